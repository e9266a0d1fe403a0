//! What KVM counts, by KVM's own names.
//!
//! A vCPU's counters are only ever added to; what a VM has mapped is counted by the MMU itself. Nothing here decides what
//! is a fault.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// The counters of one vCPU, as they are.
        #[derive(Default)]
        pub struct VcpuCounters {
            $($(#[$doc])* pub $name: Counter,)*
        }

        /// The counters of one vCPU, as they were.
        #[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
        pub struct VcpuStatistics {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl VcpuCounters {
            /// What has been counted.
            pub fn read(&self) -> VcpuStatistics {
                VcpuStatistics { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Times that the guest came out for want of a mapping, or of a permission in one.
    pf_taken,
    /// Of these, with a mapping made.
    pf_fixed,
    /// Of these, with nothing left to do.
    pf_spurious,
    /// Of these, with an instruction to be emulated.
    pf_emulate,
    /// Faults of any origin that were handled without the MMU lock.
    pf_fast,
    /// Entries made that say that there is no memory, by pre-faults too.
    pf_mmio_spte_created,
    /// Exits to the VMM because the guest accessed what is no memory.
    mmio_exits,
    /// Exits to the VMM because of a signal.
    signal_exits,
}

/// A number that only grows.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// What has been counted.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What is counted of a VM.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct VmStatistics {
    /// Leaves of 4 KiB, in all roots.
    pub pages_4k: u64,
    /// Leaves of 2 MiB.
    pub pages_2m: u64,
    /// Leaves of 1 GiB.
    pub pages_1g: u64,
}
