/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Guests that convert their memory between private and shared, and the VMM's answers to what they exit with.
 *
 * A guest asks by the hypercall KVM_HC_MAP_GPA_RANGE, and again as often as it is told EAGAIN. Or it just
 * touches memory as what it wants it to be. For that a confidential guest has a bit in its page tables; one
 * of SW_PROTECTED has none, and KVM takes each of its accesses for one of the kind that the memory is. So it
 * says on a port which page it is about to touch and as what, and the VMM does with that what it does with a
 * KVM_EXIT_MEMORY_FAULT of that page. Exits of KVM's own, which come when memory changes under an access,
 * are answered likewise, and counted apart.
 *
 * What is named guest_... ends no case, and may be called on any thread.
 */
#ifndef CONVERTING_H
#define CONVERTING_H

#include <pthread.h>
#include <stdint.h>
#include <kvmprep.h>
#include "guest.h"

/* A memslot whose memory can be of either kind. */
struct convertible {
    struct memory memory;
    struct kvmprep_memslot slot; /* with a guest_memfd, and the mapped file where there is one */
};

/* Makes memory of that kind with a guest_memfd beside it, and the slot. All of it is private at first. */
struct convertible convertible_make(const struct vm *vm, uint32_t slot, uint64_t gpa, enum kind kind,
                                    size_t size);
/* Tells the handle of the slot, and that its memory is private. */
void convertible_tell(struct kvmprep_vm *handle, const struct convertible *convertible);
void convertible_end(struct convertible *convertible);

/* A VM with private memory, two vCPUs and a row of such memslots that touch, from MEMORY_GPA on. */
#define MOST_SLOTS 3

struct private_guest {
    struct vm vm;
    struct kvmprep_vm *handle;
    struct kvmprep_error err;
    struct vcpu vcpus[2];
    struct convertible slots[MOST_SLOTS];
    unsigned n_slots;
    struct kvmprep_range all; /* the memory of all slots */
};

struct private_guest private_guest_make(enum kind kind, unsigned n_slots, uint64_t slot_size);
void private_guest_end(struct private_guest *s);

/* A vCPU whose guest converts, and what has come of it. */
struct converter {
    struct vcpu vcpu;
    struct kvm_sregs sregs; /* as they are at any time */
    struct kvmprep_vm *handle;
    struct kvmprep_convert_opts opts; /* of the VMM's answers */
    uint64_t report;                  /* gpa that guest_gather() writes to */

    uint64_t hypercalls, again;      /* exits; of these, answered with EAGAIN */
    uint64_t touches, memory_faults; /* pages that the guest announced; exits of KVM's own */
    uint64_t lost;                   /* times that the guest had to be put back into its routine */
    char odd[120];                   /* what ended run() with -EPROTO */
    int result;                      /* of the last of the library's calls */
    struct kvmprep_error err;        /* of it */
};

/* Has KVM hand the hypercall on. */
void converting_begin(const struct vm *vm);
/* Makes such a vCPU; the VMM's answers are made with it. */
struct converter converter_make(const struct vm *vm, unsigned id, struct kvmprep_vm *handle);
void converter_end(const struct vm *vm, struct converter *converter);
/*
 * Has the guest that `thread` runs looked after, where it is not heard of for long: QEMU's emulation of
 * nested guests at times leaves its host's registers in them (about once in a million exits), and then
 * nothing comes out of KVM_RUN any more. Costs nothing where nothing is wrong.
 */
void converter_kick(pthread_t thread);

/*
 * All of these run the guest until it is done and return 0 or a negative errno: KVM_RUN's, or the library's
 * when it has failed for good on an exit that the guest cannot go on from.
 */

/*
 * The hypercall, for `attributes` as the guest gives them. *answer is what the guest got: 0 or an errno as a
 * positive number.
 */
int guest_convert(struct converter *c, uint64_t gpa, uint64_t size, uint64_t attributes, uint64_t *answer);
#define TO_SHARED 0ull
#define TO_PRIVATE 16ull /* bit 4 of the hypercall's attributes */

/* Touches each page of a range as private or shared, and writes word_of() as it goes. */
int guest_touch_as(struct converter *c, uint64_t gpa, uint64_t size, uint32_t visibility, uint32_t tag);
/* Writes word_of() as the first and last word of each page, whatever that is. */
int guest_fill(struct converter *c, uint64_t gpa, uint64_t size, uint32_t tag);
/* Reads these words of each page into the report: two to a page, beginning at c->report. */
int guest_gather(struct converter *c, uint64_t gpa, uint64_t size);

/* What a page is filled with. For tags from 1 to 4095 no two pages or tags share it, and none is 0. */
static inline uint32_t word_of(uint64_t gpa, uint32_t tag) {
    return (uint32_t)gpa + tag;
}

#endif
