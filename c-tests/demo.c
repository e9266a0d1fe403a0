/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The demonstration: a real guest writes every page of its memory, once for each backing and each way of
 * getting the memory ready, and the stage-2 faults it takes are counted. `cargo xtask demo` runs it and makes
 * the table; the lines it prints are for that command.
 *
 * usage: demo probe | demo MEBIBYTES
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/guest.h"
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

enum way { NOTHING, IOCTL_ONLY, PREALLOC_ONLY, KVMPREP, WAYS };

static const char *const way_names[WAYS] = {"nothing", "ioctl", "prealloc", "kvmprep"};

/* KVM_PRE_FAULT_MEMORY on all of it, as a VMM would without this library. */
static void ioctl_only(const struct vcpu *vcpu, uint64_t gpa, uint64_t size) {
    while (size > 0)
        CHECK_EQ(raw_pre_fault(vcpu->fd, &gpa, &size), 0);
}

/* What VMMs call prealloc. A guest_memfd that is not mapped has no such thing. */
static void prealloc_only(const struct memory *memory) {
    if (memory->kind != GMEM_PRIVATE)
        CHECK_EQ(madvise(memory->hva, memory->size, MADV_POPULATE_WRITE), 0);
}

static void with_kvmprep(const struct vm *vm, const struct vcpu *vcpu, const struct kvmprep_memslot *slot) {
    struct kvmprep_error err;
    struct kvmprep_vm *handle;
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;

    config.vm_fd = vm->fd;
    CHECK_OK(kvmprep_vm_new(&config, &handle, &err), err);
    CHECK_OK(kvmprep_memslot_note(handle, slot, &err), err);
    opts.vcpu_fd = vcpu->fd;
    CHECK_OK(kvmprep_populate(handle, NULL, 0, &opts, NULL, 0, &err), err);
    CHECK_EQ(kvmprep_vm_free(handle), 0);
}

static void run_row(enum kind kind, enum way way, size_t size) {
    struct vm vm = vm_make_for(kind);
    struct vcpu vcpu = vcpu_make(&vm, 0);
    struct memory memory = memory_make(&vm, kind, size);
    struct kvmprep_memslot slot = slot_of(MEMORY_SLOT, MEMORY_GPA, &memory);
    CHECK_EQ(slot_set(&vm, &slot), 0);
    /* The guest's own code page is no part of the count. */
    CHECK_EQ(guest_touch(&vcpu, TOUCH_READ, 0, PAGE), 0);

    uint64_t start = now_ns();
    if (way == IOCTL_ONLY)
        ioctl_only(&vcpu, slot.gpa, slot.size);
    else if (way == PREALLOC_ONLY)
        prealloc_only(&memory);
    else if (way == KVMPREP)
        with_kvmprep(&vm, &vcpu, &slot);
    uint64_t populated = now_ns();
    uint64_t faults = faults_of_touch(&vcpu, TOUCH_WRITE, slot.gpa, slot.size);
    uint64_t end = now_ns();

    printf("row|%s|%s|%llu|%.3f|%.3f\n", kind_name(kind), way_names[way], (unsigned long long)faults,
           (double)(end - populated) / 1e6, (double)(populated - start) / 1e6);
    memory_end(&memory);
    vcpu_end(&vm, &vcpu);
    vm_end(&vm);
}

static size_t mebibytes;

static void all_rows(void) {
    struct vm vm = vm_make();
    const char *why;
    for (enum kind kind = 0; kind < KINDS; kind++) {
        if (!kind_is_had(&vm, kind, &why)) {
            printf("without|%s|%s\n", kind_name(kind), why);
            continue;
        }
        for (enum way way = 0; way < WAYS; way++) {
            printf("next|%s|%s\n", kind_name(kind), way_names[way]);
            run_row(kind, way, mebibytes * MIB);
        }
    }
    vm_end(&vm);
}

static void probe(void) {
    struct vm vm = vm_make();
    printf("pre_fault|%d\n", has_pre_fault(&vm));
    vm_end(&vm);
}

int main(int argc, char **argv) {
    const struct check_case case_probe = {"probe", probe}, case_rows = {"rows", all_rows};
    if (argc != 2)
        return 2;
    mebibytes = strtoull(argv[1], NULL, 10);
    return check_main(1, argv, mebibytes == 0 ? &case_probe : &case_rows, 1);
}
