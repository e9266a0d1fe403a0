//! Makes memslots and ranges: mostly ones that a VMM would make, near each other, and wrong in a place or two.

use crate::input::{GIANT, HUGE, Input, PAGE};
use crate::world::World;
use kvmprep::abi::{KVMPREP_MEMSLOT_MEMORY_FD, kvmprep_memslot, kvmprep_range};

pub const LOG_DIRTY_PAGES: u32 = 1;
pub const READONLY: u32 = 2;
pub const GUEST_MEMFD: u32 = 4;

/// Slot numbers about which something is special: the last, KVM's own behind it, the last of 16 bits.
const NUMBERS: [u32; 8] = [0, 32763, 32764, 32765, 32766, 509, 0x7fff, 0xffff];

fn number(input: &mut Input) -> u32 {
    let number = if input.rarely(8) { input.pick(&NUMBERS) } else { input.below(48) as u32 };
    let space = input.pick(&[0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 0xffff]);
    number | space << 16
}

/// An address in this process: in the world's memory, mostly.
fn host_address(input: &mut Input, world: &World, gpa: u64) -> u64 {
    match input.below(16) {
        0..=8 => world.memory + HUGE * input.below(8) as u64,
        9 | 10 => world.memory + gpa % (8 * GIANT),
        11 => world.memory + PAGE * input.below(256) as u64,
        12 => (1 << 47) - PAGE * input.below(4) as u64,
        13 => 0,
        14 => input.place(),
        _ => input.number(),
    }
}

/// A slot of its own.
fn fresh(input: &mut Input, world: &World) -> kvmprep_memslot {
    let flags =
        input.code(&[0, 0, 0, 0, 0, 0, 1, 2, 3, GUEST_MEMFD, GUEST_MEMFD, GUEST_MEMFD, 5, 6, 8, 1 << 31]);
    let gpa = input.place();
    let mut slot = kvmprep_memslot {
        slot: number(input),
        flags,
        gpa,
        size: input.size(),
        hva: host_address(input, world, gpa),
        guest_memfd_offset: 0,
        guest_memfd: -1,
        backing: input.code(&[0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        attributes: input.code(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 15, 16]),
        memory_fd: -1,
        memory_fd_offset: 0,
        reserved: [0; 8],
    };
    if slot.flags & GUEST_MEMFD != 0 {
        guest_memfd(input, world, &mut slot);
    }
    if slot.attributes & 8 != 0 || input.rarely(16) {
        slot.memory_fd = input.pick(&world.descriptors);
        slot.memory_fd_offset = input.place();
    }
    if input.rarely(64) {
        slot.reserved[input.below(8)] = input.number();
    }
    slot
}

/// A guest_memfd for a slot, and a part of it that it mostly has.
fn guest_memfd(input: &mut Input, world: &World, slot: &mut kvmprep_memslot) {
    let some =
        if input.rarely(8) { &world.descriptors[..] } else { &world.descriptors[..world.guest_memfds] };
    slot.guest_memfd = input.pick(some);
    if !input.rarely(8) {
        slot.size = PAGE * (1 + input.below(8) as u64);
    }
    slot.guest_memfd_offset = match input.below(8) {
        0..=5 => PAGE * input.below(8) as u64,
        6 => input.size(),
        _ => input.place(),
    };
}

/// A slot: of its own, or made of one of those `near`, beside it, over it, or the same with a change.
pub fn slot(input: &mut Input, world: &World, near: &[kvmprep_memslot]) -> kvmprep_memslot {
    let mut slot = fresh(input, world);
    if input.rarely(2) {
        mend(world, &mut slot);
    }
    if near.is_empty() {
        return slot;
    }
    let other = near[input.below(near.len())];
    match input.below(8) {
        0..=2 => {}
        3 => slot.gpa = other.gpa.wrapping_add(other.size),
        4 => slot.gpa = other.gpa.wrapping_sub(slot.size),
        5 => slot.gpa = other.gpa.wrapping_add(other.size).wrapping_sub(PAGE),
        6 => (slot.slot, slot.size) = (other.slot, 0),
        _ => slot = other,
    }
    for _ in 0..input.pick(&[0, 0, 0, 1, 1, 2]) {
        change(input, world, &mut slot);
    }
    slot
}

/// Changes one thing about a slot.
fn change(input: &mut Input, world: &World, slot: &mut kvmprep_memslot) {
    match input.below(12) {
        0 => slot.slot = number(input),
        1 => slot.flags ^= input.pick(&[LOG_DIRTY_PAGES, READONLY, GUEST_MEMFD, 8]),
        2 => slot.gpa = input.place(),
        3 => slot.gpa = slot.gpa.wrapping_add(input.size()),
        4 => slot.size = input.size(),
        5 => slot.size = 0,
        6 => slot.hva = host_address(input, world, slot.gpa),
        7 => slot.hva = slot.hva.wrapping_add(input.size()),
        8 => slot.guest_memfd = input.pick(&world.descriptors),
        9 => slot.guest_memfd_offset = input.place(),
        10 => slot.backing = input.below(11) as u32,
        _ => slot.attributes = input.below(17) as u32,
    }
}

/// No more than whole pages of it.
pub fn pages(value: u64) -> u64 {
    value & !(PAGE - 1)
}

/// Makes a slot such that KVM could have taken it, by itself, and such that it can be populated.
fn mend(world: &World, slot: &mut kvmprep_memslot) {
    slot.size = pages(slot.size % (16 * GIANT)).max(PAGE);
    slot.gpa = pages(slot.gpa % (1 << 45));
    if !world.is_ours(slot.hva, slot.size) || slot.hva % PAGE != 0 {
        slot.hva = world.memory + pages(slot.hva % (8 * GIANT));
    }
    slot.guest_memfd_offset = pages(slot.guest_memfd_offset % (1 << 40));
    slot.flags &= LOG_DIRTY_PAGES | READONLY | GUEST_MEMFD;
    slot.guest_memfd = slot.guest_memfd.max(0);
    slot.backing %= 10;
    slot.attributes &= 7;
    slot.reserved = [0; 8];
}

/// The slots of a guest: one behind the other, mostly, and then wrong in a place or two.
pub fn slots(input: &mut Input, world: &World) -> Vec<kvmprep_memslot> {
    let count = if input.rarely(8) { input.below(41) } else { input.below(9) };
    let mut slots: Vec<kvmprep_memslot> = Vec::new();
    let is_sound = !input.rarely(6);
    let mut end = input.place() & !(PAGE - 1);
    if is_sound {
        end %= 1 << 40;
    }
    for index in 0..count {
        let mut slot = fresh(input, world);
        if !input.rarely(12) {
            (slot.slot, slot.gpa) = (index as u32 | slot.slot & 0x10000, end);
            if is_sound {
                mend(world, &mut slot);
            }
            end = end.saturating_add(slot.size).saturating_add(input.pick(&[0, 0, 0, PAGE]));
            if input.rarely(2) {
                end = end.checked_next_multiple_of(HUGE).unwrap_or(end);
            }
        }
        slots.push(slot);
    }
    if !slots.is_empty() && input.rarely(4) {
        let index = input.below(slots.len());
        let mut slot = slots[index];
        change(input, world, &mut slot);
        slots[index] = slot;
    }
    slots
}

/// Descriptors from here on are files of one slot each, for a kernel that knows no files.
pub const OWN_FILES: i32 = 5000;

/// The slots of a guest that converts: most have a guest_memfd, some lie next to each other, and each has memory and files
/// of its own, one piece of the world's addresses behind the other.
pub fn convertible_slots(input: &mut Input, world: &World) -> Vec<kvmprep_memslot> {
    let mut slots = Vec::new();
    let mut gpa = pages(input.place() % (1 << 35));
    let mut hva = world.memory + input.pick(&[0, 0, 0, PAGE, 7 * HUGE, 9 * HUGE]);
    for number in 0..1 + input.below(6) as u32 {
        let size = pages(input.size() % (8 * GIANT)).max(PAGE);
        if !world.is_ours(hva, size) {
            break;
        }
        let has_gmem = !input.rarely(4);
        let has_file = input.rarely(3);
        slots.push(kvmprep_memslot {
            slot: number,
            flags: if has_gmem { GUEST_MEMFD } else { 0 },
            gpa,
            size,
            hva,
            guest_memfd_offset: if has_gmem { input.pick(&[0, 0, PAGE, HUGE]) } else { 0 },
            guest_memfd: if has_gmem { OWN_FILES + 2 * number as i32 } else { -1 },
            backing: 0,
            attributes: if has_file { KVMPREP_MEMSLOT_MEMORY_FD } else { 0 },
            memory_fd: if has_file { OWN_FILES + 1 + 2 * number as i32 } else { -1 },
            memory_fd_offset: 0,
            reserved: [0; 8],
        });
        hva += size;
        gpa += size + input.pick(&[0, 0, 0, PAGE, HUGE, GIANT]);
    }
    slots
}

/// A range: in or near one of the slots, or anywhere; of whole pages, mostly.
pub fn range(input: &mut Input, near: &[kvmprep_memslot]) -> kvmprep_range {
    let mut range = kvmprep_range { gpa: input.place(), size: input.size(), reserved: [0; 2] };
    if !near.is_empty() && !input.rarely(8) {
        let slot = near[input.below(near.len())];
        let skipped = PAGE * input.below(16) as u64;
        (range.gpa, range.size) = match input.below(8) {
            0 | 1 => (slot.gpa, slot.size),
            2 | 6 | 7 => (slot.gpa.wrapping_add(skipped), PAGE),
            3 => (slot.gpa.wrapping_add(skipped), slot.size.saturating_sub(skipped)),
            4 => (slot.gpa, range.size),
            _ => (slot.gpa.wrapping_add(slot.size).wrapping_sub(range.size), range.size),
        };
    }
    if !input.rarely(16) {
        range.gpa -= range.gpa % PAGE;
        range.size -= range.size % PAGE;
    }
    if input.rarely(64) {
        range.reserved[input.below(2)] = input.number();
    }
    range
}

/// Some ranges.
pub fn ranges(input: &mut Input, near: &[kvmprep_memslot]) -> Vec<kvmprep_range> {
    let count = if input.rarely(16) { input.below(32) } else { input.pick(&[0, 0, 1, 1, 1, 1, 2, 3]) };
    (0..count).map(|_| range(input, near)).collect()
}
