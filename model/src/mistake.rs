//! Rules that are broken on purpose, to see that whoever holds the model against a real kernel would notice.
//!
//! Each stands where the rule does, as a question: `mistaken(Mistake::…)`. Without the feature `mistakes` the answer is a
//! constant, and the model has no way to be wrong on purpose. With it one mistake at a time may be made, by the whole
//! process. Nothing but the search for mistakes turns the feature on.

macro_rules! mistakes {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A rule that is broken.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Mistake {
            $($(#[$doc])* $name,)*
        }

        impl Mistake {
            /// All of them.
            pub const ALL: &[Mistake] = &[$(Mistake::$name,)*];
        }
    };
}

mistakes! {
    /// A slot may have huge pages though guest and host addresses do not lie alike in their frames.
    AddressesNeedNotLieAlike,
    /// A slot may have a huge page at its start though it begins within that page's frame.
    ASlotMayBeginWithinAHugePage,
    /// After a change of attributes the frame at the start of the range is not looked at.
    AMixedFrameAtTheHeadIsForgotten,
    /// Nor the frame at its end.
    AMixedFrameAtTheTailIsForgotten,
    /// A new slot does not know what attributes there are already.
    ANewSlotHasNoMixedFrames,
    /// Attributes may be set of a part of a page.
    AttributesMayEndWithinAPage,
    /// Attributes that are set to what they are undo mappings all the same.
    AttributesAreSetAgain,
    /// A part of a guest_memfd may be bound to two slots.
    APartOfAFileMayBeBoundTwice,
    /// A hole leaves the last of its pages mapped.
    AHoleLeavesItsLastPageMapped,
    /// A slot uses its guest_memfd from the start, wherever it is bound.
    TheOffsetInAFileIsForgotten,
    /// A guest_memfd that was closed still has pages for its slots.
    AClosedFileHasPages,
    /// A pre-fault that came to something before it failed fails.
    APartlyDonePreFaultFails,
    /// A slot that is deleted takes its own mappings alone, though the VMM has not asked for that.
    ADeletedSlotTakesItsOwnMappingsAlone,
    /// A slot that is read-only is written.
    AReadOnlySlotIsWritten,
    /// A page that was only read is a page already.
    ThereIsNoZeroPage,
    /// KVM is told of one page where the host breaks up a huge one.
    ABrokenUpHugePageIsToldOfAsOnePage,
    /// A vCPU in SMM uses the first address space.
    SmmHasNoAddressSpace,
    /// A slot that is logged has huge pages.
    ALoggedSlotHasHugePages,
    /// The end of a log leaves small pages small.
    TheEndOfALogLeavesSmallPages,
    /// A page whose bit was taken out of the log is written again unnoticed.
    ALogIsReadOnce,
    /// A slot may move to where another is.
    ASlotMayMoveOntoAnother,
    /// The file of a new slot is looked at before the slots that it would overlap.
    FilesAreLookedAtBeforeOtherSlots,
    /// A fault that is to be tried again counts as handled.
    ARetryCountsAsFixed,
    /// Where there was no memory there is none for ever.
    NoMemoryIsRememberedForEver,
}

#[cfg(feature = "mistakes")]
mod made {
    use super::Mistake;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// The number of a mistake, from 1 on.
    static MADE: AtomicUsize = AtomicUsize::new(0);

    impl Mistake {
        /// Makes this one from now on, or none, in place of the one before.
        pub fn make(which: Option<Mistake>) {
            MADE.store(which.map_or(0, |mistake| mistake as usize + 1), Ordering::Relaxed);
        }
    }

    /// Whether a mistake is being made.
    pub(crate) fn mistaken(mistake: Mistake) -> bool {
        MADE.load(Ordering::Relaxed) == mistake as usize + 1
    }
}

#[cfg(feature = "mistakes")]
pub(crate) use made::mistaken;

/// Whether a mistake is being made: never.
#[cfg(not(feature = "mistakes"))]
pub(crate) const fn mistaken(_: Mistake) -> bool {
    false
}
