/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * One step of a sequence: a memslot that is set, or something that happens to a guest_memfd.
 *
 * A step says everything by itself, descriptors by what they stand for, so that a sequence can be done again
 * in a new VM, with steps left out, and be printed as a program. It holds no number of a descriptor.
 */
#ifndef OPERATION_H
#define OPERATION_H

#include <stdbool.h>
#include <stdint.h>

/* What a step's descriptor is. */
enum file {
    FILE_SHORT, /* guest_memfds of the VM, of two lengths */
    FILE_LONG,
    FILE_MAPPABLE, /* the same with GUEST_MEMFD_FLAG_MMAP, where the kernel has it */
    OWN_FILES,
    FILE_OF_OTHER_VM = OWN_FILES, /* a guest_memfd, but another VM's */
    FILE_MEMFD,
    FILE_DEVICE,
    FILE_VM,
    FILE_NAMED, /* a guest_memfd that is not open: O_PATH */
    FILE_CLOSED,
    FILE_NEGATIVE,
    FILES,
};

enum deed {
    SET_SLOT,
    /* Closes both descriptors of an own file, which unbinds it everywhere, and makes a new file in its place.
     */
    RENEW_FILE,
    /* The same, and the new file gets the old one's numbers. */
    REUSE_NUMBERS,
    /* Closes one of the two, which unbinds nothing, and duplicates the other. */
    CLOSE_ONE,
};

struct operation {
    enum deed deed;
    enum file file;
    bool second_descriptor; /* of an own file: the duplicate */
    bool version2;          /* KVM_SET_USER_MEMORY_REGION2, which KVM_MEM_GUEST_MEMFD needs in any case */
    bool by_library;        /* what passes the check is set by kvmprep_memslot_set() */
    uint32_t slot;
    uint32_t flags;
    uint64_t gpa;
    uint64_t size;
    uint64_t hva;
    uint64_t offset;
};

/* Each starts with a new VM, so that what went before a mismatch is short. */
#define LONGEST_SEQUENCE 120

struct sequence {
    unsigned long vm_type;
    unsigned n;
    struct operation steps[LONGEST_SEQUENCE];
};

/* Bytes that a guest_memfd has. */
uint64_t length_of(enum file file);

#endif
