//! Locks with the standard ones' names and ways, made of ones that are built with the rest and so are instrumented.
//!
//! What a thread that waits does within the standard library's locks ThreadSanitizer does not see: each lock that is fought
//! for looks to it like none, and what it guards like a race. These are for it alone. They are not poisoned by a thread that
//! fails, which ends the test anyhow.

use parking_lot::WaitTimeoutResult;
pub(crate) use parking_lot::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};
use std::sync::LockResult;
use std::time::Duration;

/// `std::sync::Mutex`.
#[derive(Default, Debug)]
pub(crate) struct Mutex<T>(parking_lot::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(parking_lot::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        Ok(self.0.lock())
    }
}

/// `std::sync::RwLock`.
#[derive(Default, Debug)]
pub(crate) struct RwLock<T>(parking_lot::RwLock<T>);

impl<T> RwLock<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(parking_lot::RwLock::new(value))
    }

    pub(crate) fn read(&self) -> LockResult<RwLockReadGuard<'_, T>> {
        Ok(self.0.read())
    }

    pub(crate) fn write(&self) -> LockResult<RwLockWriteGuard<'_, T>> {
        Ok(self.0.write())
    }
}

/// `std::sync::Condvar`.
#[derive(Default, Debug)]
pub(crate) struct Condvar(parking_lot::Condvar);

impl Condvar {
    pub(crate) const fn new() -> Self {
        Self(parking_lot::Condvar::new())
    }

    pub(crate) fn wait<'a, T>(&self, mut guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        self.0.wait(&mut guard);
        Ok(guard)
    }

    pub(crate) fn wait_while<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        has_to_wait: impl FnMut(&mut T) -> bool,
    ) -> LockResult<MutexGuard<'a, T>> {
        self.0.wait_while(&mut guard, has_to_wait);
        Ok(guard)
    }

    pub(crate) fn wait_timeout_while<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        time: Duration,
        has_to_wait: impl FnMut(&mut T) -> bool,
    ) -> LockResult<(MutexGuard<'a, T>, WaitTimeoutResult)> {
        let result = self.0.wait_while_for(&mut guard, has_to_wait, time);
        Ok((guard, result))
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// `std::sync::OnceLock`.
#[derive(Debug)]
pub(crate) struct OnceLock<T>(once_cell::sync::OnceCell<T>);

impl<T> OnceLock<T> {
    pub(crate) const fn new() -> Self {
        Self(once_cell::sync::OnceCell::new())
    }

    pub(crate) fn get(&self) -> Option<&T> {
        self.0.get()
    }

    pub(crate) fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
        self.0.get_or_init(make)
    }
}
