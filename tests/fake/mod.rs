//! A kernel that is none: it keeps in two sets what would be in the page tables, and fails any call it is told to.
//!
//! It stands beneath the library's engine in tests and benchmarks, where the real one cannot be made to answer as
//! one likes. It must not be taken for a model of KVM: of the rules it knows only "what was asked for is mapped", and, where
//! it was told of the guest's [`ram`], that what is given up or converted is mapped no more.

#![allow(dead_code, reason = "each user needs a part")]

pub mod guest;
mod ram;

pub use ram::Ram;

pub mod launches;

use kvmprep::kvm::{
    Access, Errno, ExitRequest, FileId, FileKind, FileStatus, ImagePages, Kernel, Launched, MappedObject,
    Mapping, Region, Stats, Sys,
};
use kvmprep::populate::job::Options;
use kvmprep::populate::plan::Intent;
use kvmprep::range::{HUGE, PAGE, Range, RangeSet};
use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Populating as most do it.
pub const WRITE: Options = Options {
    intent: Intent::Write,
    host_only: false,
    huge_advice: false,
    require_stage2: false,
    check_free: false,
    skip_covered: false,
    dirty_logged_too: false,
    exact: false,
    for_conversion: false,
    timeout: None,
};

/// The system calls that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    CheckExtension,
    DisableQuirks,
    SetRegion,
    PreFault,
    CreateGuestMemfd,
    SetAttributes,
    CloseOnExec,
    Discard,
    Remove,
    Punch,
    Stats,
    ExitRequest,
    Populate,
    AdviseHuge,
    Allocate,
    FileKind,
    FileStatus,
    Mapping,
    Mappings,
    Resident,
    HugePages,
    Event,
    ReadFile,
    /// Not the kernel's: the VMM's function that is told of changes.
    Changed,
}

/// What a pre-fault is to answer: of this vCPU and range; `None`: as usual.
pub type Script = Box<dyn Fn(RawFd, Range) -> Option<Sys<Option<Range>>> + Send + Sync>;

/// A call about memory: its kind, the descriptor that it goes through or -1, and the memory as the call names it.
pub type Did = (Call, RawFd, Range);

/// The kernel.
pub struct Fake {
    /// All mappings, by place.
    pub mappings: Mutex<Vec<Mapping>>,
    /// Whether looking one up costs what all of them cost, as before Linux 6.11.
    pub has_no_query: bool,
    /// The content of files.
    pub files: BTreeMap<String, String>,
    /// Every open file's kind and size.
    pub file_kind: FileKind,
    pub file_status: FileStatus,
    /// Bytes in memory of whatever is mapped from a file, from its first on.
    pub cached: u64,
    /// Whether KVM_PRE_FAULT_MEMORY is claimed.
    pub has_pre_fault: bool,
    /// The most that one pre-fault does, in bytes.
    pub step: u64,
    pub script: Option<Script>,
    pub exit_requested: Arc<AtomicBool>,
    pub host: Mutex<RangeSet>,
    pub stage2: Mutex<RangeSet>,
    /// What of the guest's memory is private; KVM_CAP_MEMORY_ATTRIBUTES is claimed where `has_private`.
    pub private: Mutex<RangeSet>,
    pub has_private: bool,
    /// Each range of which KVM was told what it is, in order.
    pub told: Mutex<Vec<Range>>,
    /// What was allocated of each file and not punched out again.
    pub allocated: Mutex<BTreeMap<RawFd, RangeSet>>,
    /// A guest_memfd that can be mapped.
    pub mappable: Option<RawFd>,
    /// Memory that must not be touched any more, in gpa.
    pub forbidden: Mutex<RangeSet>,
    /// Whether forbidden memory was touched.
    pub trespassed: AtomicBool,
    /// What is asked for an initial image.
    pub launches: launches::Launches,
    failing: Mutex<Option<(Call, u32, i32)>>,
    pub calls: AtomicU64,
    /// How many of each kind.
    pub counts: Mutex<BTreeMap<Call, u32>>,
    /// Those about memory, in their order.
    pub did: Mutex<Vec<Did>>,
    /// Where the guest's memory is; empty: nobody asks.
    pub ram: Vec<Ram>,
    /// What of this process is mapped as huge pages.
    pub huge: Mutex<RangeSet>,
    /// Descriptors that are another file's by now, or nobody's.
    pub reopened: Mutex<BTreeMap<RawFd, Option<FileId>>>,
    /// The far ends of all descriptors that were handed out.
    handed_out: Mutex<Vec<UnixStream>>,
}

struct Request(Arc<AtomicBool>);

impl ExitRequest for Request {
    fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl Fake {
    /// With one mapping, private and anonymous.
    pub fn new(mapped: Range) -> Self {
        Self {
            mappings: Mutex::new(vec![Mapping {
                start: mapped.start,
                end: mapped.end,
                offset: 0,
                inode: 0,
                on_mount: false,
                readable: true,
                writable: true,
                shared: false,
                page_size: PAGE,
                object: MappedObject::Anonymous,
            }]),
            has_no_query: false,
            files: BTreeMap::new(),
            file_kind: FileKind { object: MappedObject::Shmem, page_size: PAGE },
            file_status: FileStatus { id: FileId::default(), length: u64::MAX, allocated: 0 },
            cached: u64::MAX,
            has_pre_fault: true,
            step: u64::MAX,
            script: None,
            exit_requested: Arc::default(),
            host: Mutex::default(),
            stage2: Mutex::default(),
            private: Mutex::default(),
            has_private: false,
            told: Mutex::default(),
            allocated: Mutex::default(),
            mappable: None,
            forbidden: Mutex::default(),
            trespassed: AtomicBool::new(false),
            launches: launches::Launches::default(),
            failing: Mutex::default(),
            calls: AtomicU64::new(0),
            counts: Mutex::default(),
            did: Mutex::default(),
            ram: Vec::new(),
            huge: Mutex::default(),
            reopened: Mutex::default(),
            handed_out: Mutex::default(),
        }
    }

    /// Makes the call fail once, after `after` that succeed.
    pub fn fail(&self, call: Call, after: u32, errno: i32) {
        *self.failing.lock().unwrap() = Some((call, after, errno));
    }

    /// Whether a failure that was asked for has not happened.
    pub fn is_still_to_fail(&self) -> bool {
        self.failing.lock().unwrap().is_some()
    }

    /// Makes no call fail any more.
    pub fn fail_none(&self) {
        *self.failing.lock().unwrap() = None;
    }

    /// How many of the descriptors that were handed out are open.
    pub fn open_descriptors(&self) -> usize {
        // The end of a stream whose other end is open has neither data nor an end.
        self.handed_out.lock().unwrap().iter_mut().filter_map(|far| far.read(&mut [0]).err()).count()
    }

    fn hand_out(&self) -> OwnedFd {
        let (near, far) = UnixStream::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        self.handed_out.lock().unwrap().push(far);
        near.into()
    }

    /// A call about memory comes.
    pub fn enter_memory(&self, call: Call, fd: RawFd, range: Range) -> Sys<()> {
        if !self.ram.is_empty() {
            self.did.lock().unwrap().push((call, fd, range));
        }
        self.enter(call)
    }

    fn touch(&self, gpas: Range) {
        if self.forbidden.lock().unwrap().size_within(gpas) > 0 {
            self.trespassed.store(true, Ordering::SeqCst);
        }
    }

    /// What of the guest's memory is `gpas` and private, or shared.
    fn parts(&self, gpas: Range, private: bool) -> Vec<Range> {
        let set = self.private.lock().unwrap();
        if private { set.within(gpas).collect() } else { set.missing(gpas) }
    }

    fn unmap(&self, gpas: Range) {
        self.stage2.lock().unwrap().remove(gpas);
    }

    /// Memory of this process is given up: of a pool's, whole pages. Where the mapping is of a file that is emptied, what it
    /// has of others is zeroed; where it is not, a beginning inside a page is refused.
    fn give_up(&self, hvas: Range, is_file: bool) -> Sys<()> {
        let mapping = {
            let mappings = self.mappings.lock().unwrap();
            let mapping = mappings.iter().find(|m| hvas.start < m.end).filter(|m| m.start <= hvas.start);
            *mapping.filter(|m| hvas.end <= m.end).ok_or(Errno(libc::ENOMEM))?
        };
        let page = self.pool_page(&mapping);
        if !is_file && hvas.start % page != 0 {
            return Err(Errno(libc::EINVAL));
        }
        let (start, end) = (hvas.start.next_multiple_of(page), hvas.end - hvas.end % page);
        let Some(hvas) = Range::between(start, end) else { return Ok(()) };
        self.host.lock().unwrap().remove(hvas);
        self.huge.lock().unwrap().remove(whole_frames(hvas));
        for ram in &self.ram {
            if let Some((fd, part)) = ram.in_file(hvas).filter(|_| is_file) {
                self.allocated.lock().unwrap().entry(fd).or_default().remove(part);
            }
            let gpas = ram.gpas(hvas).into_iter().flat_map(|gpas| self.parts(gpas, false));
            gpas.for_each(|shared| self.unmap(shared));
        }
        Ok(())
    }

    /// Bytes in a page of a mapping, also where it does not tell.
    fn pool_page(&self, mapping: &Mapping) -> u64 {
        if mapping.object == MappedObject::Hugetlb { HUGE } else { PAGE }
    }

    fn enter(&self, call: Call) -> Sys<()> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        *self.counts.lock().unwrap().entry(call).or_default() += 1;
        let mut failing = self.failing.lock().unwrap();
        match *failing {
            Some((which, 0, errno)) if which == call => {
                *failing = None;
                Err(Errno(errno))
            }
            Some((which, after, errno)) if which == call => {
                *failing = Some((which, after - 1, errno));
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// The frames of huge pages that have anything of `range`.
fn whole_frames(range: Range) -> Range {
    Range { start: range.start - range.start % HUGE, end: range.end.next_multiple_of(HUGE) }
}

impl Kernel for Fake {
    fn check_extension(&self, _: RawFd, capability: u32) -> Sys<u32> {
        self.enter(Call::CheckExtension)?;
        Ok(match capability {
            236 => self.has_pre_fault.into(),
            213 => u32::MAX,
            10 => 32764,
            118 => 2,
            233 if self.has_private => 8,
            233 => 0,
            // Every type of VM.
            235 if self.has_private => 0x3f,
            _ => 1,
        })
    }

    fn disable_quirks(&self, _: RawFd, _: u64) -> Sys<()> {
        self.enter(Call::DisableQuirks)
    }

    fn set_region(&self, _: RawFd, _: &Region) -> Sys<()> {
        self.enter(Call::SetRegion)
    }

    fn pre_fault(&self, vcpu: RawFd, range: Range) -> Sys<Option<Range>> {
        self.enter_memory(Call::PreFault, vcpu, range)?;
        self.touch(range);
        if let Some(answer) = self.script.as_ref().and_then(|script| script(vcpu, range)) {
            return answer;
        }
        // The script may have taken its time.
        self.touch(range);
        let done = Range { start: range.start, end: range.end.min(range.start.saturating_add(self.step)) };
        self.stage2.lock().unwrap().insert(done);
        for ram in &self.ram {
            for private in self.parts(done, true).into_iter().filter_map(|part| ram.private(part)) {
                self.allocated.lock().unwrap().entry(ram.guest_memfd.0).or_default().insert(private);
            }
            for shared in self.parts(done, false).into_iter().filter_map(|part| ram.hvas(part)) {
                self.host.lock().unwrap().insert(shared);
            }
        }
        Ok(Range::between(done.end, range.end))
    }

    fn tdx_init_mem_region(&self, vcpu: RawFd, pages: &ImagePages, flags: u32) -> Launched {
        self.launches.answer(launches::Asked::Tdx { vcpu, pages: *pages, flags })
    }

    fn snp_launch_update(&self, vm: RawFd, sev: RawFd, pages: &ImagePages, page_type: u8) -> Launched {
        self.launches.answer(launches::Asked::Snp { vm, sev, pages: *pages, page_type })
    }

    fn stats(&self, _: RawFd) -> Sys<Stats> {
        self.enter(Call::Stats)?;
        Err(Errno(libc::ENOTTY))
    }

    fn exit_request(&self, _: RawFd) -> Sys<Box<dyn ExitRequest>> {
        self.enter(Call::ExitRequest)?;
        Ok(Box::new(Request(Arc::clone(&self.exit_requested))))
    }

    fn populate(&self, hva: u64, size: u64, _: Access) -> Sys<()> {
        let range = Range::new(hva, size).unwrap();
        self.enter_memory(Call::Populate, -1, range)?;
        self.ram.iter().filter_map(|ram| ram.gpas(range)).for_each(|gpas| self.touch(gpas));
        self.host.lock().unwrap().insert(range);
        Ok(())
    }

    fn advise_huge(&self, _: u64, _: u64) -> Sys<()> {
        self.enter(Call::AdviseHuge)
    }

    fn allocate(&self, fd: RawFd, offset: u64, size: u64) -> Sys<()> {
        let range = Range::new(offset, size).unwrap();
        self.enter_memory(Call::Allocate, fd, range)?;
        self.ram.iter().filter_map(|ram| ram.gpas_of_private(fd, range)).for_each(|gpas| self.touch(gpas));
        self.allocated.lock().unwrap().entry(fd).or_default().insert(range);
        Ok(())
    }

    fn create_guest_memfd(&self, _: RawFd, _: u64, _: u64) -> Sys<OwnedFd> {
        self.enter(Call::CreateGuestMemfd)?;
        Ok(self.hand_out())
    }

    fn close_on_exec(&self, _: RawFd) -> Sys<()> {
        self.enter(Call::CloseOnExec)
    }

    fn set_attributes(&self, vm: RawFd, range: Range, attributes: u64) -> Sys<()> {
        self.enter_memory(Call::SetAttributes, vm, range)?;
        self.told.lock().unwrap().push(range);
        self.unmap(range);
        for frame in [range.start, range.end - 1].map(|gpa| whole_frames(Range { start: gpa, end: gpa + 1 }))
        {
            let huge = self.huge.lock().unwrap();
            let is_huge = |ram: &Ram| ram.hvas(frame).is_some_and(|hvas| huge.size_within(hvas) == HUGE);
            if self.parts(frame, true).is_empty() && self.ram.iter().any(is_huge) {
                self.unmap(frame);
            }
        }
        let mut private = self.private.lock().unwrap();
        if attributes != 0 {
            private.insert(range);
        } else {
            private.remove(range);
        }
        Ok(())
    }

    fn discard(&self, hva: u64, size: u64) -> Sys<()> {
        let range = Range::new(hva, size).unwrap();
        self.enter_memory(Call::Discard, -1, range)?;
        self.give_up(range, false)
    }

    fn remove(&self, hva: u64, size: u64) -> Sys<()> {
        let range = Range::new(hva, size).unwrap();
        self.enter_memory(Call::Remove, -1, range)?;
        self.give_up(range, true)
    }

    fn punch(&self, fd: RawFd, offset: u64, size: u64) -> Sys<()> {
        let range = Range::new(offset, size).unwrap();
        self.enter_memory(Call::Punch, fd, range)?;
        if self.reopened.lock().unwrap().get(&fd) == Some(&None) {
            return Err(Errno(libc::EBADF));
        }
        for ram in &self.ram {
            ram.hvas_of_file(fd, range).map_or(Ok(()), |hvas| self.give_up(hvas, true))?;
            if let Some(gpas) = ram.gpas_of_private(fd, range) {
                self.parts(gpas, true).into_iter().for_each(|private| self.unmap(private));
            }
        }
        self.allocated.lock().unwrap().entry(fd).or_default().remove(range);
        Ok(())
    }

    fn file_kind(&self, _: RawFd) -> Sys<FileKind> {
        self.enter(Call::FileKind)?;
        Ok(self.file_kind)
    }

    fn file_status(&self, fd: RawFd) -> Sys<FileStatus> {
        self.enter(Call::FileStatus)?;
        match self.reopened.lock().unwrap().get(&fd) {
            None if self.ram.is_empty() => Ok(self.file_status),
            None => Ok(FileStatus { id: FileId { device: 1, inode: fd as u64 }, ..self.file_status }),
            Some(None) => Err(Errno(libc::EBADF)),
            Some(Some(id)) => Ok(FileStatus { id: *id, ..self.file_status }),
        }
    }

    fn can_map_guest_memfd(&self, fd: RawFd) -> bool {
        self.mappable == Some(fd)
    }

    fn mapping(&self, hva: u64) -> Sys<Option<Mapping>> {
        self.enter(Call::Mapping)?;
        Ok(self.mappings.lock().unwrap().iter().find(|m| hva < m.end).copied())
    }

    fn mappings(&self) -> Sys<Option<Vec<Mapping>>> {
        if !self.has_no_query {
            return Ok(None);
        }
        self.enter(Call::Mappings)?;
        Ok(Some(self.mappings.lock().unwrap().clone()))
    }

    fn resident(&self, start: u64, end: u64) -> Sys<Option<(u64, u64)>> {
        self.enter(Call::Resident)?;
        let host = self.host.lock().unwrap();
        Ok(host.within(Range { start, end }).next().map(|run| (run.start, run.end)))
    }

    fn huge_pages(&self, start: u64, end: u64) -> Sys<Option<(u64, u64)>> {
        self.enter(Call::HugePages)?;
        let huge = self.huge.lock().unwrap();
        Ok(huge.within(Range { start, end }).next().map(|run| (run.start, run.end)))
    }

    fn cached(&self, hva: u64, size: u64) -> Sys<u64> {
        let mapping = self.mapping(hva)?.ok_or(Errno(libc::ENOMEM))?;
        Ok(self.cached.saturating_sub(hva - mapping.start).min(size))
    }

    fn file_name(&self, _: RawFd) -> Option<String> {
        None
    }

    fn read_file(&self, path: &str) -> Sys<String> {
        self.enter(Call::ReadFile)?;
        self.files.get(path).cloned().ok_or(Errno(libc::ENOENT))
    }

    fn wait(&self, _: &AtomicU32, _: u32, _: Duration) -> Sys<()> {
        if self.launches.is_interrupted.load(Ordering::SeqCst) {
            return Err(Errno(libc::EINTR));
        }
        std::thread::yield_now();
        Ok(())
    }

    fn wake(&self, _: &AtomicU32) {}

    fn event(&self) -> Sys<OwnedFd> {
        self.enter(Call::Event)?;
        Ok(self.hand_out())
    }

    fn event_add(&self, _: &OwnedFd, _: u64) -> Sys<()> {
        Ok(())
    }

    fn event_take(&self, _: &OwnedFd) -> Sys<()> {
        Ok(())
    }
}
