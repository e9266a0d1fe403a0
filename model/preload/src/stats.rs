//! KVM_GET_STATS_FD: what is counted of a VM or a vCPU, as the file that the kernel makes of it.
//!
//! A header, an identifier, a descriptor for each statistic, then the values. Only what the model counts is there: a program that
//! looks for another one finds that it is missing, and is not told that it is 0.

use crate::memfd::Memfd;
use crate::objects::{self, Object};
use crate::vcpu::VcpuObject;
use crate::vm::VmObject;
use kvmprep_model::errno::Result;
use std::ffi::CString;
use std::os::fd::RawFd;
use std::sync::Arc;

/// `KVM_STATS_NAME_SIZE`.
const NAME_SIZE: usize = 48;
/// `struct kvm_stats_header` and `struct kvm_stats_desc` without its name.
const HEADER_SIZE: usize = 24;
const DESCRIPTOR_SIZE: usize = 16 + NAME_SIZE;
/// `KVM_STATS_TYPE_*`, all with `KVM_STATS_UNIT_NONE` and a base of 10.
const CUMULATIVE: u32 = 0;
const INSTANT: u32 = 1;

/// Whose statistics.
pub enum Of {
    /// A VM's.
    Vm(Arc<VmObject>),
    /// A vCPU's.
    Vcpu(Arc<VcpuObject>),
}

/// A file of statistics.
pub struct StatisticsObject {
    of: Of,
    file: Arc<Memfd>,
}

impl StatisticsObject {
    /// KVM_GET_STATS_FD: a descriptor that can be read.
    pub fn open(of: Of) -> Result<RawFd> {
        let (name, values) = (of.name(), of.values());
        let file = Arc::new(Memfd::new(&name, contents("", &values).len() as u64)?);
        let statistics = Arc::new(StatisticsObject { of, file: file.clone() });
        // For who reads by `stdio`, which is not seen.
        statistics.refresh()?;
        objects::add(file, libc::O_RDONLY | libc::O_CLOEXEC, Object::Statistics(statistics))
    }

    /// Has the file say what is counted now. To be called before it is read.
    pub fn refresh(&self) -> Result<()> {
        self.file.write(&contents(&self.of.identifier(), &self.of.values()))
    }
}

/// A statistic: its name, type and value.
type Value = (&'static str, u32, u64);

impl Of {
    fn name(&self) -> CString {
        let name = match self {
            Of::Vm(_) => "kvm-vm-stats".to_owned(),
            Of::Vcpu(vcpu) => format!("kvm-vcpu-stats:{}", vcpu.number()),
        };
        CString::new(name).expect("it has no zero in it")
    }

    fn identifier(&self) -> String {
        let pid = std::process::id();
        match self {
            Of::Vm(_) => format!("kvm-{pid}"),
            Of::Vcpu(vcpu) => format!("kvm-{pid}/vcpu-{}", vcpu.number()),
        }
    }

    fn values(&self) -> Vec<Value> {
        match self {
            Of::Vm(vm) => {
                let counted = vm.model().statistics();
                vec![
                    ("pages_4k", INSTANT, counted.pages_4k),
                    ("pages_2m", INSTANT, counted.pages_2m),
                    ("pages_1g", INSTANT, counted.pages_1g),
                ]
            }
            Of::Vcpu(vcpu) => {
                let counted = vcpu.model().statistics();
                vec![
                    ("pf_taken", CUMULATIVE, counted.pf_taken),
                    ("pf_fixed", CUMULATIVE, counted.pf_fixed),
                    ("pf_emulate", CUMULATIVE, counted.pf_emulate),
                    ("pf_spurious", CUMULATIVE, counted.pf_spurious),
                    ("pf_fast", CUMULATIVE, counted.pf_fast),
                    ("pf_mmio_spte_created", CUMULATIVE, counted.pf_mmio_spte_created),
                    ("mmio_exits", CUMULATIVE, counted.mmio_exits),
                    ("signal_exits", CUMULATIVE, counted.signal_exits),
                ]
            }
        }
    }
}

fn contents(identifier: &str, values: &[Value]) -> Vec<u8> {
    let descriptors_at = HEADER_SIZE + NAME_SIZE;
    let data_at = descriptors_at + values.len() * DESCRIPTOR_SIZE;
    let header = [0, NAME_SIZE, values.len(), HEADER_SIZE, descriptors_at, data_at];
    let mut bytes: Vec<u8> = header.iter().flat_map(|field| (*field as u32).to_le_bytes()).collect();
    bytes.extend(padded(identifier));
    for (nth, (name, kind, _)) in values.iter().enumerate() {
        // Flags, exponent, how many values, where the first is, and the size of a histogram's bucket.
        bytes.extend(kind.to_le_bytes());
        bytes.extend(0u16.to_le_bytes());
        bytes.extend(1u16.to_le_bytes());
        bytes.extend((nth as u32 * 8).to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(padded(name));
    }
    bytes.extend(values.iter().flat_map(|(_, _, value)| value.to_le_bytes()));
    bytes
}

fn padded(name: &str) -> [u8; NAME_SIZE] {
    let mut padded = [0; NAME_SIZE];
    padded[..name.len()].copy_from_slice(name.as_bytes());
    padded
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::{kvm_stats_desc, kvm_stats_header};
    use std::mem::size_of;

    #[test]
    fn the_parts_have_the_sizes_of_the_kernels() {
        assert_eq!(size_of::<kvm_stats_header>(), HEADER_SIZE);
        assert_eq!(size_of::<kvm_stats_desc>(), DESCRIPTOR_SIZE - NAME_SIZE);
        assert_eq!(
            contents("kvm-1", &[("pages_4k", INSTANT, 7)]).len(),
            HEADER_SIZE + NAME_SIZE + DESCRIPTOR_SIZE + 8
        );
    }
}
