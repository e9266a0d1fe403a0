/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KVMPREP_POPULATE_EXACT: a range at whose edge KVM may map more than was asked for is refused, with nothing
 * done, and with the range told that would do.
 *
 * KVM does map more: that is shown first, by what it counts. Where it cannot, by its own rules, every range
 * is exact and none may be refused. All of it is about stage 2: without it there is nothing to refuse.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/host.h"
#include "support/policy.h"
#include "support/setting.h"
#include <errno.h>
#include <sys/mman.h>

#define SIZE (16 * MIB)
#define FRAME (2 * MIB)

static struct kvmprep_range part_of(uint64_t offset, uint64_t size) {
    struct kvmprep_range range = {MEMORY_GPA + offset, size, {0, 0}};
    return range;
}

static int populate(struct setting *s, const struct kvmprep_range *ranges, size_t n, uint32_t flags) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    opts.vcpu_fd = s->vcpus[0].fd;
    opts.flags = flags;
    return kvmprep_populate(s->handle, ranges, n, &opts, NULL, 0, &s->err);
}

/* Bytes that KVM has mapped for the guest, in pages of all sizes. */
static uint64_t mapped(const struct setting *s) {
    return stat_of(s->vm.fd, "pages_4k") * PAGE + stat_of(s->vm.fd, "pages_2m") * FRAME;
}

/* Refused, told which range would do, and nothing done for the host, the guest or the record. */
static void check_inexact(struct setting *s, const struct kvmprep_range *ranges, size_t n,
                          struct kvmprep_range wide) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_range all = part_of(0, SIZE);
    struct kvmprep_coverage coverage;
    struct kvmprep_job *job = NULL;
    char edge[32];
    const uint64_t before = mapped(s);

    CHECK_ERR(populate(s, ranges, n, KVMPREP_POPULATE_EXACT), s->err, EINVAL, KVMPREP_REASON_RANGE_INEXACT);
    printf("  %s; %s\n", s->err.message, s->err.hint);
    CHECK_EQ(s->err.gpa, wide.gpa);
    CHECK_EQ(s->err.size, wide.size);
    CHECK_EQ(s->err.stage, KVMPREP_STAGE_STAGE2);
    CHECK(s->err.hint[0] != 0);
    /* The message names the edges that are wrong. */
    snprintf(edge, sizeof(edge), "%#llx", (unsigned long long)wide.gpa);
    CHECK(strstr(s->err.message, edge) != NULL);
    opts.flags = KVMPREP_POPULATE_EXACT;
    CHECK_ERR(kvmprep_job_new(s->handle, ranges, n, &opts, &job, &s->err), s->err, EINVAL,
              KVMPREP_REASON_RANGE_INEXACT);
    CHECK(job == NULL);
    CHECK_EQ(mapped(s), before);
    CHECK_EQ(present_bytes(s->memory.hva, SIZE), 0);
    CHECK_OK(kvmprep_get_coverage(s->handle, &all, &coverage, sizeof(coverage), &s->err), s->err);
    CHECK_EQ(coverage.host, 0);
}

/* Taken, and KVM maps as much as was asked for and no more. */
static void check_exact(struct setting *s, struct kvmprep_range range) {
    const uint64_t before = mapped(s);
    CHECK_OK(populate(s, &range, 1, KVMPREP_POPULATE_EXACT), s->err);
    CHECK_EQ(mapped(s) - before, range.size);
}

/* What it is for: one page asked for, and KVM maps the huge page around it. */
static void without_it_kvm_maps_more(void) {
    need_huge_pages_on_advice();
    struct setting s = setting_make_with_stage2(ANON_THP, SIZE);
    struct kvmprep_range page = part_of(FRAME + PAGE, PAGE);
    const uint64_t before = mapped(&s);
    CHECK_OK(populate(&s, &page, 1, 0), s.err);
    CHECK_EQ(mapped(&s) - before, FRAME);
    setting_end(&s);
}

/* Each way in which an edge can lie inside a frame; then the range that was told, with huge pages and
 * without. */
static void edges(void) {
    static const struct {
        uint64_t offset, size, wide_offset, wide_size;
    } ranges[] = {
        {PAGE, FRAME - PAGE, 0, FRAME},
        {0, PAGE, 0, FRAME},
        {0, FRAME - PAGE, 0, FRAME},
        {FRAME + 5 * PAGE, PAGE, FRAME, FRAME},
        {PAGE, 2 * FRAME, 0, 3 * FRAME},
        {FRAME - PAGE, 2 * PAGE, 0, 2 * FRAME},
        {SIZE - PAGE, PAGE, SIZE - FRAME, FRAME},
    };
    for (int huge = 0; huge < 2; huge++) {
        for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
            struct setting s = setting_make_with_stage2(huge ? ANON_THP : ANON_4K, SIZE);
            struct kvmprep_range range = part_of(ranges[i].offset, ranges[i].size);
            struct kvmprep_range wide = part_of(ranges[i].wide_offset, ranges[i].wide_size);
            check_inexact(&s, &range, 1, wide);
            check_exact(&s, wide);
            setting_end(&s);
        }
    }
}

/* Ranges that together end at a frame's edges are exact; one that is not is named, wherever it stands. */
static void several_ranges(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct kvmprep_range two[2] = {part_of(FRAME, FRAME), part_of(4 * FRAME, PAGE)};
    check_inexact(&s, two, 2, part_of(4 * FRAME, FRAME));
    struct kvmprep_range halves[2] = {part_of(FRAME + FRAME / 2, FRAME / 2),
                                      part_of(FRAME, FRAME / 2 + PAGE)};
    const uint64_t before = mapped(&s);
    CHECK_OK(populate(&s, halves, 2, KVMPREP_POPULATE_EXACT), s.err);
    CHECK_EQ(mapped(&s) - before, FRAME);
    setting_end(&s);
}

/* All memory, and none of the guest's page tables: nothing to refuse. */
static void nothing_to_refuse(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_range page = part_of(PAGE, PAGE);
    CHECK_OK(populate(&s, &page, 1, KVMPREP_POPULATE_EXACT | KVMPREP_POPULATE_HOST_ONLY), s.err);
    CHECK_EQ(present_bytes(s.memory.hva, SIZE), PAGE);
    if (!s.has_pre_fault)
        CHECK_OK(populate(&s, &page, 1, KVMPREP_POPULATE_EXACT), s.err);
    CHECK_OK(populate(&s, NULL, 0, KVMPREP_POPULATE_EXACT), s.err);
    CHECK_EQ(present_bytes(s.memory.hva, SIZE), SIZE);
    setting_end(&s);
}

/* A setting whose slot is another than the usual one: KVM and the handle are told. */
static void set_again(struct setting *s, struct kvmprep_memslot slot) {
    struct kvmprep_memslot deletion = KVMPREP_MEMSLOT_INIT;
    deletion.slot = MEMORY_SLOT;
    CHECK_OK(kvmprep_memslot_set(s->handle, &deletion, &s->err), s->err);
    CHECK_OK(kvmprep_memslot_set(s->handle, &slot, &s->err), s->err);
}

/* The head and the tail of a slot that no whole frame fits into are mapped page by page. */
static void head_and_tail_of_a_slot(void) {
    struct setting s = setting_make_with_stage2(ANON_THP, SIZE);
    struct kvmprep_memslot slot = s.slot;
    slot.gpa += 4 * PAGE;
    slot.hva += 4 * PAGE;
    slot.size -= 8 * PAGE;
    set_again(&s, slot);
    check_exact(&s, part_of(5 * PAGE, PAGE));
    check_exact(&s, part_of(SIZE - 6 * PAGE, 2 * PAGE));
    /* From head to tail, with whole frames between. */
    check_exact(&s, part_of(FRAME - PAGE, SIZE - 2 * FRAME + 2 * PAGE));
    setting_end(&s);
}

/* A slot whose gpa and hva differ modulo 2 MiB has no huge page anywhere. */
static void slot_that_is_not_congruent(void) {
    struct setting s = setting_make_with_stage2(ANON_THP, SIZE);
    struct kvmprep_memslot slot = s.slot;
    slot.gpa += PAGE;
    set_again(&s, slot);
    check_exact(&s, part_of(5 * PAGE, 7 * PAGE));
    check_exact(&s, part_of(3 * FRAME + PAGE, FRAME));
    setting_end(&s);
}

/* Nor has one whose writes are logged. */
static void slot_with_dirty_logging(void) {
    struct setting s = setting_make_with_stage2(ANON_THP, SIZE);
    struct kvmprep_memslot slot = s.slot;
    struct kvmprep_range page = part_of(5 * PAGE, PAGE);
    slot.flags = KVM_MEM_LOG_DIRTY_PAGES;
    CHECK_OK(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err);
    const uint64_t before = mapped(&s);
    CHECK_OK(populate(&s, &page, 1, KVMPREP_POPULATE_EXACT | KVMPREP_POPULATE_DIRTY_LOGGED), s.err);
    CHECK_EQ(mapped(&s) - before, PAGE);
    setting_end(&s);
}

/* Nor has private memory. */
/* That a slot is all private is believed of who says so; else KVM's attributes may say otherwise. */
static void private_memory(void) {
    struct setting s = setting_make_with_stage2(GMEM_PRIVATE, SIZE);
    struct kvmprep_range inside = part_of(5 * PAGE, PAGE);
    CHECK_ERR(populate(&s, &inside, 1, KVMPREP_POPULATE_EXACT), s.err, EINVAL, KVMPREP_REASON_RANGE_INEXACT);
    CHECK_EQ(s.err.slot, MEMORY_SLOT);
    s.slot.backing = KVMPREP_BACKING_GUEST_MEMFD;
    CHECK_OK(kvmprep_memslot_note(s.handle, &s.slot, &s.err), s.err);
    check_exact(&s, part_of(5 * PAGE, PAGE));
    check_exact(&s, part_of(FRAME - PAGE, FRAME + PAGE));
    setting_end(&s);
}

/* A pool of huge pages has nothing else. */
static void hugetlb(void) {
    struct setting s = setting_make_with_stage2(HUGETLB_SHARED, SIZE);
    struct kvmprep_range range = part_of(PAGE, FRAME);
    check_inexact(&s, &range, 1, part_of(0, 2 * FRAME));
    check_exact(&s, part_of(0, 2 * FRAME));
    setting_end(&s);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"without_it_kvm_maps_more", without_it_kvm_maps_more},
        {"edges", edges},
        {"several_ranges", several_ranges},
        {"nothing_to_refuse", nothing_to_refuse},
        {"head_and_tail_of_a_slot", head_and_tail_of_a_slot},
        {"slot_that_is_not_congruent", slot_that_is_not_congruent},
        {"slot_with_dirty_logging", slot_with_dirty_logging},
        {"private_memory", private_memory},
        {"hugetlb", hugetlb},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
