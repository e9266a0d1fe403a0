/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See generator.h. */
#include "generator.h"
#include "support/guest.h"

#define GIB (1ull << 30)
#define MOST_PAGES ((1ull << 31) - 1)

#define CHOICE(random, array) ((array)[diff_below(random, sizeof(array) / sizeof((array)[0]))])

/* ---- What is plausible ---- */

static const uint32_t numbers[] = {0, 1, 2, 3, 4, 5, 6, 32763};

static uint32_t any_number(struct diff_random *r, const struct world *w) {
    uint32_t space = w->caps.address_spaces > 1 && diff_chance(r, 4) ? 1 : 0;
    return CHOICE(r, numbers) | space << 16;
}

/* One that no slot has, if it finds one. */
static uint32_t free_number(struct diff_random *r, const struct world *w) {
    for (unsigned tries = 0; tries < 8; tries++) {
        uint32_t number = any_number(r, w);
        if (world_find(w, number) == NULL)
            return number;
    }
    return any_number(r, w);
}

/* A few places, so that slots often meet; KVM's own slots are, on some hosts, among them. */
static uint64_t any_gpa(struct diff_random *r) {
    static const uint64_t bases[] = {0, 0, 0, GIB, 4 * GIB, 0xfedf0000, 0xfffb8000};
    return CHOICE(r, bases) + diff_below(r, 24) * PAGE;
}

static uint64_t any_size(struct diff_random *r) {
    static const uint64_t sizes[] = {2 * MIB, 3 * MIB, GIB, 64 * MIB + PAGE};
    return diff_chance(r, 12) ? CHOICE(r, sizes) : (1 + diff_below(r, 8)) * PAGE;
}

static uint64_t any_hva(struct diff_random *r) {
    return 0x10000000 + diff_below(r, 4) * PAGE;
}

static uint32_t any_flags(struct diff_random *r) {
    static const uint32_t choices[] = {0,
                                       0,
                                       0,
                                       KVM_MEM_LOG_DIRTY_PAGES,
                                       KVM_MEM_LOG_DIRTY_PAGES,
                                       KVM_MEM_READONLY,
                                       KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES};
    return CHOICE(r, choices);
}

static void add_guest_memfd(struct diff_random *r, struct operation *step) {
    step->flags = KVM_MEM_GUEST_MEMFD;
    step->file = (enum file)diff_below(r, OWN_FILES);
    uint64_t pages = length_of(step->file) / PAGE, wanted = step->size / PAGE;
    step->offset = wanted < pages ? diff_below(r, pages - wanted + 1) * PAGE : 0;
    if (diff_chance(r, 2))
        step->offset %= 16 * PAGE;
}

static struct operation new_slot(struct diff_random *r, const struct world *w) {
    struct operation step = {.slot = free_number(r, w),
                             .flags = any_flags(r),
                             .gpa = any_gpa(r),
                             .size = any_size(r),
                             .hva = any_hva(r)};
    if (diff_chance(r, w->caps.guest_memfd ? 3 : 50))
        add_guest_memfd(r, &step);
    if (diff_chance(r, 20))
        step.size = 0; /* to be deleted, and not there */
    return step;
}

/* The file that the slot is bound to, by the descriptor it was made with. */
static enum file file_of(const struct world *w, const struct kvmprep_memslot *slot) {
    for (enum file file = 0; file < OWN_FILES; file++)
        if (slot->guest_memfd == w->files[file][0] || slot->guest_memfd == w->files[file][1])
            return file;
    return FILE_CLOSED;
}

/* What was said when the slot was made. */
static struct operation same_slot(const struct world *w, const struct kvmprep_memslot *slot) {
    return (struct operation){.file = file_of(w, slot),
                              .slot = slot->slot,
                              .flags = slot->flags,
                              .gpa = slot->gpa,
                              .size = slot->size,
                              .hva = slot->hva,
                              .offset = slot->guest_memfd_offset};
}

/* What a slot may not become. */
static void change_what_is_fixed(struct diff_random *r, struct operation *step) {
    switch (diff_below(r, 4)) {
    case 0:
        step->size += PAGE;
        break;
    case 1:
        step->hva += PAGE;
        break;
    case 2:
        step->flags ^= KVM_MEM_READONLY;
        break;
    default:
        step->flags = step->flags & KVM_MEM_GUEST_MEMFD ? 0 : KVM_MEM_GUEST_MEMFD;
        break;
    }
}

/* Something with a slot that is there. */
static struct operation next_of(struct diff_random *r, const struct world *w,
                                const struct kvmprep_memslot *slot) {
    struct operation step = same_slot(w, slot);
    uint64_t choice = diff_below(r, 12);
    if (choice < 5)
        step.size = 0;
    else if (choice < 7)
        step.gpa = any_gpa(r);
    else if (choice < 9)
        step.flags ^= KVM_MEM_LOG_DIRTY_PAGES;
    else if (choice < 11)
        change_what_is_fixed(r, &step);
    return step;
}

/* The same bytes of a guest_memfd once more, or bytes beside them, by another slot. */
static struct operation bound_again(struct diff_random *r, const struct world *w,
                                    const struct kvmprep_memslot *slot) {
    struct operation step = same_slot(w, slot);
    static const int64_t shifts[] = {-1, 0, 0, 1};
    step.slot = free_number(r, w);
    step.gpa = any_gpa(r);
    step.offset += (uint64_t)CHOICE(r, shifts) * step.size;
    return step;
}

static struct operation change_of_file(struct diff_random *r) {
    static const enum deed deeds[] = {CLOSE_ONE, CLOSE_ONE, RENEW_FILE, REUSE_NUMBERS};
    return (struct operation){.deed = CHOICE(r, deeds),
                              .file = (enum file)diff_below(r, OWN_FILES),
                              .second_descriptor = diff_chance(r, 2)};
}

/* ---- Edges ---- */

static uint64_t gpa_edge(struct diff_random *r, const struct world *w, const struct operation *step) {
    unsigned bits = w->caps.nested_paging ? w->caps.gpa_bits : 52;
    uint64_t width = 1ull << bits;
    const uint64_t edges[] = {step->gpa + 1,
                              step->gpa + 512,
                              -PAGE,
                              -step->size,
                              -step->size - PAGE,
                              -step->size + PAGE,
                              width - step->size,
                              width - step->size + PAGE,
                              width - PAGE,
                              width,
                              1ull << diff_below(r, 64),
                              (1ull << 52) - step->size,
                              diff_next(r) & ~(PAGE - 1)};
    return CHOICE(r, edges);
}

static uint64_t size_edge(struct diff_random *r, const struct operation *step) {
    const uint64_t edges[] = {0,
                              0,
                              1,
                              512,
                              step->size + 1,
                              step->size + 512,
                              MOST_PAGES * PAGE,
                              (MOST_PAGES + 1) * PAGE,
                              (MOST_PAGES + 1) * PAGE,
                              (MOST_PAGES + 1) * PAGE,
                              1ull << 46,
                              1ull << 63,
                              -step->gpa,
                              -PAGE,
                              64 * GIB,
                              1ull << diff_below(r, 64)};
    return CHOICE(r, edges);
}

static uint64_t hva_edge(struct diff_random *r, const struct world *w, const struct operation *step) {
    uint64_t end = w->caps.hva_end;
    const uint64_t edges[] = {0,
                              step->hva + 1,
                              step->hva + 512,
                              end - step->size,
                              end - step->size + PAGE,
                              end,
                              end + PAGE,
                              1ull << 47,
                              (1ull << 47) - PAGE,
                              1ull << 63,
                              -PAGE,
                              -PAGE,
                              -step->size,
                              -step->size + PAGE,
                              step->hva | 1ull << 57,
                              step->hva | 1ull << 62,
                              1ull << diff_below(r, 64)};
    return CHOICE(r, edges);
}

static uint32_t slot_edge(struct diff_random *r) {
    static const uint32_t low[] = {0, 1, 32763, 32763, 32764, 32765, 32766, 32767, 32768, 65535};
    static const uint32_t spaces[] = {0, 0, 1, 2, 3, 65535};
    return CHOICE(r, low) | CHOICE(r, spaces) << 16;
}

static uint32_t flags_edge(struct diff_random *r, const struct operation *step) {
    const uint32_t edges[] = {step->flags | 1u << (3 + diff_below(r, 29)),
                              1u << 16,
                              KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES,
                              KVM_MEM_GUEST_MEMFD | KVM_MEM_READONLY,
                              KVM_MEM_GUEST_MEMFD,
                              step->flags | KVM_MEM_GUEST_MEMFD,
                              step->flags ^ KVM_MEM_LOG_DIRTY_PAGES,
                              step->flags ^ KVM_MEM_READONLY};
    return CHOICE(r, edges);
}

static uint64_t offset_edge(struct diff_random *r, const struct operation *step) {
    uint64_t length = length_of(step->file);
    const uint64_t edges[] = {step->offset + 1,
                              step->offset + 1,
                              step->offset + 512,
                              step->offset + 512,
                              length,
                              length - step->size,
                              length - step->size + PAGE,
                              length - PAGE,
                              length + PAGE,
                              1ull << 63,
                              (1ull << 63) - PAGE,
                              (1ull << 63) - step->size,
                              -PAGE,
                              -step->size,
                              -step->size - PAGE,
                              1ull << diff_below(r, 64)};
    return CHOICE(r, edges);
}

/* Takes one thing to an edge. */
static void sharpen(struct diff_random *r, const struct world *w, struct operation *step) {
    bool has_gmem = (step->flags & KVM_MEM_GUEST_MEMFD) != 0;
    switch (diff_below(r, has_gmem ? 10 : 5)) {
    case 0:
        step->gpa = gpa_edge(r, w, step);
        break;
    case 1:
        step->size = size_edge(r, step);
        if (step->size / PAGE > MOST_PAGES && diff_chance(r, 2))
            step->gpa = 64 * GIB; /* where it meets no other slot */
        break;
    case 2:
        step->hva = hva_edge(r, w, step);
        break;
    case 3:
        step->slot = slot_edge(r);
        break;
    case 4:
        step->flags = flags_edge(r, step);
        break;
    case 5:
        step->offset = offset_edge(r, step);
        break;
    case 6:
        step->offset += 1ull << diff_below(r, 12);
        break;
    case 7:
        step->file = FILE_OF_OTHER_VM;
        break;
    default:
        step->file = (enum file)diff_below(r, FILES);
        break;
    }
}

/* ---- What can be afforded ---- */

/* Makes small what the kernel might take, or come far with, and pay for page by page. */
static void keep_affordable(const struct world *w, struct operation *step) {
    uint64_t affordable = w->caps.nested_paging ? 1ull << 40 : GIB;
    if (step->size / PAGE > MOST_PAGES)
        return; /* refused at once */
    if (step->size > affordable)
        step->size = affordable;
    if ((step->flags & KVM_MEM_LOG_DIRTY_PAGES) && step->size > GIB)
        step->size = GIB;
}

/* What the kernel does not read, or cannot. */
static void fill_in(struct diff_random *r, const struct world *w, struct operation *step) {
    step->version2 = w->caps.user_memory2 && diff_chance(r, 4);
    step->second_descriptor = diff_chance(r, 2);
    step->by_library = diff_chance(r, 4);
    if (!(step->flags & KVM_MEM_GUEST_MEMFD) && diff_chance(r, 2)) {
        step->file = (enum file)diff_below(r, FILES);
        step->offset = diff_next(r);
    }
}

/* A slot that a VMM has made, or NULL. */
static const struct kvmprep_memslot *any_slot(struct diff_random *r, const struct world *w) {
    size_t n = w->n_slots - w->n_internal;
    return n == 0 ? NULL : &w->slots[w->n_internal + diff_below(r, n)];
}

static struct operation plausible_step(struct diff_random *r, const struct world *w) {
    const struct kvmprep_memslot *slot = any_slot(r, w);
    if (slot == NULL || diff_chance(r, 2))
        return new_slot(r, w);
    if ((slot->flags & KVM_MEM_GUEST_MEMFD) && diff_chance(r, 2))
        return bound_again(r, w, slot);
    return next_of(r, w, slot);
}

struct operation generate_step(struct diff_random *r, const struct world *w) {
    if (w->caps.guest_memfd && diff_chance(r, 24))
        return change_of_file(r);
    struct operation step = plausible_step(r, w);
    if (diff_chance(r, 3))
        sharpen(r, w, &step);
    if (diff_chance(r, 12))
        sharpen(r, w, &step);
    fill_in(r, w, &step);
    keep_affordable(w, &step);
    return step;
}
