//! Memory becomes private or shared: where a conversion meets slots and running work.
//!
//! The order of a conversion's steps is [`mod@crate::private::convert`]'s; here it is joined to the VM's record. Whoever
//! converts has the turn for all that it may touch, huge pages around it included ([`super::refill`]), for a piece at a
//! time, and takes no other turn meanwhile.

use super::Vm;
use super::refill::{looking_up, not_refilled, parts};
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::Errno;
use crate::kvm::caps::MEMORY_ATTRIBUTE_PRIVATE;
use crate::memslot::{Placed, check_guest_width};
use crate::populate::coverage::Loss;
use crate::populate::job::Worker;
use crate::private::convert::{self, Converted, Given, Guest, Steps};
use crate::private::discard::Host;
use crate::private::turns::Turn;
use crate::private::visibility::{Run, Visibility};
use crate::range::{PAGE, Range, RangeSet};
use std::cell::RefCell;
use std::os::fd::RawFd;
use std::sync::Arc;

/// How memory is converted.
pub struct ConvertOptions<'a> {
    /// What is done to it.
    pub steps: Steps,
    /// Both page tables are filled afterwards.
    pub prefault: bool,
    /// Shared memory is kept when it goes out of sight.
    pub keep_shared: bool,
    /// A vCPU of the calling thread's, to fill stage 2 with.
    pub vcpu: Option<RawFd>,
    /// The most that is converted at a time, in bytes.
    pub max_size: Option<u64>,
    /// Is told of each run that has changed; 0, or a negative errno.
    pub changed: &'a dyn Fn(Range, Visibility) -> i32,
}

/// What a conversion has done.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConvertReport {
    /// To the memory itself.
    pub done: Converted,
    /// Bytes filled in stage 2.
    pub prefaulted: u64,
    /// Of these, bytes beside what was to be converted.
    pub neighbours: u64,
}

/// Memory that is worked on: it is nobody else's turn, and its slots stay as they are.
pub(super) struct Site<'a> {
    /// What is to be converted.
    pub piece: Range,
    /// All that may be touched by that.
    pub reach: Range,
    /// The slots there.
    pub slots: Vec<Placed>,
    _turn: Turn<'a>,
}

/// The same error, of all that is not finished: from where it came to the end of what was asked for.
fn unfinished(error: Error, asked: Range) -> Error {
    let start = error.range.map_or(asked.start, |range| range.start.clamp(asked.start, asked.end - PAGE));
    Error { range: Some(Range { start, end: asked.end }), ..error }
}

/// A call waits for the end of a function that makes it.
pub(super) fn would_deadlock(range: Range) -> Error {
    Error::new(
        libc::EDEADLK,
        Reason::WouldDeadlock,
        format!("guest {range} is being converted by this very thread, which would wait for itself"),
    )
    .range(range)
    .hint("let the function that kvmprep_convert() tells of changes return first")
}

impl Vm {
    /// Makes `range` private or shared. `report` says what was done, also on an error.
    pub fn convert(
        self: &Arc<Self>,
        range: Range,
        to: Visibility,
        options: &ConvertOptions<'_>,
        report: &mut ConvertReport,
    ) -> Result<()> {
        self.check_convertible(range, options.max_size)?;
        // Before anything that may fail otherwise: who makes this mistake is to hear of it each time.
        self.turns.check(range).map_err(|_| would_deadlock(range).stage(Stage::Attributes))?;
        let mut worker =
            options.prefault.then(|| Worker::visitor(&*self.kernel, options.vcpu, &[])).transpose()?;
        // Of what can never be so, the part is told that cannot. For all else nothing of the piece is done.
        let not_begun = |piece: Range| {
            move |error: Error| match error.errno {
                libc::EINVAL | libc::EOPNOTSUPP => error,
                _ => Error { range: Some(Range { start: piece.start, end: range.end }), ..error },
            }
        };
        let first = convert::first_piece(range);
        if first != range {
            // All of it, before anything is done.
            let slots = self.memory().slots.in_range(range);
            self.check_slots(&slots, range, to, options.steps).map_err(not_begun(range))?;
        }
        let unfinished = |piece: Range| {
            move |error: Error| unfinished(Error { range: error.range.or(Some(piece)), ..error }, range)
        };
        // The first is looked at in any case.
        let to_convert = |rest: Range| {
            let found = || self.visibility.first_to_convert(rest, to).map(|(part, _)| part);
            if rest == range { Some(rest) } else { found() }
        };
        let kept = RefCell::default();
        for piece in convert::pieces(range, to_convert) {
            if piece != first && worker.as_ref().is_some_and(Worker::is_wanted_elsewhere) {
                return Err(unfinished(piece)(interrupted(piece, Stage::Attributes)));
            }
            let site = self.begin(piece, to, options).map_err(not_begun(piece))?;
            self.convert_piece(&site, to, options, &kept, report).map_err(unfinished(piece))?;
            // Where there is no more of it, nobody else comes in between.
            if let Some(worker) = worker.as_mut().filter(|_| piece == range) {
                return self.refill(&site, worker, report).map_err(unfinished(piece));
            }
        }
        let Some(mut worker) = worker.take() else { return Ok(()) };
        let memory = |rest: Range| {
            let memory = self.memory();
            let slots = memory.slots.touching(0, rest);
            slots.filter(|(_, slot)| slot.has_guest_memfd()).find_map(|(place, _)| place.intersect(&rest))
        };
        for piece in convert::pieces(range, memory) {
            let site = self.begin(piece, to, options).map_err(not_refilled).map_err(not_begun(piece))?;
            self.refill(&site, &mut worker, report).map_err(unfinished(piece))?;
        }
        Ok(())
    }

    /// Waits for the turn to work on `piece`, and looks at what is there.
    fn begin(&self, piece: Range, to: Visibility, options: &ConvertOptions<'_>) -> Result<Site<'_>> {
        let about = |error: Error| Error { range: error.range.or(Some(piece)), ..error };
        let reach = self.reach(piece, to, options.prefault).map_err(about)?;
        let look = || {
            let slots = self.memory().slots.in_range(reach);
            self.check_slots(&slots, piece, to, options.steps).map(|()| slots)
        };
        // What is refused takes no turn: a guest that asks again and again could hold up the change of a slot that it is
        // told to wait for.
        look()?;
        let turn = self.turn(reach)?;
        Ok(Site { piece, reach, slots: look()?, _turn: turn })
    }

    fn convert_piece(
        &self,
        site: &Site<'_>,
        to: Visibility,
        options: &ConvertOptions<'_>,
        kept: &RefCell<RangeSet>,
        report: &mut ConvertReport,
    ) -> Result<()> {
        if options.prefault && to == Visibility::Private {
            self.note_broken_pages(site, options.steps.drop && !options.keep_shared)?;
        }
        let mappings = self.mappings()?;
        let shown_twice = self.shown_twice(&mappings).map_err(looking_up)?;
        let host = Host {
            kernel: &*self.kernel,
            mappings: &mappings,
            shown_twice: &shown_twice,
            map: &self.visibility,
            kept,
        };
        let guest = OnVm { vm: self, site, host, options };
        convert::convert(&self.visibility, &guest, site.piece, to, options.steps, &mut report.done)
    }

    /// Converts what an access asked for that KVM did not let through.
    pub fn handle_memory_fault(
        self: &Arc<Self>,
        range: Range,
        to: Visibility,
        options: &ConvertOptions<'_>,
        report: &mut ConvertReport,
    ) -> Result<()> {
        self.convert(range, to, options, report)?;
        if report.done.converted == 0 && options.steps.attributes && self.caps()?.has_private_memory() {
            // Another vCPU has been faster; or KVM thinks otherwise, which nobody told of, and the guest would come
            // back for ever. It accessed one page; To tell KVM of more could take it minutes.
            let first = convert::first_piece(range);
            let _turn = self.turn(first)?;
            if self.visibility.is_all(first, to) {
                self.set_attributes(first, to)?;
                // Where KVM has thought otherwise, what it had mapped there is gone.
                self.memory().coverage.discarded(first, Loss::Converted);
                report.done.calls += 1;
            }
        }
        Ok(())
    }

    /// The caller has made `range` private or shared.
    pub fn note_visibility(&self, range: Range, visibility: Visibility) -> Result<()> {
        self.check_convertible(range, None)?;
        // What KVM knows is noted whatever fails: coverage may then say too much of a page of 1 GiB.
        let reach = self.reach(range, visibility, false).unwrap_or(range);
        let _turn = self.turn(range)?;
        if self.visibility.set(range, visibility, true) > 0 {
            self.memory().coverage.discarded(reach, Loss::Converted);
        }
        Ok(())
    }

    /// What the memory at `gpa` is, and how far that goes.
    pub fn visibility_at(&self, gpa: u64) -> Result<Run> {
        let end = 1 << self.gpa_bits()?;
        let rest = Range::between(gpa, end).ok_or_else(|| {
            Error::new(
                libc::ENOENT,
                Reason::RangeBeyondGuest,
                format!("{gpa:#x} is not below the end of the guest's addresses, {end:#x}"),
            )
            .hint("there is no more memory to ask for")
        })?;
        Ok(self.visibility.run(rest))
    }

    fn turn(&self, range: Range) -> Result<Turn<'_>> {
        self.turns.take(range).map_err(|_| would_deadlock(range).stage(Stage::Attributes))
    }

    /// Refuses what is no guest memory.
    pub(super) fn check_guest_range(&self, range: Range) -> Result<()> {
        let shared_bit = self.caps()?.gpa_shared_bit;
        // It may lie beyond the width: who passes it should hear of it, and not of that.
        let has_bit = (range.start | (range.end - 1)) & shared_bit != 0;
        if !has_bit {
            check_guest_width(range, self.gpa_bits()?)?;
        }
        if has_bit || shared_bit != 0 && range.end > shared_bit {
            return Err(Error::invalid(
                Reason::SharedBit,
                format!("guest range {range} has the bit that says \"shared\""),
            )
            .range(range)
            .hint("pass guest addresses without that bit"));
        }
        Ok(())
    }

    /// Refuses what is no guest memory, or too much at a time.
    fn check_convertible(&self, range: Range, max_size: Option<u64>) -> Result<()> {
        self.check_guest_range(range)?;
        match max_size {
            Some(most) if range.size() > most => Err(Error::invalid(
                Reason::ConvertTooLarge,
                format!("{:#x} bytes are to be converted at a time, and {most:#x} is the most", range.size()),
            )
            .stage(Stage::Attributes)
            .range(range)
            .hint("raise opts->max_size, or answer the guest with EINVAL")),
            _ => Ok(()),
        }
    }

    /// Refuses what cannot become that, before anything is done.
    fn check_slots(&self, slots: &[Placed], range: Range, to: Visibility, steps: Steps) -> Result<()> {
        let refused = |errno, reason, message: String, hint, part| {
            Err(Error::new(errno, reason, message).stage(Stage::Attributes).range(part).hint(hint))
        };
        let mut at = range.start;
        let hole = |at, end| {
            let Some(hole) = Range::between(at, end).filter(|_| to == Visibility::Private) else {
                return Ok(());
            };
            let message = format!("guest {hole} has no memslot, and cannot be private");
            refused(
                libc::EINVAL,
                Reason::NoMemslot,
                message,
                "tell the handle of every slot; else it is the guest's mistake",
                hole,
            )
        };
        if to == Visibility::Private && !self.caps()?.has_private_memory() {
            let message = "this VM has no private memory".to_string();
            return refused(
                libc::EOPNOTSUPP,
                Reason::NoPrivateMemory,
                message,
                "make a VM of a type that has (KVM_X86_*)",
                range,
            );
        }
        for placed in slots {
            let Some(part) = placed.place.intersect(&range) else { continue };
            hole(at, part.start)?;
            at = part.end;
            let id = placed.slot.id();
            let of_slot = |error: Error| Error { slot: Some(id), ..error };
            if placed.is_changing {
                let message = format!("memslot {id:#x} is about to change");
                return refused(
                    libc::EBUSY,
                    Reason::MemslotChanging,
                    message,
                    "convert again after kvmprep_memslot_note",
                    part,
                )
                .map_err(of_slot);
            }
            if to == Visibility::Private {
                self.check_guest_memfd(placed, part).map_err(of_slot)?;
            } else if steps.drop && self.visibility.first_to_convert(part, to).is_some() {
                self.check_is_open(placed, part).map_err(of_slot)?;
            }
        }
        hole(at, range.end)
    }

    /// Refuses a slot whose memory cannot be private: the guest would fault on it for ever.
    fn check_guest_memfd(&self, placed: &Placed, part: Range) -> Result<()> {
        let slot = &placed.slot;
        if !slot.has_guest_memfd() {
            return Err(Error::invalid(
                Reason::NoGmem,
                format!("guest {part} has no guest_memfd behind it, and cannot be private"),
            )
            .stage(Stage::Attributes)
            .range(part)
            .hint("give the memslot a guest_memfd, or answer the guest with EINVAL"));
        }
        self.check_is_open(placed, part)
    }

    /// Refuses a slot whose guest_memfd was closed. The descriptor may be another file's by now, which must lose nothing.
    fn check_is_open(&self, placed: &Placed, part: Range) -> Result<()> {
        let fd = placed.slot.region.guest_memfd;
        let now = self.kernel.file_status(fd).ok().map(|status| status.id);
        match placed.guest_memfd {
            Some(bound) if now != Some(bound) => Err(Error::new(
                libc::EBADF,
                Reason::BadFd,
                format!("descriptor {fd}, the guest_memfd of guest {part}, was closed"),
            )
            .stage(Stage::Attributes)
            .range(part)
            .hint("keep a guest_memfd open for as long as its memslot is there: KVM does not")),
            _ => Ok(()),
        }
    }

    fn set_attributes(&self, piece: Range, to: Visibility) -> Result<()> {
        let attributes = if to == Visibility::Private { MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
        self.kernel
            .set_attributes(self.fd(), piece, attributes)
            .map_err(|errno| refused_attributes(piece, to, errno))
    }
}

fn refused_attributes(piece: Range, to: Visibility, errno: Errno) -> Error {
    let error = Error::kernel(errno, &format!("making guest {piece} {to} (KVM_SET_MEMORY_ATTRIBUTES)"));
    let error =
        if errno.0 == libc::ENOMEM { Error { reason: Reason::MemoryShortage, ..error } } else { error };
    let error = error.stage(Stage::Attributes).range(piece);
    match errno.0 {
        libc::ENOTTY | libc::EINVAL => error.hint("needs Linux 6.8 and a VM of a type with private memory"),
        _ => error,
    }
}

/// A signal has come, or the vCPU is wanted elsewhere.
pub(super) fn interrupted(rest: Range, stage: Stage) -> Error {
    Error::new(libc::EINTR, Reason::Interrupted, "a signal came, or kvm_run.immediate_exit is set")
        .stage(stage)
        .range(rest)
        .hint("call again, and only the rest is done; populating may be left to the guest's faults")
}

/// What a conversion is done to.
struct OnVm<'a> {
    vm: &'a Vm,
    site: &'a Site<'a>,
    host: Host<'a>,
    options: &'a ConvertOptions<'a>,
}

impl Guest for OnVm<'_> {
    fn set(&self, piece: Range, to: Visibility) -> Result<()> {
        self.vm.set_attributes(piece, to)
    }

    fn unmapped(&self, piece: Range) {
        // Huge pages at the edges are unmapped as a whole.
        let Site { piece: all, reach, .. } = self.site;
        let lost = Range {
            start: if piece.start == all.start { reach.start } else { piece.start },
            end: if piece.end == all.end { reach.end } else { piece.end },
        };
        self.vm.memory().coverage.discarded(lost, Loss::Converted);
    }

    fn changed(&self, piece: Range, to: Visibility) -> Result<()> {
        let answer = (self.options.changed)(piece, to);
        if answer == 0 {
            return Ok(());
        }
        // A function that answers with errno itself, or with anything at all, has not said that all is well.
        let errno = if (-4095..0).contains(&answer) { -answer } else { libc::EINVAL };
        let hint = if self.options.steps.attributes {
            "see why the function failed, and call again; kvmprep_visibility_next() tells whether it was put back"
        } else {
            "see why the function failed, and call again, or set the attributes back and note that"
        };
        let message = format!("opts->changed() returned {answer} for guest {piece}, which becomes {to}");
        Err(Error::new(errno, Reason::CallbackFailed, message)
            .stage(Stage::Attributes)
            .range(piece)
            .hint(hint))
    }

    fn drop_side(&self, piece: Range, out_of_sight: Visibility, given: &mut Given) -> Result<()> {
        for (part, placed) in
            parts(&self.site.slots, piece).filter(|(_, placed)| placed.slot.has_guest_memfd())
        {
            // Nothing has gone out of sight: both sides are one file, and the guest may have written it since.
            if placed.is_one_sided {
                continue;
            }
            let is_shared = out_of_sight == Visibility::Shared;
            if is_shared {
                self.vm.visibility.set_kept(part, self.options.keep_shared);
            }
            // Whose memory is registered with userfaultfd would wait for its handler, with the turn.
            if is_shared && (self.options.keep_shared || placed.slot.nature.userfaultfd) {
                given.kept += part.size();
                continue;
            }
            let late = given.late;
            let outcome = self.host.drop_side(placed, part, out_of_sight, given);
            if given.late > late {
                // A huge page has gone as a whole, and with it what KVM had mapped of it, privately too.
                self.vm.memory().coverage.discarded(self.site.reach, Loss::Converted);
            }
            outcome?;
        }
        Ok(())
    }
}
