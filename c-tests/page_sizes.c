/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Each limit that keeps a slot in small pages, and what lifts it: the library names the limit, says how many
 * bytes it concerns and what the smallest change is; that change is then done, and the huge pages must come.
 *
 * What is expected is held against KVM's counters each time, where there is nested paging and so something to
 * count; without it the words alone are judged. The machine's policy for transparent huge pages is changed
 * meanwhile, and put back.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/combination.h"
#include <inttypes.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif

#define SIZE (3 * FRAME)

static void skip_unless_had(const struct combination *c) {
    struct vm vm = vm_make();
    bool is_had = combination_is_had(&vm, c);
    vm_end(&vm);
    if (!is_had)
        check_skipped("%s under policy '%s' cannot be had here", kind_name(c->kind), policy_name(c->policy));
}

/* Populates the scene; KVM must then have what was expected. */
static void check_expected(struct scene *scene, const struct combination *c,
                           const struct kvmprep_memslot_report *report) {
    if (!scene_has_nested_paging())
        return;
    scene_populate(scene, c);
    struct kvmprep_page_counts after = scene_counts(scene);
    uint64_t own = scene->has_pre_fault ? 0 : 1; /* the guest had to run: its page of code */
    CHECK_EQ(after.pages_4k - own, report->expected.pages_4k);
    CHECK_EQ(after.pages_2m, report->expected.pages_2m);
    CHECK_EQ(after.pages_1g, report->expected.pages_1g);
}

/* Makes the combination, asks about it, and sees that what was expected comes. */
static struct kvmprep_memslot_report report_of(const struct combination *c) {
    skip_unless_had(c);
    struct scene scene = scene_make(c);
    struct kvmprep_memslot_report report = scene_predict(&scene);
    check_expected(&scene, c, &report);
    scene_end(&scene);
    return report;
}

/* A limit that a change would lift is put into words, with that change; of another nothing is said. */
static void check_told(const struct kvmprep_memslot_report *report, bool is_told) {
    CHECK_EQ(report->message[0] != 0, is_told);
    CHECK_EQ(report->hint[0] != 0, is_told);
}

static void check_limit(const struct kvmprep_memslot_report *report, uint32_t limit, uint64_t bytes) {
    CHECK_EQ(report->limit_2m, limit);
    CHECK_EQ(report->limited_2m, bytes);
    check_told(report, limit != KVMPREP_LIMIT_GUEST_MEMFD);
}

/* All of the slot in pages of 2 MiB, and nothing left to say of that. */
static void check_all_is_huge(const struct kvmprep_memslot_report *report, uint64_t size) {
    CHECK_EQ(report->limit_2m, KVMPREP_LIMIT_NONE);
    CHECK_EQ(report->limited_2m, 0);
    CHECK_EQ(report->expected.pages_4k, 0);
    CHECK_EQ(report->expected.pages_2m, size / FRAME);
}

/* Whether the text says this number, as C writes it. */
static bool says(const char *text, uint64_t number) {
    char word[32];
    snprintf(word, sizeof(word), "%#" PRIx64, number);
    const char *at = strstr(text, word);
    return at != NULL && strspn(at + strlen(word), "0123456789abcdef") == 0;
}

static void nothing_to_lift(void) {
    struct combination c = combination_of(ANON_4K, SIZE);
    struct kvmprep_memslot_report report = report_of(&c);
    check_all_is_huge(&report, SIZE);
    CHECK_EQ(report.message[0], 0);
    CHECK_EQ(report.hint[0], 0);
    CHECK_EQ(report.hva_shift, 0);
    CHECK_EQ(report.limit_1g, KVMPREP_LIMIT_BACKING); /* which is no news, so there is no message */
}

static void edges_of_the_slot(void) {
    struct combination c = combination_of(ANON_4K, SIZE);
    c.gpa_offset = c.hva_offset = MIB;
    struct kvmprep_memslot_report report = report_of(&c);
    check_limit(&report, KVMPREP_LIMIT_EDGES, FRAME);
    CHECK_EQ(report.allowed.pages_2m, 2);
    /* The hint names a slot that has no such edges. */
    CHECK(says(report.hint, MEMORY_GPA));
    CHECK(says(report.hint, MEMORY_GPA + 4 * FRAME));
    c = combination_of(ANON_4K, 4 * FRAME);
    report = report_of(&c);
    check_all_is_huge(&report, c.size);
}

/* The shift is done as it is told, whatever the two offsets are. */
static void congruence(void) {
    static const uint64_t offsets[][2] = {{0, PAGE},         {PAGE, 0},         {MIB, PAGE}, {PAGE, MIB},
                                          {FRAME - PAGE, 0}, {0, FRAME - PAGE}, {0, MIB}};
    for (size_t i = 0; i < sizeof(offsets) / sizeof(offsets[0]); i++) {
        struct combination c = combination_of(ANON_4K, SIZE);
        c.gpa_offset = offsets[i][0];
        c.hva_offset = offsets[i][1];
        uint64_t in_frames = c.gpa_offset == 0 ? SIZE : SIZE - FRAME; /* but for head and tail */
        struct kvmprep_memslot_report report = report_of(&c);
        check_limit(&report, KVMPREP_LIMIT_CONGRUENCE, in_frames);
        CHECK_EQ(report.allowed.pages_2m, 0);
        CHECK(report.hva_shift != 0 && report.hva_shift < FRAME);
        CHECK(says(report.hint, report.hva_shift));
        CHECK(says(report.hint, FRAME - report.hva_shift)); /* or lower */

        c.hva_offset += report.hva_shift;
        report = report_of(&c);
        CHECK_EQ(report.hva_shift, 0);
        CHECK_EQ(report.expected.pages_2m, in_frames / FRAME);
    }
}

/* Where the slot holds no whole frame, no shift would help, and none is told to help. */
static void congruence_of_a_slot_without_a_frame(void) {
    struct combination c = combination_of(ANON_4K, FRAME);
    c.gpa_offset = MIB;
    struct kvmprep_memslot_report report = report_of(&c);
    CHECK_EQ(report.limit_2m, KVMPREP_LIMIT_EDGES);
    CHECK_EQ(report.limited_2m, FRAME);
    check_told(&report, false); /* a small slot is no defect */
}

static void dirty_logging(void) {
    struct combination c = combination_of(ANON_4K, SIZE);
    c.flags = KVM_MEM_LOG_DIRTY_PAGES;
    skip_unless_had(&c);
    struct scene scene = scene_make(&c);
    struct kvmprep_memslot_report report = scene_predict(&scene);
    check_limit(&report, KVMPREP_LIMIT_DIRTY_LOGGING, SIZE);
    CHECK(strstr(report.hint, "KVM_MEM_LOG_DIRTY_PAGES") != NULL);
    check_expected(&scene, &c, &report);

    scene.slot.flags = 0;
    CHECK_EQ(slot_set(&scene.vm, &scene.slot), 0);
    report = scene_predict(&scene);
    check_all_is_huge(&report, SIZE);
    check_expected(&scene, &c, &report);
    scene_end(&scene);
}

static void advice(void) {
    struct combination c = combination_of(ANON_4K, SIZE);
    c.advice = ADVICE_NONE;
    skip_unless_had(&c);
    struct scene scene = scene_make(&c);
    struct kvmprep_memslot_report report = scene_predict(&scene);
    check_limit(&report, KVMPREP_LIMIT_ADVICE, SIZE);
    CHECK(strstr(report.hint, "MADV_HUGEPAGE") != NULL);

    CHECK_EQ(madvise((void *)(uintptr_t)scene.slot.hva, SIZE, MADV_HUGEPAGE), 0);
    report = scene_predict(&scene);
    check_all_is_huge(&report, SIZE);
    check_expected(&scene, &c, &report);
    scene_end(&scene);
}

/* Off by the system's policy, by the process's, or by advice; a pool does without all of them. */
static void no_transparent_huge_pages(void) {
    static const enum policy off[] = {POLICY_NEVER, POLICY_NEVER_2M, POLICY_NOT_HERE};
    struct kvmprep_memslot_report report;
    for (size_t i = 0; i < sizeof(off) / sizeof(off[0]); i++) {
        struct combination c = combination_of(ANON_4K, SIZE);
        c.policy = off[i];
        if (off[i] == POLICY_NEVER_2M && host_release() < 6008)
            continue; /* no setting for 2 MiB alone */
        report = report_of(&c);
        check_limit(&report, KVMPREP_LIMIT_NO_THP, SIZE);
        c.policy = POLICY_ADVISED;
        report = report_of(&c);
        check_all_is_huge(&report, SIZE);
    }
    struct combination c = combination_of(ANON_4K, SIZE);
    c.advice = ADVICE_SMALL;
    c.advised_size = 0;
    report = report_of(&c);
    check_limit(&report, KVMPREP_LIMIT_NO_THP, SIZE);

    c = combination_of(HUGETLB_PRIVATE, SIZE);
    c.policy = POLICY_NEVER;
    report = report_of(&c);
    check_all_is_huge(&report, SIZE);
}

static void shared_memory(void) {
    struct combination c = combination_of(MEMFD_SHARED, SIZE);
    struct kvmprep_memslot_report report = report_of(&c);
    check_limit(&report, KVMPREP_LIMIT_NO_THP, SIZE);
    c.policy = POLICY_SHMEM_ADVISED;
    report = report_of(&c);
    check_limit(&report, KVMPREP_LIMIT_ADVICE, SIZE);
    c.advice = ADVICE_HUGE;
    c.advised_size = SIZE;
    report = report_of(&c);
    check_all_is_huge(&report, SIZE);
}

/* A mapping that ends in a frame: nothing else is behind its last page, or a mapping of another kind. */
static void edges_of_the_mapping(void) {
    struct combination c = combination_of(ANON_4K, SIZE), whole = c;
    c.hole_at = FRAME;
    c.hole_size = PAGE;
    struct kvmprep_memslot_report report = report_of(&c);
    check_limit(&report, KVMPREP_LIMIT_MAPPING_EDGES, FRAME - PAGE);
    CHECK_EQ(report.expected.pages_4k, FRAME / PAGE - 1);

    c = whole;
    c.policy = POLICY_ALWAYS;
    c.advised_start = FRAME + MIB; /* two mappings that both have huge pages */
    c.advised_size = SIZE - c.advised_start;
    report = report_of(&c);
    check_limit(&report, KVMPREP_LIMIT_MAPPING_EDGES, FRAME);

    report = report_of(&whole);
    check_all_is_huge(&report, SIZE);
}

static void small_pages_that_are_there(void) {
    struct combination c = combination_of(ANON_4K, SIZE);
    c.resident = RESIDENT_WRITTEN;
    c.resident_at = FRAME + MIB;
    if (host_release() < 6007)
        check_skipped("before Linux 6.7 nobody can tell that there are small pages");
    skip_unless_had(&c);
    struct scene scene = scene_make(&c);
    struct kvmprep_memslot_report report = scene_predict(&scene);
    check_limit(&report, KVMPREP_LIMIT_RESIDENT, FRAME);
    CHECK(strstr(report.hint, "MADV_COLLAPSE") != NULL);

    CHECK_EQ(madvise((void *)(uintptr_t)(scene.slot.hva + FRAME), FRAME, MADV_COLLAPSE), 0);
    report = scene_predict(&scene);
    check_all_is_huge(&report, SIZE);
    check_expected(&scene, &c, &report);
    scene_end(&scene);
}

/* An address that is far from everything, so that nothing comes to lie there by itself. */
#define EMPTY_PLACE (1ull << 40)

static void nothing_mapped(void) {
    struct combination c = combination_of(ANON_4K, SIZE);
    skip_unless_had(&c);
    struct scene scene = scene_make(&c);
    uint64_t hva = scene.slot.hva;
    scene.slot.hva = EMPTY_PLACE;
    struct kvmprep_memslot_report report = scene_predict(&scene);
    check_limit(&report, KVMPREP_LIMIT_NOT_MAPPED, SIZE);
    CHECK_EQ(report.allowed.pages_2m, SIZE / FRAME);
    CHECK_EQ(report.expected.pages_4k + report.expected.pages_2m, 0);
    scene.slot.hva = hva;
    report = scene_predict(&scene);
    check_all_is_huge(&report, SIZE);
    scene_end(&scene);
}

/* What has small pages only: said, with what has others. */
static void backings_of_small_pages(void) {
    static const enum kind kinds[] = {MEMFD_PRIVATE, FILE_PRIVATE};
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        struct combination c = combination_of(kinds[i], SIZE);
        struct kvmprep_memslot_report report = report_of(&c);
        check_limit(&report, KVMPREP_LIMIT_BACKING, SIZE);
        CHECK(strstr(report.hint, "hugetlb") != NULL);
    }
}

static void mapped_guest_memfd(void) {
    struct combination c = combination_of(GMEM_SHARED, SIZE);
    struct kvmprep_memslot_report report = report_of(&c);
    check_limit(&report, KVMPREP_LIMIT_GUEST_MEMFD, SIZE);
    CHECK_EQ(report.allowed.pages_2m, 0);
}

/* A frame with a private page; converted back as a whole, it is huge again. */
static void private_pages(void) {
    struct combination c = combination_of(GMEM_PRIVATE, SIZE);
    c.n_private = 1;
    c.private_memory[0].gpa = FRAME;
    c.private_memory[0].size = PAGE;
    struct kvmprep_memslot_report report = report_of(&c);
    check_limit(&report, KVMPREP_LIMIT_ATTRIBUTES, FRAME - PAGE);
    CHECK_EQ(report.expected.pages_2m, 2);
    c.private_memory[0].size = FRAME;
    report = report_of(&c);
    check_limit(&report, KVMPREP_LIMIT_GUEST_MEMFD, FRAME);
    c.n_private = 0;
    report = report_of(&c);
    check_all_is_huge(&report, SIZE);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"nothing_to_lift", nothing_to_lift},
        {"edges_of_the_slot", edges_of_the_slot},
        {"congruence", congruence},
        {"congruence_of_a_slot_without_a_frame", congruence_of_a_slot_without_a_frame},
        {"dirty_logging", dirty_logging},
        {"advice", advice},
        {"no_transparent_huge_pages", no_transparent_huge_pages},
        {"shared_memory", shared_memory},
        {"edges_of_the_mapping", edges_of_the_mapping},
        {"small_pages_that_are_there", small_pages_that_are_there},
        {"nothing_mapped", nothing_mapped},
        {"backings_of_small_pages", backings_of_small_pages},
        {"mapped_guest_memfd", mapped_guest_memfd},
        {"private_pages", private_pages},
    };
    atexit(policy_restore);
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
