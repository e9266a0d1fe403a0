/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The VMM's part in these programs: a VM with one vCPU and some untouched memory, straight from KVM.
 *
 * Where there is no KVM the program says so and ends as skipped: it must not look like a success.
 */
#ifndef GUEST_H
#define GUEST_H

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define SKIPPED 77
#define RAM_SIZE ((size_t)16 << 20)
#define PAGE_SIZE ((size_t)4096)

struct guest {
    int vm;
    int vcpu;
    void *ram;
};

/* Ends the program as failed unless `condition` holds. */
#define REQUIRE(condition)                                                                                   \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                          \
            exit(EXIT_FAILURE);                                                                              \
        }                                                                                                    \
    } while (0)

static inline struct guest guest_make(void) {
    struct guest guest;
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) {
        printf("skipped: /dev/kvm: %s\n", strerror(errno));
        exit(SKIPPED);
    }
    guest.vm = ioctl(kvm, KVM_CREATE_VM, 0);
    REQUIRE(guest.vm >= 0);
    guest.vcpu = ioctl(guest.vm, KVM_CREATE_VCPU, 0);
    REQUIRE(guest.vcpu >= 0);
    guest.ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(guest.ram != MAP_FAILED);
    return guest;
}

/* How much of the guest's memory is in memory, in bytes, as the kernel says. */
static inline size_t guest_resident(const struct guest *guest) {
    static unsigned char pages[RAM_SIZE / PAGE_SIZE];
    size_t resident = 0;
    REQUIRE(mincore(guest->ram, RAM_SIZE, pages) == 0);
    for (size_t i = 0; i < sizeof(pages); i++)
        resident += (pages[i] & 1) != 0 ? PAGE_SIZE : 0;
    return resident;
}

#endif
