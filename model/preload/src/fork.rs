//! What becomes of the model when the program forks.
//!
//! The parent's machines are the parent's: KVM belongs to one process's memory, and so does the model. The child keeps descriptors
//! that answer EIO, and otherwise goes straight to the C library, whatever locks other threads of the parent held. What the fork
//! itself does to mapped memory (pages that could be written are shared from then on) is told to the VMs like any other change.

use crate::heap;
use crate::host;
use crate::inside;
use crate::objects::{self, Table};
use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::sync::Once;

/// What the thread that forks holds meanwhile.
struct Held(UnsafeCell<Option<(heap::Held, Table, libc::sigset_t)>>);

// SAFETY: only a thread that has the table's lock touches it, and the child's one thread.
unsafe impl Sync for Held {}

static HELD: Held = Held(UnsafeCell::new(None));

/// Has the C library call us around each fork. To be called before there is an object.
pub fn watch() {
    static WATCHED: Once = Once::new();
    WATCHED.call_once(|| {
        // SAFETY: the functions may be called at any time.
        unsafe { libc::pthread_atfork(Some(prepare), Some(in_parent), Some(in_child)) };
    });
}

unsafe extern "C" fn prepare() {
    if inside::is_forked() {
        return;
    }
    let before = block_signals();
    {
        let _inside = inside::enter();
        host::process().forking();
    }
    let table = objects::table();
    // SAFETY: the table's lock was just taken.
    unsafe { *HELD.0.get() = Some((heap::hold(), table, before)) };
}

unsafe extern "C" fn in_parent() {
    if inside::is_forked() {
        return;
    }
    let before = let_go();
    {
        let _inside = inside::enter();
        host::process().forked();
    }
    restore_signals(before);
}

unsafe extern "C" fn in_child() {
    if inside::is_forked() {
        return;
    }
    inside::set_forked();
    restore_signals(let_go());
}

fn let_go() -> Option<libc::sigset_t> {
    // SAFETY: this thread took the table's lock, or is the child's copy of the one that did.
    let (heap, table, before) = unsafe { (*HELD.0.get()).take() }?;
    drop(heap);
    drop(table);
    Some(before)
}

fn block_signals() -> libc::sigset_t {
    let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: there is room for what is written, and it is read after it was written.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
        before.assume_init()
    }
}

fn restore_signals(before: Option<libc::sigset_t>) {
    if let Some(before) = before {
        // SAFETY: it is a mask that was in force.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
    }
}
