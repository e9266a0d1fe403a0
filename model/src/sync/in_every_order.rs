//! Locks and atomics of loom's, which runs threads in every order that they could run in. Of a lock that is sharded it need not
//! know: what counts is who waits for whom.

use loom::sync::RwLock;
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};

pub(crate) type ReadGuard<'a> = loom::sync::RwLockReadGuard<'a, ()>;
pub(crate) type WriteGuard<'a> = loom::sync::RwLockWriteGuard<'a, ()>;

#[derive(Default)]
pub(crate) struct ReadersLock(RwLock<()>);

impl ReadersLock {
    pub(crate) fn read(&self) -> ReadGuard<'_> {
        self.0.read().expect("no thread has failed")
    }

    pub(crate) fn write(&self) -> WriteGuard<'_> {
        self.0.write().expect("no thread has failed")
    }
}
