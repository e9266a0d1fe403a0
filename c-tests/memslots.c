/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Which memslots KVM refuses, told before it does: each of its rules broken once, with the errno, the reason,
 * the numbers and the other slot that the library names; that nothing has changed by it; and the same slot
 * taken once the fault is mended.
 *
 * The rules are KVM's, so KVM is asked the same each time, by the plain ioctl, and must answer with the same
 * errno. Where a rule depends on a host or VM that is not at hand, what the library is told of it is changed
 * instead, and says so.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/setting.h"
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (4 * MIB)
#define GIB (1ull << 30)
#define NUMBER 5       /* of the slot that is checked */
#define OTHER_NUMBER 6 /* of one in its way */
#define FREE_NUMBER 7  /* of none */
#define FREE_GPA (2 * MEMORY_GPA)
#define TDX_VM 5 /* KVM_X86_TDX_VM */

/* A setting, all that there is in it told to the library, and a slot that could be added. */
struct place {
    struct setting s;
    struct kvmprep_caps caps;
    struct kvmprep_memslot known[3]; /* what KVM and the handle have */
    size_t n_known;
    struct kvmprep_memslot good;
    int gmem; /* twice the size of the slot, or -1 */
};

static struct place place_make(void) {
    struct place p = {.s = setting_make(ANON_4K, SIZE), .n_known = 2, .gmem = -1};
    CHECK_OK(kvmprep_probe(p.s.vm.kvm, p.s.vm.fd, &p.caps, sizeof(p.caps), &p.s.err), p.s.err);
    p.known[0] = p.s.slot;
    p.known[1] = p.good = (struct kvmprep_memslot)KVMPREP_MEMSLOT_INIT;
    p.known[1].slot = CODE_SLOT;
    p.known[1].size = PAGE;
    p.known[1].hva = (uintptr_t)p.s.vm.code;
    CHECK_OK(kvmprep_memslot_note(p.s.handle, &p.known[1], &p.s.err), p.s.err);
    p.good.slot = NUMBER;
    p.good.gpa = FREE_GPA;
    p.good.size = SIZE;
    p.good.hva = (uintptr_t)p.s.memory.hva;
    return p;
}

/* The same, the slot with a guest_memfd. */
static struct place place_make_with_gmem(void) {
    struct place p = place_make();
    if (!p.caps.guest_memfd)
        check_skipped("this kernel's default VMs have no guest_memfd");
    p.gmem = guest_memfd(&p.s.vm, 0, 2 * SIZE);
    p.good.flags = KVM_MEM_GUEST_MEMFD;
    p.good.guest_memfd = p.gmem;
    p.good.guest_memfd_offset = SIZE;
    return p;
}

static void place_end(struct place *p) {
    if (p->gmem >= 0)
        close(p->gmem);
    setting_end(&p->s);
}

/* Another slot, for KVM, the handle and the list. */
static void put_other(struct place *p, const struct kvmprep_memslot *other) {
    CHECK_OK(kvmprep_memslot_set(p->s.handle, other, &p->s.err), p->s.err);
    p->known[p->n_known++] = *other;
}

static int check_in_list(const struct place *p, const struct kvmprep_memslot *slot,
                         struct kvmprep_memslot_report *report, struct kvmprep_error *err) {
    return kvmprep_memslot_check(&p->caps, sizeof(p->caps), p->known, p->n_known, slot, KVMPREP_ALIGN_KERNEL,
                                 report, report == NULL ? 0 : sizeof(*report), err);
}

static int check_in_record(const struct place *p, const struct kvmprep_memslot *slot,
                           struct kvmprep_memslot_report *report, struct kvmprep_error *err) {
    return kvmprep_vm_check_memslot(p->s.handle, slot, KVMPREP_ALIGN_KERNEL, report, sizeof(*report), err);
}

static struct kvmprep_memslot deletion_of(uint32_t number) {
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    slot.slot = number;
    return slot;
}

/* What a slot would do, as both checks say. */
static void check_change(struct place *p, const struct kvmprep_memslot *slot, uint32_t change) {
    struct kvmprep_memslot_report report;
    CHECK_OK(check_in_list(p, slot, &report, &p->s.err), p->s.err);
    CHECK_EQ(report.change, change);
    CHECK_OK(check_in_record(p, slot, &report, &p->s.err), p->s.err);
    CHECK_EQ(report.change, change);
    CHECK_EQ(report.breaches, 0);
}

/* What the library must say of a slot that breaks a rule. */
struct refusal {
    int code; /* 0: whatever KVM says */
    uint32_t reason;
    uint32_t other_slot;
    uint64_t numbers[2]; /* which the message names, if not 0 */
};

static struct refusal refused_for(int code, uint32_t reason, uint32_t other, uint64_t number,
                                  uint64_t number_too) {
    struct refusal refusal = {code, reason, other, {number, number_too}};
    return refusal;
}

#define REFUSED(code, reason, number, number_too)                                                            \
    refused_for(code, KVMPREP_REASON_##reason, KVMPREP_NO_SLOT, number, number_too)
#define REFUSED_FOR(code, reason, other, number) refused_for(code, KVMPREP_REASON_##reason, other, number, 0)

/* Whether a text has this word, not as a part of another. */
static bool has_word(const char *text, const char *word) {
    const size_t length = strlen(word);
    for (const char *at = strstr(text, word); at != NULL; at = strstr(at + 1, word))
        if ((at == text || !isalnum((unsigned char)at[-1])) && !isalnum((unsigned char)at[length]))
            return true;
    return false;
}

static bool names(const char *message, uint64_t number) {
    char hexadecimal[32], decimal[32];
    snprintf(hexadecimal, sizeof(hexadecimal), "%#llx", (unsigned long long)number);
    snprintf(decimal, sizeof(decimal), "%llu", (unsigned long long)number);
    return has_word(message, hexadecimal) || has_word(message, decimal);
}

static void check_said(const struct kvmprep_error *err, const struct kvmprep_memslot *slot,
                       const struct refusal *expected) {
    printf("    %s; %s\n", err->message, err->hint);
    CHECK_EQ(err->slot, slot->slot);
    CHECK_EQ(err->other_slot, expected->other_slot);
    CHECK_EQ(err->stage, KVMPREP_STAGE_MEMSLOT);
    CHECK(err->hint[0] != 0);
    for (int i = 0; i < 2; i++)
        if (expected->numbers[i] != 0 && !names(err->message, expected->numbers[i]))
            check_failed(__FILE__, __LINE__, "\"%s\" does not name %#llx", err->message,
                         (unsigned long long)expected->numbers[i]);
}

/* The list's check alone: for what is only said of a host or VM. */
static void check_refused_in_list(struct place *p, const struct kvmprep_memslot *slot,
                                  struct refusal expected) {
    struct kvmprep_memslot_report report;
    memset(&report, 0xa5, sizeof(report));
    CHECK_ERR(check_in_list(p, slot, &report, &p->s.err), p->s.err, expected.code, expected.reason);
    check_said(&p->s.err, slot, &expected);
    for (size_t i = 0; i < sizeof(report); i++)
        CHECK_EQ(((unsigned char *)&report)[i], 0xa5); /* on an error the report is not written */
}

/* The record is what it was: the slots that were known are, and there is no other. */
static void check_nothing_changed(struct place *p) {
    struct kvmprep_memslot_report report;
    struct kvmprep_memslot none = deletion_of(NUMBER);
    for (size_t i = 0; i < p->n_known; i++)
        if (!(p->known[i].flags & KVM_MEM_GUEST_MEMFD)) /* those KVM takes no second time */
            check_change(p, &p->known[i], KVMPREP_CHANGE_NONE);
    CHECK_ERR(check_in_record(p, &none, &report, &p->s.err), p->s.err, EINVAL, KVMPREP_REASON_MEMSLOT_ABSENT);
}

/* Both checks, kvmprep_memslot_set() and KVM refuse the slot, for one and the same reason. */
static void check_refused(struct place *p, const struct kvmprep_memslot *slot, struct refusal expected) {
    struct kvmprep_memslot_report report;
    int answer = slot_set(&p->s.vm, slot);
    CHECK(answer < 0);
    if (expected.code == 0)
        expected.code = -answer;
    CHECK_EQ(answer, -expected.code);
    check_refused_in_list(p, slot, expected);
    CHECK_ERR(check_in_record(p, slot, &report, &p->s.err), p->s.err, expected.code, expected.reason);
    check_said(&p->s.err, slot, &expected);
    CHECK_ERR(kvmprep_memslot_set(p->s.handle, slot, &p->s.err), p->s.err, expected.code, expected.reason);
    check_said(&p->s.err, slot, &expected);
    check_nothing_changed(p);
}

/* The slot is taken, KVM has it then, and it goes away again. */
static void check_taken(struct place *p, const struct kvmprep_memslot *slot) {
    struct kvmprep_memslot twin = *slot, none = deletion_of(slot->slot);
    check_change(p, slot, KVMPREP_CHANGE_CREATE);
    CHECK_OK(kvmprep_memslot_set(p->s.handle, slot, &p->s.err), p->s.err);
    twin.slot = (slot->slot & ~0xffffu) | FREE_NUMBER;
    twin.flags = 0;
    CHECK_EQ(slot_set(&p->s.vm, &twin), -EEXIST);
    CHECK_OK(kvmprep_memslot_set(p->s.handle, &none, &p->s.err), p->s.err);
    CHECK_EQ(slot_delete(&p->s.vm, slot->slot), -EINVAL);
    check_nothing_changed(p);
}

/* The good slot, spoilt in one way: refused; and taken as it was. */
#define CHECK_RULE(p, expected, ...)                                                                         \
    do {                                                                                                     \
        struct kvmprep_memslot slot = (p)->good;                                                             \
        printf("  %s\n", #__VA_ARGS__);                                                                      \
        __VA_ARGS__;                                                                                         \
        check_refused(p, &slot, expected);                                                                   \
        check_taken(p, &(p)->good);                                                                          \
    } while (0)

/* ---- A slot by itself ---- */

static void numbers(void) {
    struct place p = place_make();
    CHECK_RULE(&p, REFUSED(EINVAL, MEMSLOT_NUMBER, p.caps.memslots, 0), slot.slot = p.caps.memslots);
    CHECK_RULE(&p, REFUSED(EINVAL, MEMSLOT_NUMBER, 0xffff, p.caps.memslots), slot.slot = 0xffff);
    CHECK_RULE(&p, REFUSED(EINVAL, MEMSLOT_NUMBER, p.caps.address_spaces, 0),
               slot.slot |= p.caps.address_spaces << 16);
    CHECK_RULE(&p, REFUSED(EINVAL, MEMSLOT_NUMBER, 0xffff, 0), slot.slot |= 0xffffu << 16);
    p.good.slot = p.caps.memslots - 1;
    check_taken(&p, &p.good);
    if (p.caps.address_spaces > 1) {
        p.good.slot |= (p.caps.address_spaces - 1) << 16;
        check_taken(&p, &p.good);
    }
    place_end(&p);
}

static void flags(void) {
    struct place p = place_make();
    CHECK_RULE(&p, REFUSED(EINVAL, UNKNOWN_FLAGS, 8, 0), slot.flags = 8);
    CHECK_RULE(&p, REFUSED(EINVAL, UNKNOWN_FLAGS, 1u << 31, 0), slot.flags = 1u << 31);
    /* On deletion too. */
    CHECK_RULE(&p, REFUSED(EINVAL, UNKNOWN_FLAGS, 8, 0), slot.slot = MEMORY_SLOT; slot.size = 0;
               slot.flags = 8);
    p.good.flags = KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES;
    check_taken(&p, &p.good);
    place_end(&p);
}

/* A VM whose memory is encrypted has no read-only slots. None is at hand: it is only said to be one. */
static void read_only_where_there_is_none(void) {
    struct place p = place_make();
    struct kvmprep_memslot slot = p.good;
    CHECK_EQ(p.caps.read_only_memslots, 1);
    slot.flags = KVM_MEM_READONLY;
    check_taken(&p, &slot);
    p.caps.read_only_memslots = 0;
    check_refused_in_list(&p, &slot, REFUSED(EINVAL, FLAGS_UNSUPPORTED, KVM_MEM_READONLY, 0));
    slot.flags = KVM_MEM_LOG_DIRTY_PAGES;
    CHECK_OK(check_in_list(&p, &slot, NULL, &p.s.err), p.s.err);
    place_end(&p);
}

static void multiples_of_a_page(void) {
    struct place p = place_make();
    const uint64_t gpa = p.good.gpa, hva = p.good.hva;
    CHECK_RULE(&p, REFUSED(EINVAL, RANGE_UNALIGNED, SIZE - 1, 0), slot.size -= 1);
    CHECK_RULE(&p, REFUSED(EINVAL, RANGE_UNALIGNED, gpa + 1, 0), slot.gpa += 1);
    CHECK_RULE(&p, REFUSED(EINVAL, RANGE_UNALIGNED, gpa + 2048, 0), slot.gpa += 2048);
    CHECK_RULE(&p, REFUSED(EINVAL, RANGE_UNALIGNED, hva + 512, 0), slot.hva += 512);
    /* On deletion too. */
    CHECK_RULE(&p, REFUSED(EINVAL, RANGE_UNALIGNED, gpa + 1, 0), slot.slot = MEMORY_SLOT; slot.size = 0;
               slot.gpa += 1);
    place_end(&p);
}

static void ends_of_the_guest(void) {
    struct place p = place_make();
    CHECK_RULE(&p, REFUSED(EINVAL, RANGE_OVERFLOW, 0 - PAGE, SIZE), slot.gpa = 0 - PAGE);
    CHECK_RULE(&p, REFUSED(EINVAL, RANGE_OVERFLOW, 0 - SIZE, 0), slot.gpa = 0 - SIZE); /* ends at 2^64 */
    place_end(&p);
}

/* The largest slot is a page smaller than 8 TiB. KVM would need a lot of memory for it, and is not asked. */
static void largest_slot(void) {
    struct place p = place_make();
    const uint64_t largest = ((1ull << 31) - 1) * PAGE;
    p.good.hva = 0;
    CHECK_RULE(&p, REFUSED(EINVAL, MEMSLOT_TOO_LARGE, 1ull << 31, (1ull << 31) - 1),
               slot.size = largest + PAGE);
    struct kvmprep_memslot slot = p.good;
    slot.size = largest;
    p.caps.gpa_bits = 52;
    CHECK_OK(check_in_list(&p, &slot, NULL, &p.s.err), p.s.err);
    place_end(&p);
}

/* Where a process's own addresses end was probed; the slot may end there, and not a page later. */
static void addresses_of_the_process(void) {
    struct place p = place_make();
    const uint64_t end = p.caps.hva_end;
    CHECK(end >= 1ull << 46);
    p.good.hva = end - SIZE;
    CHECK_RULE(&p, REFUSED(EINVAL, HVA_NOT_USER, end - SIZE + PAGE, end), slot.hva += PAGE);
    CHECK_RULE(&p, REFUSED(EINVAL, HVA_NOT_USER, end, 0), slot.hva = end);
    CHECK_RULE(&p, REFUSED(EINVAL, HVA_NOT_USER, 1ull << 63, 0),
               slot.hva = 1ull << 63); /* the kernel's half */
    CHECK_RULE(&p, REFUSED(EINVAL, HVA_NOT_USER, (1ull << 62) + end - SIZE, end),
               slot.hva |= 1ull << 62); /* a tag */
    p.good.hva = 0;                     /* as good an address as any */
    check_taken(&p, &p.good);
    place_end(&p);
}

/* A guest's physical addresses are as wide as the host's, where the processor walks the guest's page tables.
 */
static void addresses_of_the_host(void) {
    struct place p = place_make();
    const uint32_t bits = p.caps.nested_paging ? p.caps.gpa_bits : 52;
    struct kvmprep_memslot slot = p.good;
    p.good.gpa = (1ull << bits) - SIZE;
    slot.gpa = p.good.gpa + PAGE;
    CHECK_EQ(slot_set(&p.s.vm, &slot), -EINVAL);
    check_refused_in_list(&p, &slot, REFUSED(EINVAL, MEMSLOT_BEYOND_HOST, slot.gpa + SIZE, bits));
    CHECK_OK(check_in_list(&p, &p.good, NULL, &p.s.err), p.s.err);
    CHECK_EQ(slot_set(&p.s.vm, &p.good), 0);
    CHECK_EQ(slot_delete(&p.s.vm, NUMBER), 0);

    /* Without nested paging it is 52 bits, whatever the host's. */
    p.caps.nested_paging = 0;
    p.caps.gpa_bits = 40;
    slot.gpa = (1ull << 52) - SIZE;
    CHECK_OK(check_in_list(&p, &slot, NULL, &p.s.err), p.s.err);
    slot.gpa += PAGE;
    check_refused_in_list(&p, &slot, REFUSED(EINVAL, MEMSLOT_BEYOND_HOST, slot.gpa + SIZE, 52));
    p.caps.nested_paging = 1;
    slot.gpa = (1ull << 40) - SIZE;
    CHECK_OK(check_in_list(&p, &slot, NULL, &p.s.err), p.s.err);
    slot.gpa += PAGE;
    check_refused_in_list(&p, &slot, REFUSED(EINVAL, MEMSLOT_BEYOND_HOST, slot.gpa + SIZE, 40));
    place_end(&p);
}

/* A handle's guest may be narrower than its host: KVM would take the slot, and map it somewhere else. */
static void addresses_of_the_guest(void) {
    struct place p = place_make();
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_memslot_report report;
    struct kvmprep_vm *narrow;
    struct kvmprep_memslot slot = p.good;
    config.vm_fd = p.s.vm.fd;
    config.gpa_bits = 36;
    CHECK_OK(kvmprep_vm_new(&config, &narrow, &p.s.err), p.s.err);
    slot.gpa = (1ull << 36) - SIZE + PAGE;
    CHECK_ERR(kvmprep_vm_check_memslot(narrow, &slot, 0, &report, sizeof(report), &p.s.err), p.s.err, EINVAL,
              KVMPREP_REASON_RANGE_BEYOND_GUEST);
    CHECK_ERR(kvmprep_memslot_set(narrow, &slot, &p.s.err), p.s.err, EINVAL,
              KVMPREP_REASON_RANGE_BEYOND_GUEST);
    CHECK_EQ(slot_delete(&p.s.vm, NUMBER), -EINVAL); /* KVM was not asked */
    slot.gpa -= PAGE;
    CHECK_OK(kvmprep_memslot_set(narrow, &slot, &p.s.err), p.s.err);
    CHECK_EQ(slot_delete(&p.s.vm, NUMBER), 0);
    CHECK_EQ(kvmprep_vm_free(narrow), 0);
    place_end(&p);
}

/* TDX marks shared memory by a bit of the address, which no slot may have. There is no such VM here. */
static void shared_bit(void) {
    struct place p = place_make();
    struct kvmprep_memslot slot = p.good;
    p.caps.vm_type = TDX_VM;
    p.caps.vm_types |= 1ull << TDX_VM;
    p.caps.memory_attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE;
    p.caps.gpa_bits = 52;
    p.caps.nested_paging = 1;
    const uint32_t numbers[] = {47, 51};
    for (int i = 0; i < 2; i++) {
        const uint64_t bit = 1ull << numbers[i];
        p.caps.gpa_shared_bit = numbers[i];
        slot.gpa = bit;
        check_refused_in_list(&p, &slot, REFUSED(EINVAL, SHARED_BIT, bit + SIZE - PAGE, bit));
        slot.gpa = bit - SIZE + PAGE; /* the last page has it */
        check_refused_in_list(&p, &slot, REFUSED(EINVAL, SHARED_BIT, bit, bit));
        slot.gpa = bit - SIZE;
        CHECK_OK(check_in_list(&p, &slot, NULL, &p.s.err), p.s.err);
    }
    const uint32_t none[] = {1, 46, 52, 63, 64, UINT32_MAX}; /* as a mask that was cut short would be */
    for (size_t i = 0; i < sizeof(none) / sizeof(none[0]); i++) {
        p.caps.gpa_shared_bit = none[i];
        CHECK_ERR(check_in_list(&p, &slot, NULL, &p.s.err), p.s.err, EINVAL, KVMPREP_REASON_BAD_VALUE);
    }
    p.caps.gpa_shared_bit = 0; /* not known yet, as before KVM_TDX_INIT_VM */
    slot.gpa = 1ull << 47;
    CHECK_OK(check_in_list(&p, &slot, NULL, &p.s.err), p.s.err);
    place_end(&p);
}

/* ---- A slot among others ---- */

static void deletion_of_none(void) {
    struct place p = place_make();
    CHECK_RULE(&p, REFUSED(EINVAL, MEMSLOT_ABSENT, NUMBER, 0), slot.size = 0);
    if (p.caps.address_spaces > 1) { /* the number is another's in another address space */
        uint32_t there = MEMORY_SLOT | 1u << 16;
        CHECK_RULE(&p, REFUSED(EINVAL, MEMSLOT_ABSENT, there, 0), slot.size = 0; slot.slot = there);
    }
    place_end(&p);
}

/* A slot that stands keeps its size, its memory and its permission: it is deleted first. */
static void what_stands_is_fixed(void) {
    struct place p = place_make();
    struct kvmprep_memslot deletion = deletion_of(MEMORY_SLOT);
#define CHECK_FIXED(number, number_too, ...)                                                                 \
    CHECK_RULE(&p, REFUSED(EINVAL, MEMSLOT_FIXED, number, number_too), slot = p.s.slot; __VA_ARGS__)
    CHECK_FIXED(SIZE, SIZE / 2, slot.size /= 2);
    CHECK_FIXED(SIZE, SIZE + PAGE, slot.size += PAGE);
    CHECK_FIXED(p.s.slot.hva, p.s.slot.hva + PAGE, slot.hva += PAGE);
    CHECK_FIXED(MEMORY_SLOT, 0, slot.flags = KVM_MEM_READONLY);
    CHECK_FIXED(p.s.slot.hva, 0, slot.hva += PAGE; slot.gpa += SIZE); /* not while it moves either */
    /* The rule comes before that on overlaps. */
    CHECK_FIXED(SIZE, PAGE, slot.size = PAGE; slot.gpa = 0);
#undef CHECK_FIXED
    CHECK_OK(kvmprep_memslot_set(p.s.handle, &deletion, &p.s.err), p.s.err);
    p.known[0] = p.s.slot;
    p.known[0].size /= 2;
    p.known[0].flags = KVM_MEM_READONLY;
    CHECK_OK(kvmprep_memslot_set(p.s.handle, &p.known[0], &p.s.err), p.s.err);
    check_nothing_changed(&p);
    place_end(&p);
}

static void overlaps(void) {
    struct place p = place_make();
    const struct kvmprep_memslot memory = p.s.slot;
#define CHECK_OVERLAP(other, ...)                                                                            \
    CHECK_RULE(&p, REFUSED_FOR(EEXIST, MEMSLOT_OVERLAP, other, slot.slot), __VA_ARGS__)
    CHECK_OVERLAP(MEMORY_SLOT, slot.gpa = memory.gpa);
    CHECK_OVERLAP(MEMORY_SLOT, slot.gpa = memory.gpa + SIZE - PAGE);
    CHECK_OVERLAP(MEMORY_SLOT, slot.gpa = memory.gpa - SIZE + PAGE);
    CHECK_OVERLAP(MEMORY_SLOT, slot.gpa = memory.gpa + PAGE; slot.size = PAGE);
    CHECK_OVERLAP(MEMORY_SLOT, slot.gpa = memory.gpa - PAGE; slot.size = SIZE + 2 * PAGE);
    CHECK_OVERLAP(MEMORY_SLOT, slot = p.known[1]; slot.gpa = memory.gpa + PAGE); /* a slot that moves there */
#undef CHECK_OVERLAP
    /* Side by side, and in another address space, there is room. */
    p.good.gpa = memory.gpa + SIZE;
    check_taken(&p, &p.good);
    p.good.gpa = memory.gpa - SIZE;
    check_taken(&p, &p.good);
    struct kvmprep_memslot elsewhere = p.good;
    elsewhere.slot |= 1u << 16;
    elsewhere.gpa = memory.gpa;
    const uint32_t spaces = p.caps.address_spaces;
    p.caps.address_spaces = 2; /* where there is one only, it is said to be so */
    CHECK_OK(check_in_list(&p, &elsewhere, NULL, &p.s.err), p.s.err);
    p.caps.address_spaces = spaces;
    if (spaces > 1) {
        p.good.gpa = memory.gpa;
        p.good.slot |= 1u << 16;
        struct kvmprep_memslot deletion = deletion_of(p.good.slot);
        check_change(&p, &p.good, KVMPREP_CHANGE_CREATE);
        CHECK_OK(kvmprep_memslot_set(p.s.handle, &p.good, &p.s.err), p.s.err);
        CHECK_OK(kvmprep_memslot_set(p.s.handle, &deletion, &p.s.err), p.s.err);
    }
    place_end(&p);
}

/* KVM has slots of its own (the APIC's page, a task state segment, a page table), beyond the numbers that a
 * VMM may use. Whoever knows of them lists them. Not every processor has them, so KVM is not asked. */
static void internal_slots(void) {
    struct place p = place_make();
    struct kvmprep_memslot internal = p.good, slot = p.good;
    for (uint32_t i = 0; i < 3; i++) {
        internal.slot = p.caps.memslots + i;
        internal.gpa = FREE_GPA + i * SIZE;
        internal.size = PAGE;
        p.known[p.n_known] = internal;
        slot.gpa = internal.gpa;
        p.n_known++;
        check_refused_in_list(&p, &slot, REFUSED_FOR(EEXIST, MEMSLOT_OVERLAP, internal.slot, slot.gpa));
        slot.gpa += PAGE;
        CHECK_OK(check_in_list(&p, &slot, NULL, &p.s.err), p.s.err);
        p.n_known--;
    }
    /* It is in the list, and still nobody else's to change. */
    p.n_known++;
    check_refused_in_list(&p, &internal, REFUSED(EINVAL, MEMSLOT_NUMBER, internal.slot, 0));
    internal.size = 0;
    check_refused_in_list(&p, &internal, REFUSED(EINVAL, MEMSLOT_NUMBER, internal.slot, 0));
    place_end(&p);
}

/* What KVM does with a slot that stands: each kind of change, told beforehand, and done. */
static void changes(void) {
    struct place p = place_make();
    struct kvmprep_memslot *memory = &p.known[0], deletion = deletion_of(MEMORY_SLOT);
#define CHECK_CHANGE(change, ...)                                                                            \
    do {                                                                                                     \
        struct kvmprep_memslot slot = *memory;                                                               \
        __VA_ARGS__;                                                                                         \
        check_change(&p, &slot, change);                                                                     \
        CHECK_OK(kvmprep_memslot_set(p.s.handle, &slot, &p.s.err), p.s.err);                                 \
        *memory = slot;                                                                                      \
        check_nothing_changed(&p);                                                                           \
    } while (0)
    CHECK_CHANGE(KVMPREP_CHANGE_NONE, (void)slot);
    CHECK_CHANGE(KVMPREP_CHANGE_FLAGS, slot.flags = KVM_MEM_LOG_DIRTY_PAGES);
    CHECK_CHANGE(KVMPREP_CHANGE_NONE, (void)slot);
    CHECK_CHANGE(KVMPREP_CHANGE_MOVE, slot.gpa += PAGE); /* over a part of where it was */
    CHECK_CHANGE(KVMPREP_CHANGE_MOVE, slot.gpa += SIZE; slot.flags = 0);
    CHECK_CHANGE(KVMPREP_CHANGE_FLAGS, slot.flags = KVM_MEM_LOG_DIRTY_PAGES);
    CHECK_CHANGE(KVMPREP_CHANGE_FLAGS, slot.flags = 0);
#undef CHECK_CHANGE
    /* What else stands in a deletion is not compared. */
    deletion.gpa = 64 * MIB;
    deletion.hva = PAGE;
    deletion.flags = KVM_MEM_READONLY;
    check_change(&p, &deletion, KVMPREP_CHANGE_DELETE);
    CHECK_OK(kvmprep_memslot_set(p.s.handle, &deletion, &p.s.err), p.s.err);
    CHECK_EQ(slot_delete(&p.s.vm, MEMORY_SLOT), -EINVAL);
    p.known[0] = p.known[1];
    p.n_known = 1;
    check_refused(&p, &deletion, REFUSED(EINVAL, MEMSLOT_ABSENT, MEMORY_SLOT, 0));
    place_end(&p);
}

/* ---- A slot with a guest_memfd ---- */

static void offsets_in_a_guest_memfd(void) {
    struct place p = place_make_with_gmem();
    CHECK_RULE(&p, REFUSED(EINVAL, RANGE_UNALIGNED, SIZE + 1, 0), slot.guest_memfd_offset += 1);
    CHECK_RULE(&p, REFUSED(EINVAL, RANGE_OVERFLOW, 0 - PAGE, 0), slot.guest_memfd_offset = 0 - PAGE);
    CHECK_RULE(&p, REFUSED(EINVAL, GMEM_TOO_SHORT, 2 * SIZE + PAGE, 2 * SIZE),
               slot.guest_memfd_offset += PAGE);
    CHECK_RULE(&p, REFUSED(EINVAL, GMEM_TOO_SHORT, 2 * SIZE + PAGE, 2 * SIZE), slot.size += PAGE);
    p.good.guest_memfd_offset = 0;
    check_taken(&p, &p.good);
    p.good.size = 2 * SIZE; /* all of the file */
    check_taken(&p, &p.good);
    place_end(&p);
}

static void flags_beside_a_guest_memfd(void) {
    struct place p = place_make_with_gmem();
    CHECK_RULE(&p, REFUSED(EINVAL, FLAGS_UNSUPPORTED, 6, 0), slot.flags |= KVM_MEM_READONLY);
    CHECK_RULE(&p, REFUSED(EINVAL, FLAGS_UNSUPPORTED, 5, 0), slot.flags |= KVM_MEM_LOG_DIRTY_PAGES);
    CHECK_RULE(&p, REFUSED(EINVAL, UNKNOWN_FLAGS, 12, 0), slot.flags |= 8);
    place_end(&p);
}

static void descriptors(void) {
    struct place p = place_make_with_gmem();
    int closed = eventfd(0, EFD_CLOEXEC), event = eventfd(0, EFD_CLOEXEC);
    int memfd = memfd_create("kvmprep-test", MFD_CLOEXEC);
    char link[32];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", p.gmem);
    int name = open(link, O_PATH | O_CLOEXEC); /* names the right file and has it not open */
    CHECK(name >= 0);
    CHECK_EQ(ftruncate(memfd, 2 * SIZE), 0);
    close(closed);
    CHECK_RULE(&p, REFUSED(EBADF, BAD_FD, 0, 0), slot.guest_memfd = -1);
    CHECK_RULE(&p, REFUSED(EBADF, BAD_FD, (uint64_t)closed, 0), slot.guest_memfd = closed);
    CHECK_RULE(&p, REFUSED(EBADF, BAD_FD, (uint64_t)name, 0), slot.guest_memfd = name);
    CHECK_RULE(&p, REFUSED(EINVAL, GMEM_NOT_ONE, (uint64_t)event, 0), slot.guest_memfd = event);
    CHECK_RULE(&p, REFUSED(EINVAL, GMEM_NOT_ONE, (uint64_t)memfd, 0), slot.guest_memfd = memfd);
    CHECK_RULE(&p, REFUSED(EINVAL, GMEM_NOT_ONE, (uint64_t)p.s.vm.fd, 0), slot.guest_memfd = p.s.vm.fd);
    close(event);
    close(memfd);
    close(name);
    place_end(&p);
}

/* The record's check, by a thread that cannot see /proc. */
struct look {
    const struct place *place;
    const struct kvmprep_memslot *slot;
    const char *empty_directory;
    struct kvmprep_memslot_report report;
    struct kvmprep_error err, error_of_set;
    int result, result_of_set;
    bool is_blind;
};

static void *look_without_proc(void *argument) {
    struct look *look = argument;
    look->is_blind = unshare(CLONE_FS) == 0 && chroot(look->empty_directory) == 0;
    if (look->is_blind) {
        look->result = check_in_record(look->place, look->slot, &look->report, &look->err);
        look->result_of_set = kvmprep_memslot_set(look->place->s.handle, look->slot, &look->error_of_set);
    }
    return NULL;
}

/* What kind of file a descriptor is /proc tells. Without it the check cannot know, and says so; KVM knows. */
static void descriptors_without_proc(void) {
    struct place p = place_make_with_gmem();
    struct kvmprep_memslot slot = p.good;
    int memfd = memfd_create("kvmprep-test", MFD_CLOEXEC);
    const int fds[] = {p.gmem, memfd};
    char directory[] = P_tmpdir "/kvmprep-test-XXXXXX";
    CHECK_EQ(ftruncate(memfd, 2 * SIZE), 0);
    CHECK(mkdtemp(directory) != NULL);
    for (int i = 0; i < 2; i++) {
        struct look look = {.place = &p, .slot = &slot, .empty_directory = directory};
        pthread_t thread;
        slot.guest_memfd = fds[i];
        CHECK_EQ(pthread_create(&thread, NULL, look_without_proc, &look), 0);
        pthread_join(thread, NULL);
        if (!look.is_blind) {
            rmdir(directory);
            check_skipped("this user may not hide /proc from a thread (chroot)");
        }
        CHECK_OK(look.result, look.err);
        CHECK_EQ(look.report.unknown, KVMPREP_UNKNOWN_GMEM_OWNER | KVMPREP_UNKNOWN_GMEM_KIND);
        if (fds[i] == p.gmem) {
            struct kvmprep_memslot deletion = deletion_of(NUMBER);
            CHECK_OK(look.result_of_set, look.error_of_set);
            CHECK_OK(kvmprep_memslot_set(p.s.handle, &deletion, &p.s.err), p.s.err);
        } else {
            CHECK_ERR(look.result_of_set, look.error_of_set, EINVAL, KVMPREP_REASON_GMEM_OTHER_VM);
            CHECK(strstr(look.error_of_set.message, "or none") != NULL);
        }
    }
    rmdir(directory);
    close(memfd);
    place_end(&p);
}

/* Whose a guest_memfd is only KVM knows. The check says so, and kvmprep_memslot_set() knows it afterwards. */
static void guest_memfd_of_another_vm(void) {
    struct place p = place_make_with_gmem();
    struct vm other = vm_make();
    struct kvmprep_memslot slot = p.good;
    struct kvmprep_memslot_report report;
    slot.guest_memfd = guest_memfd(&other, 0, 2 * SIZE);
    CHECK_OK(check_in_list(&p, &slot, &report, &p.s.err), p.s.err);
    CHECK_EQ(report.unknown, KVMPREP_UNKNOWN_GMEM_OWNER);
    CHECK_OK(check_in_record(&p, &slot, &report, &p.s.err), p.s.err);
    CHECK_EQ(report.unknown, KVMPREP_UNKNOWN_GMEM_OWNER);
    CHECK_EQ(slot_set(&p.s.vm, &slot), -EINVAL);
    CHECK_ERR(kvmprep_memslot_set(p.s.handle, &slot, &p.s.err), p.s.err, EINVAL,
              KVMPREP_REASON_GMEM_OTHER_VM);
    const struct refusal expected = REFUSED(EINVAL, GMEM_OTHER_VM, (uint64_t)slot.guest_memfd, 0);
    check_said(&p.s.err, &slot, &expected);
    check_nothing_changed(&p);
    check_taken(&p, &p.good);
    close(slot.guest_memfd);
    vm_end(&other);
    place_end(&p);
}

/* A piece of a guest_memfd is one slot's. KVM's errno was EINVAL before Linux 7.2. */
static void pieces_of_a_guest_memfd(void) {
    struct place p = place_make_with_gmem();
    struct kvmprep_memslot other = p.good, deletion = deletion_of(OTHER_NUMBER);
    other.slot = OTHER_NUMBER;
    other.gpa += 16 * SIZE;
    other.guest_memfd_offset = 0;
    put_other(&p, &other);
#define CHECK_BOUND(...) CHECK_RULE(&p, REFUSED_FOR(0, GMEM_BOUND, OTHER_NUMBER, 0), __VA_ARGS__)
    CHECK_BOUND(slot.guest_memfd_offset = 0);
    CHECK_BOUND(slot.guest_memfd_offset = SIZE - PAGE);
    CHECK_BOUND(slot.guest_memfd_offset = SIZE / 2; slot.size = PAGE);
    int second = dup(p.gmem); /* one file by another descriptor */
    CHECK_BOUND(slot.guest_memfd_offset = 0; slot.guest_memfd = second);
#undef CHECK_BOUND
    /* KVM changes no slot that has one, not even to what it is. */
    CHECK_RULE(&p, REFUSED(EINVAL, MEMSLOT_FIXED, OTHER_NUMBER, 0), slot = other);
    CHECK_RULE(&p, REFUSED(EINVAL, MEMSLOT_FIXED, OTHER_NUMBER, 0), slot = other; slot.gpa += SIZE);
    CHECK_RULE(&p, REFUSED(EINVAL, MEMSLOT_FIXED, OTHER_NUMBER, 0), slot = other; slot.flags = 0);
    CHECK_RULE(&p, REFUSED(EINVAL, MEMSLOT_FIXED, MEMORY_SLOT, 0), slot.slot = MEMORY_SLOT;
               slot.gpa = p.s.slot.gpa);
    /* Once the other is gone its piece is free. */
    CHECK_OK(kvmprep_memslot_set(p.s.handle, &deletion, &p.s.err), p.s.err);
    p.n_known--;
    p.good.guest_memfd_offset = 0;
    check_taken(&p, &p.good);
    p.good.guest_memfd = second;
    check_taken(&p, &p.good);
    close(second);
    place_end(&p);
}

/* A slot does not keep its guest_memfd open: with the last descriptor the file is gone, and so is the
 * binding; the next file gets the same number. */
static void guest_memfd_that_was_closed(void) {
    struct place p = place_make_with_gmem();
    struct kvmprep_memslot other = p.good;
    other.slot = OTHER_NUMBER;
    other.gpa += 16 * SIZE;
    put_other(&p, &other);
    close(p.gmem);
    CHECK_EQ(guest_memfd(&p.s.vm, 0, 2 * SIZE), p.gmem);
    p.n_known--; /* whoever lists slots must leave this one out; the record knows one file from another */
    check_taken(&p, &p.good);
    /* With a descriptor left it is not gone. */
    struct kvmprep_memslot third = p.good;
    int left = dup(p.gmem);
    third.slot = OTHER_NUMBER + 1;
    CHECK_OK(kvmprep_memslot_set(p.s.handle, &third, &p.s.err), p.s.err);
    close(p.gmem);
    third.slot = NUMBER;
    third.gpa += SIZE;
    third.guest_memfd = left;
    int answer = slot_set(&p.s.vm, &third);
    CHECK(answer < 0);
    CHECK_ERR(kvmprep_memslot_set(p.s.handle, &third, &p.s.err), p.s.err, -answer, KVMPREP_REASON_GMEM_BOUND);
    CHECK_EQ(p.s.err.other_slot, OTHER_NUMBER + 1);
    close(left);
    p.gmem = -1;
    place_end(&p);
}

/* A kernel, or a VM, that has no guest_memfd says so by one of two errnos. */
static void guest_memfd_where_there_is_none(void) {
    struct place p = place_make();
    struct kvmprep_memslot slot = p.good;
    int event = eventfd(0, EFD_CLOEXEC);
    slot.flags = KVM_MEM_GUEST_MEMFD;
    slot.guest_memfd = event;
    CHECK_EQ(p.caps.user_memory2, ioctl(p.s.vm.fd, KVM_CHECK_EXTENSION, 231) > 0); /* KVM_CAP_USER_MEMORY2 */
    if (!p.caps.guest_memfd)
        check_refused(&p, &slot, REFUSED(p.caps.user_memory2 ? EINVAL : ENOTTY, FLAGS_UNSUPPORTED, 0, 0));
    p.caps.guest_memfd = 0;
    p.caps.user_memory2 = 1;
    check_refused_in_list(&p, &slot, REFUSED(EINVAL, FLAGS_UNSUPPORTED, 0, 0));
    p.caps.user_memory2 = 0;
    check_refused_in_list(&p, &slot, REFUSED(ENOTTY, FLAGS_UNSUPPORTED, 0, 0));
    CHECK_OK(check_in_list(&p, &p.good, NULL, &p.s.err), p.s.err);
    check_taken(&p, &p.good);
    close(event);
    place_end(&p);
}

/* A VM with private memory has one address space, no more. */
static void vm_with_private_memory(void) {
    struct setting s = setting_make(GMEM_PRIVATE, SIZE);
    struct kvmprep_caps caps;
    struct kvmprep_memslot_report report;
    struct kvmprep_memslot slot = s.slot;
    CHECK_OK(kvmprep_probe(s.vm.kvm, s.vm.fd, &caps, sizeof(caps), &s.err), s.err);
    CHECK_EQ(caps.address_spaces, 1);
    slot.flags = 0;
    slot.slot |= 1u << 16;
    CHECK_EQ(slot_set(&s.vm, &slot), -EINVAL);
    CHECK_ERR(kvmprep_vm_check_memslot(s.handle, &slot, 0, &report, sizeof(report), &s.err), s.err, EINVAL,
              KVMPREP_REASON_MEMSLOT_NUMBER);
    CHECK_ERR(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err, EINVAL, KVMPREP_REASON_MEMSLOT_NUMBER);
    slot.slot = NUMBER;
    slot.gpa = FREE_GPA;
    CHECK_OK(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err);
    setting_end(&s);
}

/* ---- QEMU's slots ---- */

/* One block of memory, 2 MiB aligned, as QEMU maps it; the guest's addresses beyond `low` continue at 4 GiB.
 */
struct machine {
    uint64_t low;  /* memory below 4 GiB */
    uint64_t high; /* and above */
};

struct piece {
    uint64_t gpa, offset, size; /* offset in the block */
    uint32_t flags;
};

static void check_machine(const struct machine *machine, bool with_gmem) {
    struct vm vm = with_gmem ? vm_make_private() : vm_make(); /* others would not use it */
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_error err;
    struct kvmprep_caps caps;
    struct kvmprep_vm *handle;
    const uint64_t bios = machine->low + machine->high; /* the firmware's block lies behind */
    const size_t size = bios + 2 * MIB;
    const struct piece pieces[] = {
        {0, 0, 0xc3000, 0},
        {0xe0000, bios + 0x20000, 0x20000, KVM_MEM_READONLY},
        {0xfffe0000, bios + 0x20000, 0x20000, KVM_MEM_READONLY}, /* the same memory once more */
        {MIB, MIB, machine->low - MIB, 0},
        {4 * GIB, machine->low, machine->high, 0},
    };
    const uint32_t rules[] = {KVMPREP_ALIGN_KERNEL, KVMPREP_ALIGN_KERNEL | KVMPREP_ALIGN_STRICT,
                              KVMPREP_ALIGN_CONGRUENT, KVMPREP_ALIGN_CONGRUENT | KVMPREP_ALIGN_STRICT};

    char *space = mmap(NULL, size + 2 * MIB, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(space != MAP_FAILED);
    char *block = (char *)(((uintptr_t)space + 2 * MIB - 1) & ~(uintptr_t)(2 * MIB - 1));
    int gmem = with_gmem ? guest_memfd(&vm, 0, bios) : -1;
    CHECK_EQ(slot_delete(&vm, CODE_SLOT), 0);
    config.vm_fd = vm.fd;
    config.alignment_rule = KVMPREP_ALIGN_CONGRUENT | KVMPREP_ALIGN_STRICT;
    CHECK_OK(kvmprep_vm_new(&config, &handle, &err), err);
    CHECK_OK(kvmprep_probe(-1, vm.fd, &caps, sizeof(caps), &err), err);

    uint32_t spaces = with_gmem ? 1 : caps.address_spaces;
    for (uint32_t space_id = 0; space_id < spaces; space_id++) {
        for (uint32_t i = 0; i < sizeof(pieces) / sizeof(pieces[0]); i++) {
            struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
            struct kvmprep_memslot_report report;
            slot.slot = i | space_id << 16;
            slot.gpa = pieces[i].gpa;
            slot.size = pieces[i].size;
            slot.hva = (uintptr_t)block + pieces[i].offset;
            slot.flags = pieces[i].flags;
            if (with_gmem && slot.flags == 0) {
                slot.flags = KVM_MEM_GUEST_MEMFD;
                slot.guest_memfd = gmem;
                slot.guest_memfd_offset = pieces[i].offset;
            }
            for (size_t rule = 0; rule < 4; rule++) {
                CHECK_OK(kvmprep_vm_check_memslot(handle, &slot, rules[rule], &report, sizeof(report), &err),
                         err);
                CHECK_EQ(report.change, KVMPREP_CHANGE_CREATE);
                CHECK_EQ(report.breaches, 0);
            }
            CHECK_OK(kvmprep_memslot_set(handle, &slot, &err), err); /* strictly, and KVM says yes */
        }
    }
    CHECK_EQ(kvmprep_vm_free(handle), 0);
    if (gmem >= 0)
        close(gmem);
    munmap(space, size + 2 * MIB);
    vm_end(&vm);
}

static const struct machine machines[] = {{2 * GIB, 2 * GIB}, {3 * GIB, 2 * GIB + 7 * MIB}};

static void qemu(void) {
    for (int i = 0; i < 2; i++)
        check_machine(&machines[i], false);
}

static void qemu_with_guest_memfd(void) {
    for (int i = 0; i < 2; i++)
        check_machine(&machines[i], true);
}

/* What KVM takes without a word: told by the report, and refused where strictness is asked for. */
static void check_pitfall(struct place *p, uint32_t warning, uint32_t reason) {
    struct kvmprep_memslot_report report;
    struct kvmprep_error err;
    uint32_t rules[] = {KVMPREP_ALIGN_KERNEL, KVMPREP_ALIGN_KERNEL | KVMPREP_ALIGN_STRICT};
    for (int strict = 0; strict < 2; strict++) {
        int r = kvmprep_vm_check_memslot(p->s.handle, &p->good, rules[strict], &report, sizeof(report), &err);
        if (strict && reason != KVMPREP_REASON_NONE) {
            CHECK_ERR(r, err, EINVAL, reason);
            CHECK_EQ(err.slot, p->good.slot);
            continue;
        }
        CHECK_OK(r, err);
        CHECK_EQ(report.warnings, warning);
        CHECK_EQ(report.message[0] != 0, warning != 0);
        CHECK_EQ(report.hint[0] != 0, warning != 0);
    }
    CHECK_EQ(slot_set(&p->s.vm, &p->good), 0); /* KVM indeed takes it */
    CHECK_EQ(slot_delete(&p->s.vm, p->good.slot), 0);
}

static void guest_memfd_that_is_never_used(void) {
    struct place p = place_make_with_gmem();
    check_pitfall(&p, KVMPREP_WARNING_GMEM_UNUSED, KVMPREP_REASON_GMEM_UNUSED);
    place_end(&p);
}

static void guest_memfd_that_is_mapped_elsewhere(void) {
    struct place p = place_make_with_gmem();
    const char *why;
    if (!kind_is_had(&p.s.vm, GMEM_SHARED, &why))
        check_skipped("%s", why);
    int other = guest_memfd(&p.s.vm, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED, 2 * SIZE);
    close(p.gmem);
    p.gmem = guest_memfd(&p.s.vm, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED, 2 * SIZE);
    p.good.guest_memfd = p.gmem;
    const struct {
        int fd; /* mapped at the hva; -1: anonymous memory */
        size_t offset, size;
        bool is_right;
    } rows[] = {
        {p.gmem, SIZE, SIZE, true},         {p.gmem, 0, SIZE, false}, {other, SIZE, SIZE, false},
        {p.gmem, SIZE, SIZE - PAGE, false}, {-1, 0, SIZE, false},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        char *space = mmap(NULL, 2 * SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(space != MAP_FAILED);
        int flags = MAP_FIXED | (rows[i].fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
        CHECK(mmap(space, rows[i].size, PROT_READ | PROT_WRITE, flags, rows[i].fd, (off_t)rows[i].offset) ==
              space);
        p.good.hva = (uintptr_t)space;
        check_pitfall(&p, rows[i].is_right ? 0 : KVMPREP_WARNING_GMEM_ELSEWHERE,
                      rows[i].is_right ? KVMPREP_REASON_NONE : KVMPREP_REASON_GMEM_ELSEWHERE);
        munmap(space, 2 * SIZE);
    }
    close(other);
    place_end(&p);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"numbers", numbers},
        {"flags", flags},
        {"read_only_where_there_is_none", read_only_where_there_is_none},
        {"multiples_of_a_page", multiples_of_a_page},
        {"ends_of_the_guest", ends_of_the_guest},
        {"largest_slot", largest_slot},
        {"addresses_of_the_process", addresses_of_the_process},
        {"addresses_of_the_host", addresses_of_the_host},
        {"addresses_of_the_guest", addresses_of_the_guest},
        {"shared_bit", shared_bit},
        {"deletion_of_none", deletion_of_none},
        {"what_stands_is_fixed", what_stands_is_fixed},
        {"overlaps", overlaps},
        {"internal_slots", internal_slots},
        {"changes", changes},
        {"offsets_in_a_guest_memfd", offsets_in_a_guest_memfd},
        {"flags_beside_a_guest_memfd", flags_beside_a_guest_memfd},
        {"descriptors", descriptors},
        {"descriptors_without_proc", descriptors_without_proc},
        {"guest_memfd_of_another_vm", guest_memfd_of_another_vm},
        {"pieces_of_a_guest_memfd", pieces_of_a_guest_memfd},
        {"guest_memfd_that_was_closed", guest_memfd_that_was_closed},
        {"guest_memfd_where_there_is_none", guest_memfd_where_there_is_none},
        {"guest_memfd_that_is_never_used", guest_memfd_that_is_never_used},
        {"guest_memfd_that_is_mapped_elsewhere", guest_memfd_that_is_mapped_elsewhere},
        {"vm_with_private_memory", vm_with_private_memory},
        {"qemu", qemu},
        {"qemu_with_guest_memfd", qemu_with_guest_memfd},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
