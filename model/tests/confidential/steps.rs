//! A TDX guest that does anything in any order, held against the plainest books on it.
//!
//! The books know nothing of tables, frames or modules: of each page only whether it is private, whether the guest has it,
//! and which word is in it. What each step answers follows from them. Calls of the module are busy at any time, which must
//! not be seen. `KVMPREP_MODEL_STEPS` says how many sequences there are.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use kvmprep_model::errno::Errno;
use kvmprep_model::tdx::{self, Seamcall, Status};
use kvmprep_model::units::{PAGE_SIZE, Privacy};
use kvmprep_model::vm::{Exit, Operation, Run};

use crate::bench::{Bench, Guest, IMAGE, done, is_memory_fault, run, tdx_vm};

/// So few pages that steps meet.
const PAGES: u64 = 5;

#[derive(Clone, Debug)]
enum Step {
    PreFault {
        first: u64,
        pages: u64,
    },
    Access {
        page: u64,
        operation: Operation,
        privacy: Privacy,
    },
    /// Without asking whether the page was accepted, which ends the guest if it was not.
    Reckless {
        page: u64,
        operation: Operation,
    },
    Convert {
        first: u64,
        pages: u64,
        to: Privacy,
    },
    Punch {
        first: u64,
        pages: u64,
    },
    DeleteSlot,
    CreateSlot,
    Busy {
        call: Seamcall,
        nth: u64,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..PAGES).prop_flat_map(|first| (Just(first), 1..=PAGES - first));
    let privacy = || prop_oneof![Just(Privacy::Private), Just(Privacy::Shared)];
    let operation = prop_oneof![
        2 => Just(Operation::Accept),
        3 => Just(Operation::Read),
        2 => any::<u64>().prop_map(Operation::Write),
        1 => Just(Operation::Fetch),
    ];
    let call = prop_oneof![
        Just(Seamcall::MemPageAug),
        Just(Seamcall::MemSeptAdd),
        Just(Seamcall::MemRangeBlock),
        Just(Seamcall::MemTrack),
        Just(Seamcall::MemPageRemove),
        Just(Seamcall::VpEnter),
    ];
    let step = prop_oneof![
        8 => range().prop_map(|(first, pages)| Step::PreFault { first, pages }),
        24 => (0..PAGES, operation, privacy())
            .prop_map(|(page, operation, privacy)| Step::Access { page, operation, privacy }),
        1 => (0..PAGES, prop_oneof![Just(Operation::Read), Just(Operation::Fetch)])
            .prop_map(|(page, operation)| Step::Reckless { page, operation }),
        8 => (range(), privacy()).prop_map(|((first, pages), to)| Step::Convert { first, pages, to }),
        3 => range().prop_map(|(first, pages)| Step::Punch { first, pages }),
        1 => Just(Step::DeleteSlot),
        4 => Just(Step::CreateSlot),
        6 => (call, 1..4u64).prop_map(|(call, nth)| Step::Busy { call, nth }),
    ];
    prop::collection::vec(step, 1..60)
}

/// What the guest has of a page privately.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Private {
    Nothing,
    Pending,
    Accepted(u64),
}

#[derive(Clone, Copy, Debug)]
struct Page {
    privacy: Privacy,
    private: Private,
    /// The word of the VMM's memory.
    shared: u64,
    /// It is mapped as shared memory.
    is_shared_mapped: bool,
    /// It is known to be no memory, which neither what it is told to be nor a slot changes: the guest hears of that from the
    /// processor, until a pre-fault finds memory.
    is_known_device: bool,
}

struct Books {
    pages: Vec<Page>,
    has_slot: bool,
    is_dead: bool,
}

impl Books {
    fn new() -> Self {
        let page = |nth| Page {
            privacy: Privacy::Private,
            private: if nth < IMAGE { Private::Accepted(nth + 1) } else { Private::Nothing },
            shared: nth + 1,
            is_shared_mapped: false,
            is_known_device: false,
        };
        Books { pages: (0..PAGES).map(page).collect(), has_slot: true, is_dead: false }
    }

    fn some(&mut self, first: u64, pages: u64) -> &mut [Page] {
        &mut self.pages[first as usize..(first + pages) as usize]
    }

    fn mapped(&self) -> u64 {
        let count =
            |page: &Page| u64::from(page.private != Private::Nothing) + u64::from(page.is_shared_mapped);
        self.pages.iter().map(count).sum()
    }
}

impl Page {
    fn forget(&mut self) {
        self.private = Private::Nothing;
        self.is_shared_mapped = false;
    }

    fn pre_fault(&mut self) {
        match self.privacy {
            Privacy::Shared => {
                self.is_shared_mapped = true;
                self.is_known_device = false;
            }
            Privacy::Private if self.private == Private::Nothing => self.private = Private::Pending,
            Privacy::Private => {}
        }
    }
}

/// What the books say of an access, if it does not end the guest.
fn expected_access(
    books: &mut Books,
    nth: u64,
    operation: Operation,
    privacy: Privacy,
) -> Option<Option<u64>> {
    let has_slot = books.has_slot;
    let page = &mut books.pages[nth as usize];
    if page.privacy != privacy || !has_slot {
        return None;
    }
    page.pre_fault();
    let word = match (privacy, &mut page.private) {
        (Privacy::Shared, _) => &mut page.shared,
        (Privacy::Private, Private::Accepted(word)) => word,
        (Privacy::Private, private) => {
            if operation != Operation::Accept {
                books.is_dead = true;
                return None;
            }
            *private = Private::Accepted(0);
            return Some(None);
        }
    };
    Some(match operation {
        Operation::Read => Some(*word),
        Operation::Write(new) => {
            *word = new;
            None
        }
        Operation::Accept | Operation::GiveUp | Operation::Fetch => None,
    })
}

fn access(bench: &Guest, books: &mut Books, page: u64, operation: Operation, privacy: Privacy) {
    // Nobody accepts shared memory, nor executes from it: a guest that tries is no guest, or a broken processor.
    let operation = match (privacy, operation) {
        (Privacy::Shared, Operation::Accept | Operation::Fetch) => Operation::Read,
        (_, operation) => operation,
    };
    let place = &mut books.pages[page as usize];
    place.is_known_device |=
        !books.has_slot && (place.privacy, privacy) == (Privacy::Shared, Privacy::Shared);
    let is_device = place.is_known_device && privacy == Privacy::Shared;
    let expected = if is_device { None } else { expected_access(books, page, operation, privacy) };
    let result = run(&bench.vcpu, page, operation, privacy);
    bench.vcpu.forget_queue();
    match expected {
        Some(word) => assert_eq!(result, done(word.as_slice())),
        None if books.is_dead => assert_eq!(result, Run { exit: Exit::Failed(Errno::EIO), read: vec![] }),
        // Shared memory without a slot is a device's, of which the guest is told itself.
        None if is_device => {
            assert!(matches!(result.exit, Exit::GuestException { .. }), "{result:?}");
        }
        None => assert!(is_memory_fault(&result, page), "{result:?}"),
    }
}

fn pre_fault(guest: &Guest, books: &mut Books, first: u64, pages: u64) {
    let answer = guest.pre_fault(first, pages);
    if books.has_slot {
        assert_eq!(answer, (0, Ok(())));
        books.some(first, pages).iter_mut().for_each(Page::pre_fault);
        return;
    }
    let page = &mut books.pages[first as usize];
    page.is_known_device |= page.privacy == Privacy::Shared;
    let errno = if page.privacy == Privacy::Shared { Errno::ENOENT } else { Errno::EFAULT };
    assert_eq!(answer, (pages, Err(errno)));
}

fn take(bench: &Bench, guest: &Guest, books: &mut Books, step: &Step) {
    match *step {
        Step::PreFault { first, pages } => pre_fault(guest, books, first, pages),
        Step::Access { page, operation, privacy } => {
            if privacy == Privacy::Private
                && !matches!(books.pages[page as usize].private, Private::Accepted(_))
            {
                access(guest, books, page, Operation::Accept, privacy);
            }
            access(guest, books, page, operation, privacy);
        }
        Step::Reckless { page, operation } => access(guest, books, page, operation, Privacy::Private),
        Step::Convert { first, pages, to } => {
            guest.convert(first, pages, to).unwrap();
            let pages = books.some(first, pages);
            // What is all so already is left alone.
            if pages.iter().any(|page| page.privacy != to) {
                for page in pages {
                    match to {
                        Privacy::Private => page.is_shared_mapped = false,
                        Privacy::Shared => page.private = Private::Nothing,
                    }
                    page.privacy = to;
                }
            }
        }
        Step::Punch { first, pages } => {
            guest.punch(first, pages);
            books.some(first, pages).iter_mut().for_each(|page| page.private = Private::Nothing);
        }
        Step::DeleteSlot => {
            let answer = guest.set_slot(0);
            assert_eq!(answer.is_ok(), books.has_slot);
            books.has_slot = false;
            books.pages.iter_mut().for_each(Page::forget);
        }
        Step::CreateSlot => {
            let answer = guest.set_slot(crate::bench::PAGES * PAGE_SIZE);
            assert_eq!(answer.is_ok(), !books.has_slot);
            books.has_slot = true;
        }
        Step::Busy { call, nth } => {
            // Busy twice in a row is what removing does not survive.
            if bench.module.failures().are_spent() {
                bench.module.failures().fail(call, nth, Status::OPERAND_BUSY);
            }
        }
    }
}

#[test]
fn a_guest_does_as_the_plainest_books_say() {
    let cases = std::env::var("KVMPREP_MODEL_STEPS").map_or(96, |cases| cases.parse().unwrap());
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&steps(), |steps| {
            let bench = Bench::new();
            let (guest, second) = bench.tdx_running();
            let mut books = Books::new();
            for step in &steps {
                take(&bench, &guest, &mut books, step);
                assert_eq!(guest.vm.is_dead(), books.is_dead, "{step:?}");
                if books.is_dead {
                    assert_eq!(tdx_vm(&guest.vm, tdx::Call::FinalizeVm), Err(Errno::EIO));
                    break;
                }
                guest.check();
                assert_eq!(guest.pages(), books.mapped(), "{step:?}");
                let private = books.pages.iter().filter(|page| page.private != Private::Nothing).count();
                assert_eq!(guest.pages_private(), private as u64, "{step:?}");
            }
            let td = std::sync::Arc::clone(guest.vm.tdx().unwrap().td().unwrap());
            drop((guest, second));
            assert_eq!((bench.module.frames_of(&td), td.children()), (0, 0));
            Ok(())
        })
        .unwrap();
}
