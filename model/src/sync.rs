//! Atomics and locks, of three kinds: the standard ones; those of loom, which runs threads in every order; and ones that
//! ThreadSanitizer can see through, since the standard library is not built for it.
//!
//! The MMU takes its own from here, which may be loom's; all else takes [`plain`] ones, which never are. Nobody here decides
//! what is locked.

#[cfg(not(tsan))]
pub(crate) mod plain {
    //! The standard locks.

    pub(crate) use std::sync::{
        Condvar, Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard,
    };
}
#[cfg(tsan)]
#[path = "sync/seen_through.rs"]
pub(crate) mod plain;
pub(crate) mod sharded;

#[cfg(not(loom))]
pub(crate) use {
    plain::{Mutex, MutexGuard},
    std::sync::atomic::{AtomicU64, Ordering},
};
#[cfg(not(loom))]
pub(crate) type ReadersLock = sharded::ShardedLock<()>;
#[cfg(not(loom))]
pub(crate) type ReadGuard<'a> = sharded::ShardedLockReadGuard<'a, ()>;
#[cfg(not(loom))]
pub(crate) type WriteGuard<'a> = sharded::ShardedLockWriteGuard<'a, ()>;

#[cfg(loom)]
mod in_every_order;
#[cfg(loom)]
pub(crate) use in_every_order::*;

/// Lets others run, who must come on before we can.
pub(crate) fn spin() {
    #[cfg(loom)]
    loom::thread::yield_now();
    #[cfg(not(loom))]
    std::hint::spin_loop();
}
