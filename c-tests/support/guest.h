/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The smallest guest that can show a stage-2 fault: a VM, vCPUs in flat 32-bit mode without paging, a page of
 * code at gpa 0, and memory of every backing that the library knows.
 *
 * Everything here goes straight to KVM; the library under test is not used, so that it cannot flatter itself.
 * A failure ends the case (check.h), so call these on the main thread.
 */
#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <kvmprep.h>
#include "uapi.h"

#define PAGE 4096ull
#define MIB (1ull << 20)
#define MEMORY_GPA (1ull << 30) /* where tests put the guest's memory */
#define CODE_SLOT 0
#define MEMORY_SLOT 1

struct vm {
    int kvm;
    int fd;
    size_t run_size;
    bool is_private; /* of a type that has private memory */
    void *code;
};

struct vcpu {
    int fd;
    struct kvm_run *run;
};

/* The backings of the project's findings, in their order. */
enum kind {
    ANON_4K,
    ANON_THP,
    MEMFD_PRIVATE,
    FILE_PRIVATE,
    HUGETLB_PRIVATE,
    MEMFD_SHARED,
    HUGETLB_SHARED,
    GMEM_SHARED,
    GMEM_PRIVATE,
    KINDS,
};

struct memory {
    enum kind kind;
    void *hva; /* also for GMEM_PRIVATE, where it is what shared accesses would reach */
    size_t size;
    int fd;   /* the mapped file, or -1 */
    int gmem; /* the guest_memfd, or -1 */
};

const char *kind_name(enum kind kind);

/* A VM with its code page; ends the case as skipped where /dev/kvm cannot be had. */
struct vm vm_make(void);
/* The same of a type (KVM_X86_*); skipped where the kernel has none. */
struct vm vm_make_of_type(unsigned long type);
/* The same of the type SW_PROTECTED. */
struct vm vm_make_private(void);
/* The VM that `kind` needs. */
struct vm vm_make_for(enum kind kind);
void vm_end(struct vm *vm);

/* A vCPU that is ready to run guest_touch(). */
struct vcpu vcpu_make(const struct vm *vm, unsigned id);
void vcpu_end(const struct vm *vm, struct vcpu *vcpu);
/* Has it enter system management mode, or leave it; skipped where KVM has none. */
void vcpu_set_smm(const struct vm *vm, const struct vcpu *vcpu, bool is_in_smm);

/* Whether this kernel can make such memory; says why not in *why. */
bool kind_is_had(const struct vm *vm, enum kind kind, const char **why);
/* Memory of that kind, 2 MiB aligned, untouched; skipped where it cannot be had. */
struct memory memory_make(const struct vm *vm, enum kind kind, size_t size);
void memory_end(struct memory *memory);

/* A guest_memfd alone; the caller has asked whether this VM has such. */
int guest_memfd(const struct vm *vm, uint64_t flags, size_t size);

/* What the library is told of memory at a gpa. */
struct kvmprep_memslot slot_of(uint32_t slot, uint64_t gpa, const struct memory *memory);
/* Sets a slot by KVM's own ioctl; returns 0 or a negative errno. Private memory becomes private. */
int slot_set(const struct vm *vm, const struct kvmprep_memslot *slot);
int slot_delete(const struct vm *vm, uint32_t slot);

enum touch { TOUCH_READ, TOUCH_WRITE };
/*
 * Runs the guest until it has touched one word in each 4 KiB page of [gpa, gpa + size), below 4 GiB. Returns
 * 0, or a negative errno of KVM_RUN. May be called on any thread.
 */
int guest_touch(struct vcpu *vcpu, enum touch touch, uint64_t gpa, uint64_t size);
/* Starts the same without waiting for its end: sets the registers only. */
int guest_prepare_touch(struct vcpu *vcpu, enum touch touch, uint64_t gpa, uint64_t size);
/* Makes the guest write 1 to the word at `gpa`, by which one sees that it is inside, and loop when it is next
 * run. */
int guest_prepare_loop(struct vcpu *vcpu, uint64_t gpa);

/* Counters of one vCPU or VM, by KVM's own names (pf_taken, pages_4k, ...), straight from its statistics. */
uint64_t stat_of(int fd, const char *name);
/* Stage-2 faults that guest_touch() takes. */
uint64_t faults_of_touch(struct vcpu *vcpu, enum touch touch, uint64_t gpa, uint64_t size);

/* The plain ioctl; a negative errno on failure. */
int raw_pre_fault(int vcpu, uint64_t *gpa, uint64_t *size);
bool has_pre_fault(const struct vm *vm);
/* Whether this KVM is the software model (kvmprep-model.h), which was preloaded. */
bool kvm_is_modelled(void);
/* The kernel whose KVM this is: major * 1000 + minor. */
int kernel_release(void);
/* The kernel whose memory management this is: another only where KVM is the software model. */
int host_release(void);
uint64_t now_ns(void);

#endif
