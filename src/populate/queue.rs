//! The work of one job: which memory waits for which stage, who has what in hand, what was taken away.
//!
//! Any number of threads take chunks from it. It knows ranges only: not what populating is, nor of slots. Every
//! byte is, at any time, in exactly one place: waiting for the host stage, waiting for stage 2, in hand, done,
//! or withdrawn; so nothing is lost when a thread is interrupted, and nothing is touched after a withdrawal.

use crate::kvm::{Errno, Kernel};
use crate::range::{Range, RangeSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a sleeper sleeps before it looks around for itself (cancellation, deadline).
const NAP: Duration = Duration::from_millis(20);

/// What a worker can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skill {
    /// The host stage.
    Host,
    /// Both stages.
    Both,
}

/// A chunk in a worker's hands. It goes back through [`Task::finish`]; dropped without (a panic), it goes back
/// whole.
#[must_use]
pub struct Task<'q> {
    /// The chunk.
    pub range: Range,
    /// Whether the host stage is still to be done.
    pub needs_host: bool,
    ticket: u32,
    queue: &'q Queue,
}

impl Task<'_> {
    /// Gives the task back, with what of it waits for which stage.
    pub fn finish(self, for_host: Option<Range>, for_stage2: Option<Range>) {
        self.queue.finish(self.ticket, self.range, for_host, for_stage2);
        std::mem::forget(self);
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        let (for_host, for_stage2) =
            if self.needs_host { (Some(self.range), None) } else { (None, Some(self.range)) };
        self.queue.finish(self.ticket, self.range, for_host, for_stage2);
    }
}

/// What a worker gets when it asks for work.
pub enum Claim<'q> {
    /// A chunk.
    Task(Task<'q>),
    /// Nothing now; what others have in hand may come back.
    Later(Ticket),
    /// Nothing, and nothing that could come.
    Nothing,
}

/// A moment in the queue's life: sleeping on it ends when the queue has changed since.
#[derive(Clone, Copy, Debug)]
pub struct Ticket(u32);

#[derive(Debug, Default)]
struct State {
    host: RangeSet,
    stage2: RangeSet,
    in_hand: Vec<InHand>,
    withdrawn: RangeSet,
    /// Nothing is handed out any more.
    closed: bool,
    next_ticket: u32,
}

#[derive(Debug)]
struct InHand {
    ticket: u32,
    range: Range,
    needs_host: bool,
}

/// The queue.
pub struct Queue {
    kernel: Arc<dyn Kernel>,
    state: Mutex<State>,
    /// Counts changes that a sleeper may wait for; a futex.
    changes: AtomicU32,
    sleepers: AtomicU32,
}

impl Queue {
    /// A queue of memory that waits for the host stage, and of memory that waits for stage 2 only.
    pub fn new(kernel: Arc<dyn Kernel>, host: RangeSet, stage2: RangeSet) -> Self {
        let state = State { host, stage2, in_hand: Vec::with_capacity(64), ..State::default() };
        Self { kernel, state: Mutex::new(state), changes: AtomicU32::new(0), sleepers: AtomicU32::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a chunk: `cut` says how much of a waiting range is one. Memory in `own` goes first.
    pub fn claim(&self, skill: Skill, own: &[Range], cut: impl Fn(Range) -> Range) -> Claim<'_> {
        let mut state = self.state();
        if state.closed {
            return Claim::Nothing;
        }
        // Memory whose host stage is done is warm in the cache, and somebody may be waiting for its end.
        let found = match skill {
            Skill::Both => next(&state.stage2, own)
                .map(|r| (r, false))
                .or_else(|| next(&state.host, own).map(|r| (r, true))),
            Skill::Host => next(&state.host, own).map(|r| (r, true)),
        };
        let Some((waiting, needs_host)) = found else {
            let comes_back = match skill {
                Skill::Both => !state.in_hand.is_empty(),
                Skill::Host => state.in_hand.iter().any(|t| t.needs_host),
            };
            return if comes_back { Claim::Later(self.now()) } else { Claim::Nothing };
        };
        let range = cut(waiting);
        if needs_host {
            state.host.remove(range)
        } else {
            state.stage2.remove(range)
        };
        let ticket = state.next_ticket;
        state.next_ticket = ticket.wrapping_add(1);
        state.in_hand.push(InHand { ticket, range, needs_host });
        Claim::Task(Task { range, needs_host, ticket, queue: self })
    }

    /// Takes a task back; what of it was withdrawn meanwhile does not wait.
    fn finish(&self, ticket: u32, all: Range, for_host: Option<Range>, for_stage2: Option<Range>) {
        let mut state = self.state();
        state.in_hand.retain(|t| t.ticket != ticket);
        if let Some(range) = for_host {
            state.host.insert(range);
        }
        if let Some(range) = for_stage2 {
            state.stage2.insert(range);
        }
        if (for_host.is_some() || for_stage2.is_some()) && !state.withdrawn.is_empty() {
            let gone: Vec<Range> = state.withdrawn.within(all).collect();
            for range in gone {
                state.host.remove(range);
                state.stage2.remove(range);
            }
        }
        drop(state);
        self.changed();
    }

    /// Hands out nothing from now on.
    pub fn close(&self) {
        self.state().closed = true;
        self.changed();
    }

    /// Takes memory away for good. Returns once no worker touches it.
    pub fn withdraw(&self, range: Range) {
        self.take_away(range);
        loop {
            let now = self.now();
            if !self.state().in_hand.iter().any(|t| t.range.overlaps(&range)) {
                return;
            }
            // Interrupted or not, the wait goes on: the caller is about to pull the memory away.
            let _ = self.sleep(now, NAP);
        }
    }

    /// Takes memory away for good, but for what workers have in hand now.
    pub fn take_away(&self, range: Range) {
        let mut state = self.state();
        let mut gone: Vec<Range> = state.host.within(range).chain(state.stage2.within(range)).collect();
        gone.extend(state.in_hand.iter().filter_map(|t| t.range.intersect(&range)));
        for part in gone {
            state.host.remove(part);
            state.stage2.remove(part);
            state.withdrawn.insert(part);
        }
        drop(state);
        self.changed();
    }

    /// Whether any of `range` has been withdrawn.
    pub fn is_withdrawn(&self, range: Range) -> bool {
        self.state().withdrawn.size_within(range) > 0
    }

    /// Whether nothing waits and nobody has anything in hand. Without stage 2, what waits for it does not count.
    pub fn is_done(&self, without_stage2: bool) -> bool {
        let state = self.state();
        state.host.is_empty() && (state.stage2.is_empty() || without_stage2) && state.in_hand.is_empty()
    }

    /// Whether somebody has anything in hand.
    pub fn is_in_hand(&self) -> bool {
        !self.state().in_hand.is_empty()
    }

    /// Everything that is not done: waiting, in hand, withdrawn.
    pub fn remaining(&self) -> RangeSet {
        let state = self.state();
        let mut all = state.withdrawn.clone();
        state.host.iter().chain(state.stage2.iter()).for_each(|r| all.insert(r));
        state.in_hand.iter().for_each(|t| all.insert(t.range));
        all
    }

    /// The present moment, to sleep on.
    pub fn now(&self) -> Ticket {
        Ticket(self.changes.load(Ordering::SeqCst))
    }

    /// Tells all sleepers that something has changed.
    pub fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.kernel.wake(&self.changes);
        }
    }

    /// Sleeps until the queue has changed since `then`, but never long. `EINTR` when a signal came.
    pub fn sleep(&self, then: Ticket, longest: Duration) -> Result<(), Errno> {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let result = self.kernel.wait(&self.changes, then.0, longest.min(NAP));
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        result
    }
}

/// The first waiting range, those of `own` before all others.
fn next(set: &RangeSet, own: &[Range]) -> Option<Range> {
    own.iter().find_map(|o| set.within(*o).next()).or_else(|| set.first())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Linux;
    use proptest::prelude::*;

    const ALL: Range = Range { start: 0, end: 64 };

    fn cut(waiting: Range) -> Range {
        Range { start: waiting.start, end: waiting.end.min((waiting.start / 8 + 1) * 8) }
    }

    fn queue_of_all() -> Queue {
        Queue::new(Arc::new(Linux::default()), [ALL].into_iter().collect(), RangeSet::new())
    }

    #[test]
    fn a_dropped_task_goes_back_whole() {
        let queue = queue_of_all();
        let Claim::Task(task) = queue.claim(Skill::Both, &[], cut) else { panic!("no task") };
        assert_eq!(task.range, Range { start: 0, end: 8 });
        assert!(
            matches!(queue.claim(Skill::Host, &[Range { start: 60, end: 64 }], cut), Claim::Task(t) if t.range.start == 60)
        );
        drop(task);
        assert_eq!(queue.remaining().iter().collect::<Vec<_>>(), [ALL]);
        assert!(
            matches!(queue.claim(Skill::Both, &[], cut), Claim::Task(t) if t.range.start == 0 && t.needs_host)
        );
    }

    #[test]
    fn who_can_do_nothing_waits_only_for_what_may_come() {
        let queue = Queue::new(Arc::new(Linux::default()), RangeSet::new(), [ALL].into_iter().collect());
        assert!(matches!(queue.claim(Skill::Host, &[], cut), Claim::Nothing));
        let mut tasks = Vec::new();
        while let Claim::Task(task) = queue.claim(Skill::Both, &[], cut) {
            tasks.push(task);
        }
        assert!(matches!(queue.claim(Skill::Both, &[], cut), Claim::Later(_)));
        assert!(matches!(queue.claim(Skill::Host, &[], cut), Claim::Nothing));
        tasks.into_iter().for_each(|task| task.finish(None, None));
        assert!(queue.is_done(false));
    }

    proptest! {
        /// Whatever is done, each byte is in one place, and withdrawn memory never comes back.
        #[test]
        fn every_byte_is_somewhere(ops in prop::collection::vec((0u8..6, 0u64..63, 1u64..20), 1..100)) {
            let queue = queue_of_all();
            let (mut tasks, mut done, mut withdrawn) = (Vec::new(), RangeSet::new(), RangeSet::new());
            for (op, start, size) in ops {
                match op {
                    0 | 1 => {
                        let skill = if op == 0 { Skill::Both } else { Skill::Host };
                        if let Claim::Task(task) = queue.claim(skill, &[], cut) {
                            prop_assert_eq!(withdrawn.size_within(task.range), 0);
                            tasks.push(task);
                        }
                    }
                    2..=4 => {
                        let Some(task) = tasks.pop() else { continue };
                        let range = task.range;
                        let middle = (range.start + start % range.size()).max(range.start);
                        let rest = Range::between(middle, range.end).filter(|_| op == 3);
                        done.insert(Range { start: range.start, end: rest.map_or(range.end, |r| r.start).max(range.start + 1) });
                        let rest = rest.filter(|r| r.start > range.start);
                        if op == 3 && rest.is_none() {
                            done.remove(range);
                            drop(task);
                        } else if op == 4 && task.needs_host {
                            done.remove(range);
                            task.finish(None, Some(range));
                        } else {
                            task.finish(None, rest);
                        }
                    }
                    _ => {
                        let range = Range { start, end: (start + size).min(64) };
                        queue.take_away(range);
                        let gone: Vec<_> = done.missing(range);
                        gone.into_iter().for_each(|part| withdrawn.insert(part));
                    }
                }
                let mut all = queue.remaining();
                done.iter().for_each(|range| all.insert(range));
                prop_assert_eq!(all.iter().collect::<Vec<_>>(), [ALL]);
            }
        }
    }
}
