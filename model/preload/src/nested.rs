//! KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE: a guest that the guest runs, as KVM has it on AMD's processors, whatever
//! processor the model is on.
//!
//! All that counts of it is that it is there and whether it has page tables of its own; the rest is kept and given back. The
//! checks are KVM's, in its order (`svm_set_nested_state`). Nothing of it is ever executed.

use crate::user;
use kvm_bindings::*;
use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::vm::{Nested, Vcpu};
use std::mem::size_of;

const HEADER: usize = size_of::<kvm_nested_state>();
/// The block that describes the guest (AMD64 manual, volume 2, appendix B), and what counts of it.
const BLOCK: usize = KVM_STATE_NESTED_SVM_VMCB_SIZE as usize;
const INTERCEPTS: usize = 0x10;
const INTERCEPT_VMRUN: u64 = 1;
const ASID: usize = 0x58;
const PAGING: usize = 0x90;
const NESTED_PAGING: u64 = 1;
const EFER: usize = 0x4d0;
const CR0: usize = 0x558;
const CR0_PE_PG: u64 = 1 << 31 | 1;
const EFER_SVME: u64 = 1 << 12;

const KNOWN: u32 = KVM_STATE_NESTED_GUEST_MODE
    | KVM_STATE_NESTED_RUN_PENDING
    | KVM_STATE_NESTED_EVMCS
    | KVM_STATE_NESTED_MTF_PENDING
    | KVM_STATE_NESTED_GIF_SET;
const KNOWN_TO_AMD: u32 =
    KVM_STATE_NESTED_GUEST_MODE | KVM_STATE_NESTED_RUN_PENDING | KVM_STATE_NESTED_GIF_SET;
/// Where the block's own place stands in the header.
const BLOCK_AT: u64 = 8;

/// How much there is to get at most (`KVM_CAP_NESTED_STATE`).
pub const MOST: usize = HEADER + BLOCK;

/// What was set of a nested guest, and where its guest has it.
#[derive(Default)]
pub struct Kept {
    block: Vec<u8>,
    at: u64,
}

impl Kept {
    /// KVM_GET_NESTED_STATE.
    pub fn get(&self, vcpu: &Vcpu, argument: u64) -> Result<()> {
        let room = user::read::<u32>(argument.wrapping_add(4))? as usize;
        let is_there = vcpu.nested().is_some();
        let size = if is_there { MOST } else { HEADER };
        if room < size {
            user::write(argument + 4, &(size as u32))?;
            return Err(Errno::E2BIG);
        }
        let flags = KVM_STATE_NESTED_GIF_SET | if is_there { KVM_STATE_NESTED_GUEST_MODE } else { 0 };
        let mut header = [0u8; HEADER];
        header[..4].copy_from_slice(&(flags | KVM_STATE_NESTED_FORMAT_SVM << 16).to_le_bytes());
        header[4..8].copy_from_slice(&(size as u32).to_le_bytes());
        header[8..16].copy_from_slice(&(if is_there { self.at } else { 0 }).to_le_bytes());
        user::write_all(argument, &header)?;
        if is_there {
            user::write_all(argument + HEADER as u64, &self.block)?;
        }
        Ok(())
    }

    /// KVM_SET_NESTED_STATE, of a vCPU with this EFER.
    pub fn set(&mut self, vcpu: &Vcpu, efer: u64, argument: u64) -> Result<()> {
        let [flags_and_format, size] = [user::read::<u32>(argument)?, user::read::<u32>(argument + 4)?];
        let (flags, format) = (flags_and_format & 0xffff, flags_and_format >> 16);
        let is_there = flags & KVM_STATE_NESTED_GUEST_MODE != 0;
        let is_pending = flags & KVM_STATE_NESTED_RUN_PENDING != 0;
        let is_allowed = efer & EFER_SVME != 0 || flags & !KVM_STATE_NESTED_GIF_SET == 0;
        let is_sane = size as usize >= HEADER && flags & !KNOWN == 0 && (is_there || !is_pending);
        if !is_sane || format != KVM_STATE_NESTED_FORMAT_SVM || flags & !KNOWN_TO_AMD != 0 || !is_allowed {
            return Err(Errno::EINVAL);
        }
        if !is_there {
            return vcpu.set_nested(None);
        }
        let at = user::read::<u64>(argument + BLOCK_AT)?;
        if at % 4096 != 0 || (size as usize) < MOST {
            return Err(Errno::EINVAL);
        }
        let mut block = vec![0; BLOCK];
        user::read_all(argument + HEADER as u64, &mut block)?;
        vcpu.set_nested(Some(nested(&block).ok_or(Errno::EINVAL)?))?;
        *self = Kept { block, at };
        Ok(())
    }
}

/// What a block describes, if it describes a guest.
fn nested(block: &[u8]) -> Option<Nested> {
    let word = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().expect("eight bytes"));
    let has = |at, bits| word(at) & bits == bits;
    let is_one = has(INTERCEPTS, INTERCEPT_VMRUN)
        && word(ASID) as u32 != 0
        && has(CR0, CR0_PE_PG)
        && has(EFER, EFER_SVME);
    let nested = if has(PAGING, NESTED_PAGING) { Nested::WithTables } else { Nested::WithoutTables };
    is_one.then_some(nested)
}
