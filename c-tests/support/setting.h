/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Where most cases begin: a VM with some vCPUs, one memslot at MEMORY_GPA, and a handle that knows of it.
 */
#ifndef SETTING_H
#define SETTING_H

#include <stdbool.h>
#include <kvmprep.h>
#include "guest.h"

#define MOST_VCPUS 2

struct setting {
    struct vm vm;
    struct vcpu vcpus[MOST_VCPUS];
    struct memory memory;
    struct kvmprep_memslot slot;
    struct kvmprep_vm *handle;
    struct kvmprep_error err; /* for the calls of the main thread */
    bool has_pre_fault;
};

/* Makes all of it; the case ends as skipped where it cannot be had. */
struct setting setting_make(enum kind kind, size_t size);
/* The same; skipped, with the reason, where stage 2 cannot be filled. */
struct setting setting_make_with_stage2(enum kind kind, size_t size);
/* Frees the handle, which must have no jobs any more, and all else. */
void setting_end(struct setting *s);

/* Faults that the guest takes on writing all its memory on the first vCPU, that of its code page apart. */
uint64_t faults_beyond_code(struct setting *s);
/* A population of the setting's whole memory has left nothing to do, and nothing for the guest to fault on.
 */
void check_all_is_done(struct setting *s, const struct kvmprep_populate_result *result);
/*
 * The guest writes [gpa, gpa + size) on the first vCPU and takes no fault but that of its code page, if any.
 * Does nothing where stage 2 cannot be filled.
 */
void check_writes_do_not_fault(struct setting *s, uint64_t gpa, uint64_t size);

#endif
