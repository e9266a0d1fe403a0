/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See rules.h. */
#include "rules.h"
#include "support/guest.h"

#define BIT(rule) (1u << (rule))
#define MOST_PAGES ((1ull << 31) - 1)
#define GMEM_RULES                                                                                           \
    (BIT(GMEM_DIRTY_LOGGED) | BIT(GMEM_READ_ONLY) | BIT(OFFSET_UNALIGNED) | BIT(OFFSET_WRAPS) |              \
     BIT(FIXED_GMEM) | BIT(LOST_GMEM) | BIT(GAINED_GMEM) | BIT(NO_DESCRIPTOR) | BIT(NOT_A_GMEM) |            \
     BIT(OTHER_VMS_GMEM) | BIT(GMEM_TOO_SHORT) | BIT(GMEM_IS_BOUND))

const struct rule_facts rule_facts[RULES] = {
    [NO_VERSION2] = {"no-version-2", KVMPREP_REASON_FLAGS_UNSUPPORTED},
    [UNKNOWN_FLAG] = {"unknown-flag", KVMPREP_REASON_UNKNOWN_FLAGS},
    [NO_GUEST_MEMFD] = {"no-guest-memfd", KVMPREP_REASON_FLAGS_UNSUPPORTED},
    [GMEM_DIRTY_LOGGED] = {"gmem-dirty-logged", KVMPREP_REASON_FLAGS_UNSUPPORTED},
    [GMEM_READ_ONLY] = {"gmem-read-only", KVMPREP_REASON_FLAGS_UNSUPPORTED},
    [NUMBER_TOO_LARGE] = {"number-too-large", KVMPREP_REASON_MEMSLOT_NUMBER},
    [SPACE_TOO_LARGE] = {"space-too-large", KVMPREP_REASON_MEMSLOT_NUMBER},
    [GPA_UNALIGNED] = {"gpa-unaligned", KVMPREP_REASON_RANGE_UNALIGNED},
    [SIZE_UNALIGNED] = {"size-unaligned", KVMPREP_REASON_RANGE_UNALIGNED},
    [HVA_UNALIGNED] = {"hva-unaligned", KVMPREP_REASON_RANGE_UNALIGNED},
    [OFFSET_UNALIGNED] = {"offset-unaligned", KVMPREP_REASON_RANGE_UNALIGNED},
    [GPA_WRAPS] = {"gpa-wraps", KVMPREP_REASON_RANGE_OVERFLOW},
    [HVA_WRAPS] = {"hva-wraps", KVMPREP_REASON_RANGE_OVERFLOW},
    [HVA_NOT_USER] = {"hva-not-user", KVMPREP_REASON_HVA_NOT_USER},
    [OFFSET_WRAPS] = {"offset-wraps", KVMPREP_REASON_RANGE_OVERFLOW},
    [TOO_LARGE] = {"too-large", KVMPREP_REASON_MEMSLOT_TOO_LARGE},
    [ABSENT] = {"absent", KVMPREP_REASON_MEMSLOT_ABSENT},
    [FIXED_SIZE] = {"fixed-size", KVMPREP_REASON_MEMSLOT_FIXED},
    [FIXED_HVA] = {"fixed-hva", KVMPREP_REASON_MEMSLOT_FIXED},
    [FIXED_READ_ONLY] = {"fixed-read-only", KVMPREP_REASON_MEMSLOT_FIXED},
    [FIXED_GMEM] = {"fixed-gmem", KVMPREP_REASON_MEMSLOT_FIXED},
    [LOST_GMEM] = {"lost-gmem", KVMPREP_REASON_MEMSLOT_FIXED},
    [GAINED_GMEM] = {"gained-gmem", KVMPREP_REASON_MEMSLOT_FIXED},
    [NEW_OVERLAPS] = {"new-overlaps", KVMPREP_REASON_MEMSLOT_OVERLAP},
    [MOVED_OVERLAPS] = {"moved-overlaps", KVMPREP_REASON_MEMSLOT_OVERLAP},
    [NEW_BEYOND_HOST] = {"new-beyond-host", KVMPREP_REASON_MEMSLOT_BEYOND_HOST},
    [MOVED_BEYOND_HOST] = {"moved-beyond-host", KVMPREP_REASON_MEMSLOT_BEYOND_HOST},
    [NO_DESCRIPTOR] = {"no-descriptor", KVMPREP_REASON_BAD_FD},
    [NOT_A_GMEM] = {"not-a-gmem", KVMPREP_REASON_GMEM_NOT_ONE},
    [OTHER_VMS_GMEM] = {"other-vms-gmem", KVMPREP_REASON_GMEM_OTHER_VM},
    [GMEM_TOO_SHORT] = {"gmem-too-short", KVMPREP_REASON_GMEM_TOO_SHORT},
    [GMEM_IS_BOUND] = {"gmem-is-bound", KVMPREP_REASON_GMEM_BOUND},
};

static uint32_t if_so(bool condition, enum rule rule) {
    return condition ? BIT(rule) : 0;
}

static bool wraps(uint64_t start, uint64_t size) {
    return start + size < start;
}

static bool has_gmem(const struct operation *step) {
    return (step->flags & KVM_MEM_GUEST_MEMFD) != 0;
}

/* ---- What the step says by itself ---- */

static uint32_t flags_broken(const struct kvmprep_caps *caps, const struct operation *step) {
    uint32_t known = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY | KVM_MEM_GUEST_MEMFD;
    uint32_t broken = if_so(step->flags & ~known, UNKNOWN_FLAG);
    if (!has_gmem(step))
        return broken;
    if (!caps->user_memory2)
        return broken | BIT(NO_VERSION2);
    if (!caps->guest_memfd)
        return broken | BIT(NO_GUEST_MEMFD);
    return broken | if_so(step->flags & KVM_MEM_LOG_DIRTY_PAGES, GMEM_DIRTY_LOGGED) |
           if_so(step->flags & KVM_MEM_READONLY, GMEM_READ_ONLY);
}

static uint32_t number_broken(const struct kvmprep_caps *caps, const struct operation *step) {
    return if_so((step->slot & 0xffff) >= caps->memslots, NUMBER_TOO_LARGE) |
           if_so(step->slot >> 16 >= caps->address_spaces, SPACE_TOO_LARGE);
}

/* The kernel takes an end at 2^64 for one that wraps. */
static bool wraps_or_ends_at_top(uint64_t start, uint64_t size) {
    return size != 0 && start + size <= start;
}

/* By whole pages, so that what is unaligned is not beyond the edge as well. */
static bool is_user_memory(const struct kvmprep_caps *caps, const struct operation *step) {
    uint64_t hva = step->hva / PAGE * PAGE, size = step->size / PAGE * PAGE;
    return size <= caps->hva_end && hva <= caps->hva_end - size;
}

static uint32_t form_broken(const struct kvmprep_caps *caps, const struct operation *step) {
    bool hva_wraps = wraps_or_ends_at_top(step->hva, step->size);
    uint32_t broken = if_so(step->gpa % PAGE, GPA_UNALIGNED) | if_so(step->size % PAGE, SIZE_UNALIGNED) |
                      if_so(step->hva % PAGE, HVA_UNALIGNED) |
                      if_so(wraps_or_ends_at_top(step->gpa, step->size), GPA_WRAPS) |
                      if_so(hva_wraps, HVA_WRAPS) |
                      if_so(!hva_wraps && !is_user_memory(caps, step), HVA_NOT_USER) |
                      if_so(step->size / PAGE > MOST_PAGES, TOO_LARGE);
    if (!has_gmem(step) || !caps->guest_memfd)
        return broken;
    return broken | if_so(step->offset % PAGE, OFFSET_UNALIGNED) |
           if_so(wraps(step->offset, step->size), OFFSET_WRAPS);
}

/* ---- What it says to the slot that is there ---- */

static uint32_t fixed_broken(const struct kvmprep_memslot *old, const struct operation *step) {
    bool had_gmem = (old->flags & KVM_MEM_GUEST_MEMFD) != 0;
    return if_so(step->size != old->size, FIXED_SIZE) | if_so(step->hva != old->hva, FIXED_HVA) |
           if_so((step->flags ^ old->flags) & KVM_MEM_READONLY, FIXED_READ_ONLY) |
           if_so(had_gmem && has_gmem(step), FIXED_GMEM) | if_so(had_gmem && !has_gmem(step), LOST_GMEM) |
           if_so(!had_gmem && has_gmem(step), GAINED_GMEM);
}

/* ---- What it says beside the other slots ---- */

static bool overlaps(const struct world *w, const struct operation *step) {
    for (size_t i = 0; i < w->n_slots; i++) {
        const struct kvmprep_memslot *other = &w->slots[i];
        if (other->slot != step->slot && other->slot >> 16 == step->slot >> 16 &&
            step->gpa < other->gpa + other->size && other->gpa < step->gpa + step->size)
            return true;
    }
    return false;
}

static bool ends_beyond_host(const struct kvmprep_caps *caps, const struct operation *step) {
    unsigned bits = caps->nested_paging ? caps->gpa_bits : 52;
    return step->gpa + step->size > 1ull << bits;
}

/* Whether the slot was made with one of the own file's descriptors. */
static bool is_of_file(const struct world *w, const struct kvmprep_memslot *slot, enum file file) {
    return (slot->flags & KVM_MEM_GUEST_MEMFD) &&
           (slot->guest_memfd == w->files[file][0] || slot->guest_memfd == w->files[file][1]);
}

static bool is_bound(const struct world *w, const struct operation *step) {
    for (size_t i = 0; i < w->n_slots; i++) {
        const struct kvmprep_memslot *other = &w->slots[i];
        if (is_of_file(w, other, step->file) && step->offset < other->guest_memfd_offset + other->size &&
            other->guest_memfd_offset < step->offset + step->size)
            return true;
    }
    return false;
}

static uint32_t binding_broken(const struct world *w, const struct operation *step) {
    switch (step->file) {
    case FILE_NAMED:
    case FILE_CLOSED:
    case FILE_NEGATIVE:
        return BIT(NO_DESCRIPTOR);
    case FILE_MEMFD:
    case FILE_DEVICE:
    case FILE_VM:
        return BIT(NOT_A_GMEM);
    default:
        break;
    }
    bool is_others = step->file == FILE_OF_OTHER_VM;
    uint32_t broken = if_so(is_others, OTHER_VMS_GMEM);
    if (wraps(step->offset, step->size))
        return broken;
    return broken | if_so(step->offset + step->size > length_of(step->file), GMEM_TOO_SHORT) |
           if_so(!is_others && is_bound(w, step), GMEM_IS_BOUND);
}

static uint32_t place_broken(const struct world *w, const struct operation *step, uint32_t before,
                             bool is_new) {
    uint32_t broken = if_so(overlaps(w, step), is_new ? NEW_OVERLAPS : MOVED_OVERLAPS);
    if (!(before & (BIT(GPA_WRAPS) | BIT(TOO_LARGE))))
        broken |= if_so(ends_beyond_host(&w->caps, step), is_new ? NEW_BEYOND_HOST : MOVED_BEYOND_HOST);
    if (is_new && has_gmem(step) && w->caps.guest_memfd)
        broken |= binding_broken(w, step);
    return broken;
}

uint32_t rules_broken(const struct world *w, const struct operation *step) {
    const struct kvmprep_memslot *old = world_find(w, step->slot);
    uint32_t number = number_broken(&w->caps, step);
    uint32_t broken = number | flags_broken(&w->caps, step) | form_broken(&w->caps, step);
    if (step->size == 0)
        return broken | if_so(old == NULL && number == 0, ABSENT);
    if (old != NULL)
        broken |= fixed_broken(old, step);
    if (old == NULL || step->gpa != old->gpa)
        broken |= place_broken(w, step, broken, old == NULL);
    return broken;
}

uint32_t rules_there(const struct kvmprep_caps *caps) {
    uint32_t all = (uint32_t)((1ull << RULES) - 1) & ~(BIT(NO_VERSION2) | BIT(NO_GUEST_MEMFD));
    if (caps->guest_memfd)
        return all;
    return (all & ~GMEM_RULES) | BIT(caps->user_memory2 ? NO_GUEST_MEMFD : NO_VERSION2);
}
