//! A program: some calls, one after the other, as the bytes say.

use crate::call::call;
use crate::guest::Guest;
use crate::heap::{Block, bytes_of_all, growing};
use crate::input::{Input, PAGE};
use crate::oracle::{demand, judge_output};
use crate::world::World;
use crate::{conversion, image, memslots, populate, slots};
use kvmprep::abi::*;

/// The most calls of a program, so that none takes long.
const MOST_CALLS: usize = 48;

/// Runs the program that the bytes are.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let world = World::get();
    let mut guest: Option<Guest> = None;
    for _ in 0..MOST_CALLS {
        if input.is_empty() {
            break;
        }
        step(&mut input, world, &mut guest);
    }
}

fn step(input: &mut Input, world: &'static World, guest: &mut Option<Guest>) {
    match input.below(32) {
        0..=8 => return memslots::any(input, world),
        9 => return without_handle(input, world),
        _ => {}
    }
    let guest = guest.get_or_insert_with(|| Guest::new(input, world));
    match input.below(40) {
        0..=3 => guest.set_memslots(input),
        4..=6 => guest.set(input),
        7 | 8 => guest.note(input),
        9 => guest.changing(input),
        10 => guest.discarded(input),
        11 => guest.host_discarded(input),
        12 | 13 => guest.coverage(input),
        14..=16 => populate::populate(input, guest),
        17 | 18 => populate::job(input, guest),
        19..=32 => conversion::any(input, guest, true),
        33..=36 => image::any(input, guest),
        _ => memslots::with_guest(input, world, guest),
    }
}

/// What takes neither a handle nor a slot.
fn without_handle(input: &mut Input, world: &World) {
    match input.below(5) {
        0 => probe(input, world),
        1 => fault_stats(input, world),
        2 => pre_fault(input, world),
        3 => gmem_create(input, world),
        _ => vm_new(input, world),
    }
}

fn probe(input: &mut Input, world: &World) {
    let (kvm, vm) = (input.pick(&world.descriptors), input.pick(&world.descriptors));
    let whole = size_of::<kvmprep_caps>();
    let size = input.struct_size(whole);
    let out = Block::output(size, input.passed());
    let answer = call(input, "kvmprep_probe", &(kvm, vm, size), |err| {
        // SAFETY: the block has that many bytes.
        unsafe { kvmprep_probe(kvm, vm, out.pointer(), size, err) }
    });
    judge_output("kvmprep_probe", &out, whole, answer.is_success());
}

fn fault_stats(input: &mut Input, world: &World) {
    let fds: Vec<i32> = (0..input.below(4)).map(|_| input.pick(&world.descriptors)).collect();
    let block = Block::new(&bytes_of_all(&fds), input.passed());
    let whole = size_of::<kvmprep_fault_stats>();
    let size = input.struct_size(whole);
    let out = Block::output(size, input.passed());
    let answer = call(input, "kvmprep_get_fault_stats", &(&fds, size), |err| {
        // SAFETY: the blocks have that many descriptors and bytes.
        unsafe { kvmprep_get_fault_stats(block.pointer(), fds.len(), out.pointer(), size, err) }
    });
    judge_output("kvmprep_get_fault_stats", &out, whole, answer.is_success());
}

fn pre_fault(input: &mut Input, world: &World) {
    let fd = input.pick(&world.descriptors);
    let range = slots::range(input, &[]);
    let block = Block::new(&bytes_of_all(&[range]), input.passed());
    let answer = call(input, "kvmprep_vcpu_pre_fault", &(fd, range), |err| {
        // SAFETY: the block is a range.
        unsafe { kvmprep_vcpu_pre_fault(fd, block.pointer(), err) }
    });
    demand(!answer.is_success(), "kvmprep_vcpu_pre_fault", "none of these is a vCPU");
}

fn gmem_create(input: &mut Input, world: &World) {
    const NAME: &str = "kvmprep_gmem_create";
    let vm = input.pick(&world.descriptors);
    let (size, flags) = (input.size(), input.code(&[0, 1, 2, 3, 4]).into());
    let answer = call(input, NAME, &(vm, size, flags), |err| {
        // SAFETY: no memory but err's is passed.
        unsafe { kvmprep_gmem_create(vm, size, flags, err) }
    });
    if answer.is_success() {
        demand(size > 0 && size % PAGE == 0 && size < 1 << 63, NAME, "a size that a file can have");
        // SAFETY: the descriptor is new, and nobody else's.
        let flags = unsafe { (libc::fcntl(answer.code, libc::F_GETFD), libc::close(answer.code)) };
        demand(flags == (libc::FD_CLOEXEC, 0), NAME, "a descriptor that is closed on exec");
    }
}

fn vm_new(input: &mut Input, world: &World) {
    let config = kvmprep_vm_config {
        struct_size: 0,
        flags: input.code(&[0, 0, 0, 1, 2, 3, 4]),
        vm_fd: match world.vm {
            Some((vm, _)) if !input.rarely(3) => vm,
            _ => input.pick(&world.descriptors),
        },
        gpa_bits: input.code(&[0, 0, 0, 12, 36, 48, 52, 11, 53]),
        vm_type: input.code(&[0, 0, 1, 2, 3, 4, 5]),
        alignment_rule: input.code(&[0, 0, 1, 2, 3, 4, 0x100, 0x101]),
        gpa_shared_bit: input.code(&[0, 0, 0, 47, 51, 52, 64]),
        reserved: input.pick(&[0, 0, 0, 0, 0, 0, 0, 1]),
    };
    let block = Block::new(&growing(input, &config), input.passed());
    let untouched = usize::MAX;
    let out = Block::new(&untouched.to_ne_bytes(), input.passed());
    let answer = call(input, "kvmprep_vm_new", &config, |err| {
        // SAFETY: the blocks are as many bytes as are said, and a pointer.
        unsafe { kvmprep_vm_new(block.pointer(), out.pointer(), err) }
    });
    let made = out.read::<usize>();
    demand(
        (made != untouched) == answer.is_success(),
        "kvmprep_vm_new",
        "a handle on success, and nothing else",
    );
    if answer.is_success() {
        // SAFETY: a handle, which nobody else has.
        demand(
            unsafe { kvmprep_vm_free(made as *mut kvmprep_vm) } == 0,
            "kvmprep_vm_free",
            "it can be freed",
        );
    }
}
