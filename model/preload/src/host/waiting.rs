//! Memory that somebody else brings (userfaultfd): whoever faults there waits, and a signal ends the wait.
//!
//! The kernel lets KVM's own faults be interrupted, but not those that a process asks for. So the fault is made on a thread of
//! its own, which is left behind where a signal comes first; it ends when the page comes. Memory of this kind is known by the
//! ioctl that makes it so.

use std::io;
use std::ops::Range;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::signals;

/// How often the thread looks whether it has a signal: it holds them back, and is not woken by one.
const PATIENCE: Duration = Duration::from_millis(1);

/// Which addresses.
#[derive(Default)]
pub struct Waiting(Mutex<Vec<Range<u64>>>);

impl Waiting {
    /// Notes whether faults at these addresses wait.
    pub fn set(&self, range: Range<u64>, is_waiting: bool) {
        let mut ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let others = |one: &Range<u64>| {
            let rest = [one.start..one.end.min(range.start), one.start.max(range.end)..one.end];
            rest.into_iter().filter(|part| part.start < part.end).collect::<Vec<_>>()
        };
        *ranges = ranges.iter().flat_map(others).collect();
        if is_waiting {
            ranges.push(range);
        }
    }

    /// Whether a fault at this address does.
    pub fn is_waiting(&self, address: u64) -> bool {
        let ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.iter().any(|range| range.contains(&address))
    }
}

/// Does what may have to wait; answers with nothing if a signal came first.
pub fn until_signal(fault_in: impl FnOnce() -> io::Result<()> + Send + 'static) -> Option<io::Result<()>> {
    let (done, is_done) = channel();
    thread::spawn(move || {
        // Whoever waited may have gone.
        let _ = done.send(fault_in());
    });
    loop {
        match is_done.recv_timeout(PATIENCE) {
            Ok(answer) => return Some(answer),
            Err(RecvTimeoutError::Timeout) if signals::is_pending() => return None,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Some(Err(io::ErrorKind::Interrupted.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_wait_until_they_no_longer_do() {
        let waiting = Waiting::default();
        waiting.set(0x1000..0x5000, true);
        waiting.set(0x2000..0x3000, false);
        let waits: Vec<_> = (0..6).filter(|page| waiting.is_waiting(page * 0x1000)).collect();
        assert_eq!(waits, [1, 3, 4]);
        waiting.set(0..u64::MAX, false);
        assert!(!waiting.is_waiting(0x1000));
    }
}
