/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What a VMM that is built with a sanitizer does: two vCPUs' threads pre-fault and discard memory at the same
 * time, and then a child is forked. Ends with 0 if all of it works; what the sanitizer finds is the model's.
 */

#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define SIZE ((size_t)1 << 20)
#define ROUNDS 50

/* KVM_PRE_FAULT_MEMORY, which is younger than some headers. */
#define PRE_FAULT 0xc040aed5ul
struct pre_fault {
    uint64_t gpa, size, flags, padding[5];
};

struct vcpu {
    int fd;
    uint64_t gpa;
    char *memory;
};

static void check(int is_right) {
    if (!is_right)
        _exit(1);
}

static void *use(void *argument) {
    const struct vcpu *vcpu = argument;
    for (int round = 0; round < ROUNDS; round++) {
        struct pre_fault range = {.gpa = vcpu->gpa, .size = SIZE};
        check(ioctl(vcpu->fd, PRE_FAULT, &range) == 0);
        check(madvise(vcpu->memory, SIZE, MADV_DONTNEED) == 0);
    }
    return NULL;
}

int main(void) {
    char *memory = mmap(NULL, 2 * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region slot = {.memory_size = 2 * SIZE, .userspace_addr = (uintptr_t)memory};
    struct vcpu vcpus[2];
    pthread_t threads[2];
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);

    check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) == 0);
    for (int i = 0; i < 2; i++) {
        vcpus[i] =
            (struct vcpu){ioctl(vm, KVM_CREATE_VCPU, (long)i), (uint64_t)i * SIZE, memory + (size_t)i * SIZE};
        check(pthread_create(&threads[i], NULL, use, &vcpus[i]) == 0);
    }
    for (int i = 0; i < 2; i++)
        check(pthread_join(threads[i], NULL) == 0);

    int status;
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    check(waitpid(child, &status, 0) == child && status == 0);
    return 0;
}
