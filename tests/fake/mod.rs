//! A kernel that is none: it keeps in two sets what would be in the page tables, and fails any call it is told to.
//!
//! It stands beneath the library's engine in tests and benchmarks, where the real one cannot be made to answer as
//! one likes. It must not be taken for a model of KVM: of the rules it knows only "what was asked for is mapped".

#![allow(dead_code, reason = "each user needs a part")]

use kvmprep::kvm::{
    Access, Errno, ExitRequest, FileId, FileKind, FileStatus, Kernel, MappedObject, Mapping, Region, Stats,
    Sys,
};
use kvmprep::range::{PAGE, Range, RangeSet};
use std::collections::BTreeMap;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// The system calls that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    CheckExtension,
    DisableQuirks,
    SetRegion,
    PreFault,
    Stats,
    ExitRequest,
    Populate,
    AdviseHuge,
    Allocate,
    FileKind,
    Mapping,
    Mappings,
    Resident,
    Event,
    ReadFile,
}

/// What a pre-fault is to answer: of this vCPU and range; `None`: as usual.
pub type Script = Box<dyn Fn(RawFd, Range) -> Option<Sys<Option<Range>>> + Send + Sync>;

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
    pub exit_requested: AtomicBool,
    pub host: Mutex<RangeSet>,
    pub stage2: Mutex<RangeSet>,
    /// Memory that must not be touched any more, in gpa.
    pub forbidden: Mutex<RangeSet>,
    /// Whether forbidden memory was touched.
    pub trespassed: AtomicBool,
    failing: Mutex<Option<(Call, u32, i32)>>,
    pub calls: AtomicU64,
}

struct Request(bool);

impl ExitRequest for Request {
    fn is_set(&self) -> bool {
        self.0
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
                on_mount: false,
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
            exit_requested: AtomicBool::new(false),
            host: Mutex::default(),
            stage2: Mutex::default(),
            forbidden: Mutex::default(),
            trespassed: AtomicBool::new(false),
            failing: Mutex::default(),
            calls: AtomicU64::new(0),
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

    fn enter(&self, call: Call) -> Sys<()> {
        self.calls.fetch_add(1, Ordering::Relaxed);
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

impl Kernel for Fake {
    fn check_extension(&self, _: RawFd, capability: u32) -> Sys<u32> {
        self.enter(Call::CheckExtension)?;
        Ok(match capability {
            236 => self.has_pre_fault.into(),
            213 => u32::MAX,
            10 => 32764,
            118 => 2,
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
        self.enter(Call::PreFault)?;
        if self.forbidden.lock().unwrap().size_within(range) > 0 {
            self.trespassed.store(true, Ordering::SeqCst);
        }
        if let Some(answer) = self.script.as_ref().and_then(|script| script(vcpu, range)) {
            return answer;
        }
        let done = Range { start: range.start, end: range.end.min(range.start.saturating_add(self.step)) };
        self.stage2.lock().unwrap().insert(done);
        Ok(Range::between(done.end, range.end))
    }

    fn stats(&self, _: RawFd) -> Sys<Stats> {
        self.enter(Call::Stats)?;
        Err(Errno(libc::ENOTTY))
    }

    fn exit_request(&self, _: RawFd) -> Sys<Box<dyn ExitRequest>> {
        self.enter(Call::ExitRequest)?;
        Ok(Box::new(Request(self.exit_requested.load(Ordering::SeqCst))))
    }

    fn populate(&self, hva: u64, size: u64, _: Access) -> Sys<()> {
        self.enter(Call::Populate)?;
        self.host.lock().unwrap().insert(Range::new(hva, size).unwrap());
        Ok(())
    }

    fn advise_huge(&self, _: u64, _: u64) -> Sys<()> {
        self.enter(Call::AdviseHuge)
    }

    fn allocate(&self, _: RawFd, _: u64, _: u64) -> Sys<()> {
        self.enter(Call::Allocate)
    }

    fn file_kind(&self, _: RawFd) -> Sys<FileKind> {
        self.enter(Call::FileKind)?;
        Ok(self.file_kind)
    }

    fn file_status(&self, _: RawFd) -> Sys<FileStatus> {
        Ok(self.file_status)
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
        std::thread::yield_now();
        Ok(())
    }

    fn wake(&self, _: &AtomicU32) {}

    fn event(&self) -> Sys<OwnedFd> {
        self.enter(Call::Event)?;
        Ok(std::fs::File::open("/dev/null").unwrap().into())
    }

    fn event_add(&self, _: &OwnedFd, _: u64) -> Sys<()> {
        Ok(())
    }

    fn event_take(&self, _: &OwnedFd) -> Sys<()> {
        Ok(())
    }
}
