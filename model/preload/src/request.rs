//! A request (`ioctl`) to whatever object of the model, from the moment that it is known to be one.
//!
//! What holds for all of them is here: that a test may have one fail, that a process which was forked has no part in its parent's
//! machines, and that each can be watched. What a request does is its object's.

use crate::inside;
use crate::ioctls;
use crate::objects::Object;
use crate::say;
use crate::settings;
use crate::snp;
use crate::system;
use kvmprep_model::errno::{Errno, Result};

/// Answers a request.
pub fn answer(object: &Object, request: u32, argument: u64) -> Result<i64> {
    let answer = make(object, request, argument);
    if settings::current().is_verbose {
        let answer = match &answer {
            Ok(value) => value.to_string(),
            Err(errno) => format!("{errno:?}"),
        };
        match ioctls::name_of(request) {
            Some(name) => say::line(format_args!("{}: {name} {argument:#x} = {answer}", object.name())),
            None => say::line(format_args!("{}: {request:#x} {argument:#x} = {answer}", object.name())),
        }
    }
    answer
}

fn make(object: &Object, request: u32, argument: u64) -> Result<i64> {
    if inside::is_forked() {
        // As KVM itself says to a process whose memory is not the VM's.
        return Err(Errno::EIO);
    }
    if let Some(name) = ioctls::name_of(request) {
        settings::failure_of_ioctl(name)?;
    }
    match object {
        Object::System => system::ioctl(request, argument),
        Object::Vm(vm) => vm.ioctl(request, argument),
        Object::Vcpu(vcpu) => vcpu.ioctl(request, argument),
        Object::GuestMemfd(..) | Object::Statistics(_) => Err(Errno::ENOTTY),
        Object::Firmware => snp::firmware(request, argument),
    }
}

impl Object {
    fn name(&self) -> String {
        match self {
            Object::System => "/dev/kvm".to_owned(),
            Object::Vm(_) => "VM".to_owned(),
            Object::Vcpu(vcpu) => format!("vCPU {}", vcpu.number()),
            Object::GuestMemfd(..) => "guest_memfd".to_owned(),
            Object::Statistics(_) => "statistics".to_owned(),
            Object::Firmware => "/dev/sev".to_owned(),
        }
    }
}
