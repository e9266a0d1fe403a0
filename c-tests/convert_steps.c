/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What each step of a conversion does, on a real kernel: who is told, what is put back when the VMM cannot
 * follow, what is given up and what is kept, and what is refused before anything is done.
 *
 * What the kernel takes a page for is asked of the guest: it writes, and the host sees that or does not.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/converting.h"
#include "support/guest.h"
#include "support/host.h"
#include "support/policy.h"
#include <errno.h>
#include <limits.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define SLOT_SIZE (2 * MIB)
#define SLOT_PAGES (SLOT_SIZE / PAGE)
#define FIRST_TAG 1
#define SECOND_TAG 3
#define HOST_TAG 2

/* Pages of the guest's memory. */
static struct kvmprep_range pages(uint64_t first, uint64_t count) {
    return (struct kvmprep_range){.gpa = MEMORY_GPA + first * PAGE, .size = count * PAGE};
}

static void convert(struct private_guest *s, struct kvmprep_range range, uint32_t to) {
    CHECK_OK(kvmprep_convert(s->handle, &range, to, NULL, &s->err), s->err);
}

/* Makes memory private or shared in KVM alone, as a VMM without the library does. */
static void set_attributes(struct private_guest *s, struct kvmprep_range range, uint32_t to) {
    struct kvm_memory_attributes attributes = {.address = range.gpa,
                                               .size = range.size,
                                               .attributes =
                                                   to == KVMPREP_PRIVATE ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0};
    CHECK_EQ(ioctl(s->vm.fd, KVM_SET_MEMORY_ATTRIBUTES, &attributes), 0);
}

static volatile uint32_t *word_at(struct private_guest *s, uint64_t page) {
    return (uint32_t *)((char *)s->slots[page / SLOT_PAGES].memory.hva + page % SLOT_PAGES * PAGE);
}

static uint64_t gpa_of(uint64_t page) {
    return MEMORY_GPA + page * PAGE;
}

/* ---- Guest and host at one page ---- */

static void guest_writes(struct private_guest *s, struct kvmprep_range range, uint32_t tag) {
    struct converter c = {.vcpu = s->vcpus[0], .handle = s->handle, .opts = KVMPREP_CONVERT_OPTS_INIT};
    CHECK_EQ(guest_fill(&c, range.gpa, range.size, tag), 0);
}

/* What the guest reads at the first word of a page, told by way of its code page, where that is empty. */
static uint32_t guest_reads(struct private_guest *s, uint64_t page) {
    struct converter c = {.vcpu = s->vcpus[0], .handle = s->handle, .report = 2048};
    CHECK_EQ(guest_gather(&c, gpa_of(page), PAGE), 0);
    return *(volatile uint32_t *)((char *)s->vm.code + 2048);
}

/* For what the kernel takes a page: spoils its content. */
static uint32_t kernels_view(struct private_guest *s, uint64_t page) {
    *word_at(s, page) = word_of(gpa_of(page), HOST_TAG);
    guest_writes(s, pages(page, 1), FIRST_TAG);
    return *word_at(s, page) == word_of(gpa_of(page), FIRST_TAG) ? KVMPREP_SHARED : KVMPREP_PRIVATE;
}

static uint32_t handles_view(struct private_guest *s, uint64_t page) {
    struct kvmprep_visibility_run run;
    CHECK_OK(kvmprep_visibility_next(s->handle, gpa_of(page), &run, &s->err), s->err);
    CHECK_EQ(run.gpa, gpa_of(page));
    return run.visibility;
}

/* All of a range is that, for the handle and for the kernel. */
static void check_is(struct private_guest *s, struct kvmprep_range range, uint32_t visibility) {
    for (uint64_t page = (range.gpa - MEMORY_GPA) / PAGE; gpa_of(page) < range.gpa + range.size; page++) {
        CHECK_EQ(handles_view(s, page), visibility);
        CHECK_EQ(kernels_view(s, page), visibility);
    }
}

/* ---- Who is told ---- */

struct told {
    struct kvmprep_range ranges[8];
    uint32_t to[8];
    unsigned n;
    unsigned fails_at; /* the call that fails, counted from 1; 0: none */
    int answer;        /* of that call */
    struct private_guest *guest;
    int results[3]; /* of calls from inside */
};

static int listen(const struct kvmprep_range *range, uint32_t to, void *opaque) {
    struct told *told = opaque;
    if (told->n < 8) {
        told->ranges[told->n] = *range;
        told->to[told->n] = to;
    }
    return ++told->n == told->fails_at ? told->answer : 0;
}

static struct kvmprep_convert_opts opts_of(struct told *told, struct kvmprep_convert_result *result) {
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    opts.changed = listen;
    opts.opaque = told;
    opts.result = result;
    opts.result_size = sizeof(*result);
    return opts;
}

static void check_told(const struct told *told, unsigned i, struct kvmprep_range range, uint32_t to) {
    CHECK(i < told->n);
    CHECK_EQ(told->ranges[i].gpa, range.gpa);
    CHECK_EQ(told->ranges[i].size, range.size);
    CHECK_EQ(told->to[i], to);
}

/* Only what changes is told and costs a call; what touches is one, across slots too. */
static void each_run_that_changes_is_told_once(void) {
    struct private_guest s = private_guest_make(ANON_4K, 2, SLOT_SIZE);
    struct kvmprep_convert_result result;
    struct told told = {0};
    struct kvmprep_convert_opts opts = opts_of(&told, &result);
    convert(&s, pages(10, 5), KVMPREP_SHARED);
    convert(&s, pages(20, 1), KVMPREP_SHARED);

    struct kvmprep_range range = pages(0, 30);
    CHECK_OK(kvmprep_convert(s.handle, &range, KVMPREP_SHARED, &opts, &s.err), s.err);
    CHECK_EQ(told.n, 3);
    check_told(&told, 0, pages(0, 10), KVMPREP_SHARED);
    check_told(&told, 1, pages(15, 5), KVMPREP_SHARED);
    check_told(&told, 2, pages(21, 9), KVMPREP_SHARED);
    CHECK_EQ(result.calls, 3);
    CHECK_EQ(result.converted, 24 * PAGE);
    CHECK_EQ(result.dropped, 24 * PAGE);
    check_is(&s, range, KVMPREP_SHARED);

    told.n = 0;
    CHECK_OK(kvmprep_convert(s.handle, &range, KVMPREP_SHARED, &opts, &s.err), s.err);
    CHECK_EQ(told.n + result.calls + result.converted + result.dropped, 0);

    range = pages(SLOT_PAGES - 3, 6);
    CHECK_OK(kvmprep_convert(s.handle, &range, KVMPREP_SHARED, &opts, &s.err), s.err);
    CHECK_EQ(told.n, 1);
    check_told(&told, 0, range, KVMPREP_SHARED);
    CHECK_EQ(result.calls, 1);
    check_is(&s, range, KVMPREP_SHARED);
    private_guest_end(&s);
}

/* Long runs come in pieces, so that other vCPUs are not held up. */
static void long_runs_are_cut(void) {
    struct private_guest s = private_guest_make(ANON_4K, 1, 136 * MIB);
    struct kvmprep_convert_result result;
    struct told told = {0};
    struct kvmprep_convert_opts opts = opts_of(&told, &result);
    struct kvmprep_range range = {.gpa = MEMORY_GPA + PAGE, .size = 130 * MIB};
    CHECK_OK(kvmprep_convert(s.handle, &range, KVMPREP_SHARED, &opts, &s.err), s.err);
    CHECK_EQ(told.n, 3);
    check_told(&told, 0, pages(1, 64 * MIB / PAGE - 1), KVMPREP_SHARED);
    check_told(&told, 1, pages(64 * MIB / PAGE, 64 * MIB / PAGE), KVMPREP_SHARED);
    check_told(&told, 2, pages(128 * MIB / PAGE, 2 * MIB / PAGE + 1), KVMPREP_SHARED);
    CHECK_EQ(result.calls, 3);
    CHECK_EQ(result.converted, range.size);
    private_guest_end(&s);
}

/* Where the VMM cannot follow, that run is as it was, content included, and nothing after it is touched. */
static void a_run_refused_is_put_back(uint32_t to) {
    struct private_guest s = private_guest_make(ANON_4K, 1, SLOT_SIZE);
    uint32_t from = to == KVMPREP_PRIVATE ? KVMPREP_SHARED : KVMPREP_PRIVATE;
    struct kvmprep_convert_result result;
    struct told told = {.fails_at = 2, .answer = -EXDEV};
    struct kvmprep_convert_opts opts = opts_of(&told, &result);
    convert(&s, s.all, from);
    convert(&s, pages(4, 1), to);
    convert(&s, pages(9, 1), to);
    guest_writes(&s, s.all, SECOND_TAG);

    struct kvmprep_range range = pages(0, 16); /* changes in 0 to 3, 5 to 8 and 10 to 15 */
    CHECK_ERR(kvmprep_convert(s.handle, &range, to, &opts, &s.err), s.err, EXDEV,
              KVMPREP_REASON_CALLBACK_FAILED);
    CHECK_EQ(s.err.gpa, gpa_of(5));
    CHECK_EQ(s.err.gpa + s.err.size, range.gpa + range.size);
    CHECK_EQ(told.n, 2);
    check_told(&told, 0, pages(0, 4), to);
    check_told(&told, 1, pages(5, 4), to);
    CHECK_EQ(result.converted, 4 * PAGE);
    CHECK_EQ(result.dropped, 4 * PAGE);
    CHECK_EQ(result.calls, 3); /* there, there and back */
    for (uint64_t page = 0; page < 16; page++) {
        bool is_fresh = page < 4;
        CHECK_EQ(guest_reads(&s, page), is_fresh ? 0 : word_of(gpa_of(page), SECOND_TAG));
        CHECK_EQ(handles_view(&s, page), is_fresh || page == 4 || page == 9 ? to : from);
    }
    check_is(&s, pages(0, 5), to);
    check_is(&s, pages(5, 4), from);
    check_is(&s, pages(9, 1), to);
    check_is(&s, pages(10, 6), from);

    /* Again, and the rest is done. */
    told = (struct told){0};
    CHECK_OK(kvmprep_convert(s.handle, &range, to, &opts, &s.err), s.err);
    CHECK_EQ(told.n, 2);
    check_told(&told, 0, pages(5, 4), to);
    check_told(&told, 1, pages(10, 6), to);
    check_is(&s, range, to);
    private_guest_end(&s);
}

static void a_run_refused_is_put_back_shared(void) {
    a_run_refused_is_put_back(KVMPREP_PRIVATE);
}

static void a_run_refused_is_put_back_private(void) {
    a_run_refused_is_put_back(KVMPREP_SHARED);
}

/* From inside, what overlaps would wait for itself; it is told so. */
static int call_from_inside(const struct kvmprep_range *range, uint32_t to, void *opaque) {
    struct told *told = opaque;
    struct private_guest *s = told->guest;
    struct kvmprep_range elsewhere = pages(100, 1);
    told->results[0] = kvmprep_convert(s->handle, range, to, NULL, NULL);
    told->results[1] = kvmprep_visibility_note(s->handle, range, to, NULL);
    told->results[2] = kvmprep_memslot_changing(s->handle, MEMORY_SLOT, NULL);
    told->n++;
    return kvmprep_convert(s->handle, &elsewhere, KVMPREP_SHARED, NULL, NULL);
}

static void calls_from_inside(void) {
    struct private_guest s = private_guest_make(ANON_4K, 1, SLOT_SIZE);
    struct kvmprep_convert_result result;
    struct told told = {.guest = &s};
    struct kvmprep_convert_opts opts = opts_of(&told, &result);
    struct kvmprep_range range = pages(0, 8);
    opts.changed = call_from_inside;
    CHECK_OK(kvmprep_convert(s.handle, &range, KVMPREP_SHARED, &opts, &s.err), s.err);
    CHECK_EQ(told.n, 1);
    for (int i = 0; i < 3; i++)
        CHECK_EQ(told.results[i], -EDEADLK);
    check_is(&s, range, KVMPREP_SHARED);
    check_is(&s, pages(100, 1), KVMPREP_SHARED);
    check_is(&s, pages(101, 1), KVMPREP_PRIVATE);
    private_guest_end(&s);
}

/* Whatever is neither 0 nor an errno is a failure all the same: nothing may go on as if the VMM had agreed.
 */
static void an_answer_that_is_no_errno(void) {
    const int answers[] = {1, INT_MAX, -4096, INT_MIN};
    struct private_guest s = private_guest_make(ANON_4K, 1, SLOT_SIZE);
    struct kvmprep_convert_result result;
    struct kvmprep_range range = pages(0, 2);
    guest_writes(&s, range, FIRST_TAG);
    for (size_t i = 0; i < sizeof(answers) / sizeof(answers[0]); i++) {
        struct told told = {.fails_at = 1, .answer = answers[i]};
        struct kvmprep_convert_opts opts = opts_of(&told, &result);
        CHECK_ERR(kvmprep_convert(s.handle, &range, KVMPREP_SHARED, &opts, &s.err), s.err, EINVAL,
                  KVMPREP_REASON_CALLBACK_FAILED);
        CHECK_EQ(told.n, 1);
        CHECK_EQ(result.converted + result.dropped, 0);
        check_is(&s, range, KVMPREP_PRIVATE);
        CHECK_EQ(guest_reads(&s, 0), word_of(gpa_of(0), FIRST_TAG));
    }
    private_guest_end(&s);
}

/* ---- Steps one by one ---- */

/* A step more is asked for by adding it: the others are still taken. */
static void a_step_is_added(void) {
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    opts.steps |= KVMPREP_CONVERT_PREFAULT;
    CHECK_EQ(opts.steps, KVMPREP_CONVERT_ATTRIBUTES | KVMPREP_CONVERT_DROP | KVMPREP_CONVERT_PREFAULT);
}

static struct kvmprep_convert_result convert_in_steps(struct private_guest *s, struct kvmprep_range range,
                                                      uint32_t to, uint32_t steps, uint32_t flags) {
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    struct kvmprep_convert_result result;
    opts.steps = steps;
    opts.flags = flags;
    opts.vcpu_fd = s->vcpus[0].fd;
    opts.result = &result;
    opts.result_size = sizeof(result);
    CHECK_OK(kvmprep_convert(s->handle, &range, to, &opts, &s->err), s->err);
    return result;
}

/* Pages that the guest has written as both: 0 to 3 are as `to` at the end. */
static struct private_guest written_on_both_sides(enum kind kind, uint32_t to) {
    struct private_guest s = private_guest_make(kind, 1, SLOT_SIZE);
    uint32_t from = to == KVMPREP_PRIVATE ? KVMPREP_SHARED : KVMPREP_PRIVATE;
    struct kvmprep_range range = pages(0, 4);
    convert_in_steps(&s, range, from, KVMPREP_CONVERT_ATTRIBUTES, 0);
    guest_writes(&s, range, from == KVMPREP_PRIVATE ? FIRST_TAG : SECOND_TAG);
    convert_in_steps(&s, range, to, KVMPREP_CONVERT_ATTRIBUTES, 0);
    guest_writes(&s, range, to == KVMPREP_PRIVATE ? FIRST_TAG : SECOND_TAG);
    return s;
}

static void check_reads(struct private_guest *s, uint32_t tag) {
    for (uint64_t page = 0; page < 4; page++)
        CHECK_EQ(guest_reads(s, page), tag == 0 ? 0 : word_of(gpa_of(page), tag));
}

/* Told to KVM alone, either side keeps what it had. */
static void attributes_alone_lose_nothing(void) {
    struct private_guest s = written_on_both_sides(ANON_4K, KVMPREP_SHARED);
    struct kvmprep_range range = pages(0, 4);
    struct kvmprep_convert_result result =
        convert_in_steps(&s, range, KVMPREP_PRIVATE, KVMPREP_CONVERT_ATTRIBUTES, 0);
    CHECK_EQ(result.converted, range.size);
    CHECK_EQ(result.dropped + result.prefaulted, 0);
    check_reads(&s, FIRST_TAG);
    CHECK_EQ(present_bytes(s.slots[0].memory.hva, range.size), range.size);
    convert_in_steps(&s, range, KVMPREP_SHARED, KVMPREP_CONVERT_ATTRIBUTES, 0);
    check_reads(&s, SECOND_TAG);
    CHECK_EQ(*word_at(&s, 2), word_of(gpa_of(2), SECOND_TAG));
    private_guest_end(&s);
}

/* The VMM has told KVM itself, and leaves the rest to the library. */
static void the_rest_of_a_conversion(enum kind kind) {
    struct private_guest s = written_on_both_sides(kind, KVMPREP_SHARED);
    struct kvmprep_range range = pages(0, 4);
    set_attributes(&s, range, KVMPREP_PRIVATE);
    struct kvmprep_convert_result result =
        convert_in_steps(&s, range, KVMPREP_PRIVATE, KVMPREP_CONVERT_DROP, 0);
    CHECK_EQ(result.calls, 0);
    CHECK_EQ(result.dropped, range.size);
    CHECK_EQ(handles_view(&s, 0), KVMPREP_PRIVATE);
    CHECK_EQ(present_bytes(s.slots[0].memory.hva, range.size), 0);
    check_reads(&s, FIRST_TAG);
    set_attributes(&s, range, KVMPREP_SHARED);
    result = convert_in_steps(&s, range, KVMPREP_SHARED, KVMPREP_CONVERT_DROP, 0);
    CHECK_EQ(result.calls, 0);
    CHECK_EQ(result.dropped, range.size);
    check_reads(&s, 0);
    /* And what was private is gone. */
    set_attributes(&s, range, KVMPREP_PRIVATE);
    check_reads(&s, 0);
    private_guest_end(&s);
}

static void the_rest_of_a_conversion_anon(void) {
    the_rest_of_a_conversion(ANON_4K);
}

static void the_rest_of_a_conversion_memfd(void) {
    the_rest_of_a_conversion(MEMFD_SHARED);
}

/* Pre-faulting alone: KVM is told by the VMM, nothing is given up, and the guest does not fault. */
static void prefaulting_alone(void) {
    struct private_guest s = written_on_both_sides(ANON_4K, KVMPREP_SHARED);
    struct kvmprep_range range = pages(0, 4);
    if (!has_pre_fault(&s.vm))
        check_skipped("no KVM_PRE_FAULT_MEMORY");
    set_attributes(&s, range, KVMPREP_PRIVATE);
    struct kvmprep_convert_result result =
        convert_in_steps(&s, range, KVMPREP_PRIVATE, KVMPREP_CONVERT_PREFAULT, 0);
    CHECK_EQ(result.calls + result.dropped, 0);
    CHECK_EQ(result.prefaulted, range.size);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_READ, range.gpa, range.size), 0);
    check_reads(&s, FIRST_TAG);
    private_guest_end(&s);
}

/* Shared memory may be kept: it is there again when the guest shares it again. Private memory is given up. */
static void shared_memory_kept(enum kind kind) {
    struct private_guest s = written_on_both_sides(kind, KVMPREP_SHARED);
    struct kvmprep_range range = pages(0, 4);
    struct kvmprep_convert_result result =
        convert_in_steps(&s, range, KVMPREP_PRIVATE, 0, KVMPREP_CONVERT_KEEP_SHARED);
    CHECK_EQ(result.kept, range.size);
    CHECK_EQ(result.dropped, 0);
    guest_writes(&s, range, FIRST_TAG);
    CHECK_EQ(*word_at(&s, 1), word_of(gpa_of(1), SECOND_TAG)); /* not what the guest has written */
    result = convert_in_steps(&s, range, KVMPREP_SHARED, 0, KVMPREP_CONVERT_KEEP_SHARED);
    CHECK_EQ(result.dropped, range.size);
    check_reads(&s, SECOND_TAG);
    /* Not kept any more. */
    convert_in_steps(&s, range, KVMPREP_PRIVATE, 0, 0);
    check_reads(&s, 0);
    CHECK_EQ(present_bytes(s.slots[0].memory.hva, range.size), 0);
    convert_in_steps(&s, range, KVMPREP_SHARED, 0, 0);
    check_reads(&s, 0);
    private_guest_end(&s);
}

static void shared_memory_kept_anon(void) {
    shared_memory_kept(ANON_4K);
}

static void shared_memory_kept_memfd(void) {
    shared_memory_kept(MEMFD_SHARED);
}

/* ---- What cannot be ---- */

#define OTHER_SLOT 20
#define HOLE_PAGES 4

/* Three slots' worth: a slot, a hole, then a slot without guest_memfd. */
struct ragged {
    struct private_guest guest;
    struct memory other;
    struct kvmprep_range hole, without_gmem;
};

static struct ragged ragged_make(void) {
    struct ragged r = {.guest = private_guest_make(ANON_4K, 1, SLOT_SIZE)};
    struct private_guest *s = &r.guest;
    r.other = memory_make(&s->vm, ANON_4K, SLOT_SIZE);
    r.hole = pages(SLOT_PAGES, HOLE_PAGES);
    r.without_gmem = pages(SLOT_PAGES + HOLE_PAGES, SLOT_PAGES);
    struct kvmprep_memslot slot = slot_of(OTHER_SLOT, r.without_gmem.gpa, &r.other);
    CHECK_EQ(slot_set(&s->vm, &slot), 0);
    CHECK_OK(kvmprep_memslot_note(s->handle, &slot, &s->err), s->err);
    return r;
}

static void ragged_end(struct ragged *r) {
    private_guest_end(&r->guest);
    memory_end(&r->other);
}

/* Firmware shares holes and devices: that succeeds and does nothing. */
static void holes_can_be_shared_and_nothing_else(void) {
    struct ragged r = ragged_make();
    struct private_guest *s = &r.guest;
    struct kvmprep_convert_result result;
    struct told told = {0};
    struct kvmprep_convert_opts opts = opts_of(&told, &result);
    struct kvmprep_range across = pages(SLOT_PAGES - 2, 2 + HOLE_PAGES + 2);

    CHECK_OK(kvmprep_convert(s->handle, &r.hole, KVMPREP_SHARED, &opts, &s->err), s->err);
    CHECK_EQ(told.n + result.calls + result.converted, 0);

    CHECK_ERR(kvmprep_convert(s->handle, &r.hole, KVMPREP_PRIVATE, &opts, &s->err), s->err, EINVAL,
              KVMPREP_REASON_NO_MEMSLOT);
    CHECK_EQ(s->err.gpa, r.hole.gpa);
    CHECK_EQ(s->err.size, r.hole.size);
    CHECK_ERR(kvmprep_convert(s->handle, &r.without_gmem, KVMPREP_PRIVATE, &opts, &s->err), s->err, EINVAL,
              KVMPREP_REASON_NO_GMEM);
    CHECK_EQ(s->err.gpa, r.without_gmem.gpa);
    CHECK_OK(kvmprep_convert(s->handle, &r.without_gmem, KVMPREP_SHARED, &opts, &s->err), s->err);
    CHECK_EQ(told.n, 0);

    /* Across all three: shared, where there is something to share. */
    CHECK_OK(kvmprep_convert(s->handle, &across, KVMPREP_SHARED, &opts, &s->err), s->err);
    CHECK_EQ(told.n, 1);
    check_told(&told, 0, pages(SLOT_PAGES - 2, 2), KVMPREP_SHARED);
    check_is(s, pages(SLOT_PAGES - 2, 2), KVMPREP_SHARED);
    check_is(s, pages(SLOT_PAGES - 3, 1), KVMPREP_PRIVATE);

    /* Not private, and then nothing of it: the part before the hole is as it was. */
    CHECK_ERR(kvmprep_convert(s->handle, &across, KVMPREP_PRIVATE, &opts, &s->err), s->err, EINVAL,
              KVMPREP_REASON_NO_MEMSLOT);
    CHECK_EQ(told.n, 1);
    check_is(s, pages(SLOT_PAGES - 2, 2), KVMPREP_SHARED);
    ragged_end(&r);
}

/* The same asked for by a guest, which gets an answer that it knows. */
static void what_a_guest_asks_for(void) {
    struct ragged r = ragged_make();
    struct private_guest *s = &r.guest;
    struct converter c = converter_make(&s->vm, 2, s->handle);
    struct kvmprep_range some = pages(0, 4), across = pages(SLOT_PAGES - 2, 4);
    static const struct {
        const char *what;
        uint64_t attributes, answer;
    } asked[] = {
        {"4K pages, shared", TO_SHARED, 0},
        {"2M pages, private: a hint", TO_PRIVATE | 1, 0},
        {"1G pages, shared: a hint", TO_SHARED | 2, 0},
        {"a page size that is none", TO_PRIVATE | 3, EINVAL},
        {"an attribute that is none", TO_PRIVATE | 32, EINVAL},
    };
    uint64_t answer;
    for (size_t i = 0; i < sizeof(asked) / sizeof(asked[0]); i++) {
        CHECK_EQ(guest_convert(&c, some.gpa, some.size, asked[i].attributes, &answer), 0);
        if (answer != asked[i].answer)
            check_failed(__FILE__, __LINE__, "%s: the guest is told %llu", asked[i].what,
                         (unsigned long long)answer);
    }
    check_is(s, some, KVMPREP_SHARED);

    CHECK_EQ(guest_convert(&c, across.gpa, across.size, TO_SHARED, &answer), 0);
    CHECK_EQ(answer, 0);
    CHECK_EQ(guest_convert(&c, across.gpa, across.size, TO_PRIVATE, &answer), 0);
    CHECK_EQ(answer, EINVAL);
    CHECK_EQ(guest_convert(&c, r.without_gmem.gpa, PAGE, TO_PRIVATE, &answer), 0);
    CHECK_EQ(answer, EINVAL);
    /* As much as 32 bits can say, nearly all of it no memory. */
    CHECK_EQ(guest_convert(&c, 0, 0xffffffffull * PAGE, TO_PRIVATE, &answer), 0);
    CHECK_EQ(answer, EINVAL);
    check_is(s, pages(SLOT_PAGES - 2, 2), KVMPREP_SHARED);
    check_is(s, pages(SLOT_PAGES - 4, 2), KVMPREP_PRIVATE);

    c.opts.max_size = 2 * PAGE;
    CHECK_EQ(guest_convert(&c, gpa_of(8), 3 * PAGE, TO_SHARED, &answer), 0);
    CHECK_EQ(answer, EINVAL);
    CHECK_EQ(c.err.reason, KVMPREP_REASON_CONVERT_TOO_LARGE);
    CHECK_EQ(guest_convert(&c, gpa_of(8), 2 * PAGE, TO_SHARED, &answer), 0);
    CHECK_EQ(answer, 0);
    check_is(s, pages(8, 2), KVMPREP_SHARED);
    check_is(s, pages(10, 1), KVMPREP_PRIVATE);
    converter_end(&s->vm, &c);
    ragged_end(&r);
}

/*
 * KVM takes memory for private that has nothing private behind it, which nobody has told the handle. The
 * guest's access exits; it cannot be what KVM says, and shared it is for the handle: so KVM is told again.
 */
static void exits_over_what_nobody_told(void) {
    struct ragged r = ragged_make();
    struct private_guest *s = &r.guest;
    struct kvmprep_range page = {.gpa = r.without_gmem.gpa, .size = PAGE};
    struct kvmprep_convert_result result;
    struct told told = {0};
    struct kvmprep_convert_opts opts = opts_of(&told, &result);
    set_attributes(s, page, KVMPREP_PRIVATE);
    CHECK_EQ(guest_touch(&s->vcpus[0], TOUCH_WRITE, page.gpa, PAGE), -EFAULT);
    CHECK_EQ(s->vcpus[0].run->exit_reason, KVM_EXIT_MEMORY_FAULT);
    struct memory_fault_exit fault = memory_fault_of(s->vcpus[0].run);
    CHECK_EQ(fault.flags, KVM_MEMORY_EXIT_FLAG_PRIVATE);
    CHECK_ERR(kvmprep_handle_memory_fault(s->handle, fault.gpa, fault.size, fault.flags, &opts, &s->err),
              s->err, EINVAL, KVMPREP_REASON_NO_GMEM);
    CHECK_ERR(kvmprep_handle_memory_fault(s->handle, fault.gpa, fault.size, fault.flags | 16, &opts, &s->err),
              s->err, EINVAL, KVMPREP_REASON_UNKNOWN_FLAGS);
    CHECK_OK(kvmprep_handle_memory_fault(s->handle, fault.gpa, fault.size, 0, &opts, &s->err), s->err);
    CHECK_EQ(result.calls, 1);
    CHECK_EQ(result.converted + told.n, 0);
    CHECK_EQ(guest_touch(&s->vcpus[0], TOUCH_WRITE, page.gpa, PAGE), 0);
    ragged_end(&r);
}

/* Runs on every kernel. */
static void a_vm_without_private_memory(void) {
    struct vm vm = vm_make();
    struct memory memory = memory_make(&vm, ANON_4K, SLOT_SIZE);
    struct kvmprep_memslot slot = slot_of(MEMORY_SLOT, MEMORY_GPA, &memory);
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_range range = pages(0, 1);
    struct kvmprep_vm *handle;
    struct kvmprep_error err;
    config.vm_fd = vm.fd;
    CHECK_EQ(slot_set(&vm, &slot), 0);
    CHECK_OK(kvmprep_vm_new(&config, &handle, &err), err);
    CHECK_OK(kvmprep_memslot_note(handle, &slot, &err), err);
    CHECK_ERR(kvmprep_convert(handle, &range, KVMPREP_PRIVATE, NULL, &err), err, EOPNOTSUPP,
              KVMPREP_REASON_NO_PRIVATE_MEMORY);
    CHECK_OK(kvmprep_convert(handle, &range, KVMPREP_SHARED, NULL, &err), err);
    CHECK_EQ(kvmprep_vm_free(handle), 0);
    memory_end(&memory);
    vm_end(&vm);
}

/* ---- Populating memory of both kinds ---- */

/* Each run has its right side made ready, and only that. */
static void populating_both_kinds(enum kind kind) {
    struct private_guest s = private_guest_make(kind, 2, SLOT_SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    uint64_t shared = 0;
    opts.vcpu_fd = s.vcpus[0].fd;
    if (!has_pre_fault(&s.vm))
        check_skipped("no KVM_PRE_FAULT_MEMORY");
    for (uint64_t page = 0, size = 1; page + size < 2 * SLOT_PAGES; page += 2 * size, size = size * 3 % 61) {
        convert(&s, pages(page, size), KVMPREP_SHARED);
        shared += size * PAGE;
    }
    CHECK_OK(kvmprep_populate(s.handle, &s.all, 1, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.stage2_state, KVMPREP_STAGE2_DONE);
    CHECK_EQ(result.remaining, 0);
    CHECK_EQ(result.stage2, s.all.size);
    CHECK_EQ(present_bytes(s.slots[0].memory.hva, SLOT_SIZE) +
                 present_bytes(s.slots[1].memory.hva, SLOT_SIZE),
             shared);
    for (uint64_t page = 0; page < 2 * SLOT_PAGES; page++)
        CHECK_EQ(present_bytes((const void *)word_at(&s, page), PAGE),
                 handles_view(&s, page) == KVMPREP_SHARED ? PAGE : 0);
    CHECK_EQ(guest_touch(&s.vcpus[0], TOUCH_READ, 0, PAGE), 0); /* its code page */
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, s.all.gpa, s.all.size), 0);
    private_guest_end(&s);
}

static void populating_both_kinds_anon(void) {
    populating_both_kinds(ANON_4K);
}

static void populating_both_kinds_memfd(void) {
    need_small_shared_pages();
    populating_both_kinds(MEMFD_SHARED);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"each_run_that_changes_is_told_once", each_run_that_changes_is_told_once},
        {"long_runs_are_cut", long_runs_are_cut},
        {"a_run_refused_is_put_back_shared", a_run_refused_is_put_back_shared},
        {"a_run_refused_is_put_back_private", a_run_refused_is_put_back_private},
        {"an_answer_that_is_no_errno", an_answer_that_is_no_errno},
        {"calls_from_inside", calls_from_inside},
        {"a_step_is_added", a_step_is_added},
        {"attributes_alone_lose_nothing", attributes_alone_lose_nothing},
        {"the_rest_of_a_conversion_anon", the_rest_of_a_conversion_anon},
        {"the_rest_of_a_conversion_memfd", the_rest_of_a_conversion_memfd},
        {"prefaulting_alone", prefaulting_alone},
        {"shared_memory_kept_anon", shared_memory_kept_anon},
        {"shared_memory_kept_memfd", shared_memory_kept_memfd},
        {"holes_can_be_shared_and_nothing_else", holes_can_be_shared_and_nothing_else},
        {"what_a_guest_asks_for", what_a_guest_asks_for},
        {"exits_over_what_nobody_told", exits_over_what_nobody_told},
        {"a_vm_without_private_memory", a_vm_without_private_memory},
        {"populating_both_kinds_anon", populating_both_kinds_anon},
        {"populating_both_kinds_memfd", populating_both_kinds_memfd},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
