//! What is not modelled: refused, and said by name.
//!
//! A request of KVM's that the model does not know is answered with ENOSYS, which no KVM answers: so a program cannot take it
//! for an older kernel's way of saying that it lacks something, and go on as if. What KVM does not have either, of that kind of
//! object, is the program's mistake, and gets the kernel's own answer. Nothing is ever pretended here.

use crate::ioctls::{self, ObjectKind};
use crate::say;
use kvmprep_model::errno::Errno;
use std::fmt;

/// Refuses a request of an object.
pub fn request(object: ObjectKind, request: u32) -> Errno {
    match ioctls::name_of(request).filter(|_| ioctls::is_of(request, object)) {
        Some(name) => {
            say::once(format!("{name} ({request:#x}) of {object} is not modelled: answered with ENOSYS"));
            Errno::ENOSYS
        }
        None => unknown(object),
    }
}

/// What the kernel answers to a request that an object does not have.
fn unknown(object: ObjectKind) -> Errno {
    match object {
        ObjectKind::Vm => Errno::ENOTTY,
        ObjectKind::System | ObjectKind::Vcpu => Errno::EINVAL,
    }
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ObjectKind::System => "/dev/kvm",
            ObjectKind::Vm => "a VM",
            ObjectKind::Vcpu => "a vCPU",
        })
    }
}

/// Refuses to enable a capability.
pub fn capability(object: &str, capability: u32) -> Errno {
    say::once(format!(
        "KVM_ENABLE_CAP of capability {capability} of {object} is not modelled: answered with EINVAL, as by a kernel without it"
    ));
    Errno::EINVAL
}

/// Refuses a command of what has several.
pub fn command(name: &str, of: &str) -> Errno {
    say::once(format!("{name} of {of} is not modelled: answered with ENOSYS"));
    Errno::ENOSYS
}
