//! KVM_GET_CLOCK and KVM_SET_CLOCK: the nanoseconds that a guest's clock shows.
//!
//! A VMM keeps it when it stops a machine, and sets it when it goes on. It runs as this machine's own does, from 0 when the VM is made.

use crate::user;
use kvm_bindings::{KVM_CLOCK_TSC_STABLE, kvm_clock_data};
use kvmprep_model::errno::{Errno, Result};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A VM's clock.
pub struct Clock {
    made: Instant,
    /// What it showed then.
    first: AtomicU64,
}

impl Clock {
    /// That of a new VM.
    pub fn new() -> Self {
        Clock { made: Instant::now(), first: AtomicU64::new(0) }
    }

    /// KVM_GET_CLOCK.
    pub fn get(&self, argument: u64) -> Result<()> {
        let clock = self.first.load(Ordering::Relaxed).wrapping_add(self.passed());
        user::write(argument, &kvm_clock_data { clock, flags: KVM_CLOCK_TSC_STABLE, ..Default::default() })
    }

    /// KVM_SET_CLOCK: to a reading alone.
    pub fn set(&self, argument: u64) -> Result<()> {
        let wanted: kvm_clock_data = user::read(argument)?;
        if wanted.flags != 0 {
            return Err(Errno::EINVAL);
        }
        self.first.store(wanted.clock.wrapping_sub(self.passed()), Ordering::Relaxed);
        Ok(())
    }

    fn passed(&self) -> u64 {
        self.made.elapsed().as_nanos() as u64
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_from_what_it_was_set_to() {
        let clock = Clock::new();
        let mut data = kvm_clock_data { clock: 1 << 40, ..Default::default() };
        let address = &raw mut data as u64;
        assert_eq!(clock.set(address), Ok(()));
        assert_eq!(clock.get(address), Ok(()));
        let shown = user::read::<kvm_clock_data>(address).expect("it is there").clock;
        assert!((1 << 40..1 << 41).contains(&shown), "{shown}");
    }
}
