/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Programs of every age on the library of today.
 *
 * `cargo xtask test` compiles this file once for each recorded header, and once for each way in which that
 * header could have had less, or will have more: the structs that may grow are shortened field by field, and
 * lengthened. Each is a case here, and does what a VMM does. It may use the first field of a struct only,
 * since the others are not always there; what the library writes is judged by bytes.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/host.h"
#include "support/setting.h"
#include <errno.h>

#ifdef CALLER

#define SIZE (8 * MIB)
#define UNTOUCHED 0xa5

/* An output with what lies behind it in the caller's memory. */
#define GUARDED(type)                                                                                        \
    struct {                                                                                                 \
        _Alignas(8) type value;                                                                              \
        unsigned char behind[64];                                                                            \
    }

#define PREPARE(guarded) memset(&(guarded), UNTOUCHED, sizeof(guarded))

#define CHECK_UNTOUCHED_BEHIND(guarded)                                                                      \
    do {                                                                                                     \
        for (size_t check_i = 0; check_i < sizeof((guarded).behind); check_i++)                              \
            CHECK_EQ((guarded).behind[check_i], UNTOUCHED);                                                  \
    } while (0)

/* Fills an output of this caller's size and one with room for any, and compares what both were told. */
#define CHECK_OUTPUT(guarded, call)                                                                          \
    do {                                                                                                     \
        _Alignas(8) unsigned char whole[4096];                                                               \
        void *out = &(guarded).value;                                                                        \
        size_t out_size = sizeof((guarded).value);                                                           \
        PREPARE(guarded);                                                                                    \
        CHECK_OK(call, s.err);                                                                               \
        CHECK_UNTOUCHED_BEHIND(guarded);                                                                     \
        out = whole;                                                                                         \
        out_size = sizeof(whole);                                                                            \
        CHECK_OK(call, s.err);                                                                               \
        CHECK(memcmp(&(guarded).value, whole, sizeof((guarded).value)) == 0);                                \
    } while (0)

static int note_progress(const struct kvmprep_progress *progress, void *opaque) {
    *(uint64_t *)opaque = progress->host_total;
    return 0;
}

/* A handle of this caller's own, which knows the setting's slot. */
static struct kvmprep_vm *handle_of(struct setting *s) {
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_vm *vm = NULL;
    config.vm_fd = s->vm.fd;
#ifdef CALLER_IS_NEWER
    config.added_later[1] = 1;
    CHECK_ERR(kvmprep_vm_new(&config, &vm, &s->err), s->err, E2BIG, KVMPREP_REASON_STRUCT_SIZE);
    config.added_later[1] = 0;
#endif
    CHECK_OK(kvmprep_vm_new(&config, &vm, &s->err), s->err);
    CHECK_OK(kvmprep_memslot_note(vm, &s->slot, &s->err), s->err);
    return vm;
}

static void populate(struct setting *s, struct kvmprep_vm *vm) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    GUARDED(struct kvmprep_populate_result) result;
    struct kvmprep_range remaining[2];
    uint64_t told = SIZE;
    opts.flags = KVMPREP_POPULATE_HOST_ONLY;
    opts.progress = note_progress;
    opts.opaque = &told;
    opts.remaining = remaining;
    opts.remaining_capacity = 2;
#ifdef CALLER_IS_NEWER
    opts.added_later[1] = 1;
    CHECK_ERR(kvmprep_populate(vm, NULL, 0, &opts, NULL, 0, &s->err), s->err, E2BIG,
              KVMPREP_REASON_STRUCT_SIZE);
    opts.added_later[1] = 0;
#endif
    CHECK_EQ(present_bytes(s->memory.hva, SIZE), 0);
    PREPARE(result);
    CHECK_OK(kvmprep_populate(vm, NULL, 0, &opts, &result.value, sizeof(result.value), &s->err), s->err);
    CHECK_UNTOUCHED_BEHIND(result);
    CHECK_EQ(result.value.bytes, SIZE);
    CHECK_EQ(told, SIZE);
    CHECK_EQ(present_bytes(s->memory.hva, SIZE), SIZE);
}

static void run_job(struct setting *s, struct kvmprep_vm *vm) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    GUARDED(struct kvmprep_populate_result) result;
    GUARDED(struct kvmprep_progress) progress;
    struct kvmprep_job *job = NULL;
    opts.flags = KVMPREP_POPULATE_HOST_ONLY;
    CHECK_OK(kvmprep_job_new(vm, NULL, 0, &opts, &job, &s->err), s->err);
    CHECK_OK(kvmprep_job_run(job, -1, &s->err), s->err);
    PREPARE(progress);
    CHECK_OK(kvmprep_job_progress(job, &progress.value, sizeof(progress.value), &s->err), s->err);
    CHECK_UNTOUCHED_BEHIND(progress);
    CHECK_EQ(progress.value.host_total, SIZE);
    PREPARE(result);
    CHECK_OK(kvmprep_job_wait(job, -1, &result.value, sizeof(result.value), &s->err), s->err);
    CHECK_UNTOUCHED_BEHIND(result);
    CHECK_EQ(result.value.bytes, SIZE);
    CHECK_EQ(kvmprep_job_free(job), 0);
}

static void ask(struct setting *s_of, struct kvmprep_vm *vm) {
    struct setting s = *s_of;
    struct kvmprep_range range = {MEMORY_GPA, SIZE, {0, 0}};
    GUARDED(struct kvmprep_caps) caps;
    GUARDED(struct kvmprep_coverage) coverage;
    GUARDED(struct kvmprep_fault_stats) stats;
    CHECK_OUTPUT(caps, kvmprep_probe(s.vm.kvm, s.vm.fd, out, out_size, &s.err));
    CHECK_OUTPUT(coverage, kvmprep_get_coverage(vm, &range, out, out_size, &s.err));
    CHECK_EQ(coverage.value.memory, SIZE);
    if (kernel_release() >= 5014)
        CHECK_OUTPUT(stats, kvmprep_get_fault_stats(&s.vcpus[0].fd, 1, out, out_size, &s.err));
}

#if KVMPREP_VERSION >= 0x0400
/* An input whose output is pointed to: both grow. The memory is private on paper, and becomes shared there.
 */
static void convert(struct setting *s, struct kvmprep_vm *vm) {
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    struct kvmprep_range range = {MEMORY_GPA, SIZE, {0, 0}};
    GUARDED(struct kvmprep_convert_result) result;
    opts.steps = KVMPREP_CONVERT_DROP;
    opts.result = &result.value;
    opts.result_size = sizeof(result.value);
    CHECK_OK(kvmprep_visibility_note(vm, &range, KVMPREP_PRIVATE, &s->err), s->err);
    PREPARE(result);
#ifdef CALLER_IS_NEWER
    opts.added_later[1] = 1;
    CHECK_ERR(kvmprep_convert(vm, &range, KVMPREP_SHARED, &opts, &s->err), s->err, E2BIG,
              KVMPREP_REASON_STRUCT_SIZE);
    CHECK_EQ(*(unsigned char *)&result.value, UNTOUCHED);
    opts.added_later[1] = 0;
#endif
    CHECK_OK(kvmprep_convert(vm, &range, KVMPREP_SHARED, &opts, &s->err), s->err);
    CHECK_UNTOUCHED_BEHIND(result);
    CHECK_EQ(result.value.converted, SIZE);
#ifdef CALLER_IS_NEWER
    CHECK_EQ(result.value.added_later[0] | result.value.added_later[1], 0);
#endif
}
#endif

void CALLER(void);
void CALLER(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_vm *vm = handle_of(&s);
    CHECK(kvmprep_version() >= KVMPREP_VERSION);
    populate(&s, vm);
    run_job(&s, vm);
    ask(&s, vm);
#if KVMPREP_VERSION >= 0x0400
    convert(&s, vm);
#endif
    CHECK_EQ(kvmprep_vm_free(vm), 0);
    setting_end(&s);
}

#else

/* Which callers there are: CALLER_CASE(name, function) for each. Written by `cargo xtask`. */
#define CALLER_CASE(name, function) void function(void);
#include "callers-list.h"
#undef CALLER_CASE

static const struct check_case cases[] = {
#define CALLER_CASE(name, function) {name, function},
#include "callers-list.h"
};

int main(int argc, char **argv) {
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}

#endif
