/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Two libraries written in Rust in one C program, each with a Rust runtime of its own. Panics of one must end
 * in that one, and none may reach C.
 *
 * kvmprep has no way to make it panic, by intent. A clock that fails is one that Rust itself offers: its
 * standard library takes that for impossible.
 */
#define _GNU_SOURCE
#include "populate.h"
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* other.rs: panics inside and returns 1 when that was caught. */
int other_panics_and_catches(void);

static int clock_is_broken, clock_was_asked;

/* Takes the place of libc's, for both libraries. */
int clock_gettime(clockid_t clock, struct timespec *now) {
    clock_was_asked = 1;
    if (clock_is_broken) {
        errno = EINVAL;
        return -1;
    }
    return (int)syscall(SYS_clock_gettime, clock, now);
}

static void kvmprep_panics_and_catches(const struct guest *guest) {
    struct kvmprep_error err;
    struct kvmprep_vm *vm;
    struct kvmprep_job *job = NULL;
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    int code;

    config.vm_fd = guest->vm;
    slot.hva = (uintptr_t)guest->ram;
    slot.size = RAM_SIZE;
    REQUIRE(kvmprep_vm_new(&config, &vm, &err) == 0);
    REQUIRE(kvmprep_memslot_note(vm, &slot, &err) == 0);
    clock_was_asked = 0;
    clock_is_broken = 1;
    code = kvmprep_job_new(vm, NULL, 0, &opts, &job, &err);
    clock_is_broken = 0;
    REQUIRE(clock_was_asked);
    REQUIRE(code == -ENOTRECOVERABLE && err.reason == KVMPREP_REASON_PANICKED && job == NULL);
    REQUIRE(kvmprep_vm_free(vm) == 0);
}

int main(void) {
    struct guest guest;
    REQUIRE(other_panics_and_catches() == 1);
    guest = guest_make();
    kvmprep_panics_and_catches(&guest);
    REQUIRE(other_panics_and_catches() == 1);
    populate(&guest);
    return EXIT_SUCCESS;
}
