/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What each function does with arguments that are wrong: the errno, the reason, and that nothing has
 * happened. Nothing here depends on what the kernel can do; the cases that come first need no KVM either.
 *
 * A C library cannot know whether a pointer is good, but NULL and a misaligned one can be told from a good
 * one, and are. Structs that may grow are passed as an older and as a newer application would pass them.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/setting.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (4 * MIB)

/* A pointer that no object of the type could have. The objects are larger than one byte, so it points into
 * them. */
#define MISALIGNED(pointer) ((void *)((uintptr_t)(pointer) + 1))

static struct kvmprep_range range_of(uint64_t gpa, uint64_t size) {
    struct kvmprep_range range = {gpa, size, {0, 0}};
    return range;
}

static struct kvmprep_populate_opts default_opts(void) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    return opts;
}

static struct kvmprep_job *job_of(struct setting *s) {
    struct kvmprep_job *job = NULL;
    CHECK_OK(kvmprep_job_new(s->handle, NULL, 0, NULL, &job, &s->err), s->err);
    return job;
}

/* How much memory the handle knows of around the setting's slot: tells whether a refused change changed
 * nothing. */
static uint64_t memory_known(struct setting *s) {
    struct kvmprep_range around = range_of(MEMORY_GPA - 64 * MIB, 256 * MIB);
    struct kvmprep_coverage coverage;
    CHECK_OK(kvmprep_get_coverage(s->handle, &around, &coverage, sizeof(coverage), &s->err), s->err);
    return coverage.memory;
}

/* How much memory the handle takes for private: tells whether a refused conversion changed nothing. */
static uint64_t private_bytes(const struct kvmprep_vm *vm) {
    struct kvmprep_visibility_run run;
    struct kvmprep_error err;
    uint64_t bytes = 0, gpa = 0;
    int result;
    while ((result = kvmprep_visibility_next(vm, gpa, &run, &err)) == 0) {
        CHECK(run.gpa == gpa && run.size > 0);
        bytes += run.visibility == KVMPREP_PRIVATE ? run.size : 0;
        gpa = run.gpa + run.size;
    }
    CHECK_ERR(result, err, ENOENT, KVMPREP_REASON_RANGE_BEYOND_GUEST);
    return bytes;
}

/* ---- Without KVM ---- */

static void version_and_names(void) {
    CHECK_EQ(kvmprep_version(), KVMPREP_VERSION);
    for (uint32_t reason = 0; reason <= KVMPREP_REASON_FIRMWARE_REFUSED; reason++) {
        const char *name = kvmprep_reason_name(reason);
        CHECK(name != NULL && name[0] != 0 && strcmp(name, "unknown") != 0);
        for (uint32_t other = 0; other < reason; other++)
            CHECK(strcmp(name, kvmprep_reason_name(other)) != 0);
    }
    CHECK(strcmp(kvmprep_reason_name(KVMPREP_REASON_NO_MEMSLOT), "no-memslot") == 0);
    CHECK(strcmp(kvmprep_reason_name(KVMPREP_REASON_FIRMWARE_REFUSED), "firmware-refused") == 0);
    CHECK(strcmp(kvmprep_reason_name(KVMPREP_REASON_FIRMWARE_REFUSED + 1), "unknown") == 0);
    CHECK(strcmp(kvmprep_reason_name(UINT32_MAX), "unknown") == 0);
}

/* Freeing nothing is no mistake, as with free(); every other use of no handle is one. */
static void no_handle(void) {
    struct kvmprep_error err;
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    struct kvmprep_memslot_report report;
    struct kvmprep_range range = range_of(0, PAGE);
    struct kvmprep_coverage coverage;
    struct kvmprep_populate_result result;
    struct kvmprep_progress progress;
    struct kvmprep_visibility_run run;
    struct kvmprep_job *job = NULL;
    uint64_t args[3] = {0, 1, 0}, answer = 99;
    size_t n;

    CHECK_EQ(kvmprep_vm_free(NULL), 0);
    CHECK_EQ(kvmprep_job_free(NULL), 0);
#define CHECK_NULL(call) CHECK_ERR(call, err, EINVAL, KVMPREP_REASON_NULL_POINTER)
    CHECK_NULL(kvmprep_vm_set_memslots(NULL, &slot, 1, &err));
    CHECK_NULL(kvmprep_memslot_set(NULL, &slot, &err));
    CHECK_NULL(kvmprep_vm_check_memslot(NULL, &slot, 0, &report, sizeof(report), &err));
    CHECK_NULL(kvmprep_vm_predict(NULL, &range, &report, sizeof(report), &err));
    CHECK_NULL(kvmprep_memslot_changing(NULL, 0, &err));
    CHECK_NULL(kvmprep_memslot_note(NULL, &slot, &err));
    CHECK_NULL(kvmprep_range_discarded(NULL, &range, &err));
    CHECK_NULL(kvmprep_host_range_discarded(NULL, &range, 4096, &err));
    CHECK_NULL(kvmprep_get_coverage(NULL, &range, &coverage, sizeof(coverage), &err));
    CHECK_NULL(kvmprep_populate(NULL, &range, 1, NULL, &result, sizeof(result), &err));
    CHECK_NULL(kvmprep_job_new(NULL, &range, 1, NULL, &job, &err));
    CHECK_NULL(kvmprep_visibility_next(NULL, 0, &run, &err));
    CHECK_NULL(kvmprep_visibility_note(NULL, &range, KVMPREP_SHARED, &err));
    CHECK_NULL(kvmprep_convert(NULL, &range, KVMPREP_SHARED, NULL, &err));
    CHECK_NULL(kvmprep_handle_memory_fault(NULL, 0, PAGE, 0, NULL, &err));
    CHECK_NULL(kvmprep_private_claim(NULL, &range, &err));
    CHECK_NULL(kvmprep_private_unclaim(NULL, &range, &err));
    CHECK_NULL(kvmprep_private_note_sealed(NULL, &err));
    CHECK_NULL(kvmprep_private_check_claims(NULL, &range, 1, &err));
    CHECK_NULL(kvmprep_handle_map_gpa_range(NULL, args, NULL, &answer, &err));
    CHECK_EQ(answer, EINVAL); /* the guest is told something whatever happens */
    CHECK_NULL(kvmprep_job_run(NULL, -1, &err));
    CHECK_NULL(kvmprep_job_run_near(NULL, -1, &range, 1, &err));
    CHECK_NULL(kvmprep_job_spawn(NULL, NULL, 0, 1, &err));
    CHECK_NULL(kvmprep_job_progress(NULL, &progress, sizeof(progress), &err));
    CHECK_NULL(kvmprep_job_remaining(NULL, &range, 1, &n, &err));
    CHECK_NULL(kvmprep_job_wait(NULL, 0, &result, sizeof(result), &err));
    CHECK_NULL(kvmprep_job_cancel(NULL, &err));
    CHECK_NULL(kvmprep_job_fd(NULL, &err));
#undef CHECK_NULL
    CHECK(job == NULL);
}

static void misaligned_handle(void) {
    struct kvmprep_error err;
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    struct kvmprep_memslot_report report;
    struct kvmprep_range range = range_of(0, PAGE);
    struct kvmprep_coverage coverage;
    struct kvmprep_populate_result result;
    struct kvmprep_progress progress;
    struct kvmprep_visibility_run run;
    struct kvmprep_job *job = NULL;
    uint64_t args[3] = {0, 1, 0}, answer = 99;
    size_t n;
    uint64_t place[2] = {0, 0};
    struct kvmprep_vm *bad_vm = MISALIGNED(place);
    struct kvmprep_job *bad_job = MISALIGNED(place);

#define CHECK_MISALIGNED(call) CHECK_ERR(call, err, EINVAL, KVMPREP_REASON_MISALIGNED_POINTER)
    CHECK_EQ(kvmprep_vm_free(bad_vm), -EINVAL);
    CHECK_EQ(kvmprep_job_free(bad_job), -EINVAL);
    CHECK_MISALIGNED(kvmprep_vm_set_memslots(bad_vm, &slot, 1, &err));
    CHECK_MISALIGNED(kvmprep_memslot_set(bad_vm, &slot, &err));
    CHECK_MISALIGNED(kvmprep_vm_check_memslot(bad_vm, &slot, 0, &report, sizeof(report), &err));
    CHECK_MISALIGNED(kvmprep_vm_predict(bad_vm, &range, &report, sizeof(report), &err));
    CHECK_MISALIGNED(kvmprep_memslot_changing(bad_vm, 0, &err));
    CHECK_MISALIGNED(kvmprep_memslot_note(bad_vm, &slot, &err));
    CHECK_MISALIGNED(kvmprep_range_discarded(bad_vm, &range, &err));
    CHECK_MISALIGNED(kvmprep_host_range_discarded(bad_vm, &range, 4096, &err));
    CHECK_MISALIGNED(kvmprep_get_coverage(bad_vm, &range, &coverage, sizeof(coverage), &err));
    CHECK_MISALIGNED(kvmprep_populate(bad_vm, &range, 1, NULL, &result, sizeof(result), &err));
    CHECK_MISALIGNED(kvmprep_job_new(bad_vm, &range, 1, NULL, &job, &err));
    CHECK_MISALIGNED(kvmprep_visibility_next(bad_vm, 0, &run, &err));
    CHECK_MISALIGNED(kvmprep_visibility_note(bad_vm, &range, KVMPREP_SHARED, &err));
    CHECK_MISALIGNED(kvmprep_convert(bad_vm, &range, KVMPREP_SHARED, NULL, &err));
    CHECK_MISALIGNED(kvmprep_handle_memory_fault(bad_vm, 0, PAGE, 0, NULL, &err));
    CHECK_MISALIGNED(kvmprep_private_claim(bad_vm, &range, &err));
    CHECK_MISALIGNED(kvmprep_private_unclaim(bad_vm, &range, &err));
    CHECK_MISALIGNED(kvmprep_private_note_sealed(bad_vm, &err));
    CHECK_MISALIGNED(kvmprep_private_check_claims(bad_vm, &range, 1, &err));
    CHECK_MISALIGNED(kvmprep_handle_map_gpa_range(bad_vm, args, NULL, &answer, &err));
    CHECK_EQ(answer, EINVAL); /* the guest is told something whatever happens */
    CHECK_MISALIGNED(kvmprep_job_run(bad_job, -1, &err));
    CHECK_MISALIGNED(kvmprep_job_run_near(bad_job, -1, &range, 1, &err));
    CHECK_MISALIGNED(kvmprep_job_spawn(bad_job, NULL, 0, 1, &err));
    CHECK_MISALIGNED(kvmprep_job_progress(bad_job, &progress, sizeof(progress), &err));
    CHECK_MISALIGNED(kvmprep_job_remaining(bad_job, &range, 1, &n, &err));
    CHECK_MISALIGNED(kvmprep_job_wait(bad_job, 0, &result, sizeof(result), &err));
    CHECK_MISALIGNED(kvmprep_job_cancel(bad_job, &err));
    CHECK_MISALIGNED(kvmprep_job_fd(bad_job, &err));
#undef CHECK_MISALIGNED
}

/* The functions that need no handle: pointers, sizes, descriptors. */
static void without_a_handle(void) {
    struct kvmprep_error err;
    struct kvmprep_caps caps;
    struct kvmprep_fault_stats stats;
    struct kvmprep_range range = range_of(0, PAGE);
    int none = -1;

    CHECK_ERR(kvmprep_probe(-1, -1, NULL, sizeof(caps), &err), err, EINVAL, KVMPREP_REASON_NULL_POINTER);
    CHECK_ERR(kvmprep_probe(-1, -1, MISALIGNED(&caps), sizeof(caps) - 1, &err), err, EINVAL,
              KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK_ERR(kvmprep_probe(-1, -1, &caps, sizeof(caps), &err), err, EBADF, KVMPREP_REASON_BAD_FD);
    CHECK(strstr(err.message, "both") != NULL && strstr(err.message, " are ") != NULL);
    CHECK_ERR(kvmprep_probe(-7, -1, &caps, sizeof(caps), &err), err, EBADF, KVMPREP_REASON_BAD_FD);
    CHECK_ERR(kvmprep_probe(-1, INT_MIN, &caps, sizeof(caps), &err), err, EBADF, KVMPREP_REASON_BAD_FD);

    CHECK_ERR(kvmprep_vcpu_pre_fault(0, NULL, &err), err, EINVAL, KVMPREP_REASON_NULL_POINTER);
    CHECK_ERR(kvmprep_vcpu_pre_fault(0, MISALIGNED(&range), &err), err, EINVAL,
              KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK_ERR(kvmprep_vcpu_pre_fault(-1, &range, &err), err, EBADF, KVMPREP_REASON_BAD_FD);

    CHECK_ERR(kvmprep_keep_mappings(-1, &err), err, EBADF, KVMPREP_REASON_BAD_FD);
    CHECK_ERR(kvmprep_gmem_create(-1, PAGE, 0, &err), err, EBADF, KVMPREP_REASON_BAD_FD);

    CHECK_ERR(kvmprep_get_fault_stats(&none, 1, NULL, sizeof(stats), &err), err, EINVAL,
              KVMPREP_REASON_NULL_POINTER);
    CHECK_ERR(kvmprep_get_fault_stats(&none, 1, MISALIGNED(&stats), sizeof(stats), &err), err, EINVAL,
              KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK_ERR(kvmprep_get_fault_stats(NULL, 1, &stats, sizeof(stats), &err), err, EINVAL,
              KVMPREP_REASON_NULL_POINTER);
    CHECK_ERR(kvmprep_get_fault_stats(MISALIGNED(&none), 1, &stats, sizeof(stats), &err), err, EINVAL,
              KVMPREP_REASON_MISALIGNED_POINTER);
    /* To sum over nothing would look like a guest without faults. */
    CHECK_ERR(kvmprep_get_fault_stats(NULL, 0, &stats, sizeof(stats), &err), err, EINVAL,
              KVMPREP_REASON_BAD_VALUE);
    CHECK_ERR(kvmprep_get_fault_stats(&none, 1, &stats, sizeof(stats), &err), err, EBADF,
              KVMPREP_REASON_BAD_FD);
    CHECK_ERR(kvmprep_get_fault_stats(&none, SIZE_MAX / 2, &stats, sizeof(stats), &err), err, EINVAL,
              KVMPREP_REASON_BAD_VALUE);
}

/* What kvmprep_probe() would say of an ordinary VM, for the functions that need none. */
static struct kvmprep_caps caps_of_a_vm(void) {
    struct kvmprep_caps caps;
    memset(&caps, 0, sizeof(caps));
    caps.read_only_memslots = caps.nested_paging = caps.user_memory2 = 1;
    caps.memslots = 32764;
    caps.address_spaces = 2;
    caps.gpa_bits = 46;
    caps.hva_end = (1ull << 47) - PAGE;
    caps.kernel_release = 6 << 16 | 12 << 8;
    return caps;
}

/* The checks that need no handle: pointers, sizes, lists and rules. The report is left alone. */
static void memslots_without_a_handle(void) {
    struct kvmprep_error err;
    struct kvmprep_memslot_report report, before;
    struct kvmprep_caps caps = caps_of_a_vm();
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT, other;
    struct kvmprep_range range = range_of(MEMORY_GPA, PAGE);
    slot.gpa = MEMORY_GPA;
    slot.size = SIZE;
    other = slot;
    other.slot = 1;
    other.gpa += SIZE;
    memset(&report, 0xa5, sizeof(report));
    before = report;

/* In both functions. */
#define CHECK_BOTH(code, why, caps, caps_size, slot, report, report_size)                                    \
    do {                                                                                                     \
        CHECK_ERR(kvmprep_memslot_check(caps, caps_size, NULL, 0, slot, 0, report, report_size, &err), err,  \
                  code, why);                                                                                \
        CHECK_ERR(kvmprep_memslot_predict(caps, caps_size, slot, NULL, NULL, 0, report, report_size, &err),  \
                  err, code, why);                                                                           \
    } while (0)
    const size_t size = sizeof(caps), report_size = sizeof(report);
    CHECK_BOTH(EINVAL, KVMPREP_REASON_NULL_POINTER, NULL, size, &slot, &report, report_size);
    CHECK_BOTH(EINVAL, KVMPREP_REASON_MISALIGNED_POINTER, MISALIGNED(&caps), size, &slot, &report,
               report_size);
    CHECK_BOTH(EINVAL, KVMPREP_REASON_NULL_POINTER, &caps, size, NULL, &report, report_size);
    CHECK_BOTH(EINVAL, KVMPREP_REASON_MISALIGNED_POINTER, &caps, size, MISALIGNED(&slot), &report,
               report_size);
    CHECK_BOTH(EINVAL, KVMPREP_REASON_MISALIGNED_POINTER, &caps, size, &slot, MISALIGNED(&report),
               report_size);
    CHECK_BOTH(EINVAL, KVMPREP_REASON_STRUCT_SIZE, &caps, size, &slot, &report, 0);
    CHECK_BOTH(EINVAL, KVMPREP_REASON_STRUCT_SIZE, &caps, size, &slot, &report, 4097);
    CHECK_BOTH(EINVAL, KVMPREP_REASON_STRUCT_SIZE, &caps, size, &slot, &report, SIZE_MAX);
    /* The caps of versions that could not be passed in, and of none. */
    const size_t wrong[] = {0, 1, 56, size - 1, 4097, SIZE_MAX};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++)
        CHECK_BOTH(EINVAL, KVMPREP_REASON_STRUCT_SIZE, &caps, wrong[i], &slot, &report, report_size);
    /* Those of a newer version, that says something new; and that does not. */
    union {
        struct kvmprep_caps caps;
        unsigned char space[256];
    } newer;
    memset(&newer, 0, sizeof(newer));
    newer.caps = caps;
    newer.space[size + 7] = 1;
    CHECK_BOTH(E2BIG, KVMPREP_REASON_STRUCT_SIZE, &newer.caps, size + 8, &slot, &report, report_size);
#undef CHECK_BOTH
    CHECK(memcmp(&report, &before, sizeof(report)) == 0);
    newer.space[size + 7] = 0;
    CHECK_OK(kvmprep_memslot_check(&newer.caps, size + 8, NULL, 0, &slot, 0, NULL, 0, &err), err);
    newer.space[size + 7] = 1; /* beyond what was passed */
    CHECK_OK(kvmprep_memslot_check(&newer.caps, size + 7, NULL, 0, &slot, 0, NULL, 0, &err), err);

    /* A prediction without a report would be for nothing. */
    CHECK_ERR(kvmprep_memslot_predict(&caps, size, &slot, NULL, NULL, 0, NULL, 0, &err), err, EINVAL,
              KVMPREP_REASON_NULL_POINTER);

    /* The list of slots that there are. */
#define CHECK_LIST(list, n, why)                                                                             \
    CHECK_ERR(kvmprep_memslot_check(&caps, size, list, n, &slot, 0, &report, report_size, &err), err,        \
              EINVAL, why)
    CHECK_LIST(NULL, 1, KVMPREP_REASON_NULL_POINTER);
    CHECK_LIST(MISALIGNED(&other), 1, KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK_LIST(&other, SIZE_MAX / 2, KVMPREP_REASON_BAD_VALUE);
    struct kvmprep_memslot list[2] = {other, other};
    list[1].size = 0;
    CHECK_LIST(list, 2, KVMPREP_REASON_BAD_VALUE);
    CHECK(strstr(err.message, "existing[1]") != NULL);
    list[1] = other;
    list[1].reserved[3] = 1;
    CHECK_LIST(list, 2, KVMPREP_REASON_RESERVED_NOT_ZERO);
    list[1] = other;
    list[1].backing = 10;
    CHECK_LIST(list, 2, KVMPREP_REASON_BAD_VALUE);
#undef CHECK_LIST
    CHECK_OK(kvmprep_memslot_check(&caps, size, MISALIGNED(&other), 0, &slot, 0, NULL, 0, &err), err);
    CHECK_OK(kvmprep_memslot_check(&caps, size, &other, 1, &slot, 0, NULL, 0, &err), err);
    CHECK_ERR(kvmprep_memslot_check(&caps, size, NULL, 0, &slot, 4, NULL, 0, &err), err, EINVAL,
              KVMPREP_REASON_BAD_VALUE);

    /* The part that is asked about, and what of it is private. */
#define CHECK_PART(range, private_memory, n, why)                                                            \
    CHECK_ERR(                                                                                               \
        kvmprep_memslot_predict(&caps, size, &slot, range, private_memory, n, &report, report_size, &err),   \
        err, EINVAL, why)
    CHECK_PART(MISALIGNED(&range), NULL, 0, KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK_PART(NULL, MISALIGNED(&range), 1, KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK_PART(NULL, &range, SIZE_MAX / 2, KVMPREP_REASON_BAD_VALUE);
    const struct {
        struct kvmprep_range range;
        uint32_t reason;
    } parts[] = {
        {{MEMORY_GPA, 0, {0, 0}}, KVMPREP_REASON_RANGE_EMPTY},
        {{MEMORY_GPA + 1, PAGE, {0, 0}}, KVMPREP_REASON_RANGE_UNALIGNED},
        {{0 - PAGE, PAGE, {0, 0}}, KVMPREP_REASON_RANGE_OVERFLOW},
        {{MEMORY_GPA, PAGE, {1, 0}}, KVMPREP_REASON_RESERVED_NOT_ZERO},
        {{MEMORY_GPA - PAGE, 2 * PAGE, {0, 0}}, KVMPREP_REASON_BAD_VALUE},
        {{MEMORY_GPA, SIZE + PAGE, {0, 0}}, KVMPREP_REASON_BAD_VALUE},
        {{MEMORY_GPA + SIZE, PAGE, {0, 0}}, KVMPREP_REASON_BAD_VALUE},
    };
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        struct kvmprep_range private_too[2] = {range, parts[i].range};
        CHECK_PART(&parts[i].range, NULL, 0, parts[i].reason);
        if (parts[i].reason != KVMPREP_REASON_BAD_VALUE) /* what lies outside the slot is ignored */
            CHECK_PART(NULL, private_too, 2, parts[i].reason);
    }
    slot.size = 0;
    CHECK_PART(NULL, NULL, 0, KVMPREP_REASON_RANGE_EMPTY);
    slot.size = PAGE << 31; /* which KVM does not take */
    slot.gpa = 0;
    CHECK_PART(NULL, NULL, 0, KVMPREP_REASON_MEMSLOT_TOO_LARGE);
#undef CHECK_PART
    CHECK(memcmp(&report, &before, sizeof(report)) == 0);
}

/* A vCPU's range is checked before the descriptor is looked at. What is left of it is all of it. */
static void range_of_a_pre_fault(void) {
    struct kvmprep_error err;
    const struct {
        uint64_t gpa, size;
        uint32_t reason;
    } wrong[] = {
        {0, 0, KVMPREP_REASON_RANGE_EMPTY},
        {1, PAGE, KVMPREP_REASON_RANGE_UNALIGNED},
        {0, PAGE + 1, KVMPREP_REASON_RANGE_UNALIGNED},
        {0 - PAGE, 2 * PAGE, KVMPREP_REASON_RANGE_OVERFLOW},
        {0 - PAGE, PAGE, KVMPREP_REASON_RANGE_OVERFLOW}, /* ends at 2^64, which the kernel refuses too */
        {1ull << 52, PAGE, KVMPREP_REASON_RANGE_BEYOND_GUEST},
        {(1ull << 52) - PAGE, 2 * PAGE, KVMPREP_REASON_RANGE_BEYOND_GUEST},
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        struct kvmprep_range range = range_of(wrong[i].gpa, wrong[i].size);
        CHECK_ERR(kvmprep_vcpu_pre_fault(0, &range, &err), err, EINVAL, wrong[i].reason);
        CHECK(range.gpa == wrong[i].gpa && range.size == wrong[i].size);
    }
    for (int i = 0; i < 2; i++) {
        struct kvmprep_range range = range_of(0, PAGE);
        range.reserved[i] = 1;
        CHECK_ERR(kvmprep_vcpu_pre_fault(0, &range, &err), err, EINVAL, KVMPREP_REASON_RESERVED_NOT_ZERO);
    }
}

/* Every mistake in a handle's configuration; *out stays as it was. */
static void config_of_a_handle(void) {
    struct kvmprep_error err;
    struct kvmprep_vm *const before = MISALIGNED(&err);
    struct kvmprep_vm *out = before;
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;

    CHECK_ERR(kvmprep_vm_new(NULL, &out, &err), err, EINVAL, KVMPREP_REASON_NULL_POINTER);
    CHECK_ERR(kvmprep_vm_new(&config, NULL, &err), err, EINVAL, KVMPREP_REASON_NULL_POINTER);
    CHECK_ERR(kvmprep_vm_new(MISALIGNED(&config), &out, &err), err, EINVAL,
              KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK_ERR(kvmprep_vm_new(&config, MISALIGNED(&out), &err), err, EINVAL,
              KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK_ERR(kvmprep_vm_new(&config, &out, &err), err, EBADF, KVMPREP_REASON_BAD_FD); /* _INIT says -1 */
    config.flags = 4;
    CHECK_ERR(kvmprep_vm_new(&config, &out, &err), err, EINVAL, KVMPREP_REASON_UNKNOWN_FLAGS);
    config.flags = UINT32_MAX;
    CHECK_ERR(kvmprep_vm_new(&config, &out, &err), err, EINVAL, KVMPREP_REASON_UNKNOWN_FLAGS);
    config.flags = 0;
    const uint32_t wrong_bits[] = {1, 11, 53, 64, UINT32_MAX};
    for (size_t i = 0; i < sizeof(wrong_bits) / sizeof(wrong_bits[0]); i++) {
        config.gpa_bits = wrong_bits[i];
        CHECK_ERR(kvmprep_vm_new(&config, &out, &err), err, EINVAL, KVMPREP_REASON_BAD_VALUE);
    }
    config.gpa_bits = 0;
    const uint32_t no_shared_bit[] = {1, 46, 48, 52, 64, UINT32_MAX};
    for (size_t i = 0; i < sizeof(no_shared_bit) / sizeof(no_shared_bit[0]); i++) {
        config.gpa_shared_bit = no_shared_bit[i];
        CHECK_ERR(kvmprep_vm_new(&config, &out, &err), err, EINVAL, KVMPREP_REASON_BAD_VALUE);
    }
    config.gpa_shared_bit = 51;
    CHECK_ERR(kvmprep_vm_new(&config, &out, &err), err, EBADF, KVMPREP_REASON_BAD_FD);
    config.vm_fd = 0; /* some descriptor */
    config.alignment_rule = KVMPREP_ALIGN_SLOT + 1;
    CHECK_ERR(kvmprep_vm_new(&config, &out, &err), err, EINVAL, KVMPREP_REASON_BAD_VALUE);
    config.alignment_rule = KVMPREP_ALIGN_STRICT << 1;
    CHECK_ERR(kvmprep_vm_new(&config, &out, &err), err, EINVAL, KVMPREP_REASON_BAD_VALUE);
    config.alignment_rule = KVMPREP_ALIGN_STRICT | KVMPREP_ALIGN_SLOT;
    CHECK_ERR(kvmprep_vm_new(&config, &out, &err), err, EBADF, KVMPREP_REASON_BAD_FD);
    config.reserved = 1;
    CHECK_ERR(kvmprep_vm_new(&config, &out, &err), err, EINVAL, KVMPREP_REASON_RESERVED_NOT_ZERO);
    CHECK(out == before);
}

/*
 * A struct that applications fill in: refused where its size is less than that of the first version; taken
 * from an older application, and from a newer one as long as that uses nothing new. Both are decoded by one
 * piece of code; each is tried all the same.
 */
static void check_input_sizes(void *newer, size_t first, size_t size,
                              int (*use)(const void *input, struct kvmprep_error *err), int expected,
                              uint32_t expected_reason) {
    struct kvmprep_error err;
    uint32_t *struct_size = newer;
    unsigned char *tail = (unsigned char *)newer + size;
    const uint32_t wrong[] = {0, 1, (uint32_t)first - 1, 4097, UINT32_MAX};

    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        *struct_size = wrong[i];
        CHECK_ERR(use(newer, &err), err, EINVAL, KVMPREP_REASON_STRUCT_SIZE);
    }
    /* Of an older application's struct no more is read than it has. */
    *struct_size = (uint32_t)first;
    memset((unsigned char *)newer + first, 0xa5, size - first);
    CHECK_ERR(use(newer, &err), err, expected, expected_reason);
    memset((unsigned char *)newer + first, 0, size - first);
    *struct_size = (uint32_t)size + 24;
    memset(tail, 0, 24);
    CHECK_ERR(use(newer, &err), err, expected, expected_reason);
    tail[23] = 1;
    CHECK_ERR(use(newer, &err), err, E2BIG, KVMPREP_REASON_STRUCT_SIZE);
    /* What lies behind the size that the application gave is none of the library's business. */
    *struct_size = (uint32_t)size + 23;
    CHECK_ERR(use(newer, &err), err, expected, expected_reason);
}

static int use_config(const void *config, struct kvmprep_error *err) {
    struct kvmprep_vm *out;
    return kvmprep_vm_new(config, &out, err);
}

static void size_of_a_config(void) {
    union {
        struct kvmprep_vm_config config;
        unsigned char space[256];
    } newer = {KVMPREP_VM_CONFIG_INIT};
    /* A well-sized struct comes as far as its descriptor, which is -1. */
    check_input_sizes(&newer, 16, sizeof(newer.config), use_config, EBADF, KVMPREP_REASON_BAD_FD);
}

/* The error is written whole on every call, over whatever was there, and needs no place at all. */
static void error_is_written_whole(void) {
    struct kvmprep_error err, expected;
    struct kvmprep_range range = range_of(1, PAGE);
    struct kvmprep_caps caps;

    memset(&err, 0xa5, sizeof(err));
    CHECK_EQ(kvmprep_vcpu_pre_fault(-1, &range, &err), -EINVAL);
    CHECK(memchr(err.message, 0, sizeof(err.message)) != NULL && err.message[0] != 0);
    CHECK(memchr(err.hint, 0, sizeof(err.hint)) != NULL && err.hint[0] != 0);
    expected = err;
    memset(&expected, 0, offsetof(struct kvmprep_error, message));
    expected.code = -EINVAL;
    expected.reason = KVMPREP_REASON_RANGE_UNALIGNED;
    expected.slot = expected.other_slot = KVMPREP_NO_SLOT;
    CHECK(memcmp(&err, &expected, sizeof(err)) == 0);
    CHECK(memchr(err.message, 0xa5, sizeof(err.message)) == NULL);
    CHECK(memchr(err.hint, 0xa5, sizeof(err.hint)) == NULL);

    CHECK_EQ(kvmprep_vcpu_pre_fault(-1, &range, NULL), -EINVAL);
    CHECK_EQ(kvmprep_probe(-1, -1, &caps, sizeof(caps), NULL), -EBADF);

    /* An error that cannot be written is told by the code alone. */
    memset(&err, 0xa5, sizeof(err));
    expected = err;
    CHECK_EQ(kvmprep_vcpu_pre_fault(-1, &range, MISALIGNED(&err)), -EINVAL);
    CHECK(memcmp(&err, &expected, sizeof(err)) == 0);
    /* The guest is answered all the same. */
    const uint64_t args[3] = {0, 1, 0};
    uint64_t answer = 99;
    CHECK_EQ(kvmprep_handle_map_gpa_range(NULL, args, NULL, &answer, MISALIGNED(&err)), -EINVAL);
    CHECK_EQ(answer, EINVAL);
}

/* ---- With KVM ---- */

static void error_of_success_is_empty(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_error err, expected;
    struct kvmprep_caps caps;
    memset(&err, 0xa5, sizeof(err));
    CHECK_EQ(kvmprep_probe(s.vm.kvm, s.vm.fd, &caps, sizeof(caps), &err), 0);
    memset(&expected, 0, sizeof(expected));
    expected.slot = expected.other_slot = KVMPREP_NO_SLOT;
    CHECK(memcmp(&err, &expected, sizeof(err)) == 0);
    setting_end(&s);
}

/* All functions, with everything right but no place for the error. */
static void no_error_wanted(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_range range = range_of(MEMORY_GPA, SIZE);
    struct kvmprep_caps caps;
    struct kvmprep_fault_stats stats;
    struct kvmprep_memslot_report report;
    struct kvmprep_coverage coverage;
    struct kvmprep_populate_result result;
    struct kvmprep_progress progress;
    struct kvmprep_visibility_run run;
    struct kvmprep_vm *second;
    struct kvmprep_job *job;
    uint64_t args[3] = {MEMORY_GPA >> 1, 1, 0}, answer = 99;
    size_t n;

    config.vm_fd = s.vm.fd;
    CHECK_EQ(kvmprep_probe(s.vm.kvm, -1, &caps, sizeof(caps), NULL), 0);
    CHECK_EQ(kvmprep_get_fault_stats(&s.vcpus[0].fd, 1, &stats, sizeof(stats), NULL), 0);
    CHECK_EQ(kvmprep_keep_mappings(s.vm.fd, NULL), caps.keep_mappings ? 0 : -EOPNOTSUPP);
    CHECK_EQ(kvmprep_vm_new(&config, &second, NULL), 0);
    CHECK_EQ(kvmprep_vm_set_memslots(second, &s.slot, 1, NULL), 0);
    CHECK_EQ(kvmprep_memslot_changing(second, MEMORY_SLOT, NULL), 0);
    CHECK_EQ(kvmprep_memslot_note(second, &s.slot, NULL), 0);
    CHECK_EQ(kvmprep_memslot_set(second, &s.slot, NULL), 0);
    CHECK_EQ(kvmprep_vm_check_memslot(second, &s.slot, 0, NULL, 0, NULL), 0);
    CHECK_EQ(kvmprep_memslot_check(&caps, sizeof(caps), &s.slot, 1, &s.slot, 0, NULL, 0, NULL), 0);
    CHECK_EQ(
        kvmprep_memslot_predict(&caps, sizeof(caps), &s.slot, &range, NULL, 0, &report, sizeof(report), NULL),
        0);
    CHECK_EQ(kvmprep_vm_predict(second, &range, &report, sizeof(report), NULL), 0);
    CHECK_EQ(kvmprep_range_discarded(second, &range, NULL), 0);
    CHECK_EQ(kvmprep_host_range_discarded(second, (void *)(uintptr_t)s.slot.hva, 4096, NULL), 0);
    CHECK_EQ(kvmprep_get_coverage(second, &range, &coverage, sizeof(coverage), NULL), 0);
    CHECK_EQ(kvmprep_visibility_next(second, 0, &run, NULL), 0);
    CHECK_EQ(kvmprep_visibility_note(second, &range, KVMPREP_SHARED, NULL), 0);
    CHECK_EQ(kvmprep_convert(second, &range, KVMPREP_SHARED, NULL, NULL), 0);
    CHECK_EQ(kvmprep_handle_memory_fault(second, MEMORY_GPA, PAGE, 0, NULL, NULL), 0);
    CHECK_EQ(kvmprep_handle_map_gpa_range(second, args, NULL, &answer, NULL), 0);
    CHECK_EQ(answer, 0);
    CHECK_EQ(kvmprep_gmem_create(s.vm.fd, 0, 0, NULL), -EINVAL);
    CHECK_EQ(kvmprep_private_check_claims(second, NULL, 0, NULL), 0);
    CHECK_EQ(kvmprep_private_claim(second, &range, NULL), -EINVAL); /* it is not private */
    CHECK_EQ(kvmprep_private_unclaim(second, &range, NULL), -ENOENT);
    CHECK_EQ(kvmprep_private_note_sealed(second, NULL), 0);
    CHECK_EQ(kvmprep_populate(second, &range, 1, NULL, &result, sizeof(result), NULL), 0);
    CHECK_EQ(kvmprep_job_new(second, &range, 1, NULL, &job, NULL), 0);
    CHECK(kvmprep_job_fd(job, NULL) >= 0);
    CHECK_EQ(kvmprep_job_wait(job, 0, &result, sizeof(result), NULL), -ETIMEDOUT);
    CHECK_EQ(kvmprep_job_run_near(job, -1, &range, 1, NULL), 0);
    CHECK_EQ(kvmprep_job_spawn(job, &s.vcpus[0].fd, 1, 1, NULL), 0);
    CHECK_EQ(kvmprep_job_run(job, s.vcpus[1].fd, NULL), 0);
    CHECK_EQ(kvmprep_job_wait(job, -1, &result, sizeof(result), NULL), 0);
    CHECK_EQ(kvmprep_job_progress(job, &progress, sizeof(progress), NULL), 0);
    CHECK_EQ(kvmprep_job_remaining(job, &range, 1, &n, NULL), 0);
    CHECK_EQ(n, 0);
    CHECK_EQ(kvmprep_job_cancel(job, NULL), 0);
    CHECK_EQ(kvmprep_job_free(job), 0);
    CHECK_EQ(kvmprep_vm_free(second), 0);
    setting_end(&s);
}

/* A pointer that a handle's or job's function needs, NULL and misaligned, one after the other. */
static void pointers(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_job *job = job_of(&s);
    struct kvmprep_range range = range_of(MEMORY_GPA, SIZE);
    struct kvmprep_coverage coverage;
    struct kvmprep_memslot_report report;
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_progress progress;
    struct kvmprep_visibility_run run;
    struct kvmprep_job *out = NULL;
    uint64_t args[3] = {MEMORY_GPA, 1, 0}, answer;
    int fd = s.vcpus[0].fd;
    size_t n = 99;

#define CHECK_POINTER(expression, pointer)                                                                   \
    do {                                                                                                     \
        void *where = NULL;                                                                                  \
        CHECK_ERR(expression, s.err, EINVAL, KVMPREP_REASON_NULL_POINTER);                                   \
        where = MISALIGNED(pointer);                                                                         \
        CHECK_ERR(expression, s.err, EINVAL, KVMPREP_REASON_MISALIGNED_POINTER);                             \
    } while (0)
    CHECK_POINTER(kvmprep_vm_set_memslots(s.handle, where, 1, &s.err), &s.slot);
    CHECK_POINTER(kvmprep_memslot_set(s.handle, where, &s.err), &s.slot);
    CHECK_POINTER(kvmprep_memslot_note(s.handle, where, &s.err), &s.slot);
    CHECK_POINTER(kvmprep_vm_check_memslot(s.handle, where, 0, &report, sizeof(report), &s.err), &s.slot);
    CHECK_POINTER(kvmprep_vm_predict(s.handle, where, &report, sizeof(report), &s.err), &range);
    CHECK_POINTER(kvmprep_vm_predict(s.handle, &range, where, sizeof(report), &s.err), &report);
    CHECK_POINTER(kvmprep_range_discarded(s.handle, where, &s.err), &range);
    CHECK_POINTER(kvmprep_get_coverage(s.handle, where, &coverage, sizeof(coverage), &s.err), &range);
    CHECK_POINTER(kvmprep_get_coverage(s.handle, &range, where, sizeof(coverage), &s.err), &coverage);
    CHECK_POINTER(kvmprep_visibility_next(s.handle, 0, where, &s.err), &run);
    CHECK_POINTER(kvmprep_visibility_note(s.handle, where, KVMPREP_SHARED, &s.err), &range);
    CHECK_POINTER(kvmprep_convert(s.handle, where, KVMPREP_SHARED, NULL, &s.err), &range);
    CHECK_POINTER(kvmprep_private_claim(s.handle, where, &s.err), &range);
    CHECK_POINTER(kvmprep_private_unclaim(s.handle, where, &s.err), &range);
    CHECK_POINTER(kvmprep_private_check_claims(s.handle, where, 1, &s.err), &range);
    CHECK_POINTER(kvmprep_handle_map_gpa_range(s.handle, where, NULL, &answer, &s.err), args);
    CHECK_POINTER(kvmprep_handle_map_gpa_range(s.handle, args, NULL, where, &s.err), &answer);
    CHECK_POINTER(kvmprep_populate(s.handle, where, 1, &opts, &result, sizeof(result), &s.err), &range);
    CHECK_POINTER(kvmprep_job_new(s.handle, where, 1, &opts, &out, &s.err), &range);
    CHECK_POINTER(kvmprep_job_new(s.handle, &range, 1, &opts, where, &s.err), &out);
    CHECK_POINTER(kvmprep_job_run_near(job, -1, where, 1, &s.err), &range);
    CHECK_POINTER(kvmprep_job_spawn(job, where, 1, 0, &s.err), &fd);
    CHECK_POINTER(kvmprep_job_progress(job, where, sizeof(progress), &s.err), &progress);
    CHECK_POINTER(kvmprep_job_remaining(job, where, 1, &n, &s.err), &range);
    CHECK_POINTER(kvmprep_job_remaining(job, &range, 1, where, &s.err), &n);
    opts.n_vcpu_fds = 1;
    CHECK_POINTER((opts.vcpu_fds = where,
                   kvmprep_populate(s.handle, &range, 1, &opts, &result, sizeof(result), &s.err)),
                  &fd);
    opts = default_opts();
    opts.remaining_capacity = 1;
    CHECK_POINTER((opts.remaining = where,
                   kvmprep_populate(s.handle, &range, 1, &opts, &result, sizeof(result), &s.err)),
                  &range);
#undef CHECK_POINTER

    /* What may be left out, may be NULL, and must be aligned where it is not. */
    opts = default_opts();
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, NULL, NULL, 0, &s.err), s.err);
    CHECK_ERR(kvmprep_populate(s.handle, &range, 1, MISALIGNED(&opts), NULL, 0, &s.err), s.err, EINVAL,
              KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK_ERR(kvmprep_populate(s.handle, &range, 1, &opts, MISALIGNED(&result), sizeof(result), &s.err),
              s.err, EINVAL, KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK_ERR(kvmprep_job_new(s.handle, &range, 1, MISALIGNED(&opts), &out, &s.err), s.err, EINVAL,
              KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK_ERR(kvmprep_job_wait(job, 0, MISALIGNED(&result), sizeof(result), &s.err), s.err, EINVAL,
              KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK_ERR(kvmprep_job_wait(job, 0, NULL, 0, &s.err), s.err, ETIMEDOUT, KVMPREP_REASON_NOT_FINISHED);
    CHECK_ERR(kvmprep_vm_check_memslot(s.handle, &s.slot, 0, MISALIGNED(&report), sizeof(report), &s.err),
              s.err, EINVAL, KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK_OK(kvmprep_vm_check_memslot(s.handle, &s.slot, 0, NULL, 0, &s.err), s.err);
    CHECK_OK(kvmprep_job_remaining(job, NULL, 0, &n, &s.err), s.err);
    CHECK_EQ(n, 1);
    CHECK(out == NULL);

    /* An array of no elements may lie anywhere. */
    CHECK_OK(kvmprep_populate(s.handle, MISALIGNED(&range), 0, NULL, NULL, 0, &s.err), s.err);
    CHECK_OK(kvmprep_job_spawn(job, NULL, 0, 0, &s.err), s.err);
    CHECK_OK(kvmprep_job_run_near(job, -1, NULL, 0, &s.err), s.err);
    CHECK_OK(kvmprep_private_check_claims(s.handle, MISALIGNED(&range), 0, &s.err), s.err);
    /* An array of more elements than there are addresses lies nowhere. */
    CHECK_ERR(kvmprep_populate(s.handle, &range, SIZE_MAX / 2, NULL, NULL, 0, &s.err), s.err, EINVAL,
              KVMPREP_REASON_BAD_VALUE);
    CHECK_ERR(kvmprep_vm_set_memslots(s.handle, &s.slot, SIZE_MAX / 2, &s.err), s.err, EINVAL,
              KVMPREP_REASON_BAD_VALUE);
    CHECK_ERR(kvmprep_private_check_claims(s.handle, &range, SIZE_MAX / 2, &s.err), s.err, EINVAL,
              KVMPREP_REASON_BAD_VALUE);
    CHECK_ERR(kvmprep_job_spawn(job, &fd, SIZE_MAX / 2, 0, &s.err), s.err, EINVAL, KVMPREP_REASON_BAD_VALUE);
    CHECK_EQ(kvmprep_job_free(job), 0);
    setting_end(&s);
}

static struct setting *setting_of_opts; /* use_opts() has room for a struct only */

static int use_opts(const void *opts, struct kvmprep_error *err) {
    return kvmprep_populate(setting_of_opts->handle, NULL, 0, opts, NULL, 0, err);
}

static int use_job_opts(const void *opts, struct kvmprep_error *err) {
    struct kvmprep_job *job;
    return kvmprep_job_new(setting_of_opts->handle, NULL, 0, opts, &job, err);
}

static int use_convert_opts(const void *opts, struct kvmprep_error *err) {
    struct kvmprep_range range = range_of(MEMORY_GPA, PAGE);
    return kvmprep_convert(setting_of_opts->handle, &range, KVMPREP_SHARED, opts, err);
}

static int use_memory_fault_opts(const void *opts, struct kvmprep_error *err) {
    return kvmprep_handle_memory_fault(setting_of_opts->handle, MEMORY_GPA, PAGE, 0, opts, err);
}

static int use_hypercall_opts(const void *opts, struct kvmprep_error *err) {
    uint64_t args[3] = {MEMORY_GPA, 1, 0}, answer;
    return kvmprep_handle_map_gpa_range(setting_of_opts->handle, args, opts, &answer, err);
}

static void size_of_the_options(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    union {
        struct kvmprep_populate_opts opts;
        unsigned char space[256];
    } newer = {KVMPREP_POPULATE_OPTS_INIT};
    setting_of_opts = &s;
    /* A well-sized struct comes as far as its intent. */
    newer.opts.intent = 77;
    check_input_sizes(&newer, 72, sizeof(newer.opts), use_opts, EINVAL, KVMPREP_REASON_BAD_VALUE);
    check_input_sizes(&newer, 72, sizeof(newer.opts), use_job_opts, EINVAL, KVMPREP_REASON_BAD_VALUE);

    union {
        struct kvmprep_convert_opts opts;
        unsigned char space[256];
    } newer_convert = {KVMPREP_CONVERT_OPTS_INIT};
    const size_t size = sizeof(newer_convert.opts);
    /* And as far as its steps. */
    newer_convert.opts.steps = 8;
    int (*const uses[])(const void *, struct kvmprep_error *) = {use_convert_opts, use_memory_fault_opts,
                                                                 use_hypercall_opts};
    for (size_t i = 0; i < sizeof(uses) / sizeof(uses[0]); i++)
        check_input_sizes(&newer_convert, 56, size, uses[i], EINVAL, KVMPREP_REASON_UNKNOWN_FLAGS);
    setting_end(&s);
}

/*
 * A struct that the library fills in: an older application gets the part that it knows and nothing behind, a
 * newer one gets zeroes for what this version does not know.
 */
static void check_output_sizes(void *context, size_t size,
                               int (*fill)(void *context, void *out, size_t size,
                                           struct kvmprep_error *err)) {
    struct kvmprep_error err;
    _Alignas(8) unsigned char whole[8192], part[8192];

    memset(whole, 0xa5, sizeof(whole));
    CHECK_OK(fill(context, whole, size, &err), err);
    CHECK_EQ(whole[size], 0xa5);
    const size_t older[] = {1, 3, 4, 8, size - 8, size - 1};
    for (size_t i = 0; i < sizeof(older) / sizeof(older[0]); i++) {
        memset(part, 0xa5, sizeof(part));
        CHECK_OK(fill(context, part, older[i], &err), err);
        for (size_t at = older[i]; at < sizeof(part); at++)
            CHECK_EQ(part[at], 0xa5);
    }
    const size_t newer[] = {size + 1, size + 100, 4096};
    for (size_t i = 0; i < sizeof(newer) / sizeof(newer[0]); i++) {
        memset(part, 0xa5, sizeof(part));
        CHECK_OK(fill(context, part, newer[i], &err), err);
        for (size_t at = size; at < newer[i]; at++)
            CHECK_EQ(part[at], 0);
        for (size_t at = newer[i]; at < sizeof(part); at++)
            CHECK_EQ(part[at], 0xa5);
    }
    memset(part, 0xa5, sizeof(part));
    const size_t wrong[] = {0, 4097, SIZE_MAX};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++)
        CHECK_ERR(fill(context, part, wrong[i], &err), err, EINVAL, KVMPREP_REASON_STRUCT_SIZE);
    for (size_t at = 0; at < sizeof(part); at++)
        CHECK_EQ(part[at], 0xa5);
}

static int fill_caps(void *context, void *out, size_t size, struct kvmprep_error *err) {
    struct setting *s = context;
    return kvmprep_probe(s->vm.kvm, s->vm.fd, out, size, err);
}

static int fill_stats(void *context, void *out, size_t size, struct kvmprep_error *err) {
    struct setting *s = context;
    return kvmprep_get_fault_stats(&s->vcpus[0].fd, 1, out, size, err);
}

static int fill_coverage(void *context, void *out, size_t size, struct kvmprep_error *err) {
    struct setting *s = context;
    struct kvmprep_range range = range_of(MEMORY_GPA, SIZE);
    return kvmprep_get_coverage(s->handle, &range, out, size, err);
}

static int fill_result(void *context, void *out, size_t size, struct kvmprep_error *err) {
    struct setting *s = context;
    return kvmprep_populate(s->handle, NULL, 0, NULL, out, size, err);
}

static int fill_result_of_job(void *context, void *out, size_t size, struct kvmprep_error *err) {
    return kvmprep_job_wait(context, -1, out, size, err);
}

static int fill_progress(void *context, void *out, size_t size, struct kvmprep_error *err) {
    return kvmprep_job_progress(context, out, size, err);
}

static int fill_report_of_handle(void *context, void *out, size_t size, struct kvmprep_error *err) {
    struct setting *s = context;
    return kvmprep_vm_check_memslot(s->handle, &s->slot, 0, out, size, err);
}

static int fill_report(void *context, void *out, size_t size, struct kvmprep_error *err) {
    struct setting *s = context;
    const struct kvmprep_caps caps = caps_of_a_vm();
    return kvmprep_memslot_check(&caps, sizeof(caps), NULL, 0, &s->slot, 0, out, size, err);
}

static int fill_prediction(void *context, void *out, size_t size, struct kvmprep_error *err) {
    struct setting *s = context;
    const struct kvmprep_caps caps = caps_of_a_vm();
    return kvmprep_memslot_predict(&caps, sizeof(caps), &s->slot, NULL, NULL, 0, out, size, err);
}

static int fill_convert_result(void *context, void *out, size_t size, struct kvmprep_error *err) {
    struct setting *s = context;
    struct kvmprep_range range = range_of(MEMORY_GPA, SIZE);
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    opts.result = out;
    opts.result_size = size;
    return kvmprep_convert(s->handle, &range, KVMPREP_SHARED, &opts, err);
}

static int fill_prediction_of_handle(void *context, void *out, size_t size, struct kvmprep_error *err) {
    struct setting *s = context;
    struct kvmprep_range range = range_of(MEMORY_GPA, SIZE);
    return kvmprep_vm_predict(s->handle, &range, out, size, err);
}

static void sizes_of_outputs(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_job *job;

    check_output_sizes(&s, sizeof(struct kvmprep_caps), fill_caps);
    check_output_sizes(&s, sizeof(struct kvmprep_fault_stats), fill_stats);
    check_output_sizes(&s, sizeof(struct kvmprep_coverage), fill_coverage);
    check_output_sizes(&s, sizeof(struct kvmprep_populate_result), fill_result);
    check_output_sizes(&s, sizeof(struct kvmprep_memslot_report), fill_report_of_handle);
    check_output_sizes(&s, sizeof(struct kvmprep_memslot_report), fill_report);
    check_output_sizes(&s, sizeof(struct kvmprep_memslot_report), fill_prediction);
    check_output_sizes(&s, sizeof(struct kvmprep_memslot_report), fill_prediction_of_handle);
    check_output_sizes(&s, sizeof(struct kvmprep_convert_result), fill_convert_result);
    opts.flags = KVMPREP_POPULATE_HOST_ONLY;
    CHECK_OK(kvmprep_job_new(s.handle, NULL, 0, &opts, &job, &s.err), s.err);
    check_output_sizes(job, sizeof(struct kvmprep_progress), fill_progress);
    CHECK_OK(kvmprep_job_run(job, -1, &s.err), s.err);
    check_output_sizes(job, sizeof(struct kvmprep_populate_result), fill_result_of_job);
    CHECK_EQ(kvmprep_job_free(job), 0);
    setting_end(&s);
}

/* A range that is wrong, in each function that makes memory private or shared: nothing becomes so. */
static void check_conversion_of(struct kvmprep_vm *vm, const struct kvmprep_range *wrong, uint32_t reason) {
    struct kvmprep_error err;
    CHECK_ERR(kvmprep_visibility_note(vm, wrong, KVMPREP_PRIVATE, &err), err, EINVAL, reason);
    CHECK_ERR(kvmprep_convert(vm, wrong, KVMPREP_PRIVATE, NULL, &err), err, EINVAL, reason);
    CHECK_ERR(kvmprep_convert(vm, wrong, KVMPREP_SHARED, NULL, &err), err, EINVAL, reason);
    CHECK_ERR(kvmprep_private_claim(vm, wrong, &err), err, EINVAL, reason);
    CHECK_ERR(kvmprep_private_unclaim(vm, wrong, &err), err, EINVAL, reason);
    CHECK_ERR(kvmprep_private_check_claims(vm, wrong, 1, &err), err, EINVAL, reason);
    CHECK(strncmp(err.message, "ranges[0]: ", 11) == 0);
    if (reason == KVMPREP_REASON_RESERVED_NOT_ZERO)
        return; /* an exit is told by values */
    CHECK_ERR(kvmprep_handle_memory_fault(vm, wrong->gpa, wrong->size, 8, NULL, &err), err, EINVAL, reason);
    if (wrong->size % PAGE == 0) {
        const uint64_t args[3] = {wrong->gpa, wrong->size / PAGE, 16};
        uint64_t answer = 99;
        CHECK_ERR(kvmprep_handle_map_gpa_range(vm, args, NULL, &answer, &err), err, EINVAL, reason);
        CHECK_EQ(answer, EINVAL);
    }
    CHECK_EQ(private_bytes(vm), 0);
}

/* Each way in which a range can be wrong, in each function of a handle that takes one. */
static void ranges(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_vm *narrow; /* of a guest with 32 address bits */
    config.vm_fd = s.vm.fd;
    config.gpa_bits = 32;
    CHECK_OK(kvmprep_vm_new(&config, &narrow, &s.err), s.err);
    CHECK_OK(kvmprep_memslot_note(narrow, &s.slot, &s.err), s.err);
    struct kvmprep_job *job;
    CHECK_OK(kvmprep_job_new(narrow, NULL, 0, NULL, &job, &s.err), s.err);

    const struct {
        struct kvmprep_range range;
        uint32_t reason;
    } wrong[] = {
        {{MEMORY_GPA, 0, {0, 0}}, KVMPREP_REASON_RANGE_EMPTY},
        {{MEMORY_GPA + 1, PAGE, {0, 0}}, KVMPREP_REASON_RANGE_UNALIGNED},
        {{MEMORY_GPA + 512, PAGE, {0, 0}}, KVMPREP_REASON_RANGE_UNALIGNED},
        {{MEMORY_GPA, PAGE - 1, {0, 0}}, KVMPREP_REASON_RANGE_UNALIGNED},
        {{MEMORY_GPA, 0 - PAGE, {0, 0}}, KVMPREP_REASON_RANGE_OVERFLOW},
        {{0 - PAGE, PAGE, {0, 0}}, KVMPREP_REASON_RANGE_OVERFLOW},
        {{MEMORY_GPA, PAGE, {1, 0}}, KVMPREP_REASON_RESERVED_NOT_ZERO},
        {{MEMORY_GPA, PAGE, {0, 1ull << 63}}, KVMPREP_REASON_RESERVED_NOT_ZERO},
        {{1ull << 32, PAGE, {0, 0}}, KVMPREP_REASON_RANGE_BEYOND_GUEST},
        {{(1ull << 32) - PAGE, 2 * PAGE, {0, 0}}, KVMPREP_REASON_RANGE_BEYOND_GUEST},
    };
    struct kvmprep_memslot_report report, before;
    struct kvmprep_coverage coverage;
    struct kvmprep_job *out = NULL;
    memset(&report, 0xa5, sizeof(report));
    before = report;
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        /* A good one in front does not hide it. */
        struct kvmprep_range two[2] = {range_of(MEMORY_GPA, PAGE), wrong[i].range};
        uint32_t reason = wrong[i].reason;
        CHECK_ERR(kvmprep_populate(narrow, two, 2, NULL, NULL, 0, &s.err), s.err, EINVAL, reason);
        CHECK_ERR(kvmprep_job_new(narrow, two, 2, NULL, &out, &s.err), s.err, EINVAL, reason);
        CHECK_ERR(kvmprep_range_discarded(narrow, &two[1], &s.err), s.err, EINVAL, reason);
        check_conversion_of(narrow, &two[1], reason);
        if (reason == KVMPREP_REASON_RANGE_BEYOND_GUEST)
            continue; /* to ask of what cannot be there, or to prefer it, does no harm */
        CHECK_ERR(kvmprep_get_coverage(narrow, &two[1], &coverage, sizeof(coverage), &s.err), s.err, EINVAL,
                  reason);
        CHECK_ERR(kvmprep_vm_predict(narrow, &two[1], &report, sizeof(report), &s.err), s.err, EINVAL,
                  reason);
        CHECK_ERR(kvmprep_job_run_near(job, -1, two, 2, &s.err), s.err, EINVAL, reason);
    }
    CHECK(out == NULL);
    /* A prediction is of one memslot. */
    struct kvmprep_range outside = range_of(MEMORY_GPA - PAGE, 2 * PAGE),
                         over = range_of(MEMORY_GPA, SIZE + PAGE);
    CHECK_ERR(kvmprep_vm_predict(narrow, &outside, &report, sizeof(report), &s.err), s.err, ENOENT,
              KVMPREP_REASON_NO_MEMSLOT);
    CHECK_ERR(kvmprep_vm_predict(narrow, &over, &report, sizeof(report), &s.err), s.err, EINVAL,
              KVMPREP_REASON_BAD_VALUE);
    CHECK(memcmp(&report, &before, sizeof(report)) == 0);
    const struct {
        uint64_t start, size;
        uint32_t reason;
    } host[] = {
        {s.slot.hva, 0, KVMPREP_REASON_RANGE_EMPTY},
        {s.slot.hva + 8, PAGE, KVMPREP_REASON_RANGE_UNALIGNED},
        {s.slot.hva, PAGE + 8, KVMPREP_REASON_RANGE_UNALIGNED},
        {s.slot.hva, 0 - PAGE, KVMPREP_REASON_RANGE_OVERFLOW},
    };
    for (size_t i = 0; i < sizeof(host) / sizeof(host[0]); i++)
        CHECK_ERR(
            kvmprep_host_range_discarded(narrow, (void *)(uintptr_t)host[i].start, host[i].size, &s.err),
            s.err, EINVAL, host[i].reason);
    struct kvmprep_range beyond = range_of(1ull << 32, 2 * PAGE);
    CHECK_ERR(kvmprep_populate(narrow, &beyond, 1, NULL, NULL, 0, &s.err), s.err, EINVAL,
              KVMPREP_REASON_RANGE_BEYOND_GUEST);
    CHECK_EQ(s.err.gpa, beyond.gpa);
    CHECK_EQ(s.err.size, beyond.size);
    /* Nothing was done in the good range either: a call is refused whole. */
    struct kvmprep_range all = range_of(MEMORY_GPA, SIZE);
    CHECK_OK(kvmprep_get_coverage(narrow, &all, &coverage, sizeof(coverage), &s.err), s.err);
    CHECK_EQ(coverage.host, 0);
    CHECK_EQ(kvmprep_job_free(job), 0);
    CHECK_EQ(kvmprep_vm_free(narrow), 0);
    setting_end(&s);
}

/* Where the runs of private and shared memory are asked for: every place but those that are no page's. */
static void places_of_visibility(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_visibility_run run, before;
    struct kvmprep_vm *narrow;
    config.vm_fd = s.vm.fd;
    config.gpa_bits = 32;
    CHECK_OK(kvmprep_vm_new(&config, &narrow, &s.err), s.err);

    memset(&run, 0xa5, sizeof(run));
    before = run;
    const uint64_t unaligned[] = {1, 512, PAGE - 1, (1ull << 32) + 1, UINT64_MAX};
    for (size_t i = 0; i < sizeof(unaligned) / sizeof(unaligned[0]); i++)
        CHECK_ERR(kvmprep_visibility_next(narrow, unaligned[i], &run, &s.err), s.err, EINVAL,
                  KVMPREP_REASON_RANGE_UNALIGNED);
    const uint64_t beyond[] = {1ull << 32, (1ull << 32) + PAGE, 1ull << 52, 0 - PAGE};
    for (size_t i = 0; i < sizeof(beyond) / sizeof(beyond[0]); i++)
        CHECK_ERR(kvmprep_visibility_next(narrow, beyond[i], &run, &s.err), s.err, ENOENT,
                  KVMPREP_REASON_RANGE_BEYOND_GUEST);
    CHECK(memcmp(&run, &before, sizeof(run)) == 0);

    CHECK_OK(kvmprep_visibility_next(narrow, (1ull << 32) - PAGE, &run, &s.err), s.err);
    CHECK(run.gpa == (1ull << 32) - PAGE && run.size == PAGE && run.visibility == KVMPREP_SHARED);
    CHECK_EQ(run.reserved0, 0);
    CHECK((run.reserved[0] | run.reserved[1] | run.reserved[2]) == 0);
    CHECK_EQ(kvmprep_vm_free(narrow), 0);
    setting_end(&s);
}

static int count_changes(const struct kvmprep_range *range, uint32_t to, void *opaque) {
    (void)range;
    (void)to;
    ++*(unsigned *)opaque;
    return 0;
}

/*
 * What is wrong with a conversion beside its range, in each of the functions that convert. Nobody is told of
 * a change, the result is left alone, and what was private stays so. (On paper: the VM need not have any.)
 */
static void conversions(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_range range = range_of(MEMORY_GPA, PAGE), noted = range;
    struct kvmprep_convert_result result, before;
    uint64_t answer, exit_flags = 0, attributes = 0;
    unsigned told = 0;
    int closed = eventfd(0, EFD_CLOEXEC), event = eventfd(0, EFD_CLOEXEC);
    close(closed);
    memset(&before, 0xa5, sizeof(before));
    result = before;
    CHECK_OK(kvmprep_visibility_note(s.handle, &noted, KVMPREP_PRIVATE, &s.err), s.err);

#define CONVERT_OPTS(...)                                                                                    \
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;                                            \
    opts.steps = KVMPREP_CONVERT_DROP; /* so that the control below needs no kernel that knows attributes */ \
    opts.changed = count_changes;                                                                            \
    opts.opaque = &told;                                                                                     \
    opts.result = &result;                                                                                   \
    opts.result_size = sizeof(result);                                                                       \
    __VA_ARGS__
#define CHECK_CONVERSION(code, why, ...)                                                                     \
    do {                                                                                                     \
        CONVERT_OPTS(__VA_ARGS__);                                                                           \
        const uint64_t args[3] = {range.gpa, range.size / PAGE, 0};                                          \
        CHECK_ERR(kvmprep_convert(s.handle, &range, KVMPREP_SHARED, &opts, &s.err), s.err, code, why);       \
        CHECK_ERR(kvmprep_handle_memory_fault(s.handle, range.gpa, range.size, 0, &opts, &s.err), s.err,     \
                  code, why);                                                                                \
        answer = 99;                                                                                         \
        CHECK_ERR(kvmprep_handle_map_gpa_range(s.handle, args, &opts, &answer, &s.err), s.err, code, why);   \
        CHECK_EQ(answer, EINVAL);                                                                            \
        CHECK_EQ(told, 0);                                                                                   \
        CHECK_EQ(private_bytes(s.handle), PAGE);                                                             \
    } while (0)
    CHECK_CONVERSION(EINVAL, KVMPREP_REASON_UNKNOWN_FLAGS, opts.steps = 8);
    CHECK_CONVERSION(EINVAL, KVMPREP_REASON_UNKNOWN_FLAGS, opts.steps |= 1u << 31);
    CHECK_CONVERSION(EINVAL, KVMPREP_REASON_UNKNOWN_FLAGS, opts.flags = 2);
    CHECK_CONVERSION(EINVAL, KVMPREP_REASON_UNKNOWN_FLAGS, opts.flags = 1u << 31);
    CHECK_CONVERSION(EINVAL, KVMPREP_REASON_MISALIGNED_POINTER, opts.result = MISALIGNED(&result));
    CHECK_CONVERSION(EINVAL, KVMPREP_REASON_STRUCT_SIZE, opts.result_size = 0);
    CHECK_CONVERSION(EINVAL, KVMPREP_REASON_STRUCT_SIZE, opts.result_size = 4097);
    const int no_vcpus[] = {-2, INT_MIN, closed, event, s.vm.kvm, s.vm.fd};
    for (size_t i = 0; i < sizeof(no_vcpus) / sizeof(no_vcpus[0]); i++) {
        result = before;
        CHECK_CONVERSION(EBADF, KVMPREP_REASON_BAD_FD, opts.steps |= KVMPREP_CONVERT_PREFAULT;
                         opts.vcpu_fd = no_vcpus[i]);
    }
    const uint64_t no_pages[] = {1, PAGE - 1, PAGE + 1, UINT64_MAX};
    for (size_t i = 0; i < sizeof(no_pages) / sizeof(no_pages[0]); i++) {
        result = before;
        CHECK_CONVERSION(EINVAL, KVMPREP_REASON_BAD_VALUE, opts.max_size = no_pages[i]);
        CHECK(!memcmp(&result, &before, sizeof(result)));
    }
    range.size = 2 * PAGE;
    CHECK_CONVERSION(EINVAL, KVMPREP_REASON_CONVERT_TOO_LARGE, opts.max_size = PAGE);
    CHECK_EQ(s.err.gpa, range.gpa);
    CHECK_EQ(s.err.size, range.size);
    CHECK_EQ(s.err.stage, KVMPREP_STAGE_ATTRIBUTES);
    CHECK_EQ(result.converted, 0); /* nothing was wrong with the call: there is a result */
    range.size = PAGE;
#undef CHECK_CONVERSION

    CONVERT_OPTS();
#undef CONVERT_OPTS
    result = before;
    const uint32_t neither[] = {2, 8, 1u << 31, UINT32_MAX};
    for (size_t i = 0; i < sizeof(neither) / sizeof(neither[0]); i++) {
        CHECK_ERR(kvmprep_convert(s.handle, &range, neither[i], &opts, &s.err), s.err, EINVAL,
                  KVMPREP_REASON_BAD_VALUE);
        CHECK_ERR(kvmprep_visibility_note(s.handle, &range, neither[i], &s.err), s.err, EINVAL,
                  KVMPREP_REASON_BAD_VALUE);
    }
    const uint64_t no_exit[] = {1, 7, 9, 16, 1ull << 63, UINT64_MAX};
    for (size_t i = 0; i < sizeof(no_exit) / sizeof(no_exit[0]); i++) {
        exit_flags = no_exit[i];
        CHECK_ERR(kvmprep_handle_memory_fault(s.handle, range.gpa, range.size, exit_flags, &opts, &s.err),
                  s.err, EINVAL, KVMPREP_REASON_UNKNOWN_FLAGS);
    }
    const uint64_t no_attributes[] = {3, 15, 32, 1ull << 63, UINT64_MAX};
    for (size_t i = 0; i < sizeof(no_attributes) / sizeof(no_attributes[0]); i++) {
        attributes = no_attributes[i];
        const uint64_t args[3] = {range.gpa, 1, attributes};
        answer = 99;
        CHECK_ERR(kvmprep_handle_map_gpa_range(s.handle, args, &opts, &answer, &s.err), s.err, EINVAL,
                  KVMPREP_REASON_UNKNOWN_FLAGS);
        CHECK_EQ(answer, EINVAL);
    }
    /* More pages than there are addresses; and just as many. */
    const uint64_t too_many[] = {1ull << 52, UINT64_MAX, (1ull << 52) - 1};
    for (size_t i = 0; i < sizeof(too_many) / sizeof(too_many[0]); i++) {
        const uint64_t args[3] = {range.gpa, too_many[i], 0};
        CHECK_ERR(kvmprep_handle_map_gpa_range(s.handle, args, &opts, &answer, &s.err), s.err, EINVAL,
                  KVMPREP_REASON_RANGE_OVERFLOW);
        CHECK_EQ(answer, EINVAL);
    }
    CHECK_ERR(kvmprep_convert(s.handle, &range, KVMPREP_SHARED, MISALIGNED(&opts), &s.err), s.err, EINVAL,
              KVMPREP_REASON_MISALIGNED_POINTER);
    CHECK(memcmp(&result, &before, sizeof(result)) == 0);
    CHECK_EQ(told, 0);
    CHECK_EQ(private_bytes(s.handle), PAGE);

    /* With all that right it is done: what was refused above was refused for its mistake. */
    opts.vcpu_fd = closed; /* not read without the step that uses it */
    opts.max_size = PAGE;
    CHECK_OK(kvmprep_convert(s.handle, &range, KVMPREP_SHARED, &opts, &s.err), s.err);
    CHECK_EQ(result.converted, PAGE);
    CHECK_EQ(told, 1);
    CHECK_EQ(private_bytes(s.handle), 0);
    close(event);
    setting_end(&s);
}

/* A TDX guest's addresses are passed without the bit that says "shared". */
static void shared_bit(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_vm *vm;
    config.vm_fd = s.vm.fd;
    config.gpa_bits = 52;
    config.gpa_shared_bit = 47;
    CHECK_OK(kvmprep_vm_new(&config, &vm, &s.err), s.err);
    const struct kvmprep_range with_bit[] = {
        range_of(1ull << 47, PAGE), range_of((1ull << 47) - PAGE, 2 * PAGE), range_of(1ull << 51, PAGE)};
    for (size_t i = 0; i < sizeof(with_bit) / sizeof(with_bit[0]); i++)
        check_conversion_of(vm, &with_bit[i], KVMPREP_REASON_SHARED_BIT);
    struct kvmprep_range below = range_of((1ull << 47) - PAGE, PAGE);
    CHECK_OK(kvmprep_visibility_note(vm, &below, KVMPREP_PRIVATE, &s.err), s.err);
    CHECK_EQ(private_bytes(vm), PAGE);
    CHECK_EQ(kvmprep_vm_free(vm), 0);
    setting_end(&s);
}

/* Each way in which a memslot can be malformed, in each function that takes one. Nothing changes. */
static void memslots(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_memslot_report report;
    struct kvmprep_caps caps;
    struct kvmprep_vm *narrow;
    CHECK_OK(kvmprep_probe(-1, s.vm.fd, &caps, sizeof(caps), &s.err), s.err);
    config.vm_fd = s.vm.fd;
    config.gpa_bits = 36;
    CHECK_OK(kvmprep_vm_new(&config, &narrow, &s.err), s.err);

#define CHECK_TOLD(code, why, ...)                                                                           \
    do {                                                                                                     \
        struct kvmprep_memslot slot = s.slot;                                                                \
        slot.slot = 7;                                                                                       \
        slot.gpa = 2 * MEMORY_GPA;                                                                           \
        __VA_ARGS__;                                                                                         \
        CHECK_ERR(kvmprep_memslot_note(narrow, &slot, &s.err), s.err, code, why);                            \
        CHECK_ERR(kvmprep_vm_set_memslots(narrow, &slot, 1, &s.err), s.err, code, why);                      \
        CHECK_EQ(s.err.slot, slot.slot);                                                                     \
        if ((slot.flags & KVM_MEM_GUEST_MEMFD) && !caps.guest_memfd)                                         \
            break; /* that is what is wrong with it then: see memslots.c */                                  \
        CHECK_ERR(kvmprep_memslot_set(narrow, &slot, &s.err), s.err, code, why);                             \
        CHECK_EQ(s.err.slot, slot.slot);                                                                     \
        CHECK_ERR(kvmprep_vm_check_memslot(narrow, &slot, 0, NULL, 0, &s.err), s.err, code, why);            \
        CHECK_EQ(s.err.slot, slot.slot);                                                                     \
    } while (0)
/* By itself, too. */
#define CHECK_SLOT(code, why, ...)                                                                           \
    do {                                                                                                     \
        CHECK_TOLD(code, why, __VA_ARGS__);                                                                  \
        struct kvmprep_memslot slot = s.slot;                                                                \
        __VA_ARGS__;                                                                                         \
        CHECK_ERR(kvmprep_memslot_predict(&caps, sizeof(caps), &slot, NULL, NULL, 0, &report,                \
                                          sizeof(report), &s.err),                                           \
                  s.err, code, why);                                                                         \
        CHECK_EQ(s.err.slot, slot.slot);                                                                     \
        if ((slot.flags & KVM_MEM_GUEST_MEMFD) && !caps.guest_memfd)                                         \
            break;                                                                                           \
        CHECK_ERR(kvmprep_memslot_check(&caps, sizeof(caps), NULL, 0, &slot, 0, NULL, 0, &s.err), s.err,     \
                  code, why);                                                                                \
        CHECK_EQ(s.err.slot, slot.slot);                                                                     \
    } while (0)
    CHECK_SLOT(EINVAL, KVMPREP_REASON_UNKNOWN_FLAGS, slot.flags = 8);
    CHECK_SLOT(EINVAL, KVMPREP_REASON_UNKNOWN_FLAGS, slot.attributes = 16);
    CHECK_SLOT(EINVAL, KVMPREP_REASON_BAD_VALUE, slot.backing = 10);
    CHECK_SLOT(EINVAL, KVMPREP_REASON_BAD_VALUE, slot.backing = UINT32_MAX);
    CHECK_SLOT(EINVAL, KVMPREP_REASON_RANGE_UNALIGNED, slot.gpa += 1);
    CHECK_SLOT(EINVAL, KVMPREP_REASON_RANGE_UNALIGNED, slot.size -= 1);
    CHECK_SLOT(EINVAL, KVMPREP_REASON_RANGE_UNALIGNED, slot.hva += 512);
    CHECK_SLOT(EINVAL, KVMPREP_REASON_RANGE_OVERFLOW, slot.gpa = 0 - PAGE);
    CHECK_SLOT(EINVAL, KVMPREP_REASON_RANGE_OVERFLOW, slot.hva = 0 - PAGE);
    CHECK_TOLD(EINVAL, KVMPREP_REASON_RANGE_BEYOND_GUEST, slot.gpa = (1ull << 36) - PAGE);
    CHECK_SLOT(EBADF, KVMPREP_REASON_BAD_FD, slot.attributes = KVMPREP_MEMSLOT_MEMORY_FD;
               slot.memory_fd = -1);
    CHECK_SLOT(EINVAL, KVMPREP_REASON_RANGE_OVERFLOW, slot.attributes = KVMPREP_MEMSLOT_MEMORY_FD;
               slot.memory_fd = 0; slot.memory_fd_offset = 0 - PAGE);
    CHECK_SLOT(EBADF, KVMPREP_REASON_BAD_FD, slot.flags = KVM_MEM_GUEST_MEMFD; slot.guest_memfd = -1);
    CHECK_SLOT(EINVAL, KVMPREP_REASON_RANGE_UNALIGNED, slot.flags = KVM_MEM_GUEST_MEMFD; slot.guest_memfd = 0;
               slot.guest_memfd_offset = 1);
    CHECK_SLOT(EINVAL, KVMPREP_REASON_RANGE_OVERFLOW, slot.flags = KVM_MEM_GUEST_MEMFD; slot.guest_memfd = 0;
               slot.guest_memfd_offset = 0 - PAGE);
    for (int i = 0; i < 8; i++)
        CHECK_SLOT(EINVAL, KVMPREP_REASON_RESERVED_NOT_ZERO, slot.reserved[i] = 1);
#undef CHECK_SLOT
#undef CHECK_TOLD

    /* Without the flags that say so, these fields are not read: what is in them does not matter. */
    struct kvmprep_memslot slot = s.slot;
    slot.memory_fd = -5;
    slot.memory_fd_offset = UINT64_MAX;
    slot.guest_memfd = -5;
    slot.guest_memfd_offset = 1;
    CHECK_OK(kvmprep_memslot_note(narrow, &slot, &s.err), s.err);
    /* The deletion of a slot that is not there is no mistake: the handle may be younger than the slot was. */
    slot.size = 0;
    slot.slot = 99;
    CHECK_OK(kvmprep_memslot_note(narrow, &slot, &s.err), s.err);
    CHECK_OK(kvmprep_memslot_changing(narrow, 99, &s.err), s.err);
    CHECK_EQ(kvmprep_vm_free(narrow), 0);
    setting_end(&s);
}

/* Two slots at one place: named both, and the handle goes on knowing what it knew. */
static void overlapping_memslots(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_memslot other = s.slot;
    other.slot = 9;
    other.gpa += SIZE - PAGE; /* one page is enough */
    CHECK_ERR(kvmprep_memslot_note(s.handle, &other, &s.err), s.err, EEXIST, KVMPREP_REASON_MEMSLOT_OVERLAP);
    CHECK_EQ(s.err.slot, 9);
    CHECK_EQ(s.err.other_slot, MEMORY_SLOT);
    CHECK_EQ(s.err.stage, KVMPREP_STAGE_MEMSLOT);
    CHECK_EQ(s.err.gpa, other.gpa);
    CHECK_EQ(s.err.size, other.size);
    CHECK_ERR(kvmprep_memslot_set(s.handle, &other, &s.err), s.err, EEXIST, KVMPREP_REASON_MEMSLOT_OVERLAP);
    CHECK_EQ(s.err.other_slot, MEMORY_SLOT);
    CHECK_EQ(memory_known(&s), SIZE);

    struct kvmprep_memslot list[3] = {s.slot, s.slot, other};
    list[0].slot = 4;
    list[0].gpa += 32 * MIB;
    CHECK_ERR(kvmprep_vm_set_memslots(s.handle, list, 3, &s.err), s.err, EEXIST,
              KVMPREP_REASON_MEMSLOT_OVERLAP);
    CHECK_EQ(s.err.slot, 9);
    CHECK_EQ(s.err.other_slot, MEMORY_SLOT);
    CHECK_EQ(memory_known(&s), SIZE); /* not even the first of the list */

    /* Next to each other, in another address space, or of the same number is no overlap. */
    other.gpa = s.slot.gpa + SIZE;
    CHECK_OK(kvmprep_memslot_note(s.handle, &other, &s.err), s.err);
    other.slot = 9 | 1 << 16;
    other.gpa = s.slot.gpa;
    CHECK_OK(kvmprep_memslot_note(s.handle, &other, &s.err), s.err);
    other = s.slot;
    other.gpa -= PAGE;
    CHECK_OK(kvmprep_memslot_note(s.handle, &other, &s.err), s.err);
    CHECK_EQ(memory_known(&s), 2 * SIZE);
    setting_end(&s);
}

/* A list of slots is taken whole or not at all. */
static void list_of_memslots(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_memslot list[2] = {s.slot, s.slot};
    list[1].gpa += 32 * MIB;
    CHECK_ERR(kvmprep_vm_set_memslots(s.handle, list, 2, &s.err), s.err, EINVAL, KVMPREP_REASON_BAD_VALUE);
    CHECK_EQ(s.err.slot, MEMORY_SLOT); /* the number stands there twice */
    CHECK_EQ(memory_known(&s), SIZE);
    list[1].slot = 8;
    list[1].size = 0;
    CHECK_ERR(kvmprep_vm_set_memslots(s.handle, list, 2, &s.err), s.err, EINVAL, KVMPREP_REASON_BAD_VALUE);
    CHECK_EQ(s.err.slot, 8);
    list[1].size = SIZE;
    CHECK_OK(kvmprep_vm_set_memslots(s.handle, list, 2, &s.err), s.err);
    CHECK_EQ(memory_known(&s), 2 * SIZE);
    CHECK_OK(kvmprep_vm_set_memslots(s.handle, NULL, 0, &s.err), s.err);
    CHECK_EQ(memory_known(&s), 0);
    setting_end(&s);
}

/*
 * KVM refuses what the handle thought right, since it was not told of a slot; then all stands as before, for
 * KVM and for the handle.
 */
static void memslot_that_kvm_refuses(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_memslot untold = s.slot, slot;
    struct kvmprep_populate_result result;

    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, NULL, NULL, 0, &s.err), s.err);
    untold.slot = 5;
    untold.gpa += 32 * MIB;
    CHECK_EQ(slot_set(&s.vm, &untold), 0);
    slot = untold;
    slot.size = SIZE / 2; /* which KVM does not change */
    CHECK_ERR(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err, EINVAL, KVMPREP_REASON_KERNEL_REFUSED);
    CHECK_EQ(s.err.slot, 5);
    CHECK_EQ(s.err.stage, KVMPREP_STAGE_MEMSLOT);
    CHECK_EQ(s.err.gpa, slot.gpa);
    CHECK_EQ(s.err.size, slot.size);
    CHECK(strstr(s.err.hint, "tell the handle of every slot") != NULL);
    slot = s.slot;
    slot.gpa = untold.gpa; /* a move onto it */
    CHECK_ERR(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err, EEXIST, KVMPREP_REASON_KERNEL_REFUSED);
    CHECK_EQ(s.err.slot, MEMORY_SLOT);
    CHECK(strstr(s.err.hint, "tell the handle of every slot") != NULL);

    CHECK_EQ(memory_known(&s), SIZE);
    struct kvmprep_range all = range_of(MEMORY_GPA, SIZE);
    struct kvmprep_coverage coverage;
    CHECK_OK(kvmprep_get_coverage(s.handle, &all, &coverage, sizeof(coverage), &s.err), s.err);
    CHECK_EQ(coverage.host, SIZE);
    /* Named, it would be refused if it still counted as about to change. */
    CHECK_OK(kvmprep_populate(s.handle, &all, 1, NULL, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.host, SIZE);
    setting_end(&s);
}

static void options(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_opts opts;
    struct kvmprep_populate_result result;
    struct kvmprep_range rest;
    struct kvmprep_job *const before = MISALIGNED(&s);
    struct kvmprep_job *out = before;
    int fds[2] = {s.vcpus[0].fd, s.vcpus[0].fd};

#define CHECK_OPTS(why, ...)                                                                                 \
    do {                                                                                                     \
        opts = default_opts();                                                                               \
        __VA_ARGS__;                                                                                         \
        CHECK_ERR(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err,        \
                  EINVAL, why);                                                                              \
        CHECK_ERR(kvmprep_job_new(s.handle, NULL, 0, &opts, &out, &s.err), s.err, EINVAL, why);              \
    } while (0)
    CHECK_OPTS(KVMPREP_REASON_UNKNOWN_FLAGS, opts.flags = 128);
    CHECK_OPTS(KVMPREP_REASON_UNKNOWN_FLAGS, opts.flags = 1u << 31);
    CHECK_OPTS(KVMPREP_REASON_BAD_VALUE, opts.intent = 3);
    CHECK_OPTS(KVMPREP_REASON_BAD_VALUE, opts.intent = UINT32_MAX);
    CHECK_OPTS(KVMPREP_REASON_BAD_VALUE,
               opts.flags = KVMPREP_POPULATE_HOST_ONLY | KVMPREP_POPULATE_REQUIRE_STAGE2);
    CHECK_OPTS(KVMPREP_REASON_BAD_VALUE, opts.host_threads = 1025);
    CHECK_OPTS(KVMPREP_REASON_BAD_VALUE, opts.vcpu_fds = fds; opts.n_vcpu_fds = 2); /* one vCPU twice */
    CHECK_OPTS(KVMPREP_REASON_BAD_VALUE, opts.vcpu_fds = fds; opts.n_vcpu_fds = 1; opts.vcpu_fd = fds[0]);
#undef CHECK_OPTS

    /* A job's threads come by calls of their own; options that name some would be ignored, and so are
     * refused. */
#define CHECK_JOB_OPTS(...)                                                                                  \
    do {                                                                                                     \
        opts = default_opts();                                                                               \
        __VA_ARGS__;                                                                                         \
        CHECK_ERR(kvmprep_job_new(s.handle, NULL, 0, &opts, &out, &s.err), s.err, EINVAL,                    \
                  KVMPREP_REASON_BAD_VALUE);                                                                 \
    } while (0)
    CHECK_JOB_OPTS(opts.vcpu_fd = fds[0]);
    CHECK_JOB_OPTS(opts.host_threads = 1);
    CHECK_JOB_OPTS(opts.vcpu_fds = fds; opts.n_vcpu_fds = 1);
    CHECK_JOB_OPTS(opts.remaining = &rest; opts.remaining_capacity = 1);
#undef CHECK_JOB_OPTS
    CHECK(out == before);

    struct kvmprep_job *job = job_of(&s);
    CHECK_ERR(kvmprep_job_spawn(job, fds, 2, 0, &s.err), s.err, EINVAL, KVMPREP_REASON_BAD_VALUE);
    CHECK_ERR(kvmprep_job_spawn(job, NULL, 0, 1025, &s.err), s.err, EINVAL, KVMPREP_REASON_BAD_VALUE);
    CHECK_EQ(kvmprep_job_free(job), 0);
    setting_end(&s);
}

/* Descriptors that are negative, closed, or of something else, wherever one is passed. */
static void descriptors(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_opts opts = default_opts();
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_fault_stats stats;
    struct kvmprep_caps caps;
    struct kvmprep_vm *out = NULL;
    struct kvmprep_job *job = job_of(&s);
    int closed = eventfd(0, EFD_CLOEXEC), event = eventfd(0, EFD_CLOEXEC);
    int empty =
        memfd_create("kvmprep-test", MFD_CLOEXEC); /* can be mapped, but has no byte that could be read */
    close(closed);

    /* No vCPUs: below -1, which is the way to say "none"; closed; and what KVM's own ioctls would not take.
     */
    const int no_vcpus[] = {-2, INT_MIN, closed, event, empty, s.vm.kvm, s.vm.fd};
    for (size_t i = 0; i < sizeof(no_vcpus) / sizeof(no_vcpus[0]); i++) {
        int fd = no_vcpus[i];
#define CHECK_NO_VCPU(call) CHECK_ERR(call, s.err, EBADF, KVMPREP_REASON_BAD_FD)
        opts = default_opts();
        opts.vcpu_fd = fd;
        CHECK_NO_VCPU(kvmprep_populate(s.handle, NULL, 0, &opts, NULL, 0, &s.err));
        opts = default_opts();
        opts.vcpu_fds = &fd;
        opts.n_vcpu_fds = 1;
        CHECK_NO_VCPU(kvmprep_populate(s.handle, NULL, 0, &opts, NULL, 0, &s.err));
        CHECK_NO_VCPU(kvmprep_job_run(job, fd, &s.err));
        CHECK_NO_VCPU(kvmprep_job_run_near(job, fd, NULL, 0, &s.err));
        CHECK_NO_VCPU(kvmprep_job_spawn(job, &fd, 1, 0, &s.err));
#undef CHECK_NO_VCPU
    }
    int none = -1; /* in a list there is no "none" */
    CHECK_ERR(kvmprep_job_spawn(job, &none, 1, 0, &s.err), s.err, EBADF, KVMPREP_REASON_BAD_FD);
    /* The job did not suffer from any of these. */
    CHECK_ERR(kvmprep_job_wait(job, 0, NULL, 0, &s.err), s.err, ETIMEDOUT, KVMPREP_REASON_NOT_FINISHED);

    /* What is no VM. /dev/kvm answers some of a VM's questions, which makes it the likelier mistake. */
    config.vm_fd = closed;
    CHECK_ERR(kvmprep_vm_new(&config, &out, &s.err), s.err, EBADF, KVMPREP_REASON_BAD_FD);
    const int no_vms[] = {event, empty, s.vm.kvm, s.vcpus[0].fd};
    for (size_t i = 0; i < sizeof(no_vms) / sizeof(no_vms[0]); i++) {
        config.vm_fd = no_vms[i];
        CHECK_ERR(kvmprep_vm_new(&config, &out, &s.err), s.err, EBADF, KVMPREP_REASON_BAD_FD);
        CHECK_ERR(kvmprep_keep_mappings(no_vms[i], &s.err), s.err, EBADF, KVMPREP_REASON_BAD_FD);
        CHECK_ERR(kvmprep_gmem_create(no_vms[i], PAGE, 0, &s.err), s.err, EBADF, KVMPREP_REASON_BAD_FD);
        CHECK_ERR(kvmprep_probe(-1, no_vms[i], &caps, sizeof(caps), &s.err), s.err, EBADF,
                  KVMPREP_REASON_BAD_FD);
    }
    CHECK(out == NULL);

    CHECK_ERR(kvmprep_probe(closed, -1, &caps, sizeof(caps), &s.err), s.err, EBADF, KVMPREP_REASON_BAD_FD);
    CHECK_ERR(kvmprep_probe(-1, closed, &caps, sizeof(caps), &s.err), s.err, EBADF, KVMPREP_REASON_BAD_FD);
    /* A VM answers for /dev/kvm, anything else does not: the code is the kernel's. */
    CHECK_OK(kvmprep_probe(s.vm.fd, -1, &caps, sizeof(caps), &s.err), s.err);
    CHECK_ERR(kvmprep_probe(event, -1, &caps, sizeof(caps), &s.err), s.err, ENOTTY, KVMPREP_REASON_BAD_FD);
    CHECK_ERR(kvmprep_probe(s.vcpus[0].fd, -1, &caps, sizeof(caps), &s.err), s.err, EINVAL,
              KVMPREP_REASON_BAD_FD);
    CHECK(s.err.hint[0] != 0);
    CHECK_ERR(kvmprep_get_fault_stats(&closed, 1, &stats, sizeof(stats), &s.err), s.err, EBADF,
              KVMPREP_REASON_BAD_FD);
    const int no_counters[] = {event, empty, s.vm.kvm};
    for (size_t i = 0; i < sizeof(no_counters) / sizeof(no_counters[0]); i++) {
        int fds[2] = {s.vcpus[0].fd, no_counters[i]};
        CHECK_ERR(kvmprep_get_fault_stats(fds, 2, &stats, sizeof(stats), &s.err), s.err, EBADF,
                  KVMPREP_REASON_BAD_FD);
    }
    struct kvmprep_range range = range_of(MEMORY_GPA, PAGE);
    CHECK_ERR(kvmprep_vcpu_pre_fault(closed, &range, &s.err), s.err, EBADF, KVMPREP_REASON_BAD_FD);
    const int others[] = {event, s.vm.kvm, s.vm.fd};
    for (size_t i = 0; i < 3; i++) {
        CHECK(kvmprep_vcpu_pre_fault(others[i], &range, &s.err) < 0);
        CHECK_EQ(s.err.reason, KVMPREP_REASON_BAD_FD);
        CHECK(range.gpa == MEMORY_GPA && range.size == PAGE);
    }
    CHECK_EQ(kvmprep_job_free(job), 0);
    close(event);
    close(empty);
    setting_end(&s);
}

/* A pre-fault that runs out of its memslot stops there. No handle is in play, so no advice is about one. */
static void pre_fault_beyond_the_memslot(void) {
    struct setting s = setting_make_with_stage2(MEMFD_SHARED, SIZE);
    struct kvmprep_range range = range_of(MEMORY_GPA + SIZE - PAGE, 2 * PAGE);
    CHECK_ERR(kvmprep_vcpu_pre_fault(s.vcpus[0].fd, &range, &s.err), s.err, ENOENT,
              KVMPREP_REASON_NO_MEMSLOT);
    CHECK_EQ(range.gpa, MEMORY_GPA + SIZE);
    CHECK_EQ(range.size, PAGE);
    CHECK(s.err.hint[0] != 0 && strstr(s.err.hint, "handle") == NULL);
    setting_end(&s);
}

/* Memory that cannot be populated: which errno, which reason, and where. */
static void unfit_memory(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_result result;
    struct kvmprep_range named = range_of(MEMORY_GPA, SIZE), hole = range_of(MEMORY_GPA - PAGE, 3 * PAGE);
    struct kvmprep_memslot slot = s.slot;

#define CHECK_UNFIT(range, code, why)                                                                        \
    do {                                                                                                     \
        memset(&result, 0xa5, sizeof(result));                                                               \
        CHECK_ERR(kvmprep_populate(s.handle, range, 1, NULL, &result, sizeof(result), &s.err), s.err, code,  \
                  why);                                                                                      \
        CHECK_EQ((unsigned char)result.bytes, 0xa5); /* no work was begun, so there is no result */          \
    } while (0)
    CHECK_UNFIT(&hole, ENOENT, KVMPREP_REASON_NO_MEMSLOT);
    CHECK_EQ(s.err.gpa, hole.gpa);
    CHECK_EQ(s.err.slot, KVMPREP_NO_SLOT);
    CHECK_OK(kvmprep_memslot_changing(s.handle, MEMORY_SLOT, &s.err), s.err);
    CHECK_UNFIT(&named, EBUSY, KVMPREP_REASON_MEMSLOT_CHANGING);
    CHECK_EQ(s.err.slot, MEMORY_SLOT);
    slot.attributes = KVMPREP_MEMSLOT_DEVICE;
    CHECK_OK(kvmprep_memslot_note(s.handle, &slot, &s.err), s.err);
    CHECK_UNFIT(&named, EINVAL, KVMPREP_REASON_MEMSLOT_DEVICE);
    slot.attributes = KVMPREP_MEMSLOT_USERFAULTFD;
    CHECK_OK(kvmprep_memslot_note(s.handle, &slot, &s.err), s.err);
    CHECK_UNFIT(&named, EBUSY, KVMPREP_REASON_MEMSLOT_USERFAULTFD);
    CHECK_OK(kvmprep_memslot_note(s.handle, &s.slot, &s.err), s.err);

    CHECK_EQ(mprotect((char *)s.memory.hva + SIZE / 2, SIZE / 2, PROT_READ), 0);
    CHECK_UNFIT(&named, EACCES, KVMPREP_REASON_HOST_MAPPING_READ_ONLY);
    CHECK_EQ(s.err.gpa, MEMORY_GPA + SIZE / 2);
    CHECK_EQ(s.err.size, SIZE / 2);
    CHECK_EQ(s.err.stage, KVMPREP_STAGE_HOST);
    CHECK_EQ(munmap((char *)s.memory.hva + SIZE / 2, SIZE / 2), 0);
    CHECK_UNFIT(&named, EFAULT, KVMPREP_REASON_NO_HOST_MAPPING);
    CHECK_EQ(s.err.gpa, MEMORY_GPA + SIZE / 2);
#undef CHECK_UNFIT
    setting_end(&s);
}

/* A handle outlives its jobs: it is not freed under them, and is as good as before. */
static void handle_with_a_job(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_job *job = job_of(&s);
    CHECK_EQ(kvmprep_vm_free(s.handle), -EBUSY);
    CHECK_OK(kvmprep_job_run(job, -1, &s.err), s.err);
    CHECK_OK(kvmprep_job_cancel(job, &s.err), s.err);
    CHECK_EQ(kvmprep_vm_free(s.handle), -EBUSY); /* a job that is over lives until it is freed */
    CHECK_EQ(kvmprep_job_free(job), 0);
    setting_end(&s);
}

/* What KVM's module says of nested paging; -1 where it says nothing. */
static int nested_paging_of_the_module(void) {
    static const char *const parameters[] = {"/sys/module/kvm_intel/parameters/ept",
                                             "/sys/module/kvm_amd/parameters/npt"};
    int found = -1;
    if (kvm_is_modelled())
        return 1;
    for (int i = 0; i < 2; i++) {
        FILE *file = fopen(parameters[i], "r");
        if (file == NULL)
            continue;
        int letter = fgetc(file);
        found = letter == 'Y' || letter == '1';
        fclose(file);
    }
    return found;
}

/* The probe's answers, where they can be known otherwise. */
static void probe(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_caps caps;
    CHECK_OK(kvmprep_probe(-1, s.vm.fd, &caps, sizeof(caps), &s.err), s.err);
    CHECK_EQ(caps.pre_fault, s.has_pre_fault);
    CHECK_EQ(caps.kernel_release >> 16, kernel_release() / 1000);
    CHECK_EQ(caps.kernel_release >> 8 & 255, kernel_release() % 1000);
    CHECK_EQ(caps.memslots, ioctl(s.vm.fd, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS));
    int spaces = ioctl(s.vm.fd, KVM_CHECK_EXTENSION, KVM_CAP_MULTI_ADDRESS_SPACE);
    CHECK_EQ(caps.address_spaces, spaces > 1 ? spaces : 1); /* there is always one */
    CHECK_EQ(caps.read_only_memslots, 1);
    CHECK(caps.gpa_bits >= 36 && caps.gpa_bits <= 52);
    int nested = nested_paging_of_the_module();
    if (nested >= 0)
        CHECK_EQ(caps.nested_paging, nested);
    CHECK_EQ(caps.user_memory2, ioctl(s.vm.fd, KVM_CHECK_EXTENSION, 231) > 0); /* KVM_CAP_USER_MEMORY2 */
    CHECK(caps.hva_end % PAGE == 0 && caps.hva_end > s.slot.hva);
    CHECK_EQ(caps.vm_type, 0); /* the caller's to set */
    CHECK_EQ(caps.gpa_shared_bit, 0);
    /* A program that was built with 0.2 has room for less. */
    struct kvmprep_caps old;
    memset(&old, 0xa5, sizeof(old));
    CHECK_OK(kvmprep_probe(-1, s.vm.fd, &old, offsetof(struct kvmprep_caps, nested_paging), &s.err), s.err);
    CHECK_EQ(offsetof(struct kvmprep_caps, nested_paging), 56);
    CHECK(memcmp(&old, &caps, 56) == 0);
    CHECK_EQ(old.nested_paging, 0xa5a5a5a5);
    setting_end(&s);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"version_and_names", version_and_names},
        {"no_handle", no_handle},
        {"misaligned_handle", misaligned_handle},
        {"without_a_handle", without_a_handle},
        {"memslots_without_a_handle", memslots_without_a_handle},
        {"range_of_a_pre_fault", range_of_a_pre_fault},
        {"config_of_a_handle", config_of_a_handle},
        {"size_of_a_config", size_of_a_config},
        {"error_is_written_whole", error_is_written_whole},
        {"error_of_success_is_empty", error_of_success_is_empty},
        {"no_error_wanted", no_error_wanted},
        {"pointers", pointers},
        {"size_of_the_options", size_of_the_options},
        {"sizes_of_outputs", sizes_of_outputs},
        {"ranges", ranges},
        {"places_of_visibility", places_of_visibility},
        {"conversions", conversions},
        {"shared_bit", shared_bit},
        {"memslots", memslots},
        {"overlapping_memslots", overlapping_memslots},
        {"list_of_memslots", list_of_memslots},
        {"memslot_that_kvm_refuses", memslot_that_kvm_refuses},
        {"options", options},
        {"descriptors", descriptors},
        {"pre_fault_beyond_the_memslot", pre_fault_beyond_the_memslot},
        {"unfit_memory", unfit_memory},
        {"handle_with_a_job", handle_with_a_job},
        {"probe", probe},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
