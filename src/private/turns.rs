//! Who is at work on which guest memory: of those whose ranges overlap one works at a time, the others wait their turn.
//!
//! They come to it in the order in which they asked, so that nobody is kept waiting by a guest that never stops asking.
//! Whoever works is a thread that will go on by itself, so the wait has no end but that. A thread may ask for another turn
//! while it has one, as a caller's function may, and then goes before those who only wait; where that would make threads
//! wait for each other in a circle, it is told instead. It knows nothing of what is done.

use crate::range::Range;
use std::sync::PoisonError;
use std::time::Duration;

#[cfg(loom)]
use loom::{
    sync::{Condvar, Mutex, MutexGuard},
    thread::{ThreadId, current},
};
#[cfg(not(loom))]
use std::{
    sync::{Condvar, Mutex, MutexGuard},
    thread::{ThreadId, current},
};

/// How long one waits before it looks around for itself.
const NAP: Duration = Duration::from_millis(20);

/// All turns that are taken or waited for.
#[derive(Debug, Default)]
pub struct Turns {
    queue: Mutex<Queue>,
    has_moved: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// In the order in which they came.
    places: Vec<Place>,
    next_number: u64,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    number: u64,
    range: Range,
    by: ThreadId,
    /// Has the turn, and waits no more.
    works: bool,
}

/// The right to work on a range. Dropped, it is given back.
#[must_use]
#[derive(Debug)]
pub struct Turn<'a> {
    turns: &'a Turns,
    number: u64,
}

/// The calling thread would wait for itself: it has a turn that overlaps, or one that somebody waits for who has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnTurn;

/// What became of a turn that was not waited for.
#[derive(Debug)]
pub enum Try<'a> {
    /// It is taken.
    Taken(Turn<'a>),
    /// The calling thread has one that overlaps, and nobody else has.
    Own,
    /// Somebody else has.
    Busy,
    /// Somebody else has, who waits for the calling thread: it would wait for ever.
    Circle,
}

impl Turns {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody works on anything of `range`, and takes it.
    pub fn take(&self, range: Range) -> Result<Turn<'_>, OwnTurn> {
        let (mut queue, number) = self.come_first(range)?;
        queue.begin(number);
        Ok(Turn { turns: self, number })
    }

    /// Takes it, if nobody works on anything of `range` or waits to.
    pub fn try_take(&self, range: Range) -> Try<'_> {
        let (mut queue, by) = (self.queue(), current().id());
        let Ok(place) = queue.join(range, by) else {
            let place = Place { number: queue.next_number, range, by, works: false };
            return match queue.before(&place).any(|other| other.by != by) {
                false => Try::Own,
                true if queue.others_wait_for_it(&place) => Try::Circle,
                true => Try::Busy,
            };
        };
        let is_free = queue.before(&place).next().is_none();
        if is_free {
            queue.begin(place.number);
            return Try::Taken(Turn { turns: self, number: place.number });
        }
        queue.places.pop();
        Try::Busy
    }

    /// Whether the calling thread would wait for itself.
    pub fn check(&self, range: Range) -> Result<(), OwnTurn> {
        let mut queue = self.queue();
        queue.join(range, current().id())?;
        queue.places.pop();
        Ok(())
    }

    /// Whether the calling thread is at work on anything.
    pub fn is_at_work(&self) -> bool {
        self.queue().has_turn(current().id())
    }

    /// Waits until nobody works on anything of `range`; somebody may begin to at once.
    pub fn wait(&self, range: Range) -> Result<(), OwnTurn> {
        let (queue, number) = self.come_first(range)?;
        drop(queue);
        self.leave(number);
        Ok(())
    }

    /// As [`Turns::wait`], for as long as `goes_on`, which is asked now and then.
    pub fn wait_while(&self, range: Range, goes_on: impl Fn() -> bool) -> Result<(), OwnTurn> {
        let place = self.queue().join(range, current().id())?;
        while goes_on() {
            let queue = self.queue();
            if queue.before(&place).next().is_none() {
                break;
            }
            drop(self.has_moved.wait_timeout(queue, NAP));
        }
        self.leave(place.number);
        Ok(())
    }

    fn come_first(&self, range: Range) -> Result<(MutexGuard<'_, Queue>, u64), OwnTurn> {
        let mut queue = self.queue();
        let place = queue.join(range, current().id())?;
        while queue.before(&place).next().is_some() {
            queue = self.has_moved.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        Ok((queue, place.number))
    }

    fn leave(&self, number: u64) {
        self.queue().places.retain(|place| place.number != number);
        self.has_moved.notify_all();
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.leave(self.number);
    }
}

impl Queue {
    fn join(&mut self, range: Range, by: ThreadId) -> Result<Place, OwnTurn> {
        let place = Place { number: self.next_number, range, by, works: false };
        if self.has_turn(by) && self.waits_for_itself(&place) {
            return Err(OwnTurn);
        }
        self.next_number += 1;
        self.places.push(place);
        Ok(place)
    }

    fn begin(&mut self, number: u64) {
        self.places.iter_mut().filter(|place| place.number == number).for_each(|place| place.works = true);
    }

    fn has_turn(&self, by: ThreadId) -> bool {
        self.places.iter().any(|place| place.works && place.by == by)
    }

    /// Whom it waits for: who works, and who came before. Not the latter where its thread has a turn already: they may
    /// be waiting for just that.
    fn before(&self, place: &Place) -> impl Iterator<Item = &Place> {
        let (place, is_patient) = (*place, !self.has_turn(place.by));
        let is_before = move |other: &&Place| other.works || (is_patient && other.number < place.number);
        let overlapping = self.places.iter().filter(move |other| other.range.overlaps(&place.range));
        overlapping.filter(move |other| other.number != place.number).filter(is_before)
    }

    /// Whether its own thread is among those whom it waits for, or whom these wait for, and so on.
    fn waits_for_itself(&self, place: &Place) -> bool {
        self.before(place).any(|other| other.by == place.by) || self.others_wait_for_it(place)
    }

    /// Whether others whom it waits for, wait for its own thread in turn.
    fn others_wait_for_it(&self, place: &Place) -> bool {
        let (mut rest, mut known) = (vec![*place], Vec::new());
        while let Some(waiting) = rest.pop() {
            for other in self.before(&waiting) {
                if other.by == place.by {
                    if waiting.number == place.number {
                        continue;
                    }
                    return true;
                }
                if !known.contains(&other.by) {
                    known.push(other.by);
                    rest.extend(self.places.iter().filter(|theirs| theirs.by == other.by && !theirs.works));
                }
            }
        }
        false
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn r(start: u64, end: u64) -> Range {
        Range { start, end }
    }

    #[test]
    fn who_would_wait_for_itself_is_told() {
        let turns = Turns::default();
        let turn = turns.take(r(0, 8)).unwrap();
        assert_eq!(turns.take(r(7, 9)).unwrap_err(), OwnTurn);
        assert_eq!(turns.wait(r(0, 1)), Err(OwnTurn));
        let beside = turns.take(r(8, 9)).unwrap();
        drop(turn);
        drop(turns.take(r(0, 8)).unwrap());
        drop(beside);
    }

    /// Waits until `places` are taken or waited for.
    fn until(turns: &Turns, places: usize) {
        while turns.queue().places.len() < places {
            std::thread::yield_now();
        }
    }

    #[test]
    fn who_came_first_goes_first() {
        let turns = Turns::default();
        let order = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let turn = turns.take(r(0, 1)).unwrap();
            // The second could go at once, were it not behind the first.
            for (n, range) in [r(0, 2), r(1, 2), r(1, 3)].into_iter().enumerate() {
                let (turns, order) = (&turns, &order);
                scope.spawn(move || {
                    let _turn = turns.take(range).unwrap();
                    order.lock().unwrap().push(n);
                });
                until(turns, n + 2);
            }
            drop(turn);
        });
        assert_eq!(order.into_inner().unwrap(), [0, 1, 2]);
    }

    #[test]
    fn who_has_a_turn_need_not_wait_for_those_who_wait_for_it() {
        let turns = Turns::default();
        std::thread::scope(|scope| {
            let turn = turns.take(r(0, 1)).unwrap();
            scope.spawn(|| drop(turns.take(r(0, 2)).unwrap()));
            until(&turns, 2);
            drop(turns.take(r(1, 2)).unwrap());
            drop(turn);
        });
    }

    #[test]
    fn a_circle_is_told_to_who_would_close_it() {
        let turns = Turns::default();
        std::thread::scope(|scope| {
            let turn = turns.take(r(0, 1)).unwrap();
            scope.spawn(|| {
                let _turn = turns.take(r(1, 2)).unwrap();
                drop(turns.take(r(0, 1)).unwrap());
            });
            until(&turns, 3);
            assert_eq!(turns.take(r(1, 2)).unwrap_err(), OwnTurn);
            assert_eq!(turns.wait(r(1, 2)), Err(OwnTurn));
            drop(turn);
        });
    }

    #[test]
    fn overlapping_work_is_done_by_one_at_a_time() {
        let turns = Turns::default();
        let at_work: [AtomicU32; 4] = Default::default();
        std::thread::scope(|scope| {
            for first in 0..3 {
                let (turns, at_work) = (&turns, &at_work);
                scope.spawn(move || {
                    for _ in 0..1000 {
                        let _turn = turns.take(r(first, first + 2)).unwrap();
                        let mine = &at_work[first as usize..first as usize + 2];
                        mine.iter().for_each(|n| assert_eq!(n.fetch_add(1, Ordering::SeqCst), 0));
                        mine.iter().for_each(|n| assert_eq!(n.fetch_sub(1, Ordering::SeqCst), 1));
                    }
                });
            }
        });
    }
}
