/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What is left, to the page: across the end of a memslot, in a hole, at a tail that is no multiple of a huge
 * page; and what a population leaves alone because it was asked to: copy-on-write (INTENT_READ), sparse and
 * device memory.
 *
 * Where the kernel's own ioctl gives an answer, it stands beside the library's.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/policy.h"
#include "support/setting.h"
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (8 * MIB)
#define END (MEMORY_GPA + SIZE)

static struct kvmprep_range range_of(uint64_t gpa, uint64_t size) {
    struct kvmprep_range range = {gpa, size, {0, 0}};
    return range;
}

/* Sets a slot over a part of the setting's memory, as a VMM would: KVM and the handle hear of it in one call.
 */
static void add_slot(struct setting *s, uint32_t number, uint64_t gpa, uint64_t offset, uint64_t size) {
    struct kvmprep_memslot slot = s->slot;
    slot.slot = number;
    slot.gpa = gpa;
    slot.size = size;
    slot.hva += offset;
    slot.memory_fd_offset += offset;
    CHECK_OK(kvmprep_memslot_set(s->handle, &slot, &s->err), s->err);
}

static void delete_slot(struct setting *s, uint32_t number) {
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    slot.slot = number;
    CHECK_OK(kvmprep_memslot_set(s->handle, &slot, &s->err), s->err);
}

static struct kvmprep_coverage coverage_of(struct setting *s, uint64_t gpa, uint64_t size) {
    struct kvmprep_range range = range_of(gpa, size);
    struct kvmprep_coverage coverage;
    CHECK_OK(kvmprep_get_coverage(s->handle, &range, &coverage, sizeof(coverage), &s->err), s->err);
    return coverage;
}

/* ---- One pre-fault ---- */

/* Pre-faults by the library and by the ioctl's own loop: both leave [left, gpa + size), for the same reason.
 */
static void check_pre_fault(struct setting *s, uint64_t gpa, uint64_t size, int error, uint64_t left) {
    struct kvmprep_range range = range_of(gpa, size);
    int result = kvmprep_vcpu_pre_fault(s->vcpus[0].fd, &range, &s->err);
    CHECK_EQ(result, -error);
    CHECK_EQ(range.gpa, left);
    CHECK_EQ(range.size, gpa + size - left);
    CHECK(range.reserved[0] == 0 && range.reserved[1] == 0);
    if (error == ENOENT) {
        CHECK_EQ(s->err.reason, KVMPREP_REASON_NO_MEMSLOT);
        CHECK_EQ(s->err.stage, KVMPREP_STAGE_STAGE2);
        CHECK_EQ(s->err.gpa, left);
        CHECK_EQ(s->err.size, gpa + size - left);
    }

    /* The ioctl says 0 as long as it has got on at all; its error comes with the next call. */
    uint64_t raw_gpa = gpa, raw_size = size;
    int raw = 0;
    while (raw == 0 && raw_size > 0)
        raw = raw_pre_fault(s->vcpus[0].fd, &raw_gpa, &raw_size);
    CHECK_EQ(raw, -error);
    CHECK_EQ(raw_gpa, left);
    CHECK_EQ(raw_size, gpa + size - left);
}

static void pre_fault_of_one_slot(void) {
    struct setting s = setting_make_with_stage2(MEMFD_SHARED, SIZE);
    check_pre_fault(&s, MEMORY_GPA, SIZE, 0, END);
    check_pre_fault(&s, MEMORY_GPA + PAGE, PAGE, 0, MEMORY_GPA + 2 * PAGE);
    check_pre_fault(&s, END - PAGE, PAGE, 0, END); /* ends where the slot does */
    check_writes_do_not_fault(&s, MEMORY_GPA, SIZE);
    setting_end(&s);
}

static void pre_fault_across_the_end(void) {
    struct setting s = setting_make_with_stage2(MEMFD_SHARED, SIZE);
    check_pre_fault(&s, END - 3 * PAGE, 4 * PAGE, ENOENT, END);
    check_pre_fault(&s, MEMORY_GPA, 4 * SIZE, ENOENT, END);
    check_writes_do_not_fault(&s, MEMORY_GPA, SIZE);
    setting_end(&s);
}

static void pre_fault_in_a_hole(void) {
    struct setting s = setting_make_with_stage2(MEMFD_SHARED, SIZE);
    check_pre_fault(&s, END, PAGE, ENOENT, END);
    check_pre_fault(&s, END + 64 * MIB, 8 * MIB, ENOENT, END + 64 * MIB);
    /* It does not leap over a hole to the memory behind. */
    check_pre_fault(&s, MEMORY_GPA - PAGE, SIZE, ENOENT, MEMORY_GPA - PAGE);
    CHECK_EQ(stat_of(s.vm.fd, "pages_4k"), 0);
    setting_end(&s);
}

/* To a guest two adjacent slots are one piece of memory; to the ioctl too. */
static void pre_fault_over_two_slots(void) {
    struct setting s = setting_make_with_stage2(MEMFD_SHARED, SIZE);
    const uint64_t first = 3 * MIB + 5 * PAGE;
    delete_slot(&s, MEMORY_SLOT);
    add_slot(&s, 2, MEMORY_GPA, 0, first);
    add_slot(&s, 3, MEMORY_GPA + first, first, SIZE - first);
    check_pre_fault(&s, MEMORY_GPA, SIZE, 0, END);
    check_writes_do_not_fault(&s, MEMORY_GPA, SIZE);
    delete_slot(&s, 2);
    /* Before Linux 6.15 the plain ioctl spins after a deletion until the vCPU has entered the guest. */
    CHECK_EQ(guest_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA + first, PAGE), 0);
    check_pre_fault(&s, MEMORY_GPA + first - PAGE, 2 * PAGE, ENOENT, MEMORY_GPA + first - PAGE);
    check_pre_fault(&s, MEMORY_GPA + first, SIZE - first, 0, END);
    setting_end(&s);
}

/* ---- A population ---- */

/* A population is refused whole where part of it has no slot: nothing is done, no result is written. */
static void check_hole(struct setting *s, uint64_t gpa, uint64_t size, uint64_t hole, uint64_t hole_size) {
    struct kvmprep_range range = range_of(gpa, size), left = range_of(77, 77);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    memset(&result, 0xa5, sizeof(result));
    opts.vcpu_fd = s->vcpus[0].fd;
    opts.remaining = &left;
    opts.remaining_capacity = 1;
    CHECK_ERR(kvmprep_populate(s->handle, &range, 1, &opts, &result, sizeof(result), &s->err), s->err, ENOENT,
              KVMPREP_REASON_NO_MEMSLOT);
    CHECK_EQ(s->err.gpa, hole);
    CHECK_EQ(s->err.size, hole_size);
    CHECK_EQ(left.gpa, 77);
    CHECK_EQ((unsigned char)result.bytes, 0xa5);
    CHECK_EQ(coverage_of(s, MEMORY_GPA, SIZE).host, 0);
}

static void populate_with_a_hole(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    check_hole(&s, END - PAGE, 2 * PAGE, END, PAGE);
    check_hole(&s, MEMORY_GPA, 2 * SIZE, END, SIZE);
    check_hole(&s, END + MIB, MIB, END + MIB, MIB);
    check_hole(&s, MEMORY_GPA - PAGE, 2 * PAGE, MEMORY_GPA - PAGE, 2 * PAGE);
    /* A slot in the hole's middle: the hole begins where memory ends, and all from there on is named. */
    delete_slot(&s, MEMORY_SLOT);
    add_slot(&s, 2, MEMORY_GPA, 0, 2 * MIB);
    add_slot(&s, 3, MEMORY_GPA + 4 * MIB, 4 * MIB, 4 * MIB);
    check_hole(&s, MEMORY_GPA, SIZE, MEMORY_GPA + 2 * MIB, SIZE - 2 * MIB);
    setting_end(&s);
}

/* Populates a part; exactly that part is populated. */
static void check_part(enum kind kind, uint64_t gpa, uint64_t size) {
    struct setting s = setting_make_with_stage2(kind, SIZE);
    struct kvmprep_range range = range_of(gpa, size);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    opts.vcpu_fd = s.vcpus[0].fd;
    CHECK_OK(kvmprep_populate(s.handle, &range, 1, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.bytes, size);
    CHECK_EQ(result.host, size);
    CHECK_EQ(result.stage2, size);
    CHECK_EQ(result.remaining, 0);
    CHECK_EQ(coverage_of(&s, MEMORY_GPA, SIZE).stage2_writable, size);
    CHECK_EQ(coverage_of(&s, gpa, size).stage2_writable, size);
    CHECK_EQ(result.pages_4k, size / PAGE);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, gpa, size), 1); /* the code page */
    if (gpa > MEMORY_GPA)
        CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, gpa - PAGE, PAGE), 1);
    if (gpa + size < END)
        CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, gpa + size, PAGE), 1);
    setting_end(&s);
}

/* No tail is skipped, whatever it is aligned to. */
static void populate_parts(void) {
    need_small_shared_pages();
    const enum kind kinds[] = {ANON_4K, MEMFD_SHARED};
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        check_part(kinds[i], MEMORY_GPA, PAGE);
        check_part(kinds[i], END - PAGE, PAGE);
        check_part(kinds[i], MEMORY_GPA, 2 * MIB - PAGE);
        check_part(kinds[i], MEMORY_GPA, 2 * MIB + PAGE);
        check_part(kinds[i], MEMORY_GPA + 2 * MIB - PAGE, 2 * PAGE);
        check_part(kinds[i], MEMORY_GPA + 5 * PAGE, SIZE - 12 * PAGE);
        check_part(kinds[i], MEMORY_GPA + 3 * MIB + PAGE, END - (MEMORY_GPA + 3 * MIB + PAGE));
    }
}

/* A slot whose place in the guest is not congruent with its place in the host, and whose size is odd. */
static void populate_an_odd_slot(void) {
    struct setting s = setting_make_with_stage2(ANON_THP, SIZE);
    const uint64_t gpa = MEMORY_GPA + 3 * PAGE, size = 5 * MIB + 7 * PAGE;
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    delete_slot(&s, MEMORY_SLOT);
    add_slot(&s, 2, gpa, PAGE, size);
    opts.vcpu_fd = s.vcpus[0].fd;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.bytes, size);
    CHECK_EQ(result.stage2, size);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, gpa, size), 1);
    setting_end(&s);
}

/* Ranges may overlap and come in any order: memory is counted, and done, once. */
static void ranges_that_overlap(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    const struct kvmprep_range ranges[] = {
        {MEMORY_GPA + 4 * MIB, 2 * MIB, {0, 0}},    {MEMORY_GPA, 3 * MIB, {0, 0}},
        {MEMORY_GPA + 2 * MIB, MIB + PAGE, {0, 0}}, {MEMORY_GPA, 3 * MIB, {0, 0}},
        {MEMORY_GPA + 6 * MIB, PAGE, {0, 0}}, /* touches the first, and is one with it */
    };
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    const uint64_t united = 3 * MIB + PAGE + 2 * MIB + PAGE;
    opts.vcpu_fd = s.vcpus[0].fd;
    CHECK_OK(kvmprep_populate(s.handle, ranges, 5, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.bytes, united);
    CHECK_EQ(result.host, united);
    CHECK_EQ(result.stage2, united);
    CHECK_EQ(coverage_of(&s, MEMORY_GPA, SIZE).stage2, united);
    setting_end(&s);
}

/* One population over two slots, and one over all slots there are. */
static void populate_over_slots(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_range middle = range_of(MEMORY_GPA + MIB, 3 * MIB);
    const uint64_t first = 2 * MIB + 9 * PAGE;
    opts.vcpu_fd = s.vcpus[0].fd;
    delete_slot(&s, MEMORY_SLOT);
    add_slot(&s, 2, MEMORY_GPA, 0, first);
    add_slot(&s, 3, MEMORY_GPA + first, first, 6 * MIB - first);
    add_slot(&s, 4, MEMORY_GPA + 64 * MIB, 6 * MIB, 2 * MIB);
    CHECK_OK(kvmprep_populate(s.handle, &middle, 1, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.stage2, middle.size);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, middle.gpa, middle.size), 1);
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.stage2, SIZE);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA, 6 * MIB), 0);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA + 64 * MIB, 2 * MIB), 0);
    setting_end(&s);
}

/* ---- What is left out ---- */

/* Eight slots, each second one about to change: those are left out, and named as far as there is room. */
static void room_for_what_remains(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    /* Else nothing is populated between a change's announcement and its note. */
    config.vm_fd = s.vm.fd;
    config.flags = KVMPREP_VM_KEEP_MAPPINGS;
    CHECK_EQ(kvmprep_vm_free(s.handle), 0);
    if (kvmprep_vm_new(&config, &s.handle, &s.err) == -EOPNOTSUPP)
        check_skipped("mappings cannot be kept: needs Linux 6.12");
    CHECK_EQ(s.err.code, 0);
    CHECK_OK(kvmprep_memslot_note(s.handle, &s.slot, &s.err), s.err);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_range left[5];
    struct kvmprep_job *job;
    size_t n = 99;
    delete_slot(&s, MEMORY_SLOT);
    for (uint32_t i = 0; i < 8; i++)
        add_slot(&s, 10 + i, MEMORY_GPA + i * MIB, i * MIB, MIB);
    for (uint32_t i = 1; i < 8; i += 2)
        CHECK_OK(kvmprep_memslot_changing(s.handle, 10 + i, &s.err), s.err);

    opts.vcpu_fd = s.vcpus[0].fd;
    opts.remaining = left;
    for (size_t capacity = 0; capacity <= 5; capacity++) {
        memset(left, 0xa5, sizeof(left));
        opts.remaining_capacity = capacity;
        CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
        CHECK_EQ(result.stage2_state, KVMPREP_STAGE2_DONE); /* of all that was not left out */
        CHECK_EQ(result.bytes, SIZE);
        CHECK_EQ(result.stage2, SIZE / 2);
        CHECK_EQ(result.remaining, SIZE / 2);
        CHECK_EQ(result.n_remaining, 4);
        for (size_t i = 0; i < 5; i++) {
            bool is_written = i < capacity && i < 4;
            CHECK_EQ(left[i].gpa, is_written ? MEMORY_GPA + (2 * i + 1) * MIB : 0xa5a5a5a5a5a5a5a5);
            CHECK_EQ(left[i].size, is_written ? MIB : 0xa5a5a5a5a5a5a5a5);
            CHECK_EQ(left[i].reserved[1], is_written ? 0 : 0xa5a5a5a5a5a5a5a5);
        }
    }

    CHECK_OK(kvmprep_job_new(s.handle, NULL, 0, NULL, &job, &s.err), s.err);
    CHECK_OK(kvmprep_job_remaining(job, left, 5, &n, &s.err), s.err);
    CHECK_EQ(n, 1); /* nothing is done yet, so it is all in one piece */
    CHECK(left[0].gpa == MEMORY_GPA && left[0].size == SIZE);
    CHECK_OK(kvmprep_job_run(job, s.vcpus[0].fd, &s.err), s.err);
    memset(left, 0xa5, sizeof(left));
    CHECK_OK(kvmprep_job_remaining(job, left, 3, &n, &s.err), s.err);
    CHECK_EQ(n, 4);
    CHECK(left[2].gpa == MEMORY_GPA + 5 * MIB && left[2].size == MIB);
    CHECK_EQ(left[3].gpa, 0xa5a5a5a5a5a5a5a5);
    CHECK_OK(kvmprep_job_remaining(job, NULL, 0, &n, &s.err), s.err);
    CHECK_EQ(n, 4);
    CHECK_EQ(kvmprep_job_free(job), 0);

    /* Once it is noted what has become of them, what remained is populated by naming it. */
    for (uint32_t i = 1; i < 8; i += 2) {
        struct kvmprep_memslot slot = s.slot;
        slot.slot = 10 + i;
        slot.gpa = MEMORY_GPA + i * MIB;
        slot.hva += i * MIB;
        slot.size = MIB;
        CHECK_OK(kvmprep_memslot_note(s.handle, &slot, &s.err), s.err);
    }
    opts.remaining_capacity = 5;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.n_remaining, 0);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA, SIZE), 1);
    setting_end(&s);
}

/* Sparse memory is populated where it is named; device memory never. Neither counts as remaining. */
static void sparse_and_device_slots(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_memslot slot = s.slot;
    opts.vcpu_fd = s.vcpus[0].fd;
    delete_slot(&s, MEMORY_SLOT);
    add_slot(&s, 2, MEMORY_GPA, 0, 2 * MIB);
    slot.slot = 3;
    slot.gpa = MEMORY_GPA + 2 * MIB;
    slot.hva += 2 * MIB;
    slot.size = 4 * MIB;
    slot.attributes = KVMPREP_MEMSLOT_SPARSE;
    CHECK_OK(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err);
    slot.slot = 4;
    slot.gpa += 4 * MIB;
    slot.hva += 4 * MIB;
    slot.size = 2 * MIB;
    slot.attributes = KVMPREP_MEMSLOT_DEVICE;
    CHECK_OK(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err);

    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.bytes, 2 * MIB);
    CHECK_EQ(result.stage2, 2 * MIB);
    CHECK_EQ(result.remaining, 0);
    CHECK_EQ(coverage_of(&s, MEMORY_GPA, SIZE).host, 2 * MIB);

    struct kvmprep_range plugged = range_of(MEMORY_GPA + 3 * MIB, MIB);
    CHECK_OK(kvmprep_populate(s.handle, &plugged, 1, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.stage2, MIB);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, plugged.gpa, plugged.size), 1);
    CHECK_EQ(coverage_of(&s, MEMORY_GPA, SIZE).host, 3 * MIB);

    struct kvmprep_range with_device = range_of(MEMORY_GPA + 5 * MIB, 2 * MIB);
    CHECK_ERR(kvmprep_populate(s.handle, &with_device, 1, &opts, &result, sizeof(result), &s.err), s.err,
              EINVAL, KVMPREP_REASON_MEMSLOT_DEVICE);
    CHECK_EQ(s.err.slot, 4);
    CHECK_EQ(s.err.gpa, MEMORY_GPA + 6 * MIB);
    CHECK_EQ(s.err.size, MIB);
    CHECK_EQ(coverage_of(&s, MEMORY_GPA, SIZE).host, 3 * MIB);
    setting_end(&s);
}

/* ---- Copy-on-write ---- */

/* Bytes of the setting's memory that are this process's own copy: copy-on-write broken, or simply written. */
static uint64_t own_pages(const struct setting *s) {
    FILE *file = fopen("/proc/self/smaps", "r");
    char line[512];
    uintptr_t from, to, start = (uintptr_t)s->memory.hva, end = start + s->memory.size;
    uint64_t sum = 0;
    unsigned long kib;
    bool is_ours = false;
    CHECK(file != NULL);
    while (fgets(line, sizeof(line), file) != NULL) {
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
            is_ours = from < end && to > start;
        else if (is_ours && sscanf(line, "Anonymous: %lu kB", &kib) == 1)
            sum += kib * 1024;
    }
    fclose(file);
    return sum;
}

/* A change of the file beneath shows through the mapping on every page: each is still shared with the file.
 */
static void check_mapping_follows_the_file(const struct setting *s) {
    for (uint64_t at = 0; at < s->memory.size; at += PAGE) {
        char mark[8];
        snprintf(mark, sizeof(mark), "%07x", (unsigned)(at / PAGE));
        CHECK_EQ(pwrite(s->memory.fd, mark, sizeof(mark), (off_t)at), sizeof(mark));
        CHECK(memcmp((char *)s->memory.hva + at, mark, sizeof(mark)) == 0);
    }
}

/*
 * Prepared for reading: reads take no fault, nothing has been copied, and the result says that first writes
 * to a private mapping will fault. They do.
 */
static void populate_for_reading(enum kind kind, bool is_private) {
    struct setting s = setting_make(kind, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    opts.vcpu_fd = s.vcpus[0].fd;
    opts.intent = KVMPREP_INTENT_READ;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.host, SIZE);
    CHECK_EQ(result.remaining, 0);
    CHECK_EQ(own_pages(&s), 0);
    CHECK_EQ(coverage_of(&s, MEMORY_GPA, SIZE).host, SIZE);
    CHECK_EQ(coverage_of(&s, MEMORY_GPA, SIZE).stage2_writable, 0);
    if (s.has_pre_fault) {
        CHECK_EQ(result.stage2, SIZE);
        CHECK_EQ(result.first_writes, is_private ? SIZE : 0);
        CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_READ, MEMORY_GPA, SIZE), 1); /* the code page */
        CHECK_EQ(own_pages(&s), 0);
    }
    if (s.memory.fd >= 0)
        check_mapping_follows_the_file(&s);
    if (s.has_pre_fault) {
        uint64_t faults = faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA, SIZE);
        if (is_private)
            CHECK(faults >= SIZE / PAGE);
        else
            CHECK_EQ(faults, 0);
        CHECK_EQ(own_pages(&s), is_private ? SIZE : 0);
    }
    setting_end(&s);
}

static void read_anonymous(void) {
    populate_for_reading(ANON_4K, true);
}

static void read_memfd_private(void) {
    populate_for_reading(MEMFD_PRIVATE, true);
}

static void read_file_private(void) {
    populate_for_reading(FILE_PRIVATE, true);
}

static void read_memfd_shared(void) {
    populate_for_reading(MEMFD_SHARED, false);
}

/* Populating for writing is what breaks it: the other side of the same coin. */
static void write_breaks_copy_on_write(void) {
    struct setting s = setting_make(MEMFD_PRIVATE, SIZE);
    struct kvmprep_populate_result result;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, NULL, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(own_pages(&s), SIZE);
    CHECK_EQ(result.first_writes, 0);
    CHECK_EQ(result.backings[KVMPREP_BACKING_SHMEM_PRIVATE].writable, 1);
    CHECK_EQ(memcmp(s.memory.hva, "kvmprep", 7), 0); /* and copies the content */
    setting_end(&s);
}

/* A slot that the guest may not write is prepared for reading, whatever the intent: a ROM image stays shared.
 */
static void read_only_slot(void) {
    struct setting s = setting_make(MEMFD_PRIVATE, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_memslot rom = s.slot;
    delete_slot(&s, MEMORY_SLOT);
    rom.flags |= KVM_MEM_READONLY;
    CHECK_OK(kvmprep_memslot_set(s.handle, &rom, &s.err), s.err);
    /* Its mapping need not be writable either. */
    CHECK_EQ(mprotect(s.memory.hva, SIZE, PROT_READ), 0);
    opts.vcpu_fd = s.vcpus[0].fd;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.host, SIZE);
    CHECK_EQ(result.backings[KVMPREP_BACKING_SHMEM_PRIVATE].bytes, SIZE);
    CHECK_EQ(result.backings[KVMPREP_BACKING_SHMEM_PRIVATE].host, KVMPREP_HOST_POPULATE_READ);
    CHECK_EQ(result.backings[KVMPREP_BACKING_SHMEM_PRIVATE].writable, 0);
    CHECK_EQ(own_pages(&s), 0);
    check_mapping_follows_the_file(&s);
    if (s.has_pre_fault)
        CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_READ, MEMORY_GPA, SIZE), 1);
    setting_end(&s);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"pre_fault_of_one_slot", pre_fault_of_one_slot},
        {"pre_fault_across_the_end", pre_fault_across_the_end},
        {"pre_fault_in_a_hole", pre_fault_in_a_hole},
        {"pre_fault_over_two_slots", pre_fault_over_two_slots},
        {"populate_with_a_hole", populate_with_a_hole},
        {"populate_parts", populate_parts},
        {"populate_an_odd_slot", populate_an_odd_slot},
        {"ranges_that_overlap", ranges_that_overlap},
        {"populate_over_slots", populate_over_slots},
        {"room_for_what_remains", room_for_what_remains},
        {"sparse_and_device_slots", sparse_and_device_slots},
        {"read_anonymous", read_anonymous},
        {"read_memfd_private", read_memfd_private},
        {"read_file_private", read_file_private},
        {"read_memfd_shared", read_memfd_shared},
        {"write_breaks_copy_on_write", write_breaks_copy_on_write},
        {"read_only_slot", read_only_slot},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
