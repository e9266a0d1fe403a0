/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See converting.h. */
#define _GNU_SOURCE
#include "converting.h"
#include "check.h"
#include "routines.h"
#include <errno.h>
#include <linux/kvm_para.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Times that one guest may be put back into its routine: else something else is wrong. */
#define MOST_LOST 20

static void come_out(int signal) {
    (void)signal;
}

void converting_begin(const struct vm *vm) {
    struct kvm_enable_cap cap = {.cap = KVM_CAP_EXIT_HYPERCALL, .args = {1 << KVM_HC_MAP_GPA_RANGE}};
    CHECK_EQ(ioctl(vm->fd, KVM_ENABLE_CAP, &cap), 0);
    struct sigaction action = {.sa_handler = come_out};
    CHECK_EQ(sigaction(SIGUSR1, &action, NULL), 0);
}

struct converter converter_make(const struct vm *vm, unsigned id, struct kvmprep_vm *handle) {
    struct converter c = {.vcpu = vcpu_make(vm, id), .handle = handle, .opts = KVMPREP_CONVERT_OPTS_INIT};
    c.opts.vcpu_fd = c.vcpu.fd;
    CHECK_EQ(ioctl(c.vcpu.fd, KVM_GET_SREGS, &c.sregs), 0);
    return c;
}

void converter_end(const struct vm *vm, struct converter *converter) {
    vcpu_end(vm, &converter->vcpu);
}

void converter_kick(pthread_t thread) {
    pthread_kill(thread, SIGUSR1);
}

struct convertible convertible_make(const struct vm *vm, uint32_t slot, uint64_t gpa, enum kind kind,
                                    size_t size) {
    struct convertible made = {.memory = memory_make(vm, kind, size)};
    made.slot = slot_of(slot, gpa, &made.memory);
    made.slot.flags |= KVM_MEM_GUEST_MEMFD;
    made.slot.guest_memfd = guest_memfd(vm, 0, size);
    CHECK_EQ(slot_set(vm, &made.slot), 0);
    return made;
}

void convertible_tell(struct kvmprep_vm *handle, const struct convertible *convertible) {
    const struct kvmprep_memslot *slot = &convertible->slot;
    struct kvmprep_range range = {.gpa = slot->gpa, .size = slot->size};
    struct kvmprep_error err;
    CHECK_OK(kvmprep_memslot_note(handle, slot, &err), err);
    CHECK_OK(kvmprep_visibility_note(handle, &range, KVMPREP_PRIVATE, &err), err);
}

void convertible_end(struct convertible *convertible) {
    close(convertible->slot.guest_memfd);
    memory_end(&convertible->memory);
}

struct private_guest private_guest_make(enum kind kind, unsigned n_slots, uint64_t slot_size) {
    struct private_guest s = {.vm = vm_make_private(), .n_slots = n_slots};
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    config.vm_fd = s.vm.fd;
    CHECK_OK(kvmprep_vm_new(&config, &s.handle, &s.err), s.err);
    converting_begin(&s.vm);
    for (unsigned i = 0; i < 2; i++)
        s.vcpus[i] = vcpu_make(&s.vm, i);
    for (unsigned i = 0; i < n_slots; i++) {
        s.slots[i] = convertible_make(&s.vm, MEMORY_SLOT + i, MEMORY_GPA + i * slot_size, kind, slot_size);
        convertible_tell(s.handle, &s.slots[i]);
    }
    s.all = (struct kvmprep_range){.gpa = MEMORY_GPA, .size = n_slots * slot_size};
    return s;
}

void private_guest_end(struct private_guest *s) {
    CHECK_EQ(kvmprep_vm_free(s->handle), 0);
    for (unsigned i = 0; i < s->n_slots; i++)
        convertible_end(&s->slots[i]);
    for (unsigned i = 0; i < 2; i++)
        vcpu_end(&s->vm, &s->vcpus[i]);
    vm_end(&s->vm);
}

/* The word that the guest has put out. */
static uint32_t word_out(const struct kvm_run *run) {
    uint32_t word;
    memcpy(&word, (const char *)run + run->io.data_offset, sizeof(word));
    return word;
}

static void answer_hypercall(struct converter *c) {
    uint64_t args[3], answer;
    memcpy(args, c->vcpu.run->hypercall.args, sizeof(args));
    c->result = kvmprep_handle_map_gpa_range(c->handle, args, &c->opts, &answer, &c->err);
    c->vcpu.run->hypercall.ret = answer;
    c->hypercalls++;
    c->again += answer == EAGAIN;
}

/* Returns whether the guest can go on: it has what it wants, or will come again. */
static bool answer_fault(struct converter *c, uint64_t gpa, uint64_t size, uint64_t flags) {
    c->result = kvmprep_handle_memory_fault(c->handle, gpa, size, flags, &c->opts, &c->err);
    return c->result == 0 || c->result == -EBUSY || c->result == -EAGAIN || c->result == -EINTR;
}

/* The same for a page that the guest waits for: it is not let on before it has it. */
static bool answer_touch(struct converter *c, uint32_t word) {
    c->touches++;
    do
        if (!answer_fault(c, word & ~(uint32_t)(PAGE - 1), PAGE, word & (PAGE - 1)))
            return false;
    while (c->result != 0);
    return true;
}

/*
 * Whether the guest's registers are not its own: all its code is in one page, and no routine uses the stack.
 * See converter_kick().
 */
static bool is_lost(const struct converter *c) {
    struct kvm_regs regs;
    if (kvm_is_modelled()) /* they have none */
        return false;
    return ioctl(c->vcpu.fd, KVM_GET_REGS, &regs) == 0 && (regs.rip >= PAGE || regs.rsp != 0);
}

static int put_back(struct converter *c, const struct kvm_regs *regs) {
    c->lost++;
    bool is_back =
        ioctl(c->vcpu.fd, KVM_SET_SREGS, &c->sregs) == 0 && ioctl(c->vcpu.fd, KVM_SET_REGS, regs) == 0;
    return is_back ? 0 : -errno;
}

/* An exit that no routine of the guest has. */
static int odd_exit(struct converter *c) {
    const struct kvm_run *run = c->vcpu.run;
    struct kvm_regs regs = {0};
    ioctl(c->vcpu.fd, KVM_GET_REGS, &regs);
    snprintf(c->odd, sizeof(c->odd), "exit %u (%#llx), rip %#llx, rsp %#llx, rbx %#llx", run->exit_reason,
             run->exit_reason == KVM_EXIT_MMIO ? run->mmio.phys_addr : run->hw.hardware_exit_reason, regs.rip,
             regs.rsp, regs.rbx);
    return -EPROTO;
}

/* Whether it came out with a word on a port that its routines have. */
static bool puts_out(const struct kvm_run *run) {
    return run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT &&
           (run->io.port == ANNOUNCE_PORT || run->io.port == DONE_PORT);
}

/* Goes into the guest until it comes out with something to be answered; other than that, a negative errno. */
static int enter(struct converter *c, const struct kvm_regs *regs) {
    const struct kvm_run *run = c->vcpu.run;
    for (;;) {
        int result = ioctl(c->vcpu.fd, KVM_RUN, 0) < 0 ? -errno : 0;
        if (result == -EFAULT && run->exit_reason == KVM_EXIT_MEMORY_FAULT)
            return 0;
        if (result == 0 && (run->exit_reason == KVM_EXIT_HYPERCALL || puts_out(run)))
            return 0;
        if (is_lost(c) && c->lost < MOST_LOST)
            result = put_back(c, regs);
        else if (result == 0)
            result = odd_exit(c);
        if (result != 0 && result != -EINTR)
            return result;
    }
}

/* Runs the guest from `regs` on until it is done; *word is what it put out at last. */
static int run(struct converter *c, const struct kvm_regs *regs, uint64_t *word) {
    struct kvm_run *run = c->vcpu.run;
    int result = routine_begin(&c->vcpu, regs);
    if (result != 0)
        return result;
    for (;;) {
        result = enter(c, regs);
        if (result != 0)
            return result;
        if (run->exit_reason == KVM_EXIT_MEMORY_FAULT) {
            struct memory_fault_exit fault = memory_fault_of(run);
            c->memory_faults++;
            if (!answer_fault(c, fault.gpa, fault.size, fault.flags))
                return c->result;
        } else if (run->exit_reason == KVM_EXIT_HYPERCALL) {
            answer_hypercall(c);
        } else if (run->io.port == ANNOUNCE_PORT) {
            if (!answer_touch(c, word_out(run)))
                return c->result;
        } else {
            *word = word_out(run);
            return 0;
        }
    }
}

static int run_over(struct converter *c, uint64_t rip, uint64_t gpa, uint64_t size, uint64_t esi,
                    uint64_t edx) {
    uint64_t word;
    struct kvm_regs regs = {.rip = rip, .rdi = gpa, .rcx = size / PAGE, .rsi = esi, .rdx = edx, .rflags = 2};
    return run(c, &regs, &word);
}

int guest_convert(struct converter *c, uint64_t gpa, uint64_t size, uint64_t attributes, uint64_t *answer) {
    struct kvm_regs regs = {
        .rip = ROUTINE_CONVERT, .rbx = gpa, .rcx = size / PAGE, .rdx = attributes, .rflags = 2};
    return run(c, &regs, answer);
}

int guest_touch_as(struct converter *c, uint64_t gpa, uint64_t size, uint32_t visibility, uint32_t tag) {
    uint64_t flags = visibility == KVMPREP_PRIVATE ? KVM_MEMORY_EXIT_FLAG_PRIVATE : 0;
    return run_over(c, ROUTINE_TOUCH, gpa, size, tag, flags);
}

int guest_fill(struct converter *c, uint64_t gpa, uint64_t size, uint32_t tag) {
    return run_over(c, ROUTINE_FILL, gpa, size, tag, 0);
}

int guest_gather(struct converter *c, uint64_t gpa, uint64_t size) {
    return run_over(c, ROUTINE_GATHER, gpa, size, c->report, 0);
}
