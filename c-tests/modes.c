/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * vCPUs that are in a mode in which they use other page tables than at most times: system management mode, or
 * with a nested guest running. What is pre-faulted on such a vCPU is of no use once it is out of the mode,
 * and KVM does not always refuse. The library does, and leaves the work to others.
 */
#include "support/check.h"
#include "support/guest.h"
#include "support/setting.h"
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>

#define SIZE (16 * MIB)
#define PAGES (SIZE / PAGE)
/* The same number in the address space of system management mode. */
#define SMM_SLOT (1u << 16 | MEMORY_SLOT)

static const struct kvmprep_range all = {.gpa = MEMORY_GPA, .size = SIZE};

enum mode {
    SMM,
    NESTED,               /* a nested guest on page tables that the guest's hypervisor made for it */
    NESTED_ON_OUR_TABLES, /* one whose hypervisor does without nested paging */
};

/* ---- Into a mode and out of it ---- */

/* AMD's control block of a guest, as far as it is needed here (AMD64 manual, volume 2, appendix B). */
struct vmcb {
    __u8 cr_and_exceptions[0x10];
    __u32 instructions; /* that are intercepted */
    __u8 more_intercepts[0x44];
    __u32 asid;
    __u8 interrupts[0x34];
    __u64 paging;
    __u8 events[0x18];
    __u64 nested_cr3;
    __u8 more_control[0x348];
    __u8 segments[0xd0];
    __u64 efer;
    __u8 more_state[0x70];
    __u64 cr4, cr3, cr0, dr7, dr6, rflags;
    __u8 rest[PAGE - 0x578];
};
_Static_assert(offsetof(struct vmcb, asid) == 0x58, "as the processor has it");
_Static_assert(offsetof(struct vmcb, nested_cr3) == 0xb0, "as the processor has it");
_Static_assert(offsetof(struct vmcb, efer) == 0x4d0, "as the processor has it");
_Static_assert(offsetof(struct vmcb, rflags) == 0x570, "as the processor has it");

#define INTERCEPT_VMRUN 1u
#define NESTED_PAGING 1u
#define EFER_SVME (1u << 12)
#define CR0_PE_PG (1u << 31 | 1)

static void allow_nested_guests(const struct setting *s, int vcpu) {
    struct {
        struct kvm_cpuid2 header;
        struct kvm_cpuid_entry2 entries[256];
    } cpuid = {.header = {.nent = 256}};
    /* The software model has them on any processor. */
    bool has_svm = kvm_is_modelled();
    if (ioctl(s->vm.fd, KVM_CHECK_EXTENSION, KVM_CAP_NESTED_STATE) <= 0)
        check_skipped("this KVM has no nested guests");
    CHECK_EQ(ioctl(s->vm.kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), 0);
    for (__u32 i = 0; i < cpuid.header.nent; i++)
        has_svm |= cpuid.entries[i].function == 0x80000001 && cpuid.entries[i].ecx & 1u << 2;
    if (!has_svm)
        check_skipped("no nested guests of AMD's kind here");
    CHECK_EQ(ioctl(s->vcpus[vcpu].fd, KVM_SET_CPUID2, &cpuid), 0);
}

/* As a VMM does on the destination of a migration, where the source's nested guest was running. */
static void set_nested(const struct setting *s, int vcpu, enum mode mode) {
    struct {
        struct kvm_nested_state header;
        struct vmcb vmcb;
    } state = {.header = {.flags = KVM_STATE_NESTED_GUEST_MODE | KVM_STATE_NESTED_GIF_SET,
                          .format = KVM_STATE_NESTED_FORMAT_SVM,
                          .size = sizeof(state)}};
    struct kvm_sregs sregs;
    allow_nested_guests(s, vcpu);
    CHECK_EQ(ioctl(s->vcpus[vcpu].fd, KVM_GET_SREGS, &sregs), 0);
    sregs.efer |= EFER_SVME;
    CHECK_EQ(ioctl(s->vcpus[vcpu].fd, KVM_SET_SREGS, &sregs), 0);
    state.vmcb.instructions = INTERCEPT_VMRUN;
    state.vmcb.asid = 1;
    state.vmcb.paging = mode == NESTED ? NESTED_PAGING : 0;
    state.vmcb.nested_cr3 = 0; /* what it is shadowed from stays write-protected */
    state.vmcb.efer = EFER_SVME;
    state.vmcb.cr0 = CR0_PE_PG;
    CHECK_EQ(ioctl(s->vcpus[vcpu].fd, KVM_SET_NESTED_STATE, &state), 0);
}

static void end_nested(const struct setting *s, int vcpu) {
    struct kvm_nested_state none = {
        .flags = KVM_STATE_NESTED_GIF_SET, .format = KVM_STATE_NESTED_FORMAT_SVM, .size = sizeof(none)};
    struct kvm_sregs sregs;
    CHECK_EQ(ioctl(s->vcpus[vcpu].fd, KVM_GET_SREGS, &sregs), 0);
    CHECK_EQ(ioctl(s->vcpus[vcpu].fd, KVM_SET_NESTED_STATE, &none), 0);
    sregs.efer &= ~(__u64)EFER_SVME;
    CHECK_EQ(ioctl(s->vcpus[vcpu].fd, KVM_SET_SREGS, &sregs), 0);
}

static void enter(const struct setting *s, int vcpu, enum mode mode) {
    if (mode == SMM)
        vcpu_set_smm(&s->vm, &s->vcpus[vcpu], true);
    else
        set_nested(s, vcpu, mode);
}

static void leave(const struct setting *s, int vcpu, enum mode mode) {
    if (mode == SMM)
        vcpu_set_smm(&s->vm, &s->vcpus[vcpu], false);
    else
        end_nested(s, vcpu);
}

/* The first vCPU is in this mode. The memory has slots in both address spaces, as QEMU makes them. */
static struct setting setting_in(enum mode mode) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct kvmprep_memslot slot = s.slot;
    enter(&s, 0, mode);
    slot.slot = SMM_SLOT;
    if (mode == SMM)
        CHECK_OK(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err);
    return s;
}

/* ---- What the kernel does ---- */

/* It fills the page tables of that mode, says that all is well, and the guest still faults. */
static void kernel_fills_other_tables(enum mode mode) {
    struct setting s = setting_in(mode);
    uint64_t gpa = MEMORY_GPA, size = SIZE;
    memset(s.memory.hva, 1, SIZE);
    while (size > 0)
        CHECK_EQ(raw_pre_fault(s.vcpus[0].fd, &gpa, &size), 0);
    leave(&s, 0, mode);
    CHECK_EQ(faults_beyond_code(&s), PAGES);
    setting_end(&s);
}

static void the_kernel_fills_the_tables_of_smm(void) {
    kernel_fills_other_tables(SMM);
}

static void the_kernel_fills_other_tables_with_a_nested_guest(void) {
    kernel_fills_other_tables(NESTED_ON_OUR_TABLES);
}

/* Only there does it refuse. */
static void the_kernel_refuses_with_a_nested_guest_that_has_tables_of_its_own(void) {
    struct setting s = setting_in(NESTED);
    uint64_t gpa = MEMORY_GPA, size = SIZE;
    CHECK_EQ(raw_pre_fault(s.vcpus[0].fd, &gpa, &size), -EOPNOTSUPP);
    CHECK_EQ(size, SIZE);
    leave(&s, 0, NESTED);
    CHECK_EQ(raw_pre_fault(s.vcpus[0].fd, &gpa, &size), 0);
    setting_end(&s);
}

/* ---- What the library does ---- */

/* It does not use such a vCPU, and does not say that stage 2 is done. */
static void is_refused(enum mode mode) {
    struct setting s = setting_in(mode);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    opts.vcpu_fd = s.vcpus[0].fd;
    CHECK_OK(kvmprep_populate(s.handle, &all, 1, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.host, SIZE);
    CHECK_EQ(result.stage2, 0);
    CHECK_EQ(result.remaining, SIZE);
    CHECK_EQ(result.stage2_state, KVMPREP_STAGE2_VCPUS_REFUSED);

    opts.flags = KVMPREP_POPULATE_REQUIRE_STAGE2;
    CHECK_ERR(kvmprep_populate(s.handle, &all, 1, &opts, &result, sizeof(result), &s.err), s.err, EOPNOTSUPP,
              KVMPREP_REASON_VCPU_REFUSED);
    setting_end(&s);
}

static void a_vcpu_in_smm_is_refused(void) {
    is_refused(SMM);
}

static void a_vcpu_with_a_nested_guest_is_refused(void) {
    is_refused(NESTED);
}

static void a_vcpu_with_a_nested_guest_on_our_tables_is_refused(void) {
    is_refused(NESTED_ON_OUR_TABLES);
}

/* Another vCPU takes its work; or itself, when it is out of the mode. */
static void others_do_its_work(enum mode mode) {
    struct setting s = setting_in(mode);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_job *job;
    CHECK_OK(kvmprep_job_new(s.handle, &all, 1, NULL, &job, &s.err), s.err);
    CHECK_ERR(kvmprep_job_run(job, s.vcpus[0].fd, &s.err), s.err, EOPNOTSUPP, KVMPREP_REASON_VCPU_REFUSED);
    CHECK_OK(kvmprep_job_run(job, s.vcpus[1].fd, &s.err), s.err);
    CHECK_OK(kvmprep_job_wait(job, 0, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.stage2, SIZE);
    CHECK_EQ(result.stage2_state, KVMPREP_STAGE2_DONE);
    CHECK_EQ(kvmprep_job_free(job), 0);

    leave(&s, 0, mode);
    opts.vcpu_fd = s.vcpus[0].fd;
    CHECK_OK(kvmprep_populate(s.handle, &all, 1, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.stage2, SIZE);
    CHECK_EQ(result.remaining, 0);
    CHECK_EQ(faults_beyond_code(&s), 0);
    setting_end(&s);
}

static void others_do_the_work_of_a_vcpu_in_smm(void) {
    others_do_its_work(SMM);
}

static void others_do_the_work_of_a_vcpu_with_a_nested_guest(void) {
    others_do_its_work(NESTED);
}

static void others_do_the_work_of_a_vcpu_with_a_nested_guest_on_our_tables(void) {
    others_do_its_work(NESTED_ON_OUR_TABLES);
}

int main(int argc, char **argv) {
#define CASE(name) {#name, name}
    static const struct check_case cases[] = {
        CASE(the_kernel_fills_the_tables_of_smm),
        CASE(the_kernel_fills_other_tables_with_a_nested_guest),
        CASE(the_kernel_refuses_with_a_nested_guest_that_has_tables_of_its_own),
        CASE(a_vcpu_in_smm_is_refused),
        CASE(a_vcpu_with_a_nested_guest_is_refused),
        CASE(a_vcpu_with_a_nested_guest_on_our_tables_is_refused),
        CASE(others_do_the_work_of_a_vcpu_in_smm),
        CASE(others_do_the_work_of_a_vcpu_with_a_nested_guest),
        CASE(others_do_the_work_of_a_vcpu_with_a_nested_guest_on_our_tables),
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
