/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VM whose slots are set step by step, and what the library and the kernel say to each.
 *
 * What slots there are is kept here by the kernel's answers alone, never by the library's. A step is put to
 * the check that is told of all slots, to the one that has a handle, and then to the kernel.
 */
#ifndef WORLD_H
#define WORLD_H

#include <kvmprep.h>
#include "operation.h"

/* Numbers in use, in two address spaces, and KVM's own. */
#define MOST_SLOTS 64

struct world {
    unsigned long vm_type;
    int vm;
    struct kvmprep_vm *handle;
    struct kvmprep_caps caps;
    int files[FILES][2];
    struct kvmprep_memslot slots[MOST_SLOTS];
    size_t n_slots;
    size_t n_internal; /* the first of them: KVM's own */
};

/* What was said to one step. */
struct answers {
    int kernel; /* 0 or a negative errno, all three */
    int check;
    int handle;
    int set; /* kvmprep_memslot_set(), when the step is by_library */
    struct kvmprep_error check_err, handle_err, set_err;
    struct kvmprep_memslot_report report, handle_report;
    uint32_t broken;        /* 1 << enum rule, by rules.h */
    uint32_t change;        /* KVMPREP_CHANGE_*: what setting it would do, by the slots that there are */
    bool is_set_by_library; /* the kernel was asked by kvmprep_memslot_set() */
    /* The kernel took it, and what it did is not what was asked for; or NULL. */
    const char *aftermath;
};

/* Opens what all VMs share; ends the case as skipped where there is no KVM. */
void world_prepare(void);
/* How many types of VM this kernel has of those that are tried (0 and SW_PROTECTED): 1 or 2. */
unsigned world_vm_types(void);
/* Whether KVM makes slots of its own in such VMs. */
bool world_has_internal_slots(unsigned long vm_type);
/* What the VM type is able to do. */
const struct kvmprep_caps *world_caps(unsigned long vm_type);

void world_make(struct world *world, unsigned long vm_type);
void world_end(struct world *world);

/* The slot as the library is told of it. */
struct kvmprep_memslot world_slot(const struct world *world, const struct operation *step);
/* The slot of that number, or NULL. */
const struct kvmprep_memslot *world_find(const struct world *world, uint32_t slot);
/* Puts a SET_SLOT to all three, and keeps what the kernel did. The answers are all zero before. */
void world_set_slot(struct world *world, const struct operation *step, struct answers *answers);
/* Does one of the other deeds. */
void world_change_file(struct world *world, const struct operation *step);

#endif
