/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The main promise: after kvmprep_populate() a guest that writes every page of its memory takes no stage-2
 * fault beyond its own code page, whatever lies behind the memory. One case for each backing and intent.
 */
#include "support/check.h"
#include "support/guest.h"
#include <errno.h>

#define SIZE (16 * MIB)

struct setting {
    struct vm vm;
    struct vcpu vcpu;
    struct memory memory;
    struct kvmprep_vm *handle;
    struct kvmprep_error err;
};

static struct setting set_up(enum kind kind) {
    struct setting s = {.vm = vm_make_for(kind)};
    s.vcpu = vcpu_make(&s.vm, 0);
    s.memory = memory_make(&s.vm, kind, SIZE);
    struct kvmprep_memslot slot = slot_of(MEMORY_SLOT, MEMORY_GPA, &s.memory);
    CHECK_EQ(slot_set(&s.vm, &slot), 0);

    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    config.vm_fd = s.vm.fd;
    CHECK_OK(kvmprep_vm_new(&config, &s.handle, &s.err), s.err);
    CHECK_OK(kvmprep_memslot_note(s.handle, &slot, &s.err), s.err);
    return s;
}

static void tear_down(struct setting *s) {
    CHECK_EQ(kvmprep_vm_free(s->handle), 0);
    memory_end(&s->memory);
    vcpu_end(&s->vm, &s->vcpu);
    vm_end(&s->vm);
}

static void populate_and_write(enum kind kind) {
    struct setting s = set_up(kind);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    opts.vcpu_fd = s.vcpu.fd;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.bytes, SIZE);
    CHECK_EQ(result.host, SIZE);
    CHECK_EQ(result.first_writes, 0);
    uint64_t faults = faults_of_touch(&s.vcpu, TOUCH_WRITE, MEMORY_GPA, SIZE);
    if (has_pre_fault(&s.vm)) {
        CHECK_EQ(result.stage2_state, KVMPREP_STAGE2_DONE);
        CHECK_EQ(result.remaining, 0);
        CHECK_EQ(result.stage2, SIZE);
        CHECK_EQ(faults, 1); /* its code page */
    } else {
        CHECK_EQ(result.stage2_state, KVMPREP_STAGE2_UNAVAILABLE);
        CHECK_EQ(result.stage2, 0);
    }
    tear_down(&s);
}

#define CASE(name, kind)                                                                                     \
    static void name(void) {                                                                                 \
        populate_and_write(kind);                                                                            \
    }
CASE(write_anon_4k, ANON_4K)
CASE(write_anon_thp, ANON_THP)
CASE(write_memfd_private, MEMFD_PRIVATE)
CASE(write_file_private, FILE_PRIVATE)
CASE(write_hugetlb_private, HUGETLB_PRIVATE)
CASE(write_memfd_shared, MEMFD_SHARED)
CASE(write_hugetlb_shared, HUGETLB_SHARED)
CASE(write_gmem_shared, GMEM_SHARED)
CASE(write_gmem_private, GMEM_PRIVATE)

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"write_anon_4k", write_anon_4k},
        {"write_anon_thp", write_anon_thp},
        {"write_memfd_private", write_memfd_private},
        {"write_file_private", write_file_private},
        {"write_hugetlb_private", write_hugetlb_private},
        {"write_memfd_shared", write_memfd_shared},
        {"write_hugetlb_shared", write_hugetlb_shared},
        {"write_gmem_shared", write_gmem_shared},
        {"write_gmem_private", write_gmem_private},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
