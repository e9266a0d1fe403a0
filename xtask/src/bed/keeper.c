/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Keeps two VMs of KVM's for as long as the bed's guest runs, so that no program's first VM is
 * KVM's first, nor its last one KVM's last.
 *
 * KVM rewrites instructions of the running kernel at such moments, in the scheduler among others,
 * and QEMU's emulation of several processors is not safe against that: it throws away what it has
 * translated of a page *before* it stores the new bytes, and a processor that translates in between
 * goes on with the old ones. Where these were the breakpoint that the kernel puts there meanwhile,
 * it dies of an int3 in finish_task_switch.
 *
 * It must never let go of a VM while the machine runs, and never run a vCPU. It says nothing if all
 * is well, and is a process of its own once it has returned.
 */
#define _DEFAULT_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int must(const char *what, int result) {
    if (result < 0)
        err(1, "%s", what);
    return result;
}

/* The switch of the scheduler's notifiers is on while there is a VM; KVM's own, while a vCPU has no APIC. */
static void keep_a_vcpu_without_apic(int kvm) {
    int vm = must("KVM_CREATE_VM", ioctl(kvm, KVM_CREATE_VM, 0));
    must("KVM_CREATE_VCPU", ioctl(vm, KVM_CREATE_VCPU, 0));
}

/* Two more of KVM's are on while an APIC is disabled, by its software, as it is at first, or altogether. */
static void keep_a_disabled_apic(int kvm) {
    int vm = must("KVM_CREATE_VM", ioctl(kvm, KVM_CREATE_VM, 0));
    must("KVM_CREATE_IRQCHIP", ioctl(vm, KVM_CREATE_IRQCHIP, 0));
    int vcpu = must("KVM_CREATE_VCPU", ioctl(vm, KVM_CREATE_VCPU, 0));
    struct kvm_sregs sregs;
    must("KVM_GET_SREGS", ioctl(vcpu, KVM_GET_SREGS, &sregs));
    sregs.apic_base = 0;
    must("KVM_SET_SREGS", ioctl(vcpu, KVM_SET_SREGS, &sregs));
}

int main(void) {
    int kvm = must("/dev/kvm", open("/dev/kvm", O_RDWR));
    keep_a_vcpu_without_apic(kvm);
    keep_a_disabled_apic(kvm);
    must("daemon", daemon(0, 0));
    for (;;)
        pause();
}
