//! The order of a conversion: what neither exposes nor loses data, and can be taken up again where it failed.
//!
//! Piece by piece: KVM is told, the caller is told, and only then is the memory given up that has gone out of sight. Where
//! the caller fails, KVM is told back. What is done to KVM and memory is behind a trait; this must stay the only place
//! that knows the order. Whoever calls has the turn for the range ([`super::turns`]).

use super::visibility::{Task, Visibility, VisibilityMap};
use crate::error::{Error, Result};
use crate::range::Range;

/// At most this much is made private or shared at once, in bytes: KVM holds other vCPUs up meanwhile, for a time that grows
/// with the size and that no signal ends. Pieces end at its multiples.
pub const PIECE: u64 = 64 << 20;

/// What a conversion is done to.
pub trait Guest {
    /// Makes `piece` that in KVM. All of it, or nothing when it fails.
    fn set(&self, piece: Range, to: Visibility) -> Result<()>;
    /// What was mapped of `piece` is not any more.
    fn unmapped(&self, _piece: Range) {}
    /// Tells the caller that `piece` has become that.
    fn changed(&self, piece: Range, to: Visibility) -> Result<()>;
    /// Gives up the memory behind `piece` that it had as `out_of_sight`.
    /// `given` says what became of it, also on an error.
    fn drop_side(&self, piece: Range, out_of_sight: Visibility, given: &mut Given) -> Result<()>;
}

/// What is to be done; see `kvmprep_convert_opts`.
#[derive(Clone, Copy, Debug)]
pub struct Steps {
    /// KVM is told. Where not, the caller has done it.
    pub attributes: bool,
    /// What has gone out of sight is given up.
    pub drop: bool,
}

/// What became of memory that has gone out of sight, in bytes; what nothing lies behind is neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Given up.
    pub up: u64,
    /// Kept.
    pub kept: u64,
    /// Given up beside the piece: kept before, since a huge page goes as a whole.
    pub late: u64,
    /// Of this, what was told as kept on the same occasion.
    pub kept_no_more: u64,
}

/// What was done, in bytes and calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// Has become something else.
    pub converted: u64,
    /// Was given up.
    pub dropped: u64,
    /// Is out of sight and was not given up.
    pub kept: u64,
    /// Times that KVM was told.
    pub calls: u64,
}

/// Makes `range` private or shared; `done` says what was, also on an error, which says from where on it was not.
pub fn convert(
    map: &VisibilityMap,
    guest: &dyn Guest,
    range: Range,
    to: Visibility,
    steps: Steps,
    done: &mut Converted,
) -> Result<()> {
    let mut rest = Some(range);
    while let Some((part, task)) = rest.and_then(|rest| map.first_to_convert(rest, to)) {
        let piece = first_piece(part);
        convert_piece(map, guest, piece, to, task, steps, done)
            .map_err(|error| Error { range: Some(Range { start: piece.start, end: range.end }), ..error })?;
        rest = Range::between(piece.end, range.end);
    }
    Ok(())
}

/// What of `part` is made private or shared at once.
pub fn first_piece(part: Range) -> Range {
    let end = (part.start - part.start % PIECE).saturating_add(PIECE);
    Range { start: part.start, end: part.end.min(end) }
}

/// The pieces of `range` that there is work in, in order; `work` finds the first of it. A guest may ask for all addresses
/// there are, and must not make anybody go through them.
pub fn pieces(range: Range, work: impl Fn(Range) -> Option<Range>) -> impl Iterator<Item = Range> {
    let mut rest = Some(range);
    std::iter::from_fn(move || {
        let left = rest?;
        let found = work(left)?.start;
        let start = left.start.max(found - found % PIECE);
        let piece = first_piece(Range { start, ..left });
        rest = Range::between(piece.end, range.end);
        Some(piece)
    })
}

fn convert_piece(
    map: &VisibilityMap,
    guest: &dyn Guest,
    piece: Range,
    to: Visibility,
    task: Task,
    steps: Steps,
    done: &mut Converted,
) -> Result<()> {
    // What the caller was never told of, it must still be told of after this is put back.
    let was_unfinished = map.is_unfinished(piece);
    if task == Task::Convert {
        if steps.attributes {
            guest.set(piece, to)?;
            done.calls += 1;
        }
        map.set(piece, to, false);
        guest.unmapped(piece);
        done.converted += piece.size();
    }
    if let Err(failure) = guest.changed(piece, to) {
        // Back to what it was, unless KVM will not, or it is not ours to say: then it stays unfinished.
        if task == Task::Convert && steps.attributes && guest.set(piece, to.other()).is_ok() {
            done.calls += 1;
            map.set(piece, to.other(), !was_unfinished);
            guest.unmapped(piece);
            done.converted -= piece.size();
        }
        return Err(failure);
    }
    if steps.drop {
        let mut given = Given::default();
        let outcome = guest.drop_side(piece, to.other(), &mut given);
        done.dropped += given.up + given.late;
        done.kept = (done.kept + given.kept).saturating_sub(given.kept_no_more);
        outcome?;
    } else if to == Visibility::Private {
        // It is for the VMM alone to give up, and does not go with a huge page either.
        map.set_kept(piece, true);
    }
    map.finish(piece);
    Ok(())
}
