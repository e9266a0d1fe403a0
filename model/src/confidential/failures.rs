//! Failures that tests ask for: the nth call of an operation is answered with an error, without being made, or stops on its
//! way.
//!
//! An agent asks before each operation whether it is to fail. It must ask before anything has changed, and with none of its
//! own locks held, so that an operation that was made to fail is one that was never begun, and one that has stopped hinders
//! none but those who wait for it.

use super::stops::{Gate, Stop};
use crate::sync::plain::{Mutex, MutexGuard};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

/// Which calls are to fail, and how. `O` names the operations and `E` the errors.
#[derive(Debug)]
pub struct Failures<O, E> {
    /// So that nothing is locked while no test has asked for anything.
    is_armed: AtomicBool,
    planned: Mutex<Vec<Planned<O, E>>>,
}

#[derive(Debug)]
struct Planned<O, E> {
    operation: O,
    /// How many calls still succeed.
    spared: u64,
    /// How many it is then for.
    left: u64,
    fate: Fate<E>,
}

/// What becomes of a call.
#[derive(Debug)]
enum Fate<E> {
    Fails(E),
    Stops(Arc<Gate>),
}

impl<O, E> Default for Failures<O, E> {
    fn default() -> Self {
        Failures { is_armed: AtomicBool::new(false), planned: Mutex::new(Vec::new()) }
    }
}

impl<O: Copy + PartialEq, E: Copy> Failures<O, E> {
    /// The `nth` call of an operation from now on fails; the first is 1.
    pub fn fail(&self, operation: O, nth: u64, error: E) {
        self.fail_times(operation, nth, 1, error);
    }

    /// `times` calls of an operation fail, the first of them the `nth` from now on.
    pub fn fail_times(&self, operation: O, nth: u64, times: u64, error: E) {
        self.plan(operation, nth, times, Fate::Fails(error));
    }

    /// The `nth` call of an operation from now on stops, until the answer is dropped.
    pub fn stop(&self, operation: O, nth: u64) -> Stop {
        let (stop, gate) = Stop::new();
        self.plan(operation, nth, 1, Fate::Stops(gate));
        stop
    }

    fn plan(&self, operation: O, nth: u64, times: u64, fate: Fate<E>) {
        assert!(nth >= 1 && times >= 1, "calls are counted from 1");
        self.planned().push(Planned { operation, spared: nth - 1, left: times, fate });
        self.is_armed.store(true, Ordering::Release);
    }

    /// Whether everything that was asked for has happened.
    pub fn are_spent(&self) -> bool {
        self.planned().is_empty()
    }

    /// Whether something that was asked for of an operation has not happened yet.
    pub fn is_planned(&self, operation: O) -> bool {
        self.planned().iter().any(|plan| plan.operation == operation)
    }

    /// Nothing is asked for any more. Who has stopped stays where it is until it may go on.
    pub fn clear(&self) {
        let mut planned = self.planned();
        planned.clear();
        self.is_armed.store(false, Ordering::Release);
    }

    /// Asked before each call.
    pub fn check(&self, operation: O) -> Result<(), E> {
        if !self.is_armed.load(Ordering::Acquire) {
            return Ok(());
        }
        let (error, gate) = self.fate_of(operation);
        if let Some(gate) = gate {
            gate.pass();
        }
        error.map_or(Ok(()), Err)
    }

    fn fate_of(&self, operation: O) -> (Option<E>, Option<Arc<Gate>>) {
        let mut planned = self.planned();
        let (mut error, mut gate) = (None, None);
        for plan in planned.iter_mut().filter(|plan| plan.operation == operation) {
            if plan.spared > 0 {
                plan.spared -= 1;
                continue;
            }
            match &plan.fate {
                Fate::Fails(with) if error.is_none() => error = Some(*with),
                Fate::Stops(at) if gate.is_none() => gate = Some(Arc::clone(at)),
                _ => continue,
            }
            plan.left -= 1;
        }
        planned.retain(|plan| plan.left > 0);
        if planned.is_empty() {
            self.is_armed.store(false, Ordering::Release);
        }
        (error, gate)
    }

    fn planned(&self) -> MutexGuard<'_, Vec<Planned<O, E>>> {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_nth_call_of_the_named_operation_fails_and_no_other() {
        let failures = Failures::default();
        failures.fail_times('a', 2, 2, 7);
        failures.fail('b', 1, 8);
        let answers: Vec<_> = "aabaab".chars().map(|operation| failures.check(operation).err()).collect();
        assert_eq!(answers, [None, Some(7), Some(8), Some(7), None, None]);
        assert!(failures.are_spent());
    }

    #[test]
    fn what_was_asked_for_can_be_taken_back() {
        let failures = Failures::default();
        failures.fail_times('a', 1, 2, 7);
        assert_eq!(failures.check('a'), Err(7));
        failures.clear();
        assert_eq!(failures.check('a'), Ok(()));
        assert!(failures.are_spent());
    }

    #[test]
    fn a_call_that_stops_goes_on_when_it_may_and_no_sooner() {
        let failures = Failures::default();
        let stop = failures.stop('a', 2);
        failures.fail('a', 2, 7);
        assert!(!stop.is_reached_within(Duration::ZERO));
        std::thread::scope(|scope| {
            assert_eq!(failures.check('a'), Ok(()));
            let second = scope.spawn(|| failures.check('a'));
            assert!(stop.is_reached_within(Duration::from_secs(300)));
            assert_eq!(failures.check('b'), Ok(()), "others pass");
            assert_eq!(failures.check('a'), Ok(()), "the next too");
            assert_eq!(stop.reached_by(), Some(second.thread().id()));
            assert!(!second.is_finished());
            drop(stop);
            assert_eq!(second.join().unwrap(), Err(7));
        });
    }
}
