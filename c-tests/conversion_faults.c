/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * After a conversion with KVMPREP_CONVERT_PREFAULT the guest takes no stage-2 fault: neither on the new side,
 * nor on the neighbours whose huge page the conversion has broken up, for reading or writing, in both
 * directions, for every backing and for ranges wherever they lie. Each is done without pre-faulting too, and
 * must then show faults: else nothing was shown.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/converting.h"
#include "support/guest.h"
#include "support/host.h"
#include "support/policy.h"
#include <inttypes.h>
#include <pthread.h>
#include <sys/mman.h>

#define HUGE_PAGE (2 * MIB)

/* The kernel makes huge pages of small ones by itself, at any time, which costs the guest faults that nobody
 * counts on. */
static void still_khugepaged(void) {
    static const char *const settings[][2] = {
        {"/sys/kernel/mm/transparent_hugepage/khugepaged/pages_to_scan", "1"},
        {"/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs", "1000000"},
    };
    for (int i = 0; i < 2; i++) {
        FILE *file = machine_may_be_changed() ? fopen(settings[i][0], "w") : NULL;
        if (file == NULL)
            continue;
        fputs(settings[i][1], file);
        fclose(file);
    }
}

static uint64_t faults_of(struct private_guest *s, enum touch touch) {
    return faults_of_touch(&s->vcpus[0], touch, s->all.gpa, s->all.size);
}

/*
 * A guest whose memory is all of one kind, and ready: the guest takes no fault there. Made anew for every
 * conversion, since one that breaks up a transparent huge page leaves small ones for the next.
 */
static struct private_guest ready_guest(enum kind kind, unsigned n_slots, uint64_t slot_size,
                                        uint32_t visibility) {
    struct private_guest s = private_guest_make(kind, n_slots, slot_size);
    if (!has_pre_fault(&s.vm))
        check_skipped("no KVM_PRE_FAULT_MEMORY");
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    opts.vcpu_fd = s.vcpus[0].fd;
    CHECK_OK(kvmprep_convert(s.handle, &s.all, visibility, NULL, &s.err), s.err);
    CHECK_OK(kvmprep_populate(s.handle, &s.all, 1, &opts, NULL, 0, &s.err), s.err);
    CHECK_EQ(guest_touch(&s.vcpus[0], TOUCH_READ, 0, PAGE), 0); /* its code page is not what is counted */
    CHECK_EQ(faults_of(&s, TOUCH_WRITE), 0);
    return s;
}

static struct kvmprep_convert_result convert(struct private_guest *s, int vcpu, struct kvmprep_range range,
                                             uint32_t to, bool has_prefault) {
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    struct kvmprep_convert_result result;
    opts.steps = KVMPREP_CONVERT_ATTRIBUTES | KVMPREP_CONVERT_DROP;
    if (has_prefault)
        opts.steps |= KVMPREP_CONVERT_PREFAULT;
    opts.vcpu_fd = s->vcpus[vcpu].fd;
    opts.result = &result;
    opts.result_size = sizeof(result);
    CHECK_OK(kvmprep_convert(s->handle, &range, to, &opts, &s->err), s->err);
    CHECK_EQ(result.converted, range.size);
    return result;
}

/* ---- Ranges, wherever they lie ---- */

#define SLOT_SIZE (2 * HUGE_PAGE)

struct place {
    const char *name;
    uint64_t offset, size;
};

static const struct place places[] = {
    {"one page of a frame", 100 * PAGE, PAGE},
    {"the first page of a slot", 0, PAGE},
    {"the last page of a slot", SLOT_SIZE - PAGE, PAGE},
    {"a part of a frame", 17 * PAGE, 300 * PAGE},
    {"a whole frame", HUGE_PAGE, HUGE_PAGE},
    {"across frames", HUGE_PAGE - 3 * PAGE, 5 * PAGE},
    {"across slots", SLOT_SIZE - HUGE_PAGE - PAGE, HUGE_PAGE + 8 * PAGE},
    {"the last page of all", 2 * SLOT_SIZE - PAGE, PAGE},
};

/* Faults of a guest that touches all memory after one conversion. */
struct measured {
    struct kvmprep_convert_result result;
    uint64_t first, second; /* the guest touches all of it, then writes all of it */
};

static struct measured measure(enum kind kind, const struct place *place, uint32_t to, bool has_prefault,
                               enum touch touch) {
    struct kvmprep_range range = {.gpa = MEMORY_GPA + place->offset, .size = place->size};
    uint32_t from = to == KVMPREP_PRIVATE ? KVMPREP_SHARED : KVMPREP_PRIVATE;
    struct private_guest s = ready_guest(kind, 2, SLOT_SIZE, from);
    struct measured m = {.result = convert(&s, 0, range, to, has_prefault)};
    m.first = faults_of(&s, touch);
    m.second = faults_of(&s, TOUCH_WRITE);
    private_guest_end(&s);
    return m;
}

/* Returns the faults that pre-faulting has spared. */
static uint64_t convert_and_touch(enum kind kind, const struct place *place, uint32_t to) {
    struct measured without = measure(kind, place, to, false, TOUCH_WRITE);
    struct measured read = measure(kind, place, to, true, TOUCH_READ);
    struct measured written = measure(kind, place, to, true, TOUCH_WRITE);
    uint64_t filled = read.result.prefaulted / PAGE, beside = read.result.neighbours / PAGE;
    check_is_alive();
    /* What was filled is the range and what lies beside it, and all that would have faulted. */
    if (without.first == 0 || read.first + read.second + written.first != 0 ||
        filled - beside != place->size / PAGE || without.first > filled)
        check_failed(__FILE__, __LINE__,
                     "%s, to %s: faults: %" PRIu64 " without; %" PRIu64 " + %" PRIu64
                     " when read first, %" PRIu64 " when written; %" PRIu64 " pages filled, %" PRIu64
                     " beside",
                     place->name, to == KVMPREP_PRIVATE ? "private" : "shared", without.first, read.first,
                     read.second, written.first, filled, beside);
    return without.first;
}

static void no_faults_after(enum kind kind) {
    size_t n = sizeof(places) / sizeof(places[0]);
    uint64_t spared[2] = {0, 0};
    for (size_t i = 0; i < n; i++)
        for (uint32_t to = KVMPREP_SHARED; to <= KVMPREP_PRIVATE; to++)
            spared[to] += convert_and_touch(kind, &places[i], to);
    printf("  faults without: %" PRIu64 " to private, %" PRIu64 " to shared; with: 0\n",
           spared[KVMPREP_PRIVATE], spared[KVMPREP_SHARED]);
}

static void anon_4k(void) {
    no_faults_after(ANON_4K);
}

static void anon_thp(void) {
    no_faults_after(ANON_THP);
}

static void memfd_shared(void) {
    no_faults_after(MEMFD_SHARED);
}

static void memfd_private(void) {
    no_faults_after(MEMFD_PRIVATE);
}

static void hugetlb_private(void) {
    no_faults_after(HUGETLB_PRIVATE);
}

static void hugetlb_shared(void) {
    no_faults_after(HUGETLB_SHARED);
}

/* ---- Huge pages broken up, and kept ---- */

/* One 4K page of each huge page: what is lost is all that lies beside them. */
static void one_page_of_each_huge_page(void) {
    need_huge_pages_on_advice();
    const uint64_t size = 64 * MIB, frames = size / HUGE_PAGE;
    uint64_t faults[2], neighbours = 0;
    for (int has_prefault = 0; has_prefault < 2; has_prefault++) {
        struct private_guest s = ready_guest(ANON_THP, 1, size, KVMPREP_SHARED);
        CHECK_EQ(stat_of(s.vm.fd, "pages_2m"), frames);
        for (uint64_t i = 0; i < frames; i++) {
            struct kvmprep_range page = {.gpa = MEMORY_GPA + i * HUGE_PAGE + (i * 37 % 512) * PAGE,
                                         .size = PAGE};
            neighbours += convert(&s, 0, page, KVMPREP_PRIVATE, has_prefault).neighbours;
        }
        faults[has_prefault] = faults_of(&s, TOUCH_WRITE);
        private_guest_end(&s);
    }
    printf("  %" PRIu64 " conversions of one page: %" PRIu64 " faults without, %" PRIu64 " with\n", frames,
           faults[0], faults[1]);
    CHECK_EQ(faults[0], size / PAGE); /* the new side too */
    CHECK_EQ(faults[1], 0);
    CHECK_EQ(neighbours, size - frames * PAGE);
}

/* Whether the host has memory for the first page. */
static bool is_resident(struct private_guest *s) {
    unsigned char page;
    CHECK_EQ(mincore(s->slots[0].memory.hva, PAGE, &page), 0);
    return page & 1;
}

/* A page of a pool is given up when the last of it goes out of sight, and not before. */
static void a_huge_page_in_part_is_kept(enum kind kind) {
    struct private_guest s = ready_guest(kind, 1, SLOT_SIZE, KVMPREP_SHARED);
    struct kvmprep_range half = {.gpa = MEMORY_GPA, .size = HUGE_PAGE / 2};
    struct kvmprep_range other_half = {.gpa = MEMORY_GPA + HUGE_PAGE / 2, .size = HUGE_PAGE / 2};
    const uint32_t *written = (uint32_t *)((char *)s.slots[0].memory.hva + HUGE_PAGE / 2);
    struct kvmprep_convert_result result = convert(&s, 0, half, KVMPREP_PRIVATE, true);
    CHECK_EQ(result.dropped, 0);
    CHECK_EQ(result.kept, HUGE_PAGE / 2);
    CHECK(is_resident(&s));
    CHECK(*written != 0);
    result = convert(&s, 0, other_half, KVMPREP_PRIVATE, true);
    CHECK_EQ(result.dropped, HUGE_PAGE);
    CHECK_EQ(result.kept, 0);
    CHECK(!is_resident(&s));
    CHECK_EQ(faults_of(&s, TOUCH_WRITE), 0);
    private_guest_end(&s);
}

static void a_huge_page_in_part_is_kept_private(void) {
    a_huge_page_in_part_is_kept(HUGETLB_PRIVATE);
}

static void a_huge_page_in_part_is_kept_shared(void) {
    a_huge_page_in_part_is_kept(HUGETLB_SHARED);
}

/* ---- Two vCPUs at one frame ---- */

struct half {
    struct private_guest *guest;
    pthread_barrier_t *start;
    int vcpu;
    struct kvmprep_range range;
    int result;
    struct kvmprep_error err;
};

#define ROUNDS 40

/* Converts its half of a frame back and forth, each time together with the other half's thread. */
static void *convert_half(void *argument) {
    struct half *half = argument;
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    opts.steps = KVMPREP_CONVERT_ATTRIBUTES | KVMPREP_CONVERT_DROP | KVMPREP_CONVERT_PREFAULT;
    opts.vcpu_fd = half->guest->vcpus[half->vcpu].fd;
    struct kvmprep_error err;
    /* Ends with one half private, and one shared. */
    for (unsigned i = 0, rounds = check_rounds(ROUNDS); i < rounds; i++) {
        pthread_barrier_wait(half->start);
        int result =
            kvmprep_convert(half->guest->handle, &half->range, (i + (unsigned)half->vcpu) % 2, &opts, &err);
        if (result != 0 && half->result == 0) {
            half->result = result;
            half->err = err;
        }
    }
    return NULL;
}

static void two_at_one_frame(enum kind kind) {
    struct private_guest s = ready_guest(kind, 1, SLOT_SIZE, KVMPREP_SHARED);
    pthread_barrier_t start;
    pthread_t threads[2];
    struct half halves[2];
    CHECK_EQ(pthread_barrier_init(&start, NULL, 2), 0);
    for (int i = 0; i < 2; i++) {
        halves[i] = (struct half){.guest = &s, .start = &start, .vcpu = i};
        halves[i].range = (struct kvmprep_range){.gpa = MEMORY_GPA + (i == 0 ? 0 : 200 * PAGE),
                                                 .size = (i == 0 ? 200 : 312) * PAGE};
        CHECK_EQ(pthread_create(&threads[i], NULL, convert_half, &halves[i]), 0);
    }
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pthread_join(threads[i], NULL), 0);
    for (int i = 0; i < 2; i++)
        CHECK_OK(halves[i].result, halves[i].err);
    CHECK_EQ(faults_of(&s, TOUCH_READ), 0);
    CHECK_EQ(faults_of(&s, TOUCH_WRITE), 0);
    pthread_barrier_destroy(&start);
    private_guest_end(&s);
}

static void two_at_one_frame_4k(void) {
    two_at_one_frame(ANON_4K);
}

static void two_at_one_frame_thp(void) {
    two_at_one_frame(ANON_THP);
}

static void two_at_one_frame_memfd(void) {
    two_at_one_frame(MEMFD_SHARED);
}

int main(int argc, char **argv) {
    still_khugepaged();
    static const struct check_case cases[] = {
        {"anon_4k", anon_4k},
        {"anon_thp", anon_thp},
        {"memfd_shared", memfd_shared},
        {"memfd_private", memfd_private},
        {"hugetlb_private", hugetlb_private},
        {"hugetlb_shared", hugetlb_shared},
        {"one_page_of_each_huge_page", one_page_of_each_huge_page},
        {"a_huge_page_in_part_is_kept_private", a_huge_page_in_part_is_kept_private},
        {"a_huge_page_in_part_is_kept_shared", a_huge_page_in_part_is_kept_shared},
        {"two_at_one_frame_4k", two_at_one_frame_4k},
        {"two_at_one_frame_thp", two_at_one_frame_thp},
        {"two_at_one_frame_memfd", two_at_one_frame_memfd},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
