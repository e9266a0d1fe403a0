/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The README's second example: the part of a vCPU's loop that makes memory private or shared. Compiled by
 * `cargo xtask test`, which also sees to it that the README shows what follows the last #include.
 */
#include "support/uapi.h"
#include <errno.h>
#include <kvmprep.h>
#include <linux/kvm_para.h>
#include <stdbool.h>

/*
 * After KVM_RUN, where that returned 0 or EFAULT, on the vCPU's thread. 0: run it again; -ENOSYS: it came out
 * for something else; any other: it cannot go on. `err` is not NULL here.
 */
int convert_for_guest(struct kvmprep_vm *vm, int vcpu_fd, struct kvm_run *run, struct kvmprep_error *err) {
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    opts.steps |= KVMPREP_CONVERT_PREFAULT;
    opts.vcpu_fd = vcpu_fd;
    if (run->exit_reason == KVM_EXIT_HYPERCALL && run->hypercall.nr == KVM_HC_MAP_GPA_RANGE) {
        /* Copied: the kernel's __u64 is another type than uint64_t. */
        const uint64_t args[3] = {run->hypercall.args[0], run->hypercall.args[1], run->hypercall.args[2]};
        uint64_t answer;
        kvmprep_handle_map_gpa_range(vm, args, &opts, &answer, err);
        run->hypercall.ret = answer; /* what the guest is told: done, impossible, or try again */
        return err->reason == KVMPREP_REASON_VM_DEAD ? err->code : 0;
    }
    if (run->exit_reason != KVM_EXIT_MEMORY_FAULT)
        return -ENOSYS;
    struct memory_fault_exit fault = memory_fault_of(run); /* run->memory_fault */
    int ret = kvmprep_handle_memory_fault(vm, fault.gpa, fault.size, fault.flags, &opts, err);
    if (ret == -EBUSY || ret == -EAGAIN || ret == -EINTR)
        return 0; /* the guest comes back, and it is tried again */
    bool is_converted = err->stage == KVMPREP_STAGE_DROP || err->stage == KVMPREP_STAGE_HOST ||
                        err->stage == KVMPREP_STAGE_STAGE2;
    return is_converted && err->reason != KVMPREP_REASON_VM_DEAD ? 0 : ret;
}
