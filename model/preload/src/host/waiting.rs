//! Memory that somebody else brings (userfaultfd): whoever faults there waits, and a signal ends the wait.
//!
//! The kernel lets KVM's own faults be interrupted, but not those that a process asks for. So the fault is made on a thread of
//! its own, which is left behind where a signal comes first; it ends when the page comes. Whoever faults at the same page
//! meanwhile waits for that thread, so that there is one a page however many signals come. Memory of this kind is known by the
//! ioctl that makes it so.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
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

/// A fault: of which page, and whether it writes.
type Fault = (u64, bool);

/// How a fault ended, once it has: 0, or an errno.
#[derive(Default)]
struct Underway {
    answer: Mutex<Option<i32>>,
    is_over: Condvar,
}

static UNDERWAY: Mutex<Option<HashMap<Fault, Arc<Underway>>>> = Mutex::new(None);

/// Does what may have to wait; answers with nothing if a signal came first.
pub fn until_signal(
    fault: Fault,
    fault_in: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Option<io::Result<()>> {
    let underway = match underway(fault, fault_in) {
        Ok(underway) => underway,
        Err(error) => return Some(Err(error)),
    };
    let mut answer = underway.answer.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        match *answer {
            Some(0) => return Some(Ok(())),
            Some(errno) => return Some(Err(io::Error::from_raw_os_error(errno))),
            None if signals::is_pending() => return None,
            None => {}
        }
        answer = underway.is_over.wait_timeout(answer, PATIENCE).unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// The thread that makes a fault; a new one if there is none.
fn underway(
    fault: Fault,
    fault_in: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<Arc<Underway>> {
    let mut all = UNDERWAY.lock().unwrap_or_else(PoisonError::into_inner);
    let all = all.get_or_insert_default();
    if let Some(underway) = all.get(&fault) {
        return Ok(underway.clone());
    }
    let underway = Arc::<Underway>::default();
    let told = underway.clone();
    thread::Builder::new().spawn(move || {
        let errno = fault_in().map_or_else(|error| error.raw_os_error().unwrap_or(libc::EINTR), |()| 0);
        // Who faults from now on makes a fault of its own.
        if let Some(all) = UNDERWAY.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            all.remove(&fault);
        }
        *told.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(errno);
        told.is_over.notify_all();
    })?;
    all.insert(fault, underway.clone());
    Ok(underway)
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
