//! KVM_MEMORY_ENCRYPT_OP of an SNP guest, as the program writes it.
//!
//! The structures are read and written here; what the commands do, and in which order they are checked, is the model's. What the
//! program's structure cannot be read of is left to the model to refuse where the kernel does.

use crate::objects::{self, Object};
use crate::refuse;
use crate::system;
use crate::user;
use crate::vm::VmObject;
use kvm_bindings::*;
use kvmprep_model::confidential::{Digest, User};
use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::snp::{Call, Command, IdBlock, Init2, LaunchFinish, LaunchStart, LaunchUpdate};
use std::ffi::c_int;
use std::mem::{offset_of, size_of};

const INIT2: u32 = sev_cmd_id_KVM_SEV_INIT2;
const LAUNCH_START: u32 = sev_cmd_id_KVM_SEV_SNP_LAUNCH_START;
const LAUNCH_UPDATE: u32 = sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE;
const LAUNCH_FINISH: u32 = sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH;

/// Lets a guest ask for certificates, which no modelled guest does (`KVM_SEV_SNP_ENABLE_REQ_CERTS`).
const ENABLE_REQ_CERTS: u32 = 103;

/// `SEV_ISSUE_CMD`, the one request of `/dev/sev`, and its commands by their numbers.
const ISSUE_COMMAND: u32 = 0xc010_5300;
const FIRMWARE_COMMANDS: [&str; 13] = [
    "SEV_FACTORY_RESET",
    "SEV_PLATFORM_STATUS",
    "SEV_PEK_GEN",
    "SEV_PEK_CSR",
    "SEV_PDH_GEN",
    "SEV_PDH_CERT_EXPORT",
    "SEV_PEK_CERT_IMPORT",
    "SEV_GET_ID",
    "SEV_GET_ID2",
    "SNP_PLATFORM_STATUS",
    "SNP_COMMIT",
    "SNP_SET_CONFIG",
    "SNP_VLEK_LOAD",
];

/// How large an identity block is (`KVM_SEV_SNP_ID_BLOCK_SIZE`).
const BLOCK_SIZE: usize = 96;
/// How large the signature is that an identity block comes with.
const SIGNATURE_SIZE: usize = 4096;

/// A command of the VM.
pub fn command(vm: &VmObject, argument: u64) -> Result<()> {
    if argument == 0 {
        return vm.model().snp_command(None);
    }
    let raw: kvm_sev_cmd = user::read(argument)?;
    if raw.id == ENABLE_REQ_CERTS && system::machine().personality.snp_asks_for_certificates() {
        return Err(refuse::command("KVM_SEV_SNP_ENABLE_REQ_CERTS", "KVM_MEMORY_ENCRYPT_OP"));
    }
    let is_firmware_fd = matches!(objects::find(raw.sev_fd as c_int), Some(Object::Firmware));
    let content = Command { call: call(&raw), is_firmware_fd, error: raw.error };
    let mut command = User { content, is_readable: true, is_writable: user::is_writable(argument, &raw) };
    let answer = vm.model().snp_command(Some(&mut command));
    let Command { call, error, .. } = command.content;
    if error != raw.error {
        user::write(argument, &kvm_sev_cmd { error, ..raw })?;
    }
    if let Call::LaunchUpdate(User { content, is_readable: true, .. }) = call {
        let mut update: kvm_sev_snp_launch_update = user::read(raw.data)?;
        let after = (content.gfn_start, content.uaddr, content.len);
        if (update.gfn_start, update.uaddr, update.len) != after {
            (update.gfn_start, update.uaddr, update.len) = after;
            user::write(raw.data, &update)?;
        }
    }
    answer
}

/// A command of a vCPU: there is none.
pub fn vcpu_command() -> Result<i64> {
    Err(Errno::ENOTTY)
}

/// A request of `/dev/sev`. Nothing is modelled of the firmware but what guests are launched with.
pub fn firmware(request: u32, argument: u64) -> Result<i64> {
    if request != ISSUE_COMMAND {
        return Err(Errno::EINVAL);
    }
    let number: u32 = user::read(argument)?;
    let name = FIRMWARE_COMMANDS.get(number as usize).ok_or(Errno::EINVAL)?;
    Err(refuse::command(name, "/dev/sev"))
}

fn call(raw: &kvm_sev_cmd) -> Call {
    match raw.id {
        INIT2 => Call::Init2(at(raw.data, init2, Init2::default())),
        LAUNCH_START => Call::LaunchStart(at(raw.data, launch_start, LaunchStart::default())),
        LAUNCH_UPDATE => {
            let nothing = LaunchUpdate { gfn_start: 0, uaddr: 0, len: 0, page_type: 0, flags: 0 };
            let update = at(raw.data, launch_update, nothing);
            Call::LaunchUpdate(User {
                is_writable: update.is_readable && is_update_writable(raw.data),
                ..update
            })
        }
        LAUNCH_FINISH => Call::LaunchFinish(at(raw.data, launch_finish, LaunchFinish::default())),
        older if older < LAUNCH_START => Call::Older(older),
        other => Call::Other(other),
    }
}

/// What stands at an address, or that nothing can be read there.
fn at<T>(data: u64, read: impl FnOnce(u64) -> Result<T>, nothing: T) -> User<T> {
    read(data).map_or(User::nowhere(nothing), User::new)
}

/// The launch digest that an identity block begins with, all of which is read.
fn digest_of_block(data: u64) -> Result<Digest> {
    let block: [u8; BLOCK_SIZE] = user::read(data)?;
    Ok(std::array::from_fn(|nth| block[nth]))
}

fn init2(data: u64) -> Result<Init2> {
    let kvm_sev_init { vmsa_features, flags, ghcb_version, .. } = user::read(data)?;
    Ok(Init2 { vmsa_features, flags, ghcb_version })
}

fn launch_start(data: u64) -> Result<LaunchStart> {
    let kvm_sev_snp_launch_start { policy, flags, .. } = user::read(data)?;
    Ok(LaunchStart { policy, flags })
}

fn launch_update(data: u64) -> Result<LaunchUpdate> {
    let kvm_sev_snp_launch_update { gfn_start, uaddr, len, type_: page_type, flags, .. } = user::read(data)?;
    Ok(LaunchUpdate { gfn_start, uaddr, len, page_type, flags })
}

fn is_update_writable(data: u64) -> bool {
    user::read::<kvm_sev_snp_launch_update>(data).is_ok_and(|update| user::is_writable(data, &update))
}

fn launch_finish(data: u64) -> Result<LaunchFinish> {
    // Read as bytes: the kernel's structure ends with padding that has no name.
    let mut bytes = [0u8; size_of::<kvm_sev_snp_launch_finish>()];
    user::read_all(data, &mut bytes)?;
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|nth| bytes[at + nth]));
    let has_block = bytes[offset_of!(kvm_sev_snp_launch_finish, id_block_en)] != 0;
    let block = word(offset_of!(kvm_sev_snp_launch_finish, id_block_uaddr));
    let signature = word(offset_of!(kvm_sev_snp_launch_finish, id_auth_uaddr));
    let flags = offset_of!(kvm_sev_snp_launch_finish, flags);
    Ok(LaunchFinish {
        id_block: has_block.then(|| IdBlock {
            digest: (block != 0).then(|| at(block, digest_of_block, [0; 48])),
            signature: (signature != 0)
                .then(|| at(signature, |data| user::read_all(data, &mut [0u8; SIGNATURE_SIZE]), ())),
        }),
        flags: u16::from_le_bytes([bytes[flags], bytes[flags + 1]]),
    })
}
