/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A guest of the type TDX or SNP, from its making to its end, on the software model: no machine that tests
 * run on has either. The VMM's side is that of a real one: KVM's commands, and the library for all that it is
 * for. The guest's side is steps (kvmprep-model.h).
 *
 * A failure ends the case (check.h), but for what is said to return one.
 */
#ifndef CONFIDENTIAL_H
#define CONFIDENTIAL_H

#include <kvmprep-model.h>
#include "guest.h"

enum confidential_type { SNP = 4, TDX = 5 }; /* KVM_X86_*_VM */
#define CONFIDENTIAL_VCPUS 2
#define DIGEST_SIZE 48

struct confidential {
    enum confidential_type type;
    struct vm vm;
    struct vcpu vcpus[CONFIDENTIAL_VCPUS];
    int sev;              /* /dev/sev, of SNP */
    struct memory memory; /* what shared accesses reach */
    int gmem;
    struct kvmprep_memslot slot; /* at MEMORY_GPA */
    struct kvmprep_vm *handle;
    unsigned char
        *source; /* what pages of the initial image are copied from: page for page as in the memory */
    struct kvmprep_error err;
    uint64_t memory_faults, hypercalls; /* exits that were answered */
    uint64_t answer;                    /* to the last hypercall */
};

/* Skipped without the model, or where it has no such type. All memory is private, and nothing of it in the
 * image.
 */
struct confidential confidential_make(enum confidential_type type, size_t size);
void confidential_end(struct confidential *c);

/* Has calls fail, as kvmprep_model_fail() takes them. */
void confidential_fail(const char *what);

/* Pages of its memory. */
struct kvmprep_range pages_of(uint64_t first, uint64_t n);

/* How pages go into the image. */
enum image { MEASURED, UNMEASURED };
/* Puts pages into the image, by the library; returns what that does. *rest (may be NULL): what is not in it.
 */
int confidential_add(struct confidential *c, struct kvmprep_range range, enum image how,
                     struct kvmprep_range *rest);
/* Closes the image and tells the handle; returns KVM's answer. */
int confidential_seal(struct confidential *c);
/* What was measured. */
void confidential_measure(const struct confidential *c, unsigned char digest[DIGEST_SIZE]);

/* The same without the library: one page, by KVM's command. */
int confidential_add_raw(struct confidential *c, uint64_t page);

/*
 * Has a vCPU's guest do these steps to their end, answering what it exits with by the library, with
 * pre-fault. Returns 0 or a negative errno: KVM_RUN's, or the library's.
 */
int confidential_run(struct confidential *c, int vcpu, const struct kvmprep_model_step *steps, size_t n);

/* Steps over pages of its memory. What is private is addressed so. */
struct kvmprep_model_step step_of(uint32_t kind, struct kvmprep_range range, uint32_t visibility);
/* Takes newly private pages as its own, by its platform's instruction. */
void guest_accepts(struct confidential *c, struct kvmprep_range range);
/* Writes the first 8 bytes of each page: word_of_page(tag). */
void guest_writes_words(struct confidential *c, struct kvmprep_range range, uint32_t visibility,
                        uint64_t tag);
/* Finds word_of_page(tag) there; with a tag of 0, zero. */
void check_guest_reads(struct confidential *c, struct kvmprep_range range, uint32_t visibility, uint64_t tag);
/* Asks by hypercall for pages to be of the other kind; returns the answer. */
uint64_t guest_asks_for(struct confidential *c, struct kvmprep_range range, uint32_t visibility);

/* What a page's first word is, for a tag other than 0: no two pages or tags share it. */
static inline uint64_t word_of_page(uint64_t gpa, uint64_t tag) {
    return tag << 48 | gpa;
}
/* Fills pages of the source so. */
void fill_source(struct confidential *c, struct kvmprep_range range, uint64_t tag);

/* Stage-2 faults that all vCPUs have taken. */
uint64_t faults_taken(const struct confidential *c);

#endif
