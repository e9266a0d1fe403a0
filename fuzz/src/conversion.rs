//! Conversions and exits: what a hostile guest may ask for, by any way into the library, and what must hold afterwards.
//!
//! Beside what is said of all calls: a guest is told one of three answers; nothing but memory with a guest_memfd becomes
//! private; the record is what KVM was told; nothing in sight is given up; and a call costs what it changes, not what it
//! was asked for.

use crate::call::{Answer, call};
use crate::effort::allocated;
use crate::fake::{Call, Fake};
use crate::guest::Guest;
use crate::heap::{Block, Passed, bytes_of, bytes_of_all, growing};
use crate::input::{GIANT, HUGE, Input, PAGE};
use crate::listener::{Listener, PIECE, changed};
use crate::oracle::{demand, judge_output, memory_in};
use crate::sight::{self, Sight};
use crate::slots::{self, GUEST_MEMFD, pages};
use kvmprep::abi::*;
use kvmprep::error::Reason;
use kvmprep::range::{Range, RangeSet};
use std::ffi::c_int;
use std::sync::atomic::Ordering;

/// Any of them. `is_alone`: no job is at work beside it.
pub fn any(input: &mut Input, guest: &mut Guest, is_alone: bool) {
    guest.furnish(input);
    // What can be private can be converted, in pieces: a VMM with memslots of more than there can be has asked for that.
    if with_guest_memfd(guest).any(|slot| slot.size > most_noted(slot.size)) {
        return;
    }
    begin(input, guest);
    match input.below(12) {
        0 => next(input, guest),
        1 if input.rarely(2) => note(input, guest),
        2 => huge_wish(input, guest, is_alone),
        3..=6 => convert(input, guest, is_alone),
        7 | 8 => memory_fault(input, guest, is_alone),
        _ => hypercall(input, guest, is_alone),
    }
}

fn end_of(guest: &Guest) -> u64 {
    1 << guest.gpa_bits
}

fn next(input: &mut Input, guest: &Guest) {
    const NAME: &str = "kvmprep_visibility_next";
    let gpa = slots::range(input, &guest.slots()).gpa;
    let out = Block::output(size_of::<kvmprep_visibility_run>(), input.passed());
    let answer = call(input, NAME, &gpa, |err| {
        // SAFETY: the handle lives; the block is a run.
        unsafe { kvmprep_visibility_next(guest.vm, gpa, out.pointer(), err) }
    });
    judge_output(NAME, &out, size_of::<kvmprep_visibility_run>(), answer.is_success());
    if answer.code == -libc::ENOENT {
        demand(gpa >= end_of(guest), NAME, "the end is where the addresses end");
    }
    if answer.is_success() {
        let run = out.read::<kvmprep_visibility_run>();
        demand(run.gpa == gpa && run.size > 0 && run.size % PAGE == 0, NAME, "a run from there on");
        demand(run.gpa + run.size <= end_of(guest), NAME, "no run beyond the addresses");
        demand(run.visibility <= 1 && run.reserved0 == 0 && run.reserved == [0; 3], NAME, "a run");
    }
}

/// What of the guest is private, by the handle's word; whose runs must follow upon each other.
fn private_memory(guest: &Guest) -> RangeSet {
    const NAME: &str = "kvmprep_visibility_next";
    let mut private = RangeSet::new();
    let (mut gpa, mut last) = (0, None);
    loop {
        let mut run = kvmprep_visibility_run::default();
        // SAFETY: the handle lives, the run too.
        if unsafe { kvmprep_visibility_next(guest.vm, gpa, &mut run, std::ptr::null_mut()) } != 0 {
            break;
        }
        demand(run.gpa == gpa && run.size > 0, NAME, "a run from there on");
        demand(last != Some(run.visibility), NAME, "runs that are as long as can be");
        (gpa, last) = (run.gpa + run.size, Some(run.visibility));
        if run.visibility == KVMPREP_PRIVATE {
            private.insert(Range { start: run.gpa, end: gpa });
        }
    }
    demand(gpa == end_of(guest), NAME, "runs to the end");
    private
}

/// What differs.
fn difference(a: &RangeSet, b: &RangeSet) -> RangeSet {
    a.iter().flat_map(|part| b.missing(part)).chain(b.iter().flat_map(|part| a.missing(part))).collect()
}

/// As confidential guests begin: all that can be private is.
pub fn begin(input: &mut Input, guest: &mut Guest) {
    if guest.private.is_empty() && guest.caps.memory_attributes != 0 && input.rarely(2) {
        let slots: Vec<kvmprep_memslot> = with_guest_memfd(guest).copied().collect();
        for slot in slots {
            let range = kvmprep_range { gpa: slot.gpa, size: slot.size, reserved: [0; 2] };
            note_that(input, guest, range, KVMPREP_PRIVATE);
        }
    }
}

/// What the VMM says is private, the guest can have made shared, in pieces: a VMM that says so of more than there can be has
/// asked for that itself.
fn most_noted(size: u64) -> u64 {
    const MOST: u64 = 1 << 40;
    if size > MOST { MOST + size % PAGE } else { size }
}

fn note(input: &mut Input, guest: &mut Guest) {
    let mut range = some_range(input, guest);
    let visibility = input.code(&[0, 1, 0, 1, 0, 1, 0, 1, 2]);
    if visibility == KVMPREP_PRIVATE {
        range.size = most_noted(range.size);
    }
    note_that(input, guest, range, visibility);
}

fn note_that(input: &mut Input, guest: &mut Guest, range: kvmprep_range, visibility: u32) {
    const NAME: &str = "kvmprep_visibility_note";
    let block = Block::new(&bytes_of(&range), input.passed());
    let answer = call(input, NAME, &(range, visibility), |err| {
        // SAFETY: the handle lives; the block is a range.
        unsafe { kvmprep_visibility_note(guest.vm, block.pointer(), visibility, err) }
    });
    if answer.is_success() {
        let noted = Range { start: range.gpa, end: range.gpa + range.size };
        mark(&mut guest.private, noted, visibility);
        if let Some(fake) = &guest.fake {
            mark(&mut fake.private.lock().expect("no thread has failed"), noted, visibility);
        }
    }
    demand(private_memory(guest) == guest.private, NAME, "what was noted is known, and nothing else");
}

fn mark(private: &mut RangeSet, range: Range, visibility: u32) {
    if visibility == KVMPREP_PRIVATE {
        private.insert(range);
    } else {
        private.remove(range);
    }
}

/// What is asked for: of which memory, to become what, by which function.
struct Wish {
    name: &'static str,
    gpa: u64,
    size: u64,
    to: u32,
    opts: kvmprep_convert_opts,
    /// How the options are passed.
    passed: Passed,
    is_alone: bool,
}

impl Wish {
    fn new(input: &mut Input, guest: &Guest, name: &'static str, (gpa, size): (u64, u64), to: u32) -> Self {
        let whole = size_of::<kvmprep_convert_result>();
        let opts = kvmprep_convert_opts {
            struct_size: size_of::<kvmprep_convert_opts>() as u32,
            steps: input.code(&[0, 0, 3, 3, 3, 3, 1, 7, 7, 5, 2, 6, 4, 8, 3, 7, 3, 3, 3, 1, 7, 3, 3, 0]),
            flags: input.code(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2]),
            vcpu_fd: if guest.is_real {
                -1
            } else {
                input.pick(&[-1, -1, 100, 100, 100, 101, 102, 100, 100, -2])
            },
            max_size: if input.rarely(12) { input.pick(&[PAGE, HUGE, 1]) } else { 0 },
            changed: None,
            opaque: std::ptr::null_mut(),
            result: std::ptr::null_mut(),
            result_size: input.struct_size(whole),
        };
        let passed = if input.rarely(12) { Passed::Null } else { input.passed() };
        let mut wish = Self { name, gpa, size, to, opts, passed, is_alone: true };
        // To populate terabytes takes its time, rightly.
        if wish.memory(guest) > 4 * GIANT {
            wish.opts.steps &= !KVMPREP_CONVERT_PREFAULT;
        }
        wish
    }

    /// The range, where it can be one.
    fn range(&self) -> Option<Range> {
        Range::new(self.gpa, self.size)
    }

    fn has(&self, step: u32) -> bool {
        let steps = if self.passed == Passed::Right { self.opts.steps } else { 0 };
        let default = KVMPREP_CONVERT_ATTRIBUTES | KVMPREP_CONVERT_DROP;
        (if steps == 0 { default } else { steps }) & step != 0
    }

    /// How much of it is memory with a guest_memfd.
    fn memory(&self, guest: &Guest) -> u64 {
        let Some(range) = self.range() else { return 0 };
        let asked = kvmprep_range { gpa: range.start, size: range.size(), reserved: [0; 2] };
        memory_in(&asked, with_guest_memfd(guest))
    }
}

fn with_guest_memfd(guest: &Guest) -> impl Iterator<Item = &kvmprep_memslot> {
    guest.record.values().filter(|slot| slot.slot >> 16 == 0 && slot.flags & GUEST_MEMFD != 0)
}

/// A range as guests and VMMs name it: mostly some pages of memory that can be converted, in frames of all sizes.
fn some_range(input: &mut Input, guest: &Guest) -> kvmprep_range {
    let slots: Vec<&kvmprep_memslot> = with_guest_memfd(guest).filter(|slot| slot.size != 0).collect();
    if slots.is_empty() || input.rarely(4) {
        return slots::range(input, &guest.slots());
    }
    let slot = slots[input.below(slots.len())];
    let unit = input.pick(&[PAGE, PAGE, HUGE, PIECE]);
    let skipped = unit * input.below(256) as u64 + PAGE * input.below(3) as u64;
    let skipped = pages(skipped % slot.size);
    let left = slot.size - skipped;
    let unit = input.pick(&[PAGE, PAGE, PAGE, HUGE, GIANT]);
    let size = match input.below(8) {
        0 => left,
        // Beyond the slot.
        1 => left.saturating_add(unit),
        _ => (unit * (1 + input.below(16) as u64)).min(left),
    };
    kvmprep_range { gpa: slot.gpa + skipped, size, reserved: [0; 2] }
}

fn convert(input: &mut Input, guest: &mut Guest, is_alone: bool) {
    let range = some_range(input, guest);
    let to = input.code(&[1, 0, 1, 0, 1, 0, 1, 0, 2]);
    let wish = Wish::new(input, guest, "kvmprep_convert", (range.gpa, range.size), to);
    let wish = Wish { is_alone, ..wish };
    let block = Block::new(&bytes_of(&range), input.passed());
    let vm = guest.vm;
    make(input, guest, wish, &mut |opts, err| {
        // SAFETY: the handle lives; the blocks are a range, and options as large as they say.
        unsafe { kvmprep_convert(vm, block.pointer(), to, opts, err) }
    });
}

/// All there is, or more.
fn huge_wish(input: &mut Input, guest: &mut Guest, is_alone: bool) {
    let gpa = input.pick(&[0, 0, 0, PAGE, GIANT, end_of(guest) - PAGE]);
    let beyond = input.pick(&[0, 0, 0, 0, PAGE]);
    let size = input.pick(&[end_of(guest), end_of(guest), !0 - PAGE + 1, end_of(guest) / 2]);
    let size = pages(size.saturating_sub(gpa).saturating_add(beyond));
    let to = input.pick(&[0, 0, 0, 1]);
    let wish = Wish { is_alone, ..Wish::new(input, guest, "kvmprep_handle_map_gpa_range", (gpa, size), to) };
    ask_by_hypercall(input, guest, wish, [gpa, size / PAGE, u64::from(to) << 4]);
}

fn memory_fault(input: &mut Input, guest: &mut Guest, is_alone: bool) {
    let kvmprep_range { gpa, size, .. } = some_range(input, guest);
    // KVM's own size, but for a few.
    let size = if input.rarely(4) { size } else { PAGE };
    let flags = if input.rarely(16) { input.number() } else { input.pick(&[8, 0, 8, 0, 8, 0, 1, 9]) };
    let to = u32::from(flags & 8 != 0);
    let wish = Wish::new(input, guest, "kvmprep_handle_memory_fault", (gpa, size), to);
    let wish = Wish { is_alone, ..wish };
    let vm = guest.vm;
    make(input, guest, wish, &mut |opts, err| {
        // SAFETY: the handle lives; the block is options as large as they say.
        unsafe { kvmprep_handle_memory_fault(vm, gpa, size, flags, opts, err) }
    });
}

fn hypercall(input: &mut Input, guest: &mut Guest, is_alone: bool) {
    let kvmprep_range { gpa, size, .. } = some_range(input, guest);
    let pages = match input.below(8) {
        0..=3 => size / PAGE,
        4 | 5 => 1 + input.below(600) as u64,
        6 => input.pick(&[0, 1 << 52, (1 << 52) - 1, 1 << 40, 1 << 63, !0]),
        _ => input.number(),
    };
    let attributes =
        if input.rarely(16) { input.number() } else { input.pick(&[16, 0, 16, 0, 17, 1, 18, 2, 3, 32]) };
    let to = u32::from(attributes & 16 != 0);
    let size = pages.saturating_mul(PAGE);
    let wish = Wish::new(input, guest, "kvmprep_handle_map_gpa_range", (gpa, size), to);
    ask_by_hypercall(input, guest, Wish { is_alone, ..wish }, [gpa, pages, attributes]);
}

fn ask_by_hypercall(input: &mut Input, guest: &mut Guest, wish: Wish, args: [u64; 3]) {
    const NAME: &str = "kvmprep_handle_map_gpa_range";
    const UNTOLD: u64 = 99;
    let args_block = Block::new(&bytes_of_all(&args), input.passed());
    let passed = input.passed();
    let vm = guest.vm;
    make(input, guest, wish, &mut |opts, err| {
        let told = Block::new(&UNTOLD.to_ne_bytes(), passed);
        // SAFETY: the handle lives; the blocks are three values, options as large as they say, and a value.
        let code =
            unsafe { kvmprep_handle_map_gpa_range(vm, args_block.pointer(), opts, told.pointer(), err) };
        let told_value = told.read::<u64>();
        if !told.is_passed() {
            demand(told_value == UNTOLD && code == -libc::EINVAL, NAME, "no answer without a place");
            return code;
        }
        let (invalid, again) = (libc::EINVAL as u64, libc::EAGAIN as u64);
        demand([0, invalid, again].contains(&told_value), NAME, "an answer that KVM takes");
        demand(code != 0 || told_value == 0, NAME, "that its wish is met, where it is");
        code
    });
}

/// How things are before or after a call.
struct Moment {
    private: RangeSet,
    calls: u64,
    told: usize,
    allocated: u64,
}

impl Moment {
    fn now(guest: &Guest) -> Self {
        let private = private_memory(guest);
        let (calls, told) = guest.fake.as_ref().map_or((0, 0), |fake| {
            (fake.calls.load(Ordering::Relaxed), fake.told.lock().expect("no thread has failed").len())
        });
        Self { private, calls, told, allocated: allocated() }
    }
}

/// Makes the call, perhaps with a kernel that fails, judges it, and has it finished where it was not.
fn make(
    input: &mut Input,
    guest: &mut Guest,
    wish: Wish,
    function: &mut dyn FnMut(*const kvmprep_convert_opts, *mut kvmprep_error) -> c_int,
) {
    let mut listener = Listener::new(input, guest.vm, &guest.slots());
    let has_failure = wish.is_alone && input.rarely(4) && let_fail(input, guest);
    let answer = once(input, guest, &wish, &mut listener, has_failure, function);
    let has_failed = guest.fake.as_ref().is_some_and(|fake| has_failure && !fake.is_still_to_fail());
    guest.fake.iter().for_each(|fake| fake.fail_none());
    if answer.is_success() || !(has_failed || listener.has_failed) {
        return;
    }
    // Now that nothing stands in its way, it is finished; and then there is nothing left to do.
    listener.calm_down();
    let answer = once(input, guest, &wish, &mut listener, false, function);
    if !answer.is_success() || wish.has(KVMPREP_CONVERT_PREFAULT) || wish.name != "kvmprep_convert" {
        return;
    }
    listener.calm_down();
    let before = Moment::now(guest);
    once(input, guest, &wish, &mut listener, false, function);
    let after = Moment::now(guest);
    demand(listener.told.is_empty() && before.told == after.told, wish.name, "nothing is done twice");
}

/// Has a call of the kernel's fail; says whether there is one that can.
fn let_fail(input: &mut Input, guest: &Guest) -> bool {
    let call = input.pick(&[
        Call::SetAttributes,
        Call::SetAttributes,
        Call::SetAttributes,
        Call::Discard,
        Call::Punch,
        Call::Remove,
        Call::Mapping,
        Call::Mappings,
        Call::Allocate,
        Call::Populate,
        Call::PreFault,
        Call::ExitRequest,
    ]);
    let errno = input.pick(&[libc::ENOMEM, libc::EINTR, libc::EIO, libc::EINVAL, libc::EFAULT, libc::EBADF]);
    let after = input.pick(&[0, 0, 0, 1, 1, 2, 3]);
    guest.fake.iter().for_each(|fake| fake.fail(call, after, errno));
    guest.fake.is_some()
}

fn once(
    input: &mut Input,
    guest: &mut Guest,
    wish: &Wish,
    listener: &mut Listener,
    may_fail: bool,
    function: &mut dyn FnMut(*const kvmprep_convert_opts, *mut kvmprep_error) -> c_int,
) -> Answer {
    let slots = if wish.is_alone { sight::of_their_own(&guest.slots()) } else { Vec::new() };
    guest.fake.iter().for_each(|fake| sight::fill(fake, &slots));
    let result_passed = if input.rarely(8) { Passed::Null } else { input.passed() };
    let result = Block::output(wish.opts.result_size, result_passed);
    let listens = !input.rarely(4);
    let opts = kvmprep_convert_opts {
        changed: listens.then_some(changed as _),
        opaque: std::ptr::from_mut(listener).cast(),
        result: result.pointer(),
        ..wish.opts
    };
    let opts_bytes = if input.rarely(8) { growing(input, &opts) } else { bytes_of(&opts) };
    let is_whole = opts_bytes == bytes_of(&opts);
    let block = Block::new(&opts_bytes, wish.passed);
    demand(private_memory(guest) == guest.private, wish.name, "nothing has changed but by a conversion");
    let before = Moment::now(guest);
    let arguments = (wish.gpa, wish.size, wish.to, opts.steps, opts.flags, opts.vcpu_fd, opts.max_size);
    let answer = call(input, wish.name, &arguments, |err| function(block.pointer(), err));
    let spent = allocated() - before.allocated;
    let after = Moment::now(guest);

    let judge = Judge { guest, wish, before: &before, after: &after };
    judge.memory(&answer);
    judge.listener(&answer, listener, listens && wish.passed == Passed::Right);
    if let Some(fake) = &guest.fake {
        // What the caller must have told KVM it is.
        if !wish.has(KVMPREP_CONVERT_ATTRIBUTES) {
            *fake.private.lock().expect("no thread has failed") = after.private.clone();
        }
        let told = fake.private.lock().expect("no thread has failed");
        demand(*told == after.private, wish.name, "the record is what KVM was told");
        drop(told);
        // From inside, a listener may cause work of other calls.
        if wish.is_alone && listener.is_quiet() {
            judge.effort(spent);
        }
        let sight = Sight { fake, slots: &slots, before: &before.private, after: &after.private };
        // To be put back is to be out of sight for a moment.
        sight.judge_kept(wish.name);
        let drops = wish.has(KVMPREP_CONVERT_DROP) && opts.flags == 0 && !may_fail && is_whole;
        if let Some(range) = wish.range().filter(|_| drops && answer.is_success()) {
            sight.judge_dropped(wish.name, range, guest.first_plain_memory());
        }
        judge.told(fake);
    }
    if is_whole && wish.passed == Passed::Right {
        let whole = size_of::<kvmprep_convert_result>();
        judge_output(wish.name, &result, whole, answer.is_success() || !result.is_unwritten());
        if wish.opts.result_size >= whole && result.is_passed() && !result.is_unwritten() {
            judge.result(&result.read());
        }
    }
    guest.unfinished += if answer.is_success() { 0 } else { pieces(&guest.private, wish) };
    guest.private = after.private;
    answer
}

/// How many pieces there are to convert.
fn pieces(private: &RangeSet, wish: &Wish) -> u64 {
    let Some(range) = wish.range() else { return 0 };
    let of = |part: Range| (part.end - 1) / PIECE - part.start / PIECE + 1;
    if wish.to == KVMPREP_PRIVATE {
        private.missing(range).into_iter().map(of).sum()
    } else {
        private.within(range).map(of).sum()
    }
}

struct Judge<'a> {
    guest: &'a Guest,
    wish: &'a Wish,
    before: &'a Moment,
    after: &'a Moment,
}

impl Judge<'_> {
    /// What has changed, and what must not have.
    fn memory(&self, answer: &Answer) {
        let Self { guest, wish, before, after } = *self;
        let changed = difference(&before.private, &after.private);
        if answer.is_success() {
            let range = wish.range();
            demand(range.is_some() && wish.to <= KVMPREP_PRIVATE, wish.name, "no success of what cannot be");
        }
        let Some(range) = wish.range() else {
            return demand(changed.is_empty(), wish.name, "nothing changes");
        };
        demand(changed.size_within(range) == changed.size(), wish.name, "nothing changes elsewhere");
        let private = after.private.size_within(range);
        let all = if wish.to == KVMPREP_PRIVATE { range.size() } else { 0 };
        demand(!answer.is_success() || private == all, wish.name, "all of it has become that");
        let fresh = changed.iter().flat_map(|part| after.private.within(part).collect::<Vec<_>>());
        let gains: RangeSet = fresh.collect();
        demand(gains.is_empty() || wish.to == KVMPREP_PRIVATE, wish.name, "nothing becomes the other");
        let held: u64 = with_guest_memfd(guest)
            .filter_map(|slot| Range::new(slot.gpa, slot.size))
            .map(|place| gains.size_within(place))
            .sum();
        demand(held == gains.size(), wish.name, "nothing becomes private that has no guest_memfd");
        demand(gains.is_empty() || guest.caps.memory_attributes != 0, wish.name, "nor in a VM without");
        if wish.passed == Passed::Right && wish.opts.max_size != 0 {
            let is_small = range.size() <= wish.opts.max_size;
            demand(is_small || changed.is_empty(), wish.name, "no more is converted than may be");
        }
    }

    fn listener(&self, answer: &Answer, listener: &Listener, listens: bool) {
        let Self { wish, before, after, .. } = *self;
        let told: RangeSet = listener.told.iter().filter_map(|(gpa, size)| Range::new(*gpa, *size)).collect();
        let changed = difference(&before.private, &after.private);
        let Some(range) = wish.range() else { return };
        demand(told.size_within(range) == told.size(), wish.name, "the listener hears of nothing else");
        if !listens {
            return demand(told.is_empty(), wish.name, "nobody is told");
        }
        let has_heard = changed.iter().all(|part| told.size_within(part) == part.size());
        demand(has_heard || !answer.is_success(), wish.name, "the listener hears of all that changes");
        if let Some(errno) = listener.errno() {
            demand(answer.code == -errno, wish.name, "what the listener returned is returned");
            let says = answer.error.is_none() || answer.error_of(Reason::CallbackFailed).is_some();
            demand(says, wish.name, "and why");
        }
    }

    /// No more was done than there was to do.
    fn effort(&self, spent: u64) {
        let Self { guest, wish, before, after } = *self;
        let slots = guest.record.len() as u64 + 1;
        let is_impossible =
            wish.to == KVMPREP_PRIVATE && wish.range().is_none_or(|range| wish.memory(guest) < range.size());
        // What cannot be is refused before anything is done.
        let work = if is_impossible { 0 } else { pieces(&before.private, wish) + guest.unfinished };
        let memory = if wish.has(KVMPREP_CONVERT_PREFAULT) { wish.memory(guest) / HUGE + slots } else { 0 };
        let runs = before.private.len() as u64;
        // A piece lies in some slots, and a slot in some of the eight mappings.
        let calls = 64 + 8 * (work + 9 * slots) + 16 * (memory + runs);
        demand(after.calls - before.calls <= calls, wish.name, "no more calls than there is to do");
        let bytes = (64 << 10) + (8 << 10) * (work + slots) + 4096 * (memory + runs);
        demand(spent <= bytes, wish.name, "no more memory than there is to do");
    }

    /// What KVM was told, it was told in pieces.
    fn told(&self, fake: &Fake) {
        let told = fake.told.lock().expect("no thread has failed");
        let is_short = |range: &Range| range.size() <= PIECE;
        demand(
            told[self.before.told..].iter().all(is_short),
            self.wish.name,
            "KVM is told of 64 MiB at most",
        );
    }

    fn result(&self, result: &kvmprep_convert_result) {
        let Self { guest, wish, before, after } = *self;
        let changed = difference(&before.private, &after.private).size();
        demand(result.converted == changed, wish.name, "as much was converted as has changed");
        let given = result.dropped.checked_add(result.kept);
        demand(
            given.is_some_and(|given| given <= wish.size),
            wish.name,
            "no more is given up than asked for",
        );
        if guest.fake.is_some() {
            let calls = (after.told - before.told) as u64;
            demand(result.calls == calls, wish.name, "as many calls as KVM was told");
        }
        demand(result.neighbours <= result.prefaulted, wish.name, "neighbours are populated memory");
    }
}
