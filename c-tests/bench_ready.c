/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The whole job, on a real KVM: how long until a guest's memory is ready, and how many stage-2 faults are
 * left, for every backing, with the library and with what people do without it. `cargo xtask bench` runs it
 * in the bed and judges.
 *
 * Every measurement has a VM and memory of its own. Faults are counted over less memory than is timed: they
 * are exact whatever the size, and a guest that takes them all is slow.
 *
 * usage: bench_ready ROUNDS MEBIBYTES [CASE...]
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/guest.h"
#include "support/sample.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>

#define FAULTS_SIZE (16 * MIB)

static unsigned rounds;
static size_t size;

struct setting {
    struct vm vm;
    struct vcpu vcpus[2];
    struct memory memory;
    struct kvmprep_memslot slot;
    struct kvmprep_vm *handle;
};

static struct setting set_up(enum kind kind, size_t bytes) {
    struct setting s = {.vm = vm_make_for(kind)};
    struct kvmprep_error err;
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;

    for (unsigned i = 0; i < 2; i++)
        s.vcpus[i] = vcpu_make(&s.vm, i);
    s.memory = memory_make(&s.vm, kind, bytes);
    s.slot = slot_of(MEMORY_SLOT, MEMORY_GPA, &s.memory);
    CHECK_EQ(slot_set(&s.vm, &s.slot), 0);
    if (!has_pre_fault(&s.vm))
        check_skipped("this kernel has no KVM_PRE_FAULT_MEMORY");
    config.vm_fd = s.vm.fd;
    CHECK_OK(kvmprep_vm_new(&config, &s.handle, &err), err);
    CHECK_OK(kvmprep_memslot_note(s.handle, &s.slot, &err), err);
    return s;
}

static void tear_down(struct setting *s) {
    CHECK_EQ(kvmprep_vm_free(s->handle), 0);
    memory_end(&s->memory);
    for (unsigned i = 0; i < 2; i++)
        vcpu_end(&s->vm, &s->vcpus[i]);
    vm_end(&s->vm);
}

/* ---- the ways ---- */

/* The host has no mapping of private memory that could be populated. */
static bool can_prealloc(enum kind kind) {
    return kind != GMEM_PRIVATE;
}

static void prealloc(struct setting *s) {
    if (can_prealloc(s->memory.kind))
        CHECK_EQ(madvise(s->memory.hva, s->memory.size, MADV_POPULATE_WRITE), 0);
}

static void ioctl_whole(struct setting *s) {
    uint64_t gpa = s->slot.gpa, left = s->slot.size;
    while (left > 0) {
        int result = raw_pre_fault(s->vcpus[0].fd, &gpa, &left);
        if (result != -EAGAIN && result != -EINTR)
            CHECK_EQ(result, 0);
    }
}

/* Both stages in the order that leaves no fault: the best that is written by hand, on one thread. */
static void by_hand(struct setting *s) {
    prealloc(s);
    ioctl_whole(s);
}

/* The calling thread with the first vCPU; with two, a thread of the library's has the second. */
static void kvmprep(struct setting *s, unsigned vcpus) {
    struct kvmprep_error err;
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;

    opts.flags = KVMPREP_POPULATE_REQUIRE_STAGE2;
    opts.vcpu_fd = s->vcpus[0].fd;
    opts.vcpu_fds = &s->vcpus[1].fd;
    opts.n_vcpu_fds = vcpus - 1;
    CHECK_OK(kvmprep_populate(s->handle, NULL, 0, &opts, NULL, 0, &err), err);
}

enum way { NOTHING, IOCTL_ONLY, PREALLOC_ONLY, BY_HAND, ONE_VCPU, TWO_VCPUS, WAYS };

static const char *const way_names[WAYS] = {
    "nothing", "ioctl only", "prealloc only", "by hand", "kvmprep, 1 vCPU", "kvmprep, 2 vCPUs",
};

static void prepare(struct setting *s, enum way way) {
    switch (way) {
    case IOCTL_ONLY:
        ioctl_whole(s);
        break;
    case PREALLOC_ONLY:
        prealloc(s);
        break;
    case BY_HAND:
        by_hand(s);
        break;
    case ONE_VCPU:
    case TWO_VCPUS:
        kvmprep(s, way == ONE_VCPU ? 1 : 2);
        break;
    default:
        break;
    }
}

/* ---- what is measured ---- */

static void sample_faults(enum kind kind, enum way way) {
    struct setting s = set_up(kind, FAULTS_SIZE);
    char what[64];
    prepare(&s, way);
    /* The guest's own code page is no part of the count. */
    CHECK_EQ(guest_touch(&s.vcpus[0], TOUCH_READ, 0, PAGE), 0);
    snprintf(what, sizeof(what), "%s, faults left", kind_name(kind));
    sample(what, way_names[way], faults_of_touch(&s.vcpus[0], TOUCH_WRITE, s.slot.gpa, s.slot.size));
    tear_down(&s);
}

static void sample_time(enum kind kind, enum way way, bool is_warm_up) {
    struct setting s = set_up(kind, size);
    char what[64];
    uint64_t start = now_ns();
    prepare(&s, way);
    uint64_t taken = now_ns() - start;
    snprintf(what, sizeof(what), "%s, time to ready", kind_name(kind));
    if (!is_warm_up)
        sample(what, way_names[way], taken);
    tear_down(&s);
}

static void compare(enum kind kind) {
    for (enum way way = 0; way < WAYS; way++)
        if (way != PREALLOC_ONLY || can_prealloc(kind))
            sample_faults(kind, way);
    sample_time(kind, TWO_VCPUS, true);
    for (unsigned round = 0; round < rounds; round++) {
        for (unsigned i = 0; i < WAYS - 1; i++) {
            enum way way = IOCTL_ONLY + in_turn(round, i, WAYS - 1);
            if (way != PREALLOC_ONLY || can_prealloc(kind))
                sample_time(kind, way, false);
        }
    }
}

/* ---- guest_memfd: does it pay to allocate before stage 2 is filled? ---- */

static void compare_gmem_methods(enum kind kind) {
    static const char *const names[] = {"stage 2 alone", "allocate, then stage 2", "populate, then stage 2"};
    unsigned methods = kind == GMEM_PRIVATE ? 2 : 3;
    char what[64];

    snprintf(what, sizeof(what), "%s, methods", kind_name(kind));
    for (unsigned round = 0; round < rounds; round++) {
        for (unsigned i = 0; i < methods; i++) {
            unsigned method = in_turn(round, i, methods);
            struct setting s = set_up(kind, size);
            uint64_t start = now_ns();
            if (method == 1)
                CHECK_EQ(fallocate(s.memory.gmem, FALLOC_FL_KEEP_SIZE, 0, (off_t)size), 0);
            if (method == 2)
                prealloc(&s);
            ioctl_whole(&s);
            sample(what, names[method], now_ns() - start);
            tear_down(&s);
        }
    }
}

#define CASE(name, measure, kind)                                                                            \
    static void name(void) {                                                                                 \
        measure(kind);                                                                                       \
    }
CASE(ready_anon_4k, compare, ANON_4K)
CASE(ready_anon_thp, compare, ANON_THP)
CASE(ready_memfd_private, compare, MEMFD_PRIVATE)
CASE(ready_file_private, compare, FILE_PRIVATE)
CASE(ready_hugetlb_private, compare, HUGETLB_PRIVATE)
CASE(ready_memfd_shared, compare, MEMFD_SHARED)
CASE(ready_hugetlb_shared, compare, HUGETLB_SHARED)
CASE(ready_gmem_shared, compare, GMEM_SHARED)
CASE(ready_gmem_private, compare, GMEM_PRIVATE)
CASE(methods_gmem_shared, compare_gmem_methods, GMEM_SHARED)
CASE(methods_gmem_private, compare_gmem_methods, GMEM_PRIVATE)

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"ready_anon_4k", ready_anon_4k},
        {"ready_anon_thp", ready_anon_thp},
        {"ready_memfd_private", ready_memfd_private},
        {"ready_file_private", ready_file_private},
        {"ready_hugetlb_private", ready_hugetlb_private},
        {"ready_memfd_shared", ready_memfd_shared},
        {"ready_hugetlb_shared", ready_hugetlb_shared},
        {"ready_gmem_shared", ready_gmem_shared},
        {"ready_gmem_private", ready_gmem_private},
        {"methods_gmem_shared", methods_gmem_shared},
        {"methods_gmem_private", methods_gmem_private},
    };
    if (argc < 3)
        return 2;
    rounds = (unsigned)atoi(argv[1]);
    size = (size_t)atoll(argv[2]) * MIB;
    return check_main(argc - 2, argv + 2, cases, sizeof(cases) / sizeof(cases[0]));
}
