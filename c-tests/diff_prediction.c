/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the library predicts of a slot's page sizes, held against the pages that KVM makes.
 *
 * Each combination of geometry, flags, backing and state is made for real on a VM of its own. The library is
 * asked before the population, the population is done by plain system calls, KVM's own counters of 4 KiB, 2
 * MiB and 1 GiB mappings are read, and the library is asked again. All three must agree. It must not ask the
 * library to populate, and must not know the rules by which a page is huge: it only compares.
 *
 * While it runs it changes the machine's policy for transparent huge pages, and puts it back.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/combination.h"
#include "support/diff.h"
#include <inttypes.h>
#include <stdio.h>

#define USUAL_COMBINATIONS 80 /* a whole run: cargo xtask bed diff prediction */
#define MANY_PAGES 4096
#define PAGES_PER_FRAME (FRAME / PAGE)
#define LARGEST_HOLE 16 /* pages: too small for the C library to put a mapping there */

/* ---- Combinations: a grid of what is known to matter, and as many at random ---- */

struct geometry {
    uint64_t size, gpa_offset, hva_offset;
};

static const struct geometry grid_geometries[] = {
    {PAGE, 0, 0},
    {FRAME, 0, 0},
    {FRAME - PAGE, 0, 0},
    {FRAME, MIB, MIB},
    {3 * FRAME, 0, 0},
    {5 * MIB + 3 * PAGE, 0, 0},
    {3 * FRAME, MIB + PAGE, MIB + PAGE},
    {7 * MIB + PAGE, FRAME - PAGE, FRAME - PAGE},
    {3 * FRAME, PAGE, 0},
    {3 * FRAME, 0, PAGE},
    {3 * FRAME, MIB, PAGE},
    {16 * MIB + 5 * PAGE, 7 * PAGE, 7 * PAGE},
    {30 * MIB, 0, 0},
};
#define GRID_GEOMETRIES (sizeof(grid_geometries) / sizeof(grid_geometries[0]))

static const uint32_t grid_flags[] = {0, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
#define GRID_FLAGS (sizeof(grid_flags) / sizeof(grid_flags[0]))

/* What may be there before, in the middle of three frames that would be huge. */
static const struct {
    enum kind kind;
    enum resident resident;
} grid_states[] = {
    {ANON_4K, RESIDENT_WRITTEN},   {ANON_4K, RESIDENT_READ},        {ANON_4K, RESIDENT_ZERO_HUGE},
    {ANON_4K, RESIDENT_PUNCHED},   {ANON_4K, RESIDENT_HUGE},        {MEMFD_SHARED, RESIDENT_WRITTEN},
    {MEMFD_SHARED, RESIDENT_READ}, {MEMFD_SHARED, RESIDENT_CACHED}, {MEMFD_SHARED, RESIDENT_PUNCHED},
    {MEMFD_SHARED, RESIDENT_HUGE},
};
#define GRID_STATES (sizeof(grid_states) / sizeof(grid_states[0]))

static struct combination state_number(uint64_t number) {
    struct combination c = combination_of(grid_states[number].kind, 3 * FRAME);
    c.policy = POLICY_SHMEM_ADVISED;
    c.advice = ADVICE_HUGE;
    c.advised_size = c.size;
    c.resident = grid_states[number].resident;
    c.resident_at = FRAME + MIB;
    return c;
}

#define GRID (KINDS * GRID_GEOMETRIES * GRID_FLAGS)
#define GRID_STRIDE 101 /* prime, so that every part of the grid is visited from all over */

static bool takes_flags(enum kind kind) {
    return kind != GMEM_SHARED && kind != GMEM_PRIVATE;
}

static struct combination from_grid(uint64_t number) {
    uint64_t place = number * GRID_STRIDE % GRID;
    enum kind kind = (enum kind)(place % KINDS);
    const struct geometry *geometry = &grid_geometries[place / KINDS % GRID_GEOMETRIES];
    struct combination c = combination_of(kind, geometry->size);
    c.gpa_offset = geometry->gpa_offset;
    c.hva_offset = geometry->hva_offset;
    if (takes_flags(kind))
        c.flags = grid_flags[place / KINDS / GRID_GEOMETRIES];
    return c;
}

/* Bytes below 2 MiB, biased to the edges. */
static uint64_t some_offset(struct diff_random *random) {
    static const uint64_t edges[] = {0, 0, MIB, PAGE, FRAME - PAGE};
    uint64_t choice = diff_below(random, 7);
    return choice < 5 ? edges[choice] : diff_below(random, PAGES_PER_FRAME) * PAGE;
}

static uint64_t some_size(struct diff_random *random) {
    switch (diff_below(random, 4)) {
    case 0:
        return (1 + diff_below(random, 16)) * PAGE;
    case 1:
        return (1 + diff_below(random, MANY_PAGES / PAGES_PER_FRAME)) * FRAME;
    default:
        return (1 + diff_below(random, MANY_PAGES)) * PAGE;
    }
}

static uint64_t some_page(struct diff_random *random, uint64_t size) {
    return diff_below(random, size / PAGE) * PAGE;
}

/* A part of `size` bytes that begins at a page or, as often, at a frame's edge of the address that has
 * `offset`. */
static void some_part(struct diff_random *random, uint64_t size, uint64_t offset, uint64_t *start,
                      uint64_t *length) {
    *start = some_page(random, size);
    if (diff_chance(random, 2)) {
        uint64_t beyond = (*start + offset) % FRAME;
        *start = *start < beyond ? 0 : *start - beyond;
    }
    uint64_t rest = size - *start;
    switch (diff_below(random, 3)) {
    case 0:
        *length = PAGE;
        break;
    case 1:
        *length = rest < FRAME ? rest : FRAME;
        break;
    default:
        *length = some_page(random, rest) + PAGE;
    }
}

static bool has_advice(enum kind kind) {
    return kind == ANON_4K || kind == ANON_THP || kind == GMEM_PRIVATE || kind == MEMFD_SHARED ||
           kind == MEMFD_PRIVATE;
}

static void add_advice(struct combination *c, struct diff_random *random) {
    static const enum policy usual[] = {POLICY_ADVISED, POLICY_ALWAYS};
    uint64_t choice = diff_below(random, 3);
    c->policy = choice < 2 ? usual[choice] : (enum policy)diff_below(random, POLICIES);
    c->advice = (enum advice)diff_below(random, 3);
    c->advised_start = 0;
    c->advised_size = c->size;
    if (diff_chance(random, 3))
        some_part(random, c->size, c->hva_offset, &c->advised_start, &c->advised_size);
}

static void add_resident(struct combination *c, struct diff_random *random) {
    static const enum resident anonymous[] = {RESIDENT_WRITTEN, RESIDENT_READ, RESIDENT_ZERO_HUGE,
                                              RESIDENT_PUNCHED, RESIDENT_HUGE};
    static const enum resident shared[] = {RESIDENT_WRITTEN, RESIDENT_READ, RESIDENT_CACHED, RESIDENT_PUNCHED,
                                           RESIDENT_HUGE};
    c->resident_at = some_page(random, c->size);
    c->resident = (c->kind == MEMFD_SHARED ? shared : anonymous)[diff_below(random, 5)];
}

static void add_private(struct combination *c, struct diff_random *random) {
    c->n_private = (unsigned)diff_below(random, MOST_PRIVATE + 1);
    for (unsigned i = 0; i < c->n_private; i++)
        some_part(random, c->size, c->gpa_offset, &c->private_memory[i].gpa, &c->private_memory[i].size);
    if (diff_chance(random, 8))
        c->private_memory[0].size += FRAME; /* beyond the slot's end, perhaps */
}

/* Most of those that have most states. */
static enum kind some_kind(struct diff_random *random) {
    switch (diff_below(random, 8)) {
    case 0:
    case 1:
    case 2:
        return ANON_4K;
    case 3:
    case 4:
        return GMEM_PRIVATE;
    default:
        return (enum kind)diff_below(random, KINDS);
    }
}

static struct combination at_random(uint64_t seed, uint64_t number) {
    struct diff_random state = {.state = seed ^ number << 20}, *random = &state;
    enum kind kind = some_kind(random);
    struct combination c = combination_of(kind, some_size(random));
    bool is_hugetlb = kind == HUGETLB_PRIVATE || kind == HUGETLB_SHARED;
    c.hva_offset = some_offset(random);
    c.gpa_offset = diff_chance(random, 4) ? some_offset(random) : c.hva_offset;
    c.is_file_named = diff_chance(random, 2);
    if (takes_flags(kind) && diff_chance(random, 5))
        c.flags = diff_chance(random, 2) ? KVM_MEM_LOG_DIRTY_PAGES : KVM_MEM_READONLY;
    else if (kind == ANON_4K && diff_chance(random, 8))
        c.has_idle_gmem = true;
    if (!is_hugetlb && diff_chance(random, 3))
        c.is_trimmed = true;
    if (has_advice(kind))
        add_advice(&c, random);
    if (has_advice(kind) && kind != MEMFD_PRIVATE && diff_chance(random, 2))
        add_resident(&c, random);
    if (kind == GMEM_PRIVATE)
        add_private(&c, random);
    if (has_advice(kind) && kind != GMEM_PRIVATE && diff_chance(random, 6)) {
        c.hole_at = some_page(random, c.size);
        c.hole_size = (1 + diff_below(random, LARGEST_HOLE)) * PAGE;
        if (c.hole_size > c.size - c.hole_at)
            c.hole_size = c.size - c.hole_at;
    }
    if (diff_chance(random, 3))
        some_part(random, c.size, c.gpa_offset, &c.range_start, &c.range_size);
    return c;
}

/* Each depends on the seed and its number alone. */
static struct combination combination_number(uint64_t seed, uint64_t number) {
    uint64_t place = number / 2;
    if (number % 2 != 0 || place >= GRID_STATES + GRID)
        return at_random(seed, number);
    return place < GRID_STATES ? state_number(place) : from_grid(place - GRID_STATES);
}

/* Before Linux 6.7 nobody can tell that small pages are in memory already; the header says so. */
static bool is_foreseeable(const struct combination *c) {
    return c->resident == RESIDENT_NOTHING || host_release() >= 6007;
}

/* ---- Comparing ---- */

static bool are_equal(const struct kvmprep_page_counts *a, const struct kvmprep_page_counts *b) {
    return a->pages_4k == b->pages_4k && a->pages_2m == b->pages_2m && a->pages_1g == b->pages_1g;
}

/* What is expected is in no larger pages than what is allowed. */
static bool is_within(const struct kvmprep_page_counts *expected, const struct kvmprep_page_counts *allowed) {
    uint64_t frames = expected->pages_2m + expected->pages_1g * (1024 / 2);
    return expected->pages_1g <= allowed->pages_1g &&
           frames <= allowed->pages_2m + allowed->pages_1g * (1024 / 2);
}

/* Whether the memory behind the slot is of huge pages wherever a frame is, so that all that is allowed comes.
 */
static bool gives_all(const struct combination *c) {
    if (c->kind == HUGETLB_PRIVATE || c->kind == HUGETLB_SHARED)
        return !c->is_gigantic || c->hva_offset == 0;
    return (c->kind == ANON_4K || c->kind == ANON_THP || c->kind == GMEM_PRIVATE) &&
           (c->policy == POLICY_ADVISED || c->policy == POLICY_ALWAYS) && c->advice != ADVICE_NONE &&
           c->advised_size == c->size && c->resident == RESIDENT_NOTHING && c->hole_size == 0;
}

/* A report that leaves memory in small pages says why, and how much of it; and in words where a change would
 * help. */
static bool is_explained(const struct scene *scene, const struct kvmprep_memslot_report *report) {
    bool is_told = report->message[0] != 0;
    if (is_told != (report->hint[0] != 0))
        return false;
    if (report->expected.pages_4k == 0)
        return true;
    bool is_lifted = report->limit_2m != KVMPREP_LIMIT_GUEST_MEMFD && report->limit_2m != KVMPREP_LIMIT_CPU &&
                     report->limit_2m != KVMPREP_LIMIT_VM_TYPE && report->limit_2m != KVMPREP_LIMIT_EDGES;
    return report->limit_2m != KVMPREP_LIMIT_NONE && report->limited_2m > 0 &&
           report->limited_2m <= scene->range.size && (is_told || !is_lifted);
}

static void print_counts(const char *what, const struct kvmprep_page_counts *counts) {
    printf("    %-21s %6" PRIu64 " of 4K %4" PRIu64 " of 2M %2" PRIu64 " of 1G\n", what, counts->pages_4k,
           counts->pages_2m, counts->pages_1g);
}

/* Whether prediction and kernel agree; prints all of it where they do not. */
static bool agrees(uint64_t seed, uint64_t number, const struct combination *c) {
    struct scene scene = scene_make(c);
    struct kvmprep_memslot_report before = scene_predict(&scene);
    struct kvmprep_page_counts actual = scene_populate(&scene, c);
    struct kvmprep_memslot_report after = scene_predict(&scene);
    bool is_right = (!gives_all(c) || are_equal(&before.allowed, &actual)) &&
                    are_equal(&before.expected, &actual) && are_equal(&after.expected, &actual) &&
                    are_equal(&before.allowed, &after.allowed) &&
                    is_within(&before.expected, &before.allowed) && is_explained(&scene, &before);
    if (!is_right) {
        printf("  mismatch: seed %" PRIu64 " number %" PRIu64 ": ", seed, number);
        combination_print(c);
        print_counts("the kernel made", &actual);
        print_counts("predicted before it", &before.expected);
        print_counts("predicted after it", &after.expected);
        print_counts("allowed", &before.allowed);
        printf("    limit %u for %#" PRIx64 " bytes: %s; %s\n", before.limit_2m, before.limited_2m,
               before.message, before.hint);
    }
    scene_end(&scene);
    return is_right;
}

/* Each combination is one under some policy. */
static void skip_without_policies(void) {
    if (!policy_set(POLICY_ADVISED))
        check_skipped("the policy for transparent huge pages cannot be set here");
    policy_restore();
}

static void skip_without_nested_paging(void) {
    if (!scene_has_nested_paging())
        check_skipped("no nested paging: there are no stage-2 mappings to count");
}

/* The model keeps to one kernel's rules, the memory below it to those of the kernel that runs. */
static void skip_where_memory_is_another_kernels(void) {
    if (kvm_is_modelled() && kernel_release() != host_release())
        check_skipped(
            "predicted is what the memory of the modelled kernel does, and this machine's is another's");
}

static void prediction_equals_the_kernel_s_counts(void) {
    uint64_t seed = diff_seed(), wanted = diff_operations(USUAL_COMBINATIONS), done = 0, mismatches = 0;
    skip_where_memory_is_another_kernels();
    skip_without_nested_paging();
    skip_without_policies();
    struct vm vm = vm_make();
    for (uint64_t number = 0; done < wanted; number++) {
        struct combination c = combination_number(seed, number);
        if (!is_foreseeable(&c) || !combination_is_had(&vm, &c))
            continue;
        if (!agrees(seed, number, &c))
            mismatches++;
        done++;
        check_is_alive();
    }
    vm_end(&vm);
    policy_restore();
    diff_report(seed, done, mismatches);
    CHECK_EQ(mismatches, 0);
}

/*
 * Pages of 1 GiB take a machine with room for one: `cargo xtask bed diff prediction` has it, a lane of
 * `cargo xtask test` has not.
 */
static void prediction_of_pages_of_1_gib(void) {
    static const struct {
        uint64_t size, gpa_offset, hva_offset, range_start, range_size;
        uint32_t flags, limit_1g;
        uint64_t hva_shift;
    } places[] = {
        {GIB, 0, 0, 0, GIB, 0, KVMPREP_LIMIT_NONE, 0},
        {GIB, 0, 0, MIB, PAGE, 0, KVMPREP_LIMIT_NONE, 0},
        {GIB, 0, FRAME, 0, GIB - FRAME, 0, KVMPREP_LIMIT_CONGRUENCE, GIB - FRAME},
        {GIB, 0, PAGE, 0, 5 * FRAME, 0, KVMPREP_LIMIT_CONGRUENCE, GIB - PAGE},
        {GIB, FRAME, 0, 0, GIB, 0, KVMPREP_LIMIT_EDGES, 0}, /* it holds no whole page of 1 GiB */
        {GIB, PAGE, 0, 0, 5 * FRAME, 0, KVMPREP_LIMIT_EDGES, PAGE},
        {GIB - PAGE, 0, 0, 0, GIB - PAGE, 0, KVMPREP_LIMIT_EDGES, 0},
        {GIB, 0, 0, MIB, 3 * FRAME, KVM_MEM_LOG_DIRTY_PAGES, KVMPREP_LIMIT_DIRTY_LOGGING, 0},
    };
    uint64_t mismatches = 0, n = sizeof(places) / sizeof(places[0]);
    skip_without_nested_paging();
    struct vm vm = vm_make();
    for (uint64_t i = 0; i < n; i++) {
        struct combination c = combination_of(HUGETLB_SHARED, places[i].size);
        c.is_gigantic = true;
        c.gpa_offset = places[i].gpa_offset;
        c.hva_offset = places[i].hva_offset;
        c.flags = places[i].flags;
        c.range_start = places[i].range_start;
        c.range_size = places[i].range_size;
        if (!combination_is_had(&vm, &c))
            check_skipped("no page of 1 GiB could be had; a guest of cargo xtask bed diff prediction has "
                          "one, where its kernel can");
        struct scene scene = scene_make(&c);
        struct kvmprep_memslot_report report = scene_predict(&scene);
        scene_end(&scene);
        CHECK_EQ(report.limit_1g, places[i].limit_1g);
        CHECK_EQ(report.hva_shift, places[i].hva_shift);
        if (!agrees(0, i, &c))
            mismatches++;
        check_is_alive();
    }
    vm_end(&vm);
    diff_report(diff_seed(), n, mismatches);
    CHECK_EQ(mismatches, 0);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"prediction_of_pages_of_1_gib",
         prediction_of_pages_of_1_gib}, /* first: while there is room for one */
        {"prediction_equals_the_kernel_s_counts", prediction_equals_the_kernel_s_counts},
    };
    int result = check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
    policy_restore(); /* a case may have ended early */
    return result;
}
