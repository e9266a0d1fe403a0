//! Calls that stop on their way, for someone to look at what is when they have not been answered yet.
//!
//! The thread that makes such a call waits where the other side has not begun, as if that took long. It holds what it holds
//! of KVM's locks, so whoever looks must ask for none of them. Nothing is decided here.

use crate::sync::plain::{Condvar, Mutex, MutexGuard};
use std::sync::{Arc, PoisonError};
use std::thread::ThreadId;
use std::time::Duration;

/// A call that is to stop, or has. It goes on when this is dropped.
#[derive(Debug)]
pub struct Stop(Arc<Gate>);

/// Where the thread waits.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct State {
    reached_by: Option<ThreadId>,
    is_open: bool,
}

impl Stop {
    pub(super) fn new() -> (Self, Arc<Gate>) {
        let gate = Arc::<Gate>::default();
        (Stop(Arc::clone(&gate)), gate)
    }

    /// Whether the call has come, waiting that long for it.
    pub fn is_reached_within(&self, time: Duration) -> bool {
        let has_to_come = |state: &mut State| state.reached_by.is_none();
        let wait = self.0.changed.wait_timeout_while(self.0.lock(), time, has_to_come);
        wait.unwrap_or_else(PoisonError::into_inner).0.reached_by.is_some()
    }

    /// The thread whose call it was, if it has come.
    pub fn reached_by(&self) -> Option<ThreadId> {
        self.0.lock().reached_by
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.lock().is_open = true;
        self.0.changed.notify_all();
    }
}

impl Gate {
    /// The call has come; returns when it may go on.
    pub(super) fn pass(&self) {
        let mut state = self.lock();
        state.reached_by = Some(std::thread::current().id());
        self.changed.notify_all();
        let opened = self.changed.wait_while(state, |state| !state.is_open);
        drop(opened.unwrap_or_else(PoisonError::into_inner));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
