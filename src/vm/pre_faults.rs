//! Pre-faults under way, counted where a slot's change would make them hang.
//!
//! A change waits for those there are, and none begins before it is noted. It is no matter what they map.

use super::Vm;
use std::sync::atomic::Ordering;
use std::time::Duration;

impl Vm {
    /// Whether a pre-fault of any slot hangs when any slot is deleted meanwhile. Deleting a slot makes all page
    /// tables obsolete, and a pre-fault under way goes on trying with those it began with, until a signal comes
    /// (Linux 7.3 too). Where mappings are kept it is not so.
    fn has_hanging_zaps(&self) -> bool {
        !self.mappings_are_kept
    }

    /// Whether a pre-fault may begin now. If so, [`Vm::end_pre_fault`] must follow.
    pub(crate) fn begin_pre_fault(&self) -> bool {
        if !self.has_hanging_zaps() {
            return true;
        }
        let mut memory = self.memory();
        if memory.slots.is_any_changing() {
            return false;
        }
        memory.pre_faults += 1;
        true
    }

    /// A pre-fault is over.
    pub(crate) fn end_pre_fault(&self) {
        if !self.has_hanging_zaps() {
            return;
        }
        let is_awaited = {
            let mut memory = self.memory();
            memory.pre_faults -= 1;
            memory.pre_faults == 0 && memory.awaiting_pre_faults > 0
        };
        if is_awaited {
            self.pre_faults_ended.fetch_add(1, Ordering::SeqCst);
            self.kernel.wake(&self.pre_faults_ended);
        }
    }

    /// Returns once no pre-fault is under way, where one could hang on a slot's change.
    pub(super) fn await_pre_faults(&self) {
        if !self.has_hanging_zaps() {
            return;
        }
        self.memory().awaiting_pre_faults += 1;
        loop {
            let ended = self.pre_faults_ended.load(Ordering::SeqCst);
            {
                let mut memory = self.memory();
                if memory.pre_faults == 0 {
                    memory.awaiting_pre_faults -= 1;
                    return;
                }
            }
            // A signal is no reason not to wait: the slot is about to go.
            let _ = self.kernel.wait(&self.pre_faults_ended, ended, Duration::from_millis(20));
        }
    }
}
