//! A lock for what is read on every fault and hardly ever changed: readers on several cores do not fight for one cache line.
//!
//! A reader locks one of several stripes, its own as far as they go, and whoever changes the value locks them all. The value
//! is reached through each of them, and no locked reader ever waits for another. It must never ask the standard library who
//! the thread is, nor leave it anything to do at its end: both allocate from the program's heap, and below
//! `libkvmprep-model.so` it may be a signal handler that reads, in the midst of the program's `malloc`.

use super::plain::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use crossbeam_utils::CachePadded;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};

/// How many stripes what is striped by thread has.
pub(crate) const STRIPES: usize = 8;

static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static STRIPE: usize = THREADS.fetch_add(1, Ordering::Relaxed) % STRIPES;
}

/// The calling thread's.
pub(crate) fn stripe() -> usize {
    STRIPE.with(|stripe| *stripe)
}

pub(crate) struct ShardedLock<T> {
    /// Each has the value, but while it is changed.
    stripes: [CachePadded<RwLock<Option<Arc<T>>>>; STRIPES],
}

pub(crate) struct ShardedLockReadGuard<'a, T>(RwLockReadGuard<'a, Option<Arc<T>>>);

pub(crate) struct ShardedLockWriteGuard<'a, T> {
    value: Arc<T>,
    stripes: [RwLockWriteGuard<'a, Option<Arc<T>>>; STRIPES],
}

impl<T> ShardedLock<T> {
    pub(crate) fn new(value: T) -> Self {
        let value = Arc::new(value);
        Self { stripes: std::array::from_fn(|_| CachePadded::new(RwLock::new(Some(value.clone())))) }
    }

    pub(crate) fn read(&self) -> ShardedLockReadGuard<'_, T> {
        ShardedLockReadGuard(self.stripes[stripe()].read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn write(&self) -> ShardedLockWriteGuard<'_, T> {
        let all = self.stripes.each_ref();
        let mut stripes = all.map(|stripe| stripe.write().unwrap_or_else(PoisonError::into_inner));
        // All but one are let go, so that this one may be changed.
        let value = stripes.iter_mut().filter_map(|stripe| stripe.take()).reduce(|kept, _| kept);
        ShardedLockWriteGuard { value: value.expect("every writer puts it back"), stripes }
    }
}

impl<T: Default> Default for ShardedLock<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> Deref for ShardedLockReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_deref().expect("every writer puts it back")
    }
}

impl<T> Deref for ShardedLockWriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for ShardedLockWriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        Arc::get_mut(&mut self.value).expect("no stripe has it")
    }
}

impl<T> Drop for ShardedLockWriteGuard<'_, T> {
    fn drop(&mut self) {
        for stripe in &mut self.stripes {
            **stripe = Some(self.value.clone());
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn what_one_thread_changes_all_others_read() {
        let lock = ShardedLock::new(vec![0u64; 2]);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    (0..1000).for_each(|_| lock.write().iter_mut().for_each(|number| *number += 1))
                });
            }
            for _ in 0..2 * STRIPES {
                scope.spawn(|| {
                    let mut last = 0;
                    while last < 2000 {
                        let numbers = lock.read();
                        assert_eq!(numbers[0], numbers[1], "half a change is seen");
                        assert!(numbers[0] >= last, "a change is taken back");
                        last = numbers[0];
                    }
                });
            }
        });
    }

    #[test]
    fn a_thread_that_fails_takes_nothing_with_it() {
        let lock = ShardedLock::new(1);
        let failed = std::thread::scope(|scope| {
            let failing = scope.spawn(|| {
                *lock.write() += 1;
                let _held = lock.write();
                panic!("as it is meant to");
            });
            failing.join().is_err()
        });
        assert!(failed);
        assert_eq!(*lock.read(), 2);
    }
}
