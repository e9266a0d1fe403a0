/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What KVM does that nobody would expect of it, and that docs/kernel-behaviour.md is about. Each case does
 * the least that shows it, without the library, and says of every kernel which way it goes: a kernel that was
 * mended is noticed too.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/guest.h"
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/time.h>

#define SMM (1u << 16) /* as a slot's number has its address space */

enum found { MEMORY, A_DEVICE, A_FAULT };

/* What a read of a page comes to. */
static enum found guest_reads(struct vcpu *vcpu, uint64_t gpa) {
    struct kvm_run *run = vcpu->run;
    CHECK_EQ(guest_prepare_touch(vcpu, TOUCH_READ, gpa, PAGE), 0);
    if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
        CHECK_EQ(errno, EFAULT);
        CHECK_EQ(run->exit_reason, KVM_EXIT_MEMORY_FAULT);
        return A_FAULT;
    }
    bool is_device = run->exit_reason == KVM_EXIT_MMIO;
    if (is_device) {
        CHECK_EQ(run->mmio.phys_addr, gpa);
        CHECK_EQ(ioctl(vcpu->fd, KVM_RUN, 0), 0);
    }
    CHECK_EQ(run->exit_reason, KVM_EXIT_IO);
    return is_device ? A_DEVICE : MEMORY;
}

/* Whether the last fault was told as one of a private access. (Older headers have no name for it.) */
static bool is_told_as_private(const struct vcpu *vcpu) {
    uint64_t flags;
    memcpy(&flags, &vcpu->run->mmio, sizeof(flags));
    return flags & KVM_MEMORY_ATTRIBUTE_PRIVATE;
}

static void on_alarm(int number) {
    (void)number;
}

/* KVM_PRE_FAULT_MEMORY, until a signal comes after this time; `size` is what is left then. */
static int pre_fault_for(struct timeval time, struct vcpu *vcpu, uint64_t gpa, uint64_t *size) {
    struct itimerval some_time = {.it_value = time}, none = {0};
    setitimer(ITIMER_REAL, &some_time, NULL);
    int result = raw_pre_fault(vcpu->fd, &gpa, size);
    setitimer(ITIMER_REAL, &none, NULL);
    return result;
}

/*
 * The same of one page; what spins does so each time. What does not is done at once, but on a busy machine
 * the signal may come before it has begun.
 */
static int pre_fault_for_some_time(struct vcpu *vcpu, uint64_t gpa) {
    int result = -EINTR;
    for (int i = 0; i < 10 && result == -EINTR; i++) {
        uint64_t size = PAGE;
        result = pre_fault_for((struct timeval){.tv_usec = 100000}, vcpu, gpa, &size);
    }
    return result;
}

/* A guest that is pre-faulted in one slot while another goes; the alarm has a handler. */
struct scene {
    struct vm vm;
    struct vcpu vcpu;
    struct memory memory;
    struct kvmprep_memslot slot, other; /* the first is set */
};

static struct scene scene_make(void) {
    struct sigaction action = {.sa_handler = on_alarm};
    struct scene s = {.vm = vm_make()};
    if (!has_pre_fault(&s.vm))
        check_skipped("KVM has no KVM_PRE_FAULT_MEMORY");
    s.vcpu = vcpu_make(&s.vm, 0);
    s.memory = memory_make(&s.vm, MEMFD_SHARED, 2 * MIB);
    s.slot = slot_of(MEMORY_SLOT, MEMORY_GPA, &s.memory);
    s.other = slot_of(MEMORY_SLOT + 1, MEMORY_GPA + 4 * MIB, &s.memory);
    CHECK_EQ(sigaction(SIGALRM, &action, NULL), 0);
    CHECK_EQ(slot_set(&s.vm, &s.slot), 0);
    return s;
}

static void scene_end(struct scene *s) {
    memory_end(&s->memory);
    vcpu_end(&s->vm, &s->vcpu);
    vm_end(&s->vm);
}

/* A slot goes, and with it all mappings. Before 6.17 a pre-fault spins until the vCPU has run again. */
static void pre_fault_on_an_obsolete_root(void) {
    struct scene s = scene_make();
    bool spins = kernel_release() < 6017;

    CHECK_EQ(slot_set(&s.vm, &s.other), 0);
    CHECK_EQ(guest_touch(&s.vcpu, TOUCH_READ, MEMORY_GPA, PAGE), 0);
    CHECK_EQ(slot_delete(&s.vm, s.other.slot), 0);
    CHECK_EQ(pre_fault_for_some_time(&s.vcpu, MEMORY_GPA), spins ? -EINTR : 0);
    CHECK_EQ(pre_fault_for_some_time(&s.vcpu, MEMORY_GPA), spins ? -EINTR : 0);
    CHECK_EQ(guest_touch(&s.vcpu, TOUCH_READ, 0, PAGE), 0);
    CHECK_EQ(pre_fault_for_some_time(&s.vcpu, MEMORY_GPA), 0);
    scene_end(&s);
}

/* A slot that comes and goes beside others. */
struct passing {
    const struct scene *scene;
    atomic_bool is_over;
    int result;
};

static void *come_and_go(void *argument) {
    struct passing *passing = argument;
    while (!passing->is_over && passing->result == 0) {
        passing->result = slot_set(&passing->scene->vm, &passing->scene->other);
        if (passing->result == 0)
            passing->result = slot_delete(&passing->scene->vm, passing->scene->other.slot);
    }
    return NULL;
}

/*
 * A slot goes while memory of another is being pre-faulted. The root that goes with all mappings may be the
 * one that the pre-fault has already taken, which then never ends, and neither does the deletion.
 */
static void pre_fault_beside_a_deletion(void) {
    if (kvm_is_modelled())
        check_skipped("on the model the two need not ever meet");
    struct scene s = scene_make();
    struct passing passing = {.scene = &s};
    bool is_stuck = false;
    sigset_t alarm;
    pthread_t thread;

    /* The signal is for this thread. */
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    CHECK_EQ(pthread_sigmask(SIG_BLOCK, &alarm, NULL), 0);
    CHECK_EQ(pthread_create(&thread, NULL, come_and_go, &passing), 0);
    CHECK_EQ(pthread_sigmask(SIG_UNBLOCK, &alarm, NULL), 0);
    for (int i = 0; i < 1000 && !is_stuck; i++) {
        uint64_t size = 64 * PAGE;
        (void)pre_fault_for((struct timeval){.tv_sec = 1}, &s.vcpu, MEMORY_GPA, &size);
        is_stuck = size > 0;
    }
    passing.is_over = true;
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_EQ(passing.result, 0);
    CHECK(is_stuck);
    scene_end(&s);
}

/*
 * A vCPU remembers where it last found no memory, until slots change. Before 7.0 only those of the first
 * address space count, although in SMM it uses the second: memory that comes there is not found.
 */
static void memory_that_comes_in_smm(void) {
    struct vm vm = vm_make();
    if (ioctl(vm.fd, KVM_CHECK_EXTENSION, KVM_CAP_MULTI_ADDRESS_SPACE) < 2)
        check_skipped("KVM has no SMM");
    struct vcpu vcpu = vcpu_make(&vm, 0);
    struct memory memory = memory_make(&vm, MEMFD_SHARED, 2 * MIB);
    struct kvmprep_memslot slot = slot_of(SMM | MEMORY_SLOT, MEMORY_GPA, &memory);
    struct kvmprep_memslot code = {
        .slot = SMM | CODE_SLOT, .size = PAGE, .hva = (uintptr_t)vm.code, .guest_memfd = -1};
    struct kvmprep_memslot unrelated = slot_of(MEMORY_SLOT, MEMORY_GPA + 4 * MIB, &memory);
    bool is_mended = kernel_release() >= 7000;

    CHECK_EQ(slot_set(&vm, &code), 0);
    vcpu_set_smm(&vm, &vcpu, true);
    CHECK_EQ(guest_reads(&vcpu, MEMORY_GPA), A_DEVICE);
    CHECK_EQ(slot_set(&vm, &slot), 0);
    CHECK_EQ(guest_reads(&vcpu, MEMORY_GPA), is_mended ? MEMORY : A_DEVICE);
    CHECK_EQ(guest_reads(&vcpu, MEMORY_GPA), is_mended ? MEMORY : A_DEVICE);
    CHECK_EQ(slot_set(&vm, &unrelated), 0); /* in the first address space */
    CHECK_EQ(guest_reads(&vcpu, MEMORY_GPA), MEMORY);
    memory_end(&memory);
    vcpu_end(&vm, &vcpu);
    vm_end(&vm);
}

static void convert(const struct vm *vm, uint64_t gpa, uint64_t size, uint64_t to) {
    struct kvm_memory_attributes attributes = {.address = gpa, .size = size, .attributes = to};
    CHECK_EQ(ioctl(vm->fd, KVM_SET_MEMORY_ATTRIBUTES, &attributes), 0);
}

/*
 * Where there is no memory KVM keeps an entry that says so. It stays when the page becomes private: the
 * guest's next access goes to a device, and once there is private memory the VMM is told of a shared access
 * to it, again and again.
 */
static void no_memory_that_became_private(void) {
    struct vm vm = vm_make_private();
    struct vcpu vcpu = vcpu_make(&vm, 0);
    struct memory memory = memory_make(&vm, GMEM_PRIVATE, 2 * MIB);
    struct kvmprep_memslot slot = slot_of(MEMORY_SLOT, MEMORY_GPA, &memory);
    uint64_t touched = MEMORY_GPA, untouched = MEMORY_GPA + PAGE;

    CHECK_EQ(guest_reads(&vcpu, touched), A_DEVICE);
    convert(&vm, MEMORY_GPA, 2 * MIB, KVM_MEMORY_ATTRIBUTE_PRIVATE);
    CHECK_EQ(guest_reads(&vcpu, untouched), A_FAULT);
    CHECK(is_told_as_private(&vcpu));
    CHECK_EQ(guest_reads(&vcpu, touched), A_DEVICE);

    CHECK_EQ(slot_set(&vm, &slot), 0);
    CHECK_EQ(guest_reads(&vcpu, untouched), MEMORY);
    for (int time = 0; time < 3; time++) {
        CHECK_EQ(guest_reads(&vcpu, touched), A_FAULT);
        CHECK(!is_told_as_private(&vcpu));
    }
    convert(&vm, touched, PAGE, 0);
    CHECK_EQ(guest_reads(&vcpu, touched), MEMORY);
    memory_end(&memory);
    vcpu_end(&vm, &vcpu);
    vm_end(&vm);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"pre_fault_on_an_obsolete_root", pre_fault_on_an_obsolete_root},
        {"pre_fault_beside_a_deletion", pre_fault_beside_a_deletion},
        {"memory_that_comes_in_smm", memory_that_comes_in_smm},
        {"no_memory_that_became_private", no_memory_that_became_private},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
