//! A guest: a handle, and beside it, by arithmetic of its own, what the handle should know.

use crate::call::{Answer, call, call_with};
use crate::fake::Fake;
use crate::heap::{Block, Passed, bytes_of, bytes_of_all};
use crate::image::Image;
use crate::input::{GIANT, HUGE, Input};
use crate::oracle::{demand, judge_output, judge_overlap, memory_in, overlap};
use crate::slots;
use crate::world::World;
use kvmprep::abi::*;
use kvmprep::error::Reason;
use kvmprep::kvm::{MappedObject, Mapping};
use kvmprep::range::{Range, RangeSet};
use kvmprep::vm::{Config, Vm};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_void;
use std::os::fd::RawFd;
use std::sync::Arc;

/// A handle.
pub struct Guest {
    pub vm: *mut kvmprep_vm,
    /// Whether a real VM and real memory are beneath it.
    pub is_real: bool,
    /// The slots that the handle was told of, by number.
    pub record: BTreeMap<u32, kvmprep_memslot>,
    /// What the VM beneath offers.
    pub caps: kvmprep_caps,
    /// Whether the handle holds slots to a width of its own.
    pub has_own_width: bool,
    /// Whether memory may have been populated.
    pub has_touched: bool,
    /// Whether a change was announced at some time: jobs may wait two seconds for its end, and often.
    pub may_hold_up: bool,
    /// The kernel that is none, where that is beneath.
    pub fake: Option<Arc<Fake>>,
    /// Bits of its addresses.
    pub gpa_bits: u32,
    /// What of its memory is private.
    pub private: RangeSet,
    /// What was claimed for its initial image.
    pub image: Image,
    /// Pieces that conversions may have left to later ones.
    pub unfinished: u64,
    /// The slots that the real VM has been given.
    in_kernel: BTreeSet<u32>,
    /// Whether the handle knows what the real VM knows.
    is_in_step: bool,
    world: &'static World,
}

impl Guest {
    /// Over a real VM, or over a kernel that is none.
    pub fn new(input: &mut Input, world: &'static World) -> Self {
        let real = world.vm.as_ref().filter(|_| input.rarely(3));
        let (vm, caps, own_width, fake) = match real {
            Some((vm_fd, caps)) => (over_real(input, *vm_fd), *caps, None, None),
            None => over_fake(input, world),
        };
        Self {
            vm,
            is_real: real.is_some(),
            record: BTreeMap::new(),
            caps,
            has_own_width: own_width.is_some(),
            has_touched: false,
            may_hold_up: false,
            fake,
            gpa_bits: own_width.unwrap_or(caps.gpa_bits),
            private: RangeSet::new(),
            image: Image::default(),
            unfinished: 0,
            in_kernel: BTreeSet::new(),
            is_in_step: true,
            world,
        }
    }

    /// The slots that the handle knows.
    pub fn slots(&self) -> Vec<kvmprep_memslot> {
        self.record.values().copied().collect()
    }

    /// Where the memory of a kernel that is none is nothing but anonymous.
    pub fn first_plain_memory(&self) -> u64 {
        self.world.memory + 7 * HUGE
    }

    /// A slot that may be given to this handle.
    fn slot(&self, input: &mut Input) -> kvmprep_memslot {
        let mut slot = slots::slot(input, self.world, &self.slots());
        self.keep_harmless(&mut slot);
        slot
    }

    /// What could be populated must be ours.
    fn keep_harmless(&self, slot: &mut kvmprep_memslot) {
        if self.is_real && !self.world.is_harmless(slot.hva, slot.size) {
            slot.hva = self.world.memory;
            slot.size %= 8 * GIANT;
        }
    }

    /// Slots, where there are none yet.
    pub fn furnish(&mut self, input: &mut Input) {
        if self.record.is_empty() {
            self.set_memslots(input);
        }
    }

    pub fn set_memslots(&mut self, input: &mut Input) {
        const NAME: &str = "kvmprep_vm_set_memslots";
        let mut slots = if self.caps.memory_attributes != 0 && !input.rarely(4) {
            slots::convertible_slots(input, self.world)
        } else {
            slots::slots(input, self.world)
        };
        slots.iter_mut().for_each(|slot| self.keep_harmless(slot));
        let block = Block::new(&bytes_of_all(&slots), input.passed());
        let answer = call(input, NAME, &slots, |err| {
            // SAFETY: the handle lives; the block has that many slots.
            unsafe { kvmprep_vm_set_memslots(self.vm, block.pointer(), slots.len(), err) }
        });
        if answer.is_success() {
            let record: BTreeMap<u32, kvmprep_memslot> =
                slots.iter().map(|slot| (slot.slot, *slot)).collect();
            demand(record.len() == slots.len(), NAME, "no number twice");
            let has_overlap = slots.iter().any(|a| slots.iter().any(|b| overlap(a, b)));
            demand(!has_overlap, NAME, "no two slots overlap");
            demand(slots.iter().all(|slot| slot.size != 0), NAME, "no deletions");
            self.record = record;
            self.is_in_step = false;
        }
        judge_overlap(NAME, &answer, &slots, None);
    }

    pub fn set(&mut self, input: &mut Input) {
        const NAME: &str = "kvmprep_memslot_set";
        let (slot, answer) = self.tell(input, NAME, kvmprep_memslot_set);
        if self.is_real && answer.is_success() {
            self.in_kernel.insert(slot.slot);
        }
        if self.is_real && self.is_in_step {
            // KVM itself agrees that what passes the checks is right, but for memory that it has not got.
            let is_refused = answer.error_of(Reason::KernelRefused).is_some_and(|e| e.code != -libc::ENOMEM);
            demand(!is_refused, NAME, "KVM takes what passes");
        }
    }

    pub fn note(&mut self, input: &mut Input) {
        let (_, answer) = self.tell(input, "kvmprep_memslot_note", kvmprep_memslot_note);
        self.is_in_step &= !answer.is_success();
    }

    fn tell(
        &mut self,
        input: &mut Input,
        name: &'static str,
        function: unsafe extern "C" fn(*mut kvmprep_vm, *const kvmprep_memslot, *mut kvmprep_error) -> i32,
    ) -> (kvmprep_memslot, Answer) {
        let slot = self.slot(input);
        let block = Block::new(&bytes_of(&slot), input.passed());
        let answer = call(input, name, &slot, |err| {
            // SAFETY: the handle lives; the block is a slot.
            unsafe { function(self.vm, block.pointer(), err) }
        });
        judge_overlap(name, &answer, &self.slots(), Some(&slot));
        if answer.is_success() {
            demand(!self.record.values().any(|other| overlap(other, &slot)), name, "no two slots overlap");
            if slot.size == 0 {
                self.record.remove(&slot.slot);
            } else {
                self.record.insert(slot.slot, slot);
            }
        }
        (slot, answer)
    }

    pub fn changing(&mut self, input: &mut Input) {
        let known = self.slots();
        let slot = if known.is_empty() || input.rarely(4) {
            self.slot(input)
        } else {
            known[input.below(known.len())]
        }
        .slot;
        self.may_hold_up = true;
        call(input, "kvmprep_memslot_changing", &slot, |err| {
            // SAFETY: the handle lives.
            unsafe { kvmprep_memslot_changing(self.vm, slot, err) }
        });
    }

    pub fn discarded(&mut self, input: &mut Input) {
        let range = slots::range(input, &self.slots());
        let block = Block::new(&bytes_of(&range), input.passed());
        call(input, "kvmprep_range_discarded", &range, |err| {
            // SAFETY: the handle lives; the block is a range.
            unsafe { kvmprep_range_discarded(self.vm, block.pointer(), err) }
        });
    }

    pub fn host_discarded(&mut self, input: &mut Input) {
        let slot = self.slot(input);
        call(input, "kvmprep_host_range_discarded", &(slot.hva, slot.size), |err| {
            // SAFETY: the handle lives; the memory is not read.
            unsafe {
                kvmprep_host_range_discarded(self.vm, slot.hva as *const c_void, slot.size as usize, err)
            }
        });
    }

    pub fn coverage(&mut self, input: &mut Input) {
        const NAME: &str = "kvmprep_get_coverage";
        let range = slots::range(input, &self.slots());
        let place = Block::new(&bytes_of(&range), input.passed());
        let whole = size_of::<kvmprep_coverage>();
        let size = input.struct_size(whole);
        let out = Block::output(size, input.passed());
        let answer = call(input, NAME, &(range, size), |err| {
            // SAFETY: the handle lives; the blocks are a range and as many bytes as are said.
            unsafe { kvmprep_get_coverage(self.vm, place.pointer(), out.pointer(), size, err) }
        });
        judge_output(NAME, &out, whole, answer.is_success());
        if answer.is_success() && size >= whole {
            let coverage = out.read::<kvmprep_coverage>();
            let memory = memory_in(&range, self.record.values());
            demand(coverage.memory == memory, NAME, "as much memory as the slots have there");
            demand(coverage.host.max(coverage.stage2) <= memory, NAME, "no more is covered than there is");
            demand(coverage.stage2_writable <= coverage.stage2, NAME, "what is writable is there");
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Whatever was set in the VM must not be there for the next program.
        self.in_kernel.iter().for_each(|slot| self.world.delete_slot(*slot));
        // SAFETY: the handle has not been freed, and has no jobs any more.
        let freed = unsafe { kvmprep_vm_free(self.vm) };
        demand(
            freed == 0 || std::thread::panicking(),
            "kvmprep_vm_free",
            "a handle without jobs can be freed",
        );
        if self.has_touched {
            self.world.clear();
        }
    }
}

/// A handle over a VM.
fn over_real(input: &mut Input, vm_fd: RawFd) -> *mut kvmprep_vm {
    let config = kvmprep_vm_config {
        struct_size: size_of::<kvmprep_vm_config>() as u32,
        flags: input.pick(&[0, KVMPREP_VM_MAPPINGS_ARE_KEPT]),
        vm_fd,
        gpa_bits: 0,
        vm_type: 0,
        alignment_rule: input.pick(&ALIGNMENT_RULES),
        gpa_shared_bit: 0,
        reserved: 0,
    };
    let mut vm = std::ptr::null_mut();
    let answer = call_with(Passed::Right, "kvmprep_vm_new", &config, |err| {
        // SAFETY: all three live.
        unsafe { kvmprep_vm_new(&config, &mut vm, err) }
    });
    demand(answer.is_success(), "kvmprep_vm_new", "a handle for a VM");
    vm
}

const ALIGNMENT_RULES: [u32; 4] = [
    KVMPREP_ALIGN_CONGRUENT,
    KVMPREP_ALIGN_STRICT,
    KVMPREP_ALIGN_SIZE | KVMPREP_ALIGN_STRICT,
    KVMPREP_ALIGN_KERNEL,
];

/// What a kernel tells of its huge pages.
const FILES: [(&str, &str); 3] = [
    ("/sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never\n"),
    ("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [advise] never deny force\n"),
    ("/proc/sys/kernel/osrelease", "7.3.4\n"),
];

/// A handle over a kernel that says yes to everything, what it offers, the guest's width where that is another, and the kernel.
fn over_fake(
    input: &mut Input,
    world: &World,
) -> (*mut kvmprep_vm, kvmprep_caps, Option<u32>, Option<Arc<Fake>>) {
    let start = world.memory;
    let mut fake = Fake::new(Range { start: start + HUGE * 7, end: start + 64 * GIANT });
    let mappings = fake.mappings.get_mut().expect("no thread has it");
    let rest = mappings[0];
    let mapping = |at: u64, writable, object| Mapping {
        start: start + HUGE * at,
        end: start + HUGE * (at + 1),
        writable,
        shared: object == MappedObject::Shmem,
        page_size: if object == MappedObject::Hugetlb { HUGE } else { rest.page_size },
        object,
        ..rest
    };
    // One piece is not mapped.
    let kinds = [
        mapping(0, true, MappedObject::Anonymous),
        mapping(1, false, MappedObject::Anonymous),
        mapping(2, true, MappedObject::Shmem),
        mapping(3, true, MappedObject::File),
        mapping(5, true, MappedObject::GuestMemfd),
        mapping(6, true, MappedObject::Hugetlb),
    ];
    mappings.splice(0..0, kinds);
    fake.files = FILES
        .iter()
        .filter(|_| !input.rarely(4))
        .map(|(name, text)| (name.to_string(), text.to_string()))
        .collect();
    fake.has_pre_fault = input.pick(&[true, true, false]);
    fake.has_no_query = input.rarely(4);
    fake.has_private = !input.rarely(4);
    let gpa_bits = input.pick(&[None, None, None, Some(36), Some(48), Some(52)]);
    let config = Config {
        vm_fd: 0,
        // SW_PROTECTED, SNP, TDX.
        vm_type: if fake.has_private { input.pick(&[0, 1, 0, 1, 0, 1, 4, 5]) } else { 0 },
        gpa_bits,
        mappings_are_kept: input.rarely(2),
        gpa_shared_bit: input.pick(&[0, 0, 1 << 47, 1 << 51]),
        ..Config::default()
    };
    let fake = Arc::new(fake);
    let vm = Vm::new(fake.clone(), config).expect("the kernel says yes");
    let caps = kvmprep_caps::from(vm.caps().expect("the kernel says yes"));
    (Box::into_raw(Box::new(kvmprep_vm::from(Arc::new(vm)))), caps, gpa_bits, Some(fake))
}
