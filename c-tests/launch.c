/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The experimental launches on machines that have neither TDX nor SNP, which is every machine that tests run
 * on: the arguments, and that a VM which is neither is told so and keeps nothing claimed.
 *
 * What the calls make of each answer of a kernel that has them is in tests/launch.rs.
 */
#define _GNU_SOURCE
#define KVMPREP_EXPERIMENTAL
#include "support/check.h"
#include "support/guest.h"
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (16 * PAGE)
#define SNP 4
#define TDX 5

#ifdef KVM_SEV_SNP_PAGE_TYPE_NORMAL
_Static_assert(KVMPREP_SNP_PAGE_NORMAL == KVM_SEV_SNP_PAGE_TYPE_NORMAL, "the kernel's number");
_Static_assert(KVMPREP_SNP_PAGE_ZERO == KVM_SEV_SNP_PAGE_TYPE_ZERO, "the kernel's number");
_Static_assert(KVMPREP_SNP_PAGE_UNMEASURED == KVM_SEV_SNP_PAGE_TYPE_UNMEASURED, "the kernel's number");
_Static_assert(KVMPREP_SNP_PAGE_SECRETS == KVM_SEV_SNP_PAGE_TYPE_SECRETS, "the kernel's number");
_Static_assert(KVMPREP_SNP_PAGE_CPUID == KVM_SEV_SNP_PAGE_TYPE_CPUID, "the kernel's number");
#endif
#ifdef KVM_TDX_MEASURE_MEMORY_REGION
_Static_assert(KVMPREP_TDX_MEASURE == KVM_TDX_MEASURE_MEMORY_REGION, "the kernel's number");
#endif

/* A handle that takes part of its memory for private. Only the record says so: launches need no more to
 * begin. */
struct launcher {
    struct vm vm;
    struct vcpu vcpu;
    struct kvmprep_vm *handle;
    unsigned char *source;
    int file; /* for what must be a descriptor and is not looked into */
};

static struct kvmprep_range pages(uint64_t first, uint64_t n) {
    struct kvmprep_range range = {MEMORY_GPA + first * PAGE, n * PAGE, {0, 0}};
    return range;
}

static struct launcher launcher_make(struct vm vm, uint32_t vm_type) {
    struct launcher s = {.vm = vm, .vcpu = vcpu_make(&vm, 0)};
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    struct kvmprep_range private = pages(0, 12);
    struct kvmprep_error err;
    config.vm_fd = vm.fd;
    config.vm_type = vm_type;
    CHECK_OK(kvmprep_vm_new(&config, &s.handle, &err), err);
    s.file = memfd_create("launch", 0);
    s.source = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(s.file >= 0 && s.source != MAP_FAILED);
    slot.slot = MEMORY_SLOT;
    slot.flags = KVM_MEM_GUEST_MEMFD;
    slot.gpa = MEMORY_GPA;
    slot.size = SIZE;
    slot.hva = (uintptr_t)s.source;
    slot.guest_memfd = s.file;
    CHECK_OK(kvmprep_memslot_note(s.handle, &slot, &err), err);
    CHECK_OK(kvmprep_visibility_note(s.handle, &private, KVMPREP_PRIVATE, &err), err);
    return s;
}

static void launcher_end(struct launcher *s) {
    CHECK_EQ(kvmprep_vm_free(s->handle), 0);
    vcpu_end(&s->vm, &s->vcpu);
    munmap(s->source, SIZE);
    close(s->file);
    vm_end(&s->vm);
}

enum launch { BY_TDX, BY_SNP };

static int launch(struct launcher *s, enum launch by, struct kvmprep_range range, struct kvmprep_range *rest,
                  struct kvmprep_error *err) {
    if (by == BY_TDX)
        return kvmprep_tdx_init_mem_region(s->handle, s->vcpu.fd, &range, s->source, KVMPREP_TDX_MEASURE,
                                           rest, err);
    return kvmprep_snp_launch_update(s->handle, s->file, &range, s->source, KVMPREP_SNP_PAGE_NORMAL, rest,
                                     err);
}

/* The kernel refuses, whichever it is, and the claim is given back. */
static void check_given_back(struct launcher *s, enum launch by) {
    struct kvmprep_error err;
    struct kvmprep_range asked = pages(2, 6), rest;
    memset(&rest, 0xff, sizeof(rest));
    int answer = launch(s, by, asked, &rest, &err);
    printf("  %s on a %s VM: %d, %s\n", by == BY_TDX ? "TDX" : "SNP",
           s->vm.is_private ? "private" : "default", answer, err.message);
    CHECK(answer == -ENOTTY || answer == -EINVAL);
    CHECK_EQ(err.reason, KVMPREP_REASON_KERNEL_REFUSED);
    CHECK_EQ(err.stage, KVMPREP_STAGE_LAUNCH);
    CHECK_EQ(err.firmware_error, 0);
    CHECK(err.hint[0] != 0);
    CHECK(memcmp(&rest, &asked, sizeof(rest)) == 0);
    CHECK(err.gpa == asked.gpa && err.size == asked.size);
    CHECK_ERR(kvmprep_private_unclaim(s->handle, &asked, &err), err, ENOENT, KVMPREP_REASON_NOT_CLAIMED);
    CHECK_OK(kvmprep_private_check_claims(s->handle, &asked, 1, &err), err);
}

static void neither(struct vm vm) {
    struct launcher s = launcher_make(vm, 0);
    check_given_back(&s, BY_TDX);
    check_given_back(&s, BY_SNP);
    launcher_end(&s);
}

static void a_default_vm_is_neither(void) {
    neither(vm_make());
}

static void a_vm_with_private_memory_is_neither(void) {
    neither(vm_make_private());
}

static void a_handle_that_was_told_another_type_asks_nobody(void) {
    struct launcher s = launcher_make(vm_make_private(), KVM_X86_SW_PROTECTED_VM);
    struct kvmprep_error err;
    struct kvmprep_range rest;
    for (int by = BY_TDX; by <= BY_SNP; by++) {
        CHECK_ERR(launch(&s, by, pages(0, 4), &rest, &err), err, EINVAL, KVMPREP_REASON_BAD_VALUE);
        CHECK_EQ(rest.size, 4 * PAGE);
    }
    launcher_end(&s);
}

/* The ledger stands before the kernel: what it refuses, nobody is asked for. */
static void the_ledger_stands_before_the_kernel(void) {
    struct launcher s = launcher_make(vm_make(), 0);
    struct kvmprep_error err;
    struct kvmprep_range claim = pages(3, 2), rest;
    CHECK_OK(kvmprep_private_claim(s.handle, &claim, &err), err);
    for (int by = BY_TDX; by <= BY_SNP; by++) {
        CHECK_ERR(launch(&s, by, pages(0, 4), &rest, &err), err, EEXIST, KVMPREP_REASON_CLAIMED);
        CHECK(err.gpa == claim.gpa && err.size == claim.size);
        CHECK(rest.gpa == MEMORY_GPA && rest.size == 4 * PAGE);
        CHECK_ERR(launch(&s, by, pages(10, 4), &rest, &err), err, EINVAL, KVMPREP_REASON_NOT_PRIVATE);
        CHECK(err.gpa == pages(12, 2).gpa && err.size == 2 * PAGE && err.slot == MEMORY_SLOT);
        CHECK_ERR(launch(&s, by, pages(14, 4), NULL, &err), err, EINVAL, KVMPREP_REASON_NOT_PRIVATE);
        CHECK_ERR(launch(&s, by, pages(16, 4), NULL, &err), err, EINVAL, KVMPREP_REASON_NO_MEMSLOT);
    }
    CHECK_OK(kvmprep_private_note_sealed(s.handle, &err), err);
    for (int by = BY_TDX; by <= BY_SNP; by++)
        CHECK_ERR(launch(&s, by, pages(6, 1), &rest, &err), err, EPERM, KVMPREP_REASON_SEALED);
    launcher_end(&s);
}

static void arguments_are_refused(void) {
    struct launcher s = launcher_make(vm_make(), 0);
    struct kvmprep_error err;
    struct kvmprep_range good = pages(0, 2), rest;
    struct kvmprep_range reserved = {MEMORY_GPA, PAGE, {0, 1}}, odd = {MEMORY_GPA + 1, PAGE, {0, 0}};
    struct kvmprep_range wrapping = {-PAGE, 2 * PAGE, {0, 0}}, empty = {MEMORY_GPA, 0, {0, 0}};
    const struct {
        struct kvmprep_vm *vm;
        const struct kvmprep_range *range;
        void *source;
        struct kvmprep_range *rest;
        uint32_t reason;
    } tries[] = {
        {NULL, &good, s.source, &rest, KVMPREP_REASON_NULL_POINTER},
        {s.handle, NULL, s.source, &rest, KVMPREP_REASON_NULL_POINTER},
        {s.handle, &good, NULL, &rest, KVMPREP_REASON_NULL_POINTER},
        {s.handle, &good, s.source + 1, &rest, KVMPREP_REASON_RANGE_UNALIGNED},
        {s.handle, &good, (void *)-PAGE, &rest, KVMPREP_REASON_RANGE_OVERFLOW},
        {s.handle, &good, s.source, (void *)((char *)&rest + 1), KVMPREP_REASON_MISALIGNED_POINTER},
        {s.handle, &reserved, s.source, &rest, KVMPREP_REASON_RESERVED_NOT_ZERO},
        {s.handle, &odd, s.source, &rest, KVMPREP_REASON_RANGE_UNALIGNED},
        {s.handle, &wrapping, s.source, &rest, KVMPREP_REASON_RANGE_OVERFLOW},
        {s.handle, &empty, s.source, &rest, KVMPREP_REASON_RANGE_EMPTY},
    };
    for (size_t i = 0; i < sizeof(tries) / sizeof(tries[0]); i++) {
        CHECK_ERR(kvmprep_tdx_init_mem_region(tries[i].vm, s.vcpu.fd, tries[i].range, tries[i].source, 0,
                                              tries[i].rest, &err),
                  err, EINVAL, tries[i].reason);
        CHECK_ERR(kvmprep_snp_launch_update(tries[i].vm, s.file, tries[i].range, tries[i].source,
                                            KVMPREP_SNP_PAGE_NORMAL, tries[i].rest, &err),
                  err, EINVAL, tries[i].reason);
    }
    CHECK_ERR(kvmprep_tdx_init_mem_region(s.handle, s.vcpu.fd, &good, s.source, 2, &rest, &err), err, EINVAL,
              KVMPREP_REASON_UNKNOWN_FLAGS);
    const uint32_t unknown[] = {0, 2, 7, 0x101, UINT32_MAX};
    for (size_t i = 0; i < sizeof(unknown) / sizeof(unknown[0]); i++)
        CHECK_ERR(kvmprep_snp_launch_update(s.handle, s.file, &good, s.source, unknown[i], &rest, &err), err,
                  EINVAL, KVMPREP_REASON_BAD_VALUE);
    /* Descriptors: none, another kind, closed. */
    CHECK_ERR(kvmprep_tdx_init_mem_region(s.handle, -1, &good, s.source, 0, &rest, &err), err, EBADF,
              KVMPREP_REASON_BAD_FD);
    CHECK_ERR(kvmprep_tdx_init_mem_region(s.handle, s.vm.fd, &good, s.source, 0, &rest, &err), err, EBADF,
              KVMPREP_REASON_BAD_FD);
    CHECK_ERR(kvmprep_snp_launch_update(s.handle, -1, &good, s.source, KVMPREP_SNP_PAGE_NORMAL, &rest, &err),
              err, EBADF, KVMPREP_REASON_BAD_FD);
    CHECK_ERR(
        kvmprep_snp_launch_update(s.handle, 1000, &good, s.source, KVMPREP_SNP_PAGE_NORMAL, &rest, &err), err,
        EBADF, KVMPREP_REASON_BAD_FD);
    /* Zeroes have no source. */
    CHECK(kvmprep_snp_launch_update(s.handle, s.file, &good, NULL, KVMPREP_SNP_PAGE_ZERO, &rest, &err) < 0);
    CHECK_EQ(err.reason, KVMPREP_REASON_KERNEL_REFUSED);
    CHECK_OK(kvmprep_private_check_claims(s.handle, &good, 1, &err), err);
    launcher_end(&s);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"a default VM is neither TDX nor SNP", a_default_vm_is_neither},
        {"a VM with private memory is neither TDX nor SNP", a_vm_with_private_memory_is_neither},
        {"a handle that was told another type asks nobody", a_handle_that_was_told_another_type_asks_nobody},
        {"the ledger stands before the kernel", the_ledger_stands_before_the_kernel},
        {"arguments are refused", arguments_are_refused},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
