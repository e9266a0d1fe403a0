/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the C programs share: all of a guest's memory prepared by the blocking call, on the thread that calls,
 * and the kernel asked whether that is so.
 */
#ifndef POPULATE_H
#define POPULATE_H

#include <kvmprep.h>
#include "guest.h"

static inline void populate(struct guest *guest) {
    struct kvmprep_error err;
    struct kvmprep_vm *vm;
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;

    REQUIRE(guest_resident(guest) == 0);
    config.vm_fd = guest->vm;
    REQUIRE(kvmprep_vm_new(&config, &vm, &err) == 0);
    slot.hva = (uintptr_t)guest->ram;
    slot.size = RAM_SIZE;
    REQUIRE(kvmprep_memslot_set(vm, &slot, &err) == 0);
    opts.vcpu_fd = guest->vcpu;
    if (kvmprep_populate(vm, NULL, 0, &opts, &result, sizeof(result), &err) < 0) {
        fprintf(stderr, "%s; %s\n", err.message, err.hint);
        exit(EXIT_FAILURE);
    }
    REQUIRE(result.host == RAM_SIZE && result.remaining == 0);
    REQUIRE(guest_resident(guest) == RAM_SIZE);
    REQUIRE(kvmprep_vm_free(vm) == 0);
    printf("kvmprep %x: %zu MiB ready, stage 2 %s\n", kvmprep_version(), RAM_SIZE >> 20,
           result.stage2_state == KVMPREP_STAGE2_DONE ? "too" : "not, on this kernel");
}

#endif
