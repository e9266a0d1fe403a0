//! The initial image on a kernel that answers as TDX and SNP would: each errno and each partial progress that Linux's two
//! calls can give (7.3's, and what older releases add), held against what the caller is told.
//!
//! The exchanges are written after the kernel's source, for want of the hardware. Each is a row of a table that the test
//! prints (`cargo test --test launch -- --nocapture`); the calls go through the C functions.

mod fake;

use fake::launches::{Answer, Asked};
use fake::{Call, Fake, WRITE};
use kvmprep::abi::{
    KVMPREP_SNP_PAGE_CPUID, KVMPREP_SNP_PAGE_NORMAL, KVMPREP_SNP_PAGE_ZERO, KVMPREP_TDX_MEASURE,
    kvmprep_error, kvmprep_private_check_claims, kvmprep_private_claim, kvmprep_private_note_sealed,
    kvmprep_private_unclaim, kvmprep_range, kvmprep_snp_launch_update, kvmprep_tdx_init_mem_region,
    kvmprep_vm,
};
use kvmprep::error::{Reason, Stage};
use kvmprep::kvm::{ImagePages, MEM_GUEST_MEMFD, Mapping, Region};
use kvmprep::memslot::{Memslot, Nature};
use kvmprep::populate::job::{Job, Options};
use kvmprep::private::launch::Way;
use kvmprep::private::visibility::Visibility;
use kvmprep::range::{PAGE, Range};
use kvmprep::vm::{Config, Vm};
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const GPA: u64 = 1 << 32;
const VM: c_int = 3;
const VCPU: c_int = 5;
const SEV: c_int = 7;
const TDX_VM: u32 = 5;
const SNP_VM: u32 = 4;
/// Two memslots with guest_memfd, of 8 pages each, private; then 8 pages of one that is not private, and a memslot without.
const IMAGE: Range = Range { start: GPA, end: GPA + 16 * PAGE };
const SHARED_BIT: u64 = 1 << 47;

/// Content for a whole image, that the firmware may write to.
#[repr(C, align(4096))]
struct Source([u8; 16 * PAGE as usize]);

struct World {
    kernel: Arc<Fake>,
    vm: Arc<Vm>,
    handle: kvmprep_vm,
    source: Box<Source>,
}

fn pages(first: u64, end: u64) -> Range {
    Range { start: GPA + first * PAGE, end: GPA + end * PAGE }
}

fn in_c(range: Range) -> kvmprep_range {
    kvmprep_range { gpa: range.start, size: range.size(), reserved: [0; 2] }
}

fn slot(id: u32, range: Range, flags: u32) -> Memslot {
    Memslot {
        region: Region {
            slot: id,
            flags,
            gpa: range.start,
            size: range.size(),
            hva: range.start,
            guest_memfd: if flags & MEM_GUEST_MEMFD != 0 { 20 + id as c_int } else { -1 },
            guest_memfd_offset: 0,
        },
        backing: None,
        file: None,
        nature: Nature::default(),
    }
}

impl World {
    fn new(vm_type: u32) -> Self {
        let mut source = Box::new(Source([0; 16 * PAGE as usize]));
        let start = source.0.as_mut_ptr() as u64;
        let mut kernel = Fake::new(Range { start, end: start + IMAGE.size() });
        kernel.has_private = true;
        let mut mappings = kernel.mappings.lock().unwrap();
        let memory = Mapping { start: pages(0, 32).start, end: pages(0, 32).end, ..mappings[0] };
        mappings.insert(0, memory);
        drop(mappings);
        let kernel = Arc::new(kernel);
        let config = Config {
            vm_fd: VM,
            gpa_bits: Some(48),
            vm_type,
            gpa_shared_bit: SHARED_BIT,
            ..Config::default()
        };
        let vm = Arc::new(Vm::new(kernel.clone(), config).unwrap());
        vm.set_memslots(&[
            slot(1, pages(0, 8), MEM_GUEST_MEMFD),
            slot(2, pages(8, 24), MEM_GUEST_MEMFD),
            slot(3, pages(24, 32), 0),
        ])
        .unwrap();
        vm.note_visibility(IMAGE, Visibility::Private).unwrap();
        Self { kernel, handle: vm.clone().into(), vm, source }
    }

    fn source(&mut self) -> *mut c_void {
        self.source.0.as_mut_ptr().cast()
    }

    /// Runs a C function that has an error as its last parameter.
    fn call(
        &mut self,
        function: impl FnOnce(*mut kvmprep_vm, *mut kvmprep_error) -> c_int,
    ) -> (c_int, kvmprep_error) {
        let mut err = MaybeUninit::uninit();
        let code = function(&mut self.handle, err.as_mut_ptr());
        // SAFETY: written on every return.
        let err = unsafe { err.assume_init() };
        assert_eq!(err.code, code.min(0));
        (code, err)
    }

    fn claim(&mut self, range: Range) -> (c_int, kvmprep_error) {
        // SAFETY: all are live.
        self.call(|vm, err| unsafe { kvmprep_private_claim(vm, &in_c(range), err) })
    }

    fn unclaim(&mut self, range: Range) -> (c_int, kvmprep_error) {
        // SAFETY: all are live.
        self.call(|vm, err| unsafe { kvmprep_private_unclaim(vm, &in_c(range), err) })
    }

    fn check_claims(&mut self, ranges: &[Range]) -> (c_int, kvmprep_error) {
        let ranges: Vec<kvmprep_range> = ranges.iter().map(|range| in_c(*range)).collect();
        // SAFETY: all are live.
        self.call(|vm, err| unsafe { kvmprep_private_check_claims(vm, ranges.as_ptr(), ranges.len(), err) })
    }

    fn note_sealed(&mut self) {
        // SAFETY: all are live.
        assert_eq!(self.call(|vm, err| unsafe { kvmprep_private_note_sealed(vm, err) }).0, 0);
    }

    /// Which pages of `range` are claimed.
    fn claimed(&mut self, range: Range) -> Vec<u64> {
        let all = (range.start / PAGE..range.end / PAGE)
            .map(|page| Range { start: page * PAGE, end: (page + 1) * PAGE });
        let is_claimed = |page: &Range| self.check_claims(&[*page]).1.reason == Reason::Claimed as u32;
        all.filter(is_claimed).map(|page| (page.start - GPA) / PAGE).collect()
    }

    /// One of the launches, with its answers.
    fn launch(&mut self, launch: &Launch, range: Range, answers: &[Answer]) -> Told {
        *self.kernel.launches.answers.lock().unwrap() = answers.iter().copied().collect();
        self.kernel.launches.asked.lock().unwrap().clear();
        let source = self.source();
        let mut remaining = kvmprep_range { gpa: 1, size: 1, reserved: [1; 2] };
        let (range, rest) = (in_c(range), &raw mut remaining);
        let launch = *launch;
        let (code, err) = self.call(|vm, err| {
            // SAFETY: all are live, and the source is as large as any range that a test passes.
            unsafe {
                match launch {
                    Launch::Tdx => {
                        kvmprep_tdx_init_mem_region(vm, VCPU, &range, source, KVMPREP_TDX_MEASURE, rest, err)
                    }
                    Launch::Snp(KVMPREP_SNP_PAGE_ZERO) => kvmprep_snp_launch_update(
                        vm,
                        SEV,
                        &range,
                        std::ptr::null_mut(),
                        KVMPREP_SNP_PAGE_ZERO,
                        rest,
                        err,
                    ),
                    Launch::Snp(page_type) => {
                        kvmprep_snp_launch_update(vm, SEV, &range, source, page_type, rest, err)
                    }
                }
            }
        });
        Told { code, err, remaining }
    }

    /// What the kernel was asked for, in pages.
    fn asked(&self) -> Vec<(u64, u64)> {
        let asked = self.kernel.launches.asked.lock().unwrap();
        let ranges = asked.iter().map(|asked| asked.pages().range);
        ranges.map(|range| ((range.start - GPA) / PAGE, (range.end - GPA) / PAGE)).collect()
    }
}

#[derive(Clone, Copy, Debug)]
enum Launch {
    Tdx,
    Snp(u32),
}

impl Launch {
    fn vm_type(self) -> u32 {
        if matches!(self, Launch::Tdx) { TDX_VM } else { SNP_VM }
    }
}

struct Told {
    code: c_int,
    err: kvmprep_error,
    remaining: kvmprep_range,
}

fn text(buffer: &[std::ffi::c_char]) -> String {
    let bytes = buffer.iter().map(|c| *c as u8).take_while(|byte| *byte != 0);
    String::from_utf8(bytes.collect()).unwrap()
}

fn reason(number: u32) -> &'static str {
    Reason::ALL[number as usize].name().to_str().unwrap()
}

/// What else is so, beside the answers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Circumstance {
    None,
    VmDead,
    SourceUnmapped,
    SourceReadOnly,
    SourceUnreadable,
    /// Comes while the library waits to try again.
    Signal,
}

/// A row: four pages, from the first of the guest's on, are to be added.
struct Row {
    launch: Launch,
    what: &'static str,
    answers: Vec<Answer>,
    and: Circumstance,
    code: c_int,
    reason: Reason,
    /// Pages left; they are what is not claimed afterwards, but where `claimed` says otherwise.
    left: u64,
    claimed: Option<u64>,
    calls: usize,
    /// Words of the message.
    says: &'static str,
}

const ASKED: u64 = 4;

const fn done(taken: u64) -> Answer {
    Answer { taken, errno: 0, firmware: 0, correction: None }
}

const fn fails(taken: u64, errno: i32) -> Answer {
    Answer { taken, errno, firmware: 0, correction: None }
}

const fn refuses(firmware: u64) -> Answer {
    Answer { taken: 0, errno: libc::EIO, firmware, correction: None }
}

impl Row {
    fn new(
        launch: Launch,
        what: &'static str,
        answers: &[Answer],
        code: c_int,
        reason: Reason,
        left: u64,
    ) -> Self {
        let answers = answers.to_vec();
        let calls = answers.len();
        Self {
            launch,
            what,
            answers,
            and: Circumstance::None,
            code: -code,
            reason,
            left,
            claimed: None,
            calls,
            says: "",
        }
    }

    fn and(self, and: Circumstance) -> Self {
        Self { and, ..self }
    }

    fn says(self, says: &'static str) -> Self {
        Self { says, ..self }
    }

    fn calls(self, calls: usize) -> Self {
        Self { calls, ..self }
    }

    fn claimed(self, pages: u64) -> Self {
        Self { claimed: Some(pages), ..self }
    }

    /// The exchange in a few words.
    fn exchange(&self) -> String {
        let each = self.answers.iter().map(|answer| {
            let said = match answer.errno {
                0 => "0".to_owned(),
                errno => errno_name(errno).to_owned(),
            };
            let firmware =
                if answer.firmware == 0 { String::new() } else { format!(" fw {:#x}", answer.firmware) };
            format!("{}p {said}{firmware}", answer.taken)
        });
        let more = if self.calls > self.answers.len() { ", …" } else { "" };
        each.collect::<Vec<_>>().join(", ") + more
    }

    fn check(&self) {
        let mut world = World::new(self.launch.vm_type());
        match self.and {
            Circumstance::None => {}
            Circumstance::VmDead => world.kernel.fail(Call::CheckExtension, 0, libc::EIO),
            Circumstance::Signal => world.kernel.launches.is_interrupted.store(true, Ordering::SeqCst),
            Circumstance::SourceUnmapped => world.kernel.mappings.lock().unwrap().clear(),
            Circumstance::SourceUnreadable => world.kernel.mappings.lock().unwrap()[1].readable = false,
            Circumstance::SourceReadOnly => world.kernel.mappings.lock().unwrap()[1].writable = false,
        }
        let Told { code, err, remaining } = world.launch(&self.launch, pages(0, ASKED), &self.answers);
        let claimed = world.claimed(IMAGE);
        let calls = world.asked();
        println!(
            "{:12} {:54} {:29} {:>9} {:17} {:>4} {:>7} {:>5}  {}",
            match self.launch {
                Launch::Tdx => "TDX".to_owned(),
                Launch::Snp(page_type) => format!("SNP type {page_type}"),
            },
            self.what,
            self.exchange(),
            if code == 0 { "0".to_owned() } else { errno_name(-code).to_owned() },
            reason(err.reason),
            remaining.size / PAGE,
            claimed.len(),
            calls.len(),
            text(&err.message),
        );
        let what = self.what;
        assert_eq!((code, reason(err.reason)), (self.code, reason(self.reason as u32)), "{what}");
        let rest = Range { start: pages(0, ASKED - self.left).end, end: pages(0, ASKED).end };
        assert_eq!(
            (remaining.gpa, remaining.size, remaining.reserved),
            (rest.start, self.left * PAGE, [0; 2]),
            "{what}"
        );
        assert_eq!(
            claimed,
            (0..self.claimed.unwrap_or(ASKED - self.left)).collect::<Vec<_>>(),
            "{what}: claims"
        );
        assert_eq!(calls.len(), self.calls, "{what}: {calls:?}");
        assert!(!world.kernel.is_still_to_fail(), "{what}: KVM was not asked whether the VM is dead");
        let firmware = self.answers.last().map_or(0, |answer| answer.firmware);
        assert_eq!(err.firmware_error, if firmware == 0xffff_ffff { 0 } else { firmware }, "{what}");
        if code != 0 {
            assert_eq!(
                (err.stage, err.gpa, err.size),
                (Stage::Launch as u32, rest.start, rest.size()),
                "{what}"
            );
            assert!(!text(&err.message).is_empty() && !text(&err.hint).is_empty(), "{what}: no word of help");
            assert!(text(&err.message).contains(self.says), "{what}: {}", text(&err.message));
            assert!(text(&err.message).len() < 255 && text(&err.hint).len() < 255, "{what}: cut");
        }
    }
}

fn errno_name(errno: i32) -> &'static str {
    match errno {
        libc::EPERM => "EPERM",
        libc::EINTR => "EINTR",
        libc::EIO => "EIO",
        libc::EBADF => "EBADF",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EFAULT => "EFAULT",
        libc::EBUSY => "EBUSY",
        libc::EEXIST => "EEXIST",
        libc::EINVAL => "EINVAL",
        libc::ENOTTY => "ENOTTY",
        libc::ENOSPC => "ENOSPC",
        libc::EPROTO => "EPROTO",
        libc::EHWPOISON => "EHWPOISON",
        _ => "?",
    }
}

fn heading() {
    println!(
        "\n{:12} {:54} {:29} {:>9} {:17} {:>4} {:>7} {:>5}  message",
        "4 pages by",
        "the kernel's side",
        "answers: pages, errno",
        "told",
        "reason",
        "left",
        "claimed",
        "calls"
    );
}

/// How often the library tries where the kernel neither gets on nor fails.
const PATIENCE: usize = 200;

#[test]
fn each_answer_of_tdx_s_call_is_understood() {
    let row = |what, answers: &[Answer], code, reason, left| {
        Row::new(Launch::Tdx, what, answers, code, reason, left)
    };
    let rows = [
        row("all at once", &[done(4)], 0, Reason::None, 0),
        row("piece by piece", &[done(1), done(2), done(1)], 0, Reason::None, 0),
        row(
            "no TD vCPU, or not initialised; finalised",
            &[fails(0, libc::EINVAL)],
            libc::EINVAL,
            Reason::KernelRefused,
            4,
        )
        .says("is not initialised"),
        row(
            "the attribute is not private there, no guest_memfd",
            &[fails(2, libc::EINVAL)],
            libc::EINVAL,
            Reason::KernelRefused,
            2,
        )
        .says("0x100002000: it is not private"),
        row(
            "killed while it waits for the locks",
            &[fails(0, libc::EINTR)],
            libc::EINTR,
            Reason::Interrupted,
            4,
        ),
        row("a signal between two pages", &[fails(2, libc::EINTR)], libc::EINTR, Reason::Interrupted, 2),
        row("a signal later", &[done(1), fails(1, libc::EINTR)], libc::EINTR, Reason::Interrupted, 2),
        row("the source is not mapped", &[fails(1, libc::EFAULT)], libc::EFAULT, Reason::NoHostMapping, 3)
            .and(Circumstance::SourceUnmapped),
        row("the guest_memfd is closed", &[fails(1, libc::EFAULT)], libc::EFAULT, Reason::NoHostMapping, 3),
        row("broken memory", &[fails(3, libc::EHWPOISON)], libc::EHWPOISON, Reason::Poisoned, 1),
        row("no memory", &[fails(0, libc::ENOMEM)], libc::ENOMEM, Reason::MemoryShortage, 4),
        row("no room in the cgroup", &[fails(1, libc::ENOSPC)], libc::ENOMEM, Reason::MemoryShortage, 3),
        row("the page is there already", &[fails(2, libc::EIO)], libc::EEXIST, Reason::Claimed, 2),
        row(
            "a fatal SEAMCALL, or its measurement fails",
            &[fails(2, libc::EIO)],
            libc::EIO,
            Reason::VmDead,
            2,
        )
        .and(Circumstance::VmDead),
        row(
            "the TDX module refuses",
            &[refuses(0xc000_0b0b_0000_0000)],
            libc::EIO,
            Reason::FirmwareRefused,
            4,
        ),
        row(
            "a busy S-EPT (Linux 6.16 to 6.18), then well",
            &[fails(1, libc::EBUSY), done(3)],
            0,
            Reason::None,
            0,
        ),
        row("busy for ever", &[done(1), fails(0, libc::EBUSY)], libc::EAGAIN, Reason::RetriesExhausted, 3)
            .calls(1 + PATIENCE),
        row(
            "to be tried again, then well",
            &[fails(0, libc::EAGAIN), fails(2, libc::EAGAIN), done(2)],
            0,
            Reason::None,
            0,
        ),
        row(
            "a signal before it is tried again",
            &[fails(1, libc::EAGAIN)],
            libc::EINTR,
            Reason::Interrupted,
            3,
        )
        .and(Circumstance::Signal),
        row("nothing done, nothing said; then well", &[done(0), done(4)], 0, Reason::None, 0),
        row("nothing done for ever", &[done(0)], libc::EAGAIN, Reason::RetriesExhausted, 4).calls(PATIENCE),
        row("no such call", &[fails(0, libc::ENOTTY)], libc::ENOTTY, Reason::KernelRefused, 4),
        row("the vCPU was closed", &[fails(1, libc::EBADF)], libc::EBADF, Reason::BadFd, 3),
        row(
            "progress that cannot be",
            &[done(1), fails(0, libc::EPROTO)],
            libc::EPROTO,
            Reason::KernelRefused,
            3,
        )
        .claimed(4),
    ];
    heading();
    rows.iter().for_each(Row::check);
    println!("{} exchanges with TDX", rows.len());
}

#[test]
fn each_answer_of_snp_s_call_is_understood() {
    let row = |what, answers: &[Answer], code, reason, left| {
        Row::new(Launch::Snp(KVMPREP_SNP_PAGE_NORMAL), what, answers, code, reason, left)
    };
    let silent = refuses(0);
    let of_type = |page_type, row: Row| Row { launch: Launch::Snp(page_type), ..row };
    let rows = [
        row("all at once", &[done(4)], 0, Reason::None, 0),
        row("stops at the memslot's end", &[done(3), done(1)], 0, Reason::None, 0),
        of_type(
            KVMPREP_SNP_PAGE_ZERO,
            row("zeroes, which have no source", &[done(2), done(2)], 0, Reason::None, 0),
        ),
        row("SEV is not enabled", &[fails(0, libc::ENOTTY)], libc::ENOTTY, Reason::KernelRefused, 4),
        row("the VM takes other commands", &[fails(0, libc::EPERM)], libc::EPERM, Reason::KernelRefused, 4),
        row(
            "no SNP guest, or no LAUNCH_START",
            &[fails(0, libc::EINVAL)],
            libc::EINVAL,
            Reason::KernelRefused,
            4,
        )
        .says("this is no SNP guest"),
        row(
            "then a memslot without guest_memfd",
            &[done(1), fails(0, libc::EINVAL)],
            libc::EINVAL,
            Reason::KernelRefused,
            3,
        )
        .says("or has no guest_memfd there"),
        row("a signal before the first page", &[silent, done(4)], 0, Reason::None, 0),
        row("signals all the time", &[silent, silent, done(1), silent, silent, done(3)], 0, Reason::None, 0),
        row("a signal between two pages", &[done(2), silent, silent, done(2)], 0, Reason::None, 0),
        row("not private, there already, no /dev/sev", &[silent], libc::EIO, Reason::KernelRefused, 4)
            .calls(3),
        row("the same, later", &[done(3), silent], libc::EIO, Reason::KernelRefused, 1).calls(4),
        row("the firmware was not reached", &[refuses(0xffff_ffff)], libc::EIO, Reason::KernelRefused, 4)
            .calls(3),
        row("the source is not mapped", &[done(1), silent], libc::EFAULT, Reason::NoHostMapping, 3)
            .and(Circumstance::SourceUnmapped)
            .calls(4),
        row("the source is mapped and cannot be read", &[silent], libc::EFAULT, Reason::NoHostMapping, 4)
            .and(Circumstance::SourceUnreadable)
            .calls(3),
        of_type(
            KVMPREP_SNP_PAGE_CPUID,
            row("the source cannot be written", &[silent], libc::EFAULT, Reason::NoHostMapping, 4)
                .and(Circumstance::SourceReadOnly)
                .calls(3),
        ),
        of_type(
            KVMPREP_SNP_PAGE_NORMAL,
            row("the source is only read, and can be", &[silent], libc::EIO, Reason::KernelRefused, 4)
                .and(Circumstance::SourceReadOnly)
                .calls(3),
        ),
        row("the VM is dead", &[silent], libc::EIO, Reason::VmDead, 4).and(Circumstance::VmDead).calls(3),
        row(
            "the firmware refuses: INVALID_GUEST_STATE",
            &[refuses(0x02)],
            libc::EIO,
            Reason::FirmwareRefused,
            4,
        ),
        row("the firmware refuses later", &[done(2), refuses(0x1a)], libc::EIO, Reason::FirmwareRefused, 2),
        of_type(
            KVMPREP_SNP_PAGE_CPUID,
            row("CPUID values are refused", &[refuses(0x16)], libc::EIO, Reason::FirmwareRefused, 4),
        ),
        of_type(
            KVMPREP_SNP_PAGE_CPUID,
            row("the second page's are", &[done(1), refuses(0x16)], libc::EIO, Reason::FirmwareRefused, 3),
        ),
        row("to be tried again, as it is documented", &[fails(0, libc::EAGAIN), done(4)], 0, Reason::None, 0),
        row("for ever", &[fails(0, libc::EAGAIN)], libc::EAGAIN, Reason::RetriesExhausted, 4).calls(PATIENCE),
        row("nothing done, nothing said; then well", &[done(0), done(4)], 0, Reason::None, 0),
        row("the VM's descriptor was closed", &[fails(0, libc::EBADF)], libc::EBADF, Reason::BadFd, 4),
        row("progress that cannot be", &[fails(0, libc::EPROTO)], libc::EPROTO, Reason::KernelRefused, 4)
            .claimed(4),
    ];
    heading();
    rows.iter().for_each(Row::check);
    println!("{} exchanges with SNP", rows.len());
}

/// The calls are the kernel's to the last field, and go on where the last has stopped, in guest and source alike.
#[test]
fn what_is_asked_goes_on_in_guest_and_source_alike() {
    for launch in [Launch::Tdx, Launch::Snp(KVMPREP_SNP_PAGE_NORMAL), Launch::Snp(KVMPREP_SNP_PAGE_ZERO)] {
        let mut world = World::new(launch.vm_type());
        // Across the border of two memslots.
        assert_eq!(world.launch(&launch, pages(6, 12), &[done(2), done(4)]).code, 0);
        let source = world.source() as u64;
        let step = |from: u64, source| match launch {
            Launch::Tdx => Asked::Tdx {
                vcpu: VCPU,
                pages: ImagePages { range: pages(from, 12), source: Some(source) },
                flags: KVMPREP_TDX_MEASURE,
            },
            Launch::Snp(page_type) => Asked::Snp {
                vm: VM,
                sev: SEV,
                pages: ImagePages {
                    range: pages(from, 12),
                    source: (page_type != KVMPREP_SNP_PAGE_ZERO).then_some(source),
                },
                page_type: page_type as u8,
            },
        };
        let asked = world.kernel.launches.asked.lock().unwrap().clone();
        assert_eq!(asked, [step(6, source), step(8, source + 2 * PAGE)]);
    }
}

#[test]
fn cpuid_values_go_page_by_page_and_what_was_corrected_is_added_by_the_caller_alone() {
    let mut world = World::new(SNP_VM);
    let cpuid = Launch::Snp(KVMPREP_SNP_PAGE_CPUID);
    world.source.0.fill(0x11);
    let corrected = Answer { correction: Some(0x22), ..refuses(0x16) };
    let told = world.launch(&cpuid, pages(0, 3), &[done(1), corrected, done(1)]);
    assert_eq!((told.code, told.err.firmware_error), (-libc::EIO, 0x16));
    assert!(text(&told.err.hint).contains("compare"), "{}", text(&told.err.hint));
    // Not a call more: the page that nobody has looked at.
    assert_eq!(world.asked(), [(0, 1), (1, 2)]);
    let page = |world: &World, n: usize| world.source.0[n * PAGE as usize..(n + 1) * PAGE as usize].to_vec();
    assert_eq!(page(&world, 0), [0x11; PAGE as usize]);
    assert_eq!(page(&world, 1), [0x22; PAGE as usize]);
    assert_eq!(page(&world, 2), [0x11; PAGE as usize]);
    assert_eq!((told.remaining.gpa, told.remaining.size), (pages(1, 3).start, 2 * PAGE));
    // The caller has looked.
    assert_eq!(world.launch(&cpuid, pages(1, 3), &[done(1)]).code, 0);
    assert_eq!(world.asked(), [(1, 2), (2, 3)]);
    assert_eq!(world.claimed(IMAGE), [0, 1, 2]);
}

#[test]
fn what_is_wrong_by_itself_is_refused_before_anything_is_done() {
    let mut world = World::new(TDX_VM);
    let source = world.source();
    let odd = source.wrapping_byte_add(16);
    let last = (u64::MAX - PAGE + 1) as *mut c_void;
    let range = in_c(pages(0, 4));
    let bad = |gpa, size| kvmprep_range { gpa, size, reserved: [0; 2] };
    let tries: [(&str, kvmprep_range, *mut c_void, u32, c_int, c_int, Reason); 12] = [
        ("no source", range, std::ptr::null_mut(), 1, VCPU, libc::EINVAL, Reason::NullPointer),
        ("a source that is not aligned", range, odd, 1, VCPU, libc::EINVAL, Reason::RangeUnaligned),
        ("a source that wraps", range, last, 1, VCPU, libc::EINVAL, Reason::RangeOverflow),
        (
            "a gpa that is not aligned",
            bad(GPA + 1, PAGE),
            source,
            1,
            VCPU,
            libc::EINVAL,
            Reason::RangeUnaligned,
        ),
        ("nothing", bad(GPA, 0), source, 1, VCPU, libc::EINVAL, Reason::RangeEmpty),
        (
            "a range that wraps",
            bad(PAGE.wrapping_neg(), 2 * PAGE),
            source,
            1,
            VCPU,
            libc::EINVAL,
            Reason::RangeOverflow,
        ),
        ("the shared bit", bad(GPA | SHARED_BIT, PAGE), source, 1, VCPU, libc::EINVAL, Reason::SharedBit),
        (
            "up into the shared bit",
            bad(SHARED_BIT - PAGE, 2 * PAGE),
            source,
            1,
            VCPU,
            libc::EINVAL,
            Reason::SharedBit,
        ),
        ("beyond the guest", bad(1 << 48, PAGE), source, 1, VCPU, libc::EINVAL, Reason::RangeBeyondGuest),
        ("unknown flags", range, source, 3, VCPU, libc::EINVAL, Reason::UnknownFlags),
        ("no vCPU", range, source, 0, -1, libc::EBADF, Reason::BadFd),
        ("shared memory", in_c(pages(14, 18)), source, 0, VCPU, libc::EINVAL, Reason::NotPrivate),
    ];
    for (what, range, source, flags, vcpu, errno, why) in tries {
        let (code, err) = world.call(|vm, err| {
            // SAFETY: vm and err are live; the source is not looked at where the arguments are refused.
            unsafe { kvmprep_tdx_init_mem_region(vm, vcpu, &range, source, flags, std::ptr::null_mut(), err) }
        });
        println!("{what:32} {:>6} {:20} {}", errno_name(-code), reason(err.reason), text(&err.message));
        assert_eq!((code, reason(err.reason)), (-errno, reason(why as u32)), "{what}");
    }
    for (vm_type, page_type, sev, errno, why) in [
        (SNP_VM, 2, SEV, libc::EINVAL, Reason::BadValue),
        (SNP_VM, 0x101, SEV, libc::EINVAL, Reason::BadValue),
        (SNP_VM, KVMPREP_SNP_PAGE_NORMAL, -1, libc::EBADF, Reason::BadFd),
        (TDX_VM, KVMPREP_SNP_PAGE_NORMAL, SEV, libc::EINVAL, Reason::BadValue),
    ] {
        let mut world = World::new(vm_type);
        let source = world.source();
        let (code, err) = world.call(|vm, err| {
            // SAFETY: all are live.
            unsafe {
                kvmprep_snp_launch_update(vm, sev, &range, source, page_type, std::ptr::null_mut(), err)
            }
        });
        assert_eq!((code, reason(err.reason)), (-errno, reason(why as u32)), "page type {page_type}");
        assert_eq!((world.asked(), world.claimed(IMAGE)), (vec![], vec![]));
    }
    assert_eq!((world.asked(), world.claimed(IMAGE)), (vec![], vec![]));
}

#[test]
fn a_page_is_launched_once_and_only_what_the_kernel_has_not_taken_again() {
    let mut world = World::new(TDX_VM);
    assert_eq!(world.launch(&Launch::Tdx, pages(0, 4), &[fails(3, libc::EINTR)]).code, -libc::EINTR);
    let again = world.launch(&Launch::Tdx, pages(2, 4), &[done(2)]);
    assert_eq!((again.code, again.err.reason), (-libc::EEXIST, Reason::Claimed as u32));
    assert_eq!(
        (again.err.gpa, again.err.size),
        (pages(0, 3).start, 3 * PAGE),
        "the earlier claim, as it is left"
    );
    assert_eq!((again.remaining.gpa, again.remaining.size), (pages(2, 4).start, 2 * PAGE));
    assert_eq!(world.asked(), []);
    assert_eq!(world.launch(&Launch::Tdx, pages(3, 4), &[done(1)]).code, 0);
    world.note_sealed();
    let late = world.launch(&Launch::Tdx, pages(8, 9), &[done(1)]);
    assert_eq!((late.code, late.err.reason, world.asked().len()), (-libc::EPERM, Reason::Sealed as u32, 0));
}

#[test]
fn a_page_that_several_threads_launch_is_asked_for_once() {
    for _ in 0..50 {
        let world = World::new(TDX_VM);
        *world.kernel.launches.answers.lock().unwrap() = [done(1)].into();
        let launched = AtomicU32::new(0);
        let one = |page| {
            let pages = ImagePages { range: pages(page, page + 1), source: Some(PAGE) };
            match world.vm.launch(Way::Tdx { vcpu: VCPU, flags: 0 }, &pages).verdict {
                Ok(()) => drop(launched.fetch_add(1, Ordering::Relaxed)),
                Err(error) => assert_eq!(error.reason, Reason::Claimed),
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(|| (0..8).for_each(one)))));
        let mut asked = world.asked();
        asked.sort_unstable();
        assert_eq!(asked, (0..8).map(|page| (page, page + 1)).collect::<Vec<_>>());
        assert_eq!(launched.into_inner(), 8);
    }
}

#[test]
fn a_claim_says_which_memory_does_not_fit() {
    let mut world = World::new(SNP_VM);
    let unfit = [
        (pages(4, 18), Reason::NotPrivate, pages(16, 18), Some(2)),
        (pages(17, 20), Reason::NotPrivate, pages(17, 20), Some(2)),
        (pages(15, 30), Reason::NotPrivate, pages(16, 24), Some(2)),
        (pages(24, 26), Reason::NoGmem, pages(24, 26), Some(3)),
        (pages(26, 40), Reason::NoGmem, pages(26, 32), Some(3)),
        (pages(40, 44), Reason::NoMemslot, pages(40, 44), None),
    ];
    for (range, why, part, slot) in unfit {
        let (code, err) = world.claim(range);
        println!("{:>7} {:14} {}", errno_name(-code), reason(err.reason), text(&err.message));
        assert_eq!((code, reason(err.reason)), (-libc::EINVAL, reason(why as u32)));
        assert_eq!((err.gpa, err.size), (part.start, part.size()), "{range}");
        assert_eq!(err.slot, slot.unwrap_or(u32::MAX), "{range}");
    }
    world
        .vm
        .set_memslots(&[slot(1, pages(0, 4), MEM_GUEST_MEMFD), slot(2, pages(6, 8), MEM_GUEST_MEMFD)])
        .unwrap();
    let (code, err) = world.claim(pages(2, 7));
    assert_eq!((code, err.reason, err.gpa, err.size), (-libc::EINVAL, 12, pages(4, 6).start, 2 * PAGE));
    assert_eq!(world.claimed(IMAGE), []);
}

#[test]
fn claims_go_through_the_c_functions() {
    let mut world = World::new(SNP_VM);
    assert_eq!(world.claim(pages(0, 4)).0, 0);
    assert_eq!(world.claim(pages(6, 10)).0, 0);
    let (code, err) = world.claim(pages(3, 8));
    assert_eq!((code, err.reason, err.gpa, err.size), (-libc::EEXIST, 53, pages(0, 4).start, 4 * PAGE));
    let (code, err) = world.unclaim(pages(2, 8));
    assert_eq!((code, err.reason, err.gpa, err.size), (-libc::ENOENT, 54, pages(4, 6).start, 2 * PAGE));
    assert_eq!(world.claimed(IMAGE), [0, 1, 2, 3, 6, 7, 8, 9]);
    assert_eq!(world.unclaim(pages(7, 9)).0, 0);
    assert_eq!(world.claimed(IMAGE), [0, 1, 2, 3, 6, 9]);
    assert_eq!(world.check_claims(&[]).0, 0);
    assert_eq!(world.check_claims(&[pages(4, 6), pages(7, 9)]).0, 0);
    let (code, err) = world.check_claims(&[pages(4, 5), pages(7, 8), pages(4, 6), pages(20, 21)]);
    assert_eq!((code, err.reason, err.gpa, err.size), (-libc::EEXIST, 53, pages(4, 5).start, PAGE));
    assert!(text(&err.message).starts_with("ranges[2]: "), "{}", text(&err.message));
    let (code, err) = world.check_claims(&[pages(4, 5), pages(20, 21), pages(4, 5)]);
    assert_eq!((code, err.reason), (-libc::EINVAL, 55));
    assert!(text(&err.message).starts_with("ranges[1]: "), "{}", text(&err.message));
    assert_eq!(world.claimed(IMAGE), [0, 1, 2, 3, 6, 9], "a dry run claims nothing");
    world.note_sealed();
    world.note_sealed();
    // Whatever else is wrong.
    for range in [pages(4, 5), pages(0, 1), pages(20, 21)] {
        for (code, err) in [world.claim(range), world.unclaim(range), world.check_claims(&[range])] {
            assert_eq!((code, err.reason), (-libc::EPERM, 56), "{range}");
        }
    }
}

#[test]
fn nothing_is_pre_faulted_before_the_image_is_closed() {
    for (vm_type, is_refused) in [(TDX_VM, true), (SNP_VM, true), (1, false), (0, false)] {
        let mut world = World::new(vm_type);
        let refused = |world: &World, range: &[Range], options| {
            Job::new(&world.vm, range, options).err().map(|error| (error.errno, error.reason))
        };
        let expected = is_refused.then_some((libc::EOPNOTSUPP, Reason::NotSealed));
        // Of the whole VM, shared memory included.
        for range in [&[][..], &[pages(0, 4)], &[pages(24, 32)]] {
            assert_eq!(refused(&world, range, WRITE), expected, "type {vm_type}");
        }
        assert_eq!(refused(&world, &[pages(24, 32)], Options { host_only: true, ..WRITE }), None);
        world.note_sealed();
        assert_eq!(refused(&world, &[pages(0, 4)], WRITE), None, "type {vm_type}");
    }
}
