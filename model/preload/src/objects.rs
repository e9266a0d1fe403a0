//! Which of the program's descriptors are the model's, and how long what lies behind them lives.
//!
//! An object is known by the file that stands for it ([`Memfd`]), whatever the numbers of its descriptors are. It is here as long
//! as the program has the file open, and lives on for as long as another one needs it: a VM for its vCPUs and files, as in the
//! kernel. What has gone is looked for whenever the program closes or unmaps something that may have been the last.
//!
//! The table's lock is held for a look-up and nothing else, by threads whose signals wait, and across a fork: so neither a
//! handler nor a child ever finds it held by nobody.

use crate::memfd::{self, Memfd};
use crate::stats::StatisticsObject;
use crate::vcpu::VcpuObject;
use crate::vm::VmObject;
use kvmprep_model::errno::Result;
use kvmprep_model::gmem::GuestMemfd;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_int;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What lies behind a descriptor.
#[derive(Clone)]
pub enum Object {
    /// `/dev/kvm`.
    System,
    /// A virtual machine.
    Vm(Arc<VmObject>),
    /// A vCPU.
    Vcpu(Arc<VcpuObject>),
    /// A guest_memfd, and the VM that it was made by.
    GuestMemfd(Arc<GuestMemfd>, Arc<VmObject>),
    /// `/dev/sev`: the firmware that SNP guests are launched with.
    Firmware,
    /// Statistics.
    Statistics(Arc<StatisticsObject>),
}

struct Entry {
    // Dropped first: what was made of the file goes before the file.
    object: Object,
    file: Arc<Memfd>,
}

#[derive(Default)]
struct Objects {
    by_inode: BTreeMap<u64, Entry>,
    /// Of these a descriptor was closed, but they are still open elsewhere, or mapped.
    awaited: BTreeSet<u64>,
}

static TABLE: Mutex<Objects> = Mutex::new(Objects { by_inode: BTreeMap::new(), awaited: BTreeSet::new() });
/// How many there are, for who has no time to lock.
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// How many are awaited.
static AWAITED: AtomicUsize = AtomicUsize::new(0);

/// The table while a thread has it. Not to be kept while anything is called that may look something up.
pub struct Table(MutexGuard<'static, Objects>);

/// Locks the table.
pub fn table() -> Table {
    Table(TABLE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Whether there is any object at all.
pub fn are_there_any() -> bool {
    COUNT.load(Ordering::Relaxed) != 0
}

/// Whether a descriptor may be one of the model's. Takes no lock.
pub fn may_be_ours(fd: RawFd) -> bool {
    are_there_any() && fd >= 0 && memfd::inode_of_memfd(fd).is_some()
}

/// What lies behind a descriptor, if it is one of the model's.
pub fn find(fd: RawFd) -> Option<Object> {
    if !are_there_any() {
        return None;
    }
    let inode = memfd::inode_of_memfd(fd)?;
    table().0.by_inode.get(&inode).map(|entry| entry.object.clone())
}

/// The vCPU behind a descriptor.
pub fn vcpu(fd: RawFd) -> Option<Arc<VcpuObject>> {
    match find(fd)? {
        Object::Vcpu(vcpu) => Some(vcpu),
        _ => None,
    }
}

/// The VM behind a descriptor.
pub fn vm(fd: RawFd) -> Option<Arc<VmObject>> {
    match find(fd)? {
        Object::Vm(vm) => Some(vm),
        _ => None,
    }
}

/// The guest_memfd behind a descriptor.
pub fn guest_memfd(fd: RawFd) -> Option<Arc<GuestMemfd>> {
    match find(fd)? {
        Object::GuestMemfd(file, _) => Some(file),
        _ => None,
    }
}

/// Every guest_memfd, with the model's own descriptor of it.
pub fn guest_memfds() -> Vec<(RawFd, Arc<GuestMemfd>)> {
    let table = table();
    let file_of = |entry: &Entry| match &entry.object {
        Object::GuestMemfd(file, _) => Some((entry.file.fd(), file.clone())),
        _ => None,
    };
    table.0.by_inode.values().filter_map(file_of).collect()
}

/// The model's own descriptors of all files that the program can map.
pub fn mappable() -> Vec<RawFd> {
    let table = table();
    let is_mappable = |entry: &&Entry| matches!(entry.object, Object::GuestMemfd(..) | Object::Vcpu(_));
    table.0.by_inode.values().filter(is_mappable).map(|entry| entry.file.fd()).collect()
}

/// Gives the program a descriptor for a new object, opened with these flags.
pub fn add(file: Arc<Memfd>, flags: c_int, object: Object) -> Result<RawFd> {
    let fd = file.open_for_program(flags)?;
    let mut table = table();
    table.0.by_inode.insert(file.inode(), Entry { object, file });
    COUNT.store(table.0.by_inode.len(), Ordering::Relaxed);
    Ok(fd)
}

/// A descriptor of what may be an object was closed.
pub fn closed(inode: u64) {
    let_go_of(|objects| if objects.by_inode.contains_key(&inode) { vec![inode] } else { Vec::new() });
}

/// Many descriptors were closed.
pub fn many_closed() {
    let_go_of(|objects| objects.by_inode.keys().copied().collect());
}

/// Something was unmapped.
pub fn unmapped() {
    if AWAITED.load(Ordering::Relaxed) != 0 {
        let_go_of(|objects| objects.awaited.iter().copied().collect());
    }
}

/// Lets go of what the program has no longer open, of those that it may have closed.
fn let_go_of(closed: impl FnOnce(&Objects) -> Vec<u64>) {
    let mut gone = Vec::new();
    let mut table = table();
    for inode in closed(&table.0) {
        if table.0.by_inode[&inode].file.is_open_in_program() {
            table.0.awaited.insert(inode);
        } else {
            table.0.awaited.remove(&inode);
            gone.extend(table.0.by_inode.remove(&inode));
        }
    }
    AWAITED.store(table.0.awaited.len(), Ordering::Relaxed);
    COUNT.store(table.0.by_inode.len(), Ordering::Relaxed);
    // A VM that goes takes its time, and looks up what it likes.
    drop(table);
    drop(gone);
}
