/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KVM's rules for a slot one by one: which of them does a step break?
 *
 * This is no third check, since it knows of no order. It says what a test has met: a rule counts only when a
 * step broke it and no other, since otherwise the other may have been what refused it.
 */
#ifndef RULES_H
#define RULES_H

#include "world.h"

enum rule {
    NO_VERSION2,
    UNKNOWN_FLAG,
    NO_GUEST_MEMFD,
    GMEM_DIRTY_LOGGED,
    GMEM_READ_ONLY,
    NUMBER_TOO_LARGE,
    SPACE_TOO_LARGE,
    GPA_UNALIGNED,
    SIZE_UNALIGNED,
    HVA_UNALIGNED,
    OFFSET_UNALIGNED,
    GPA_WRAPS,
    HVA_WRAPS,
    HVA_NOT_USER,
    OFFSET_WRAPS,
    TOO_LARGE,
    ABSENT,
    FIXED_SIZE,
    FIXED_HVA,
    FIXED_READ_ONLY,
    FIXED_GMEM,
    LOST_GMEM,
    GAINED_GMEM,
    NEW_OVERLAPS,
    MOVED_OVERLAPS,
    NEW_BEYOND_HOST,
    MOVED_BEYOND_HOST,
    NO_DESCRIPTOR,
    NOT_A_GMEM,
    OTHER_VMS_GMEM,
    GMEM_TOO_SHORT,
    GMEM_IS_BOUND,
    RULES,
};

struct rule_facts {
    const char *name;
    uint32_t reason; /* KVMPREP_REASON_*: how the library calls it */
};

extern const struct rule_facts rule_facts[RULES];

/* One bit for each rule that setting the slot would break. What follows from another rule's breach, as ending
 * beyond the host does from wrapping, does not count beside it. */
uint32_t rules_broken(const struct world *world, const struct operation *step);
/* The rules that a VM with these capabilities can break. */
uint32_t rules_there(const struct kvmprep_caps *caps);

#endif
