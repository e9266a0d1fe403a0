/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * One slot with all that decides on its page sizes: geometry, flags, what lies behind it and in which state,
 * what of it is private; made for real, on a VM of its own, populated by the rawest means there are, and
 * counted.
 *
 * A combination is plain numbers, so that it can be drawn at random, printed in one line, and made again. The
 * library is asked for its prediction here, and used for nothing else, so that it cannot flatter itself.
 */
#ifndef COMBINATION_H
#define COMBINATION_H

#include <stdbool.h>
#include <stdint.h>
#include <kvmprep.h>
#include "guest.h"
#include "policy.h"

#define FRAME (2 * MIB)
#define GIB (1ull << 30)
#define MOST_PRIVATE 3

/* Which of the anonymous memory is advised, or of shared memory. */
enum advice {
    ADVICE_NONE,
    ADVICE_HUGE,  /* MADV_HUGEPAGE in [advised_start, + advised_size), nothing elsewhere */
    ADVICE_SMALL, /* the same, MADV_NOHUGEPAGE elsewhere */
};

/* What is there before the population, at the page `resident_at`. */
enum resident {
    RESIDENT_NOTHING,
    RESIDENT_WRITTEN,   /* before the advice: a small page */
    RESIDENT_READ,      /* before the advice: the zero page */
    RESIDENT_CACHED,    /* written through the file: in memory, but not mapped */
    RESIDENT_ZERO_HUGE, /* read after the advice: the huge zero page where there is one */
    RESIDENT_PUNCHED,   /* its frame populated after the advice, then this page dropped */
    RESIDENT_HUGE,      /* its frame populated after the advice, then all advised against huge pages */
};

/* All places are in bytes from the slot's start. */
struct combination {
    enum kind kind;
    bool has_idle_gmem; /* with a guest_memfd that a default VM does not use */
    uint64_t size;
    uint64_t gpa_offset, hva_offset; /* how far beyond a 2 MiB boundary the slot starts */
    uint32_t flags;                  /* KVM_MEM_* */
    bool is_trimmed;                 /* the mapping ends where the slot does */
    enum policy policy;
    enum advice advice;
    uint64_t advised_start, advised_size;
    enum resident resident;
    uint64_t resident_at;
    uint64_t hole_at, hole_size;      /* what is unmapped; no size: nothing */
    uint64_t range_start, range_size; /* what is asked about and populated */
    struct kvmprep_range private_memory[MOST_PRIVATE];
    unsigned n_private;
    bool is_file_named; /* the library is told the file, with KVMPREP_MEMSLOT_MEMORY_FD */
    bool is_gigantic;   /* HUGETLB_SHARED with one page of 1 GiB, at its start */
};

/* A combination that is there. */
struct scene {
    struct vm vm;
    struct vcpu vcpu;
    struct memory memory;
    int idle_gmem;
    struct kvmprep_memslot slot;
    struct kvmprep_range range;
    struct kvmprep_range private_memory[MOST_PRIVATE];
    unsigned n_private;
    bool has_pre_fault;
};

/* A plain slot of that size and backing: congruent, advised where that matters, nothing resident. */
struct combination combination_of(enum kind kind, uint64_t size);
/* Whether this kernel can make it. */
bool combination_is_had(const struct vm *vm, const struct combination *c);
void combination_print(const struct combination *c);

/* Makes the VM, the memory, its state and the slot; the case ends where it cannot. */
struct scene scene_make(const struct combination *c);
void scene_end(struct scene *scene);

/* What the library says of the scene's range. */
struct kvmprep_memslot_report scene_predict(const struct scene *scene);

/* Whether the second stage can be filled and counted at all: not under shadow paging. */
bool scene_has_nested_paging(void);
/* Stage-2 mappings of the scene's VM now. */
struct kvmprep_page_counts scene_counts(const struct scene *scene);
/*
 * Fills both stages of the scene's range: MADV_POPULATE_WRITE, then KVM_PRE_FAULT_MEMORY, or the guest's own
 * reads where there is none. Returns by how much the counts have grown.
 */
struct kvmprep_page_counts scene_populate(struct scene *scene, const struct combination *c);

#endif
