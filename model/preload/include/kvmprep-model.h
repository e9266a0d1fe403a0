/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * libkvmprep-model.so, preloaded, answers a program's /dev/kvm out of a software model of KVM's memory side.
 * What a test may ask of the model beside KVM's own interface is here: what the guest does (no guest is ever
 * executed), which kernel is modelled, which calls fail, and what became of it all.
 *
 * Nothing is linked. The functions are weak: a program that was built with this header runs with and without
 * the model, and asks kvmprep_model_is_here() before it calls any of them.
 *
 * Each function returns 0 or more, or a negative errno, and leaves errno alone. A descriptor is one that the
 * program got from the model; of any other, the answer is -EBADF. All functions may be called from any
 * thread. What is wrong with a text is said on the standard error.
 *
 * The same by environment variables, without a change to the program:
 *   KVMPREP_MODEL_KERNEL    7.3 (if not set), 7.2, 6.18, 6.12 or 6.1
 *   KVMPREP_MODEL_VM_TYPES  of default, sw_protected, tdx and snp, separated by commas (if not set: all)
 *   KVMPREP_MODEL_FAIL      as kvmprep_model_fail() takes it
 *   KVMPREP_MODEL_VERBOSE   1: each ioctl on the standard error, with its answer
 * A value that is not understood ends the program at its start, with exit status 78 (EX_CONFIG); another
 * variable that begins so is said on the standard error, since it may be one of these that was mistyped.
 *
 * What the model sees is what a program calls of the C library. What makes system calls by itself goes past
 * it, to the machine's own KVM if there is one: a program that is linked statically, one written in Go,
 * syscall(2). stdio goes past it too, once a file is open: statistics that are read so are as they were when
 * they were opened. A forked child has no part in the model: what it inherited and the functions below answer
 * EIO, and opening /dev/kvm ENOSYS. A program that it executes has a model of its own. The descriptors are
 * those of regular files to fstat(2), where the kernel's are of a character device and of anonymous inodes.
 *
 * A program may be built with ThreadSanitizer or UndefinedBehaviorSanitizer. With gcc's AddressSanitizer it
 * takes ASAN_OPTIONS=verify_asan_link_order=0, since that wants to be the first library.
 */

#ifndef KVMPREP_MODEL_H
#define KVMPREP_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVMPREP_MODEL_WEAK __attribute__((weak))

/* What a step does (`kind`). */

/* Reads `count` words of `width` bytes, `stride` bytes apart, from `gpa` on. They go to `values`, if that is
 * not NULL. */
#define KVMPREP_MODEL_READ 1u
/* Writes such words: `value` first, `value_stride` more each further time. */
#define KVMPREP_MODEL_WRITE 2u
/* Executes from the page of each such address. */
#define KVMPREP_MODEL_FETCH 3u
/* Reads such words, and writes each elsewhere: to `to` first, `to_stride` bytes further each time. */
#define KVMPREP_MODEL_COPY 4u
/* Accepts the page of each such address, so that it can be used: TDG.MEM.PAGE.ACCEPT, PVALIDATE. */
#define KVMPREP_MODEL_ACCEPT 5u
/* Puts `value`, of `width` bytes (not 8), out on `port`: KVM_EXIT_IO. */
#define KVMPREP_MODEL_OUT 6u
/* Calls KVM: number `value`, with `args`. KVM_EXIT_HYPERCALL where the VMM has asked for that call. What it
 * was answered is what KVM_GET_REGS says is in rax. */
#define KVMPREP_MODEL_HYPERCALL 7u
/* Halts: KVM_EXIT_HLT. */
#define KVMPREP_MODEL_HALT 8u
/* Runs on until a signal ends KVM_RUN. (KVM looks at immediate_exit only as KVM_RUN begins.) */
#define KVMPREP_MODEL_LOOP 9u

/* How a step does it (`flags`). */

/* READ, WRITE, FETCH, COPY, ACCEPT: addressed as private memory (TDX: without the shared bit, SNP: with the C
 * bit). Of a VM of another type the memory is what KVM was told that it is, and this makes no difference. */
#define KVMPREP_MODEL_STEP_PRIVATE 1u
/* HYPERCALL: made again for as long as the answer is KVM_EAGAIN. */
#define KVMPREP_MODEL_STEP_AGAIN 2u
/* OUT: puts out what the last hypercall was answered, in place of `value`. */
#define KVMPREP_MODEL_STEP_ANSWER 4u

/*
 * A step of what a guest does. Fields that a kind has no use for are not looked at. Addresses are guest
 * physical ones, without a shared bit, and multiples of `width`.
 */
struct kvmprep_model_step {
    uint32_t kind;         /* KVMPREP_MODEL_READ and so on */
    uint32_t flags;        /* KVMPREP_MODEL_STEP_... */
    uint64_t gpa;          /* the first address, in bytes */
    uint64_t count;        /* how many accesses; 0 is 1 */
    uint64_t stride;       /* from each to the next, in bytes */
    uint32_t width;        /* of each word, in bytes: 1, 2, 4 or 8; 0 is 4 */
    uint32_t port;         /* OUT */
    uint64_t value;        /* WRITE, OUT, HYPERCALL */
    uint64_t value_stride; /* WRITE */
    uint64_t to;           /* COPY: the first address, in bytes */
    uint64_t to_stride;    /* COPY: in bytes */
    uint64_t args[4];      /* HYPERCALL: rbx, rcx, rdx, rsi */
    uint64_t *values;      /* READ: `count` words; must stay until the step is done. NULL: not kept */
};

#ifdef __cplusplus
#define KVMPREP_MODEL_STEP_INIT                                                                              \
    {                                                                                                        \
    }
#else
#define KVMPREP_MODEL_STEP_INIT {0}
#endif

/*
 * Has the guest of a vCPU do these `n` steps at the next KVM_RUN, and no longer what it had to do; they are
 * copied. An access that ends in KVM_EXIT_MEMORY_FAULT, or with an error, is made again at the next KVM_RUN;
 * one that ends in KVM_EXIT_MMIO is over, and so is what ends in any other exit. KVM_RUN with nothing to do
 * fails with ENOSYS and says so.
 *
 * Waits while the vCPU is in KVM_RUN. -EINVAL for a step that makes no sense (none is taken then), -EFAULT
 * for NULL with an `n` of more than 0.
 */
KVMPREP_MODEL_WEAK int kvmprep_model_set_steps(int vcpu_fd, const struct kvmprep_model_step *steps, size_t n);

/*
 * Models this kernel, or offers these types of virtual machines, in place of what the environment says, with
 * the names that the variables take. To be called before /dev/kvm is opened: -EBUSY afterwards, -EINVAL for a
 * name that is none.
 */
KVMPREP_MODEL_WEAK int kvmprep_model_set_kernel(const char *name);
KVMPREP_MODEL_WEAK int kvmprep_model_set_vm_types(const char *names);

/*
 * Has calls fail without being made: WHAT:NTH:HOW, several separated by commas, in addition to what was asked
 * for before. NTH is counted from now, the next call being 1, over all virtual machines; 3-5 is three calls.
 * NULL or "" takes back all that has not happened. -EINVAL for what is not understood (nothing is planned
 * then).
 *
 * WHAT of the TDX module: mng_create mng_init mng_key_freeid vp_create vp_init vp_enter mem_sept_add
 * mem_sept_remove mem_page_add mem_page_aug mem_page_remove mem_range_block mem_track mr_extend mr_finalize
 * phymem_page_reclaim phymem_page_wbinvd. HOW: busy epoch_busy operand_invalid page_metadata_incorrect
 * ept_walk_failed ept_entry_state_incorrect op_state_incorrect non_recoverable_td, or a status as 0x...
 * mng_key_freeid, mem_sept_remove and phymem_page_reclaim are called when a guest ends: no program is told
 * that they failed.
 *
 * WHAT of the SNP firmware: gctx_create launch_start activate launch_update launch_finish page_reclaim. HOW:
 * invalid_guest_state policy_failure inactive bad_measurement invalid_param invalid_page_state
 * invalid_page_owner, or a number as 0x... By itself the firmware refuses (invalid_param) a page of type
 * CPUID whose first 8 bytes have their highest bit set, and corrects it.
 *
 * A change of the table of frames (SNP) is rmpupdate, and can be refused: "rmpupdate:1:refused". An ioctl is
 * named as in "ioctl KVM_PRE_FAULT_MEMORY:2:EAGAIN", with an errno by its name or number.
 */
KVMPREP_MODEL_WEAK int kvmprep_model_fail(const char *what);

/*
 * Writes the measurement of a TDX guest (MRTD) or an SNP guest (launch digest) as it stands, 48 bytes, to
 * `digest`, and returns how many bytes these are. It is what real hardware would say of the same image, but
 * for SNP's vCPUs, whose pages count as zeroes. -ENODATA before the guest is begun, -ENOTTY for a VM of
 * another type, -E2BIG if there are less than 48 bytes of room.
 */
KVMPREP_MODEL_WEAK int kvmprep_model_measurement(int vm_fd, void *digest, size_t size);

/* Counts, in pages. May grow at its end. */
struct kvmprep_model_counts {
    uint64_t pages_4k; /* mapped for the guest, as KVM's own statistics say */
    uint64_t pages_2m;
    uint64_t pages_1g;
    uint64_t external_pages; /* of 4 KiB, in the external table of a TDX guest */
    uint64_t gmem_pages;     /* of 4 KiB, that the guest_memfds of the VM have */
};

/*
 * Writes no more than `counts_size` bytes, and zeroes for what it does not know.
 */
KVMPREP_MODEL_WEAK int kvmprep_model_get_counts(int vm_fd, struct kvmprep_model_counts *counts,
                                                size_t counts_size);

/*
 * Writes what a virtual machine is at this moment to `text` (slots, private memory, page tables with their
 * roots, the external table), line by line, for people: no more than `size` bytes with a zero at the end.
 * Returns how long the text is without the zero, so that it can be asked for with a `size` of 0 first.
 */
KVMPREP_MODEL_WEAK int kvmprep_model_dump(int vm_fd, char *text, size_t size);

/*
 * Looks whether all that must be true of a virtual machine is: 0, or -EIO with what is not in `why` (`size`
 * bytes, with a zero at the end). To be called while no other thread uses the virtual machine or changes its
 * memory.
 */
KVMPREP_MODEL_WEAK int kvmprep_model_check(int vm_fd, char *why, size_t size);

/* Whether the program runs with the model. */
static inline bool kvmprep_model_is_here(void) {
    return kvmprep_model_set_steps != NULL;
}

#ifdef __cplusplus
}
#endif

#endif
