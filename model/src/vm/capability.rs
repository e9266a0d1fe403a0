//! KVM_CHECK_EXTENSION and KVM_ENABLE_CAP, on the VM's descriptor.
//!
//! Only what is said here of memory: a capability that is not is answered with 0, as one that the kernel does not have, and a
//! quirk that is not is none.

use super::{Machine, Vm};
use crate::errno::{Errno, Result};
use crate::memslot::USER_SLOTS;
use crate::personality::{Personality, VmType};
use std::sync::atomic::Ordering;

/// `KVM_X86_QUIRK_SLOT_ZAP_ALL`: deleting any slot undoes every mapping.
pub(super) const SLOT_ZAP_ALL: u64 = 1 << 7;

const CAP_NR_MEMSLOTS: u64 = 10;
const CAP_READONLY_MEM: u64 = 81;
const CAP_MULTI_ADDRESS_SPACE: u64 = 118;
const CAP_MANUAL_DIRTY_LOG_PROTECT2: u64 = 168;
const CAP_DISABLE_QUIRKS2: u64 = 213;
const CAP_USER_MEMORY2: u64 = 231;
const CAP_MEMORY_FAULT_INFO: u64 = 232;
const CAP_MEMORY_ATTRIBUTES: u64 = 233;
const CAP_GUEST_MEMFD: u64 = 234;
const CAP_VM_TYPES: u64 = 235;
const CAP_PRE_FAULT_MEMORY: u64 = 236;
const CAP_GUEST_MEMFD_FLAGS: u64 = 244;
/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE`.
pub(super) const DIRTY_LOG_ENABLED: u64 = 1 << 0;
/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE` and `KVM_DIRTY_LOG_INITIALLY_SET`.
const DIRTY_LOG_PROTECT: u64 = 3;

impl Machine {
    /// KVM_CHECK_EXTENSION of `/dev/kvm`: what some VM can have.
    pub fn check_extension(&self, capability: u64) -> i64 {
        let most_able = match capability {
            CAP_MEMORY_ATTRIBUTES | CAP_GUEST_MEMFD => VmType::SwProtected,
            _ => VmType::Default,
        };
        match capability {
            CAP_VM_TYPES => {
                VmType::ALL.iter().filter(|t| self.has_vm_type(**t)).map(|t| 1 << t.number()).sum()
            }
            _ => of_memory(&self.personality, most_able, capability),
        }
    }
}

impl Vm {
    /// KVM_CHECK_EXTENSION.
    pub fn check_extension(&self, capability: u64) -> i64 {
        of_memory(&self.personality, self.vm_type, capability)
    }

    /// KVM_ENABLE_CAP.
    pub fn enable_capability(&self, capability: u64, flags: u32, arguments: [u64; 4]) -> Result<()> {
        self.check_alive()?;
        if flags != 0 {
            return Err(Errno::EINVAL);
        }
        match capability {
            CAP_DISABLE_QUIRKS2 => self.disable_quirks(arguments[0]),
            CAP_MANUAL_DIRTY_LOG_PROTECT2 => self.set_dirty_log_protect(arguments[0]),
            _ => Err(Errno::EINVAL),
        }
    }

    fn disable_quirks(&self, quirks: u64) -> Result<()> {
        if quirks & !self.personality.memory_quirks() != 0 {
            return Err(Errno::EINVAL);
        }
        self.quirks.fetch_and(!quirks, Ordering::Relaxed);
        Ok(())
    }

    fn set_dirty_log_protect(&self, how: u64) -> Result<()> {
        let is_enabled = how & 1 != 0;
        if how & !DIRTY_LOG_PROTECT != 0 || (how != 0 && !is_enabled) {
            return Err(Errno::EINVAL);
        }
        self.dirty_log_protect.store(how, Ordering::Relaxed);
        Ok(())
    }
}

fn of_memory(personality: &Personality, vm_type: VmType, capability: u64) -> i64 {
    match capability {
        CAP_NR_MEMSLOTS => USER_SLOTS.into(),
        CAP_READONLY_MEM => personality.has_read_only_slots(vm_type).into(),
        CAP_MULTI_ADDRESS_SPACE => personality.address_spaces(vm_type) as i64,
        CAP_USER_MEMORY2 | CAP_MEMORY_FAULT_INFO => personality.has_memory_region2().into(),
        CAP_MEMORY_ATTRIBUTES => personality.memory_attributes(vm_type) as i64,
        CAP_GUEST_MEMFD => personality.takes_guest_memfd_slots(vm_type).into(),
        CAP_GUEST_MEMFD_FLAGS => personality.guest_memfd_flags(vm_type) as i64,
        CAP_VM_TYPES => {
            VmType::ALL.iter().filter(|t| personality.has_vm_type(**t)).map(|t| 1 << t.number()).sum()
        }
        CAP_DISABLE_QUIRKS2 => personality.memory_quirks() as i64,
        CAP_MANUAL_DIRTY_LOG_PROTECT2 => DIRTY_LOG_PROTECT as i64,
        CAP_PRE_FAULT_MEMORY => personality.has_pre_fault().into(),
        _ => 0,
    }
}
