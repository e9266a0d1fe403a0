/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The four alignment rules, case by case: which of them takes which slot, by how much a slot is off, and that
 * a breach is told where it is not strictly forbidden.
 *
 * What today's kernel enforces it is asked itself. What it once nearly enforced is history: a proposal that
 * refuses slots which QEMU makes, and two ways in which that proposal was miscoded. All three stand here as
 * functions, and the table holds cases that tell each of them apart from the rules that are offered.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/guest.h"
#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#define KIB (1ull << 10)
#define GIB (1ull << 30)
#define FILE_SIZE (8 * GIB)   /* of the guest_memfd: as sparse as it comes */
#define FREE_HVA (1ull << 44) /* nothing is mapped from here on; a multiple of every page size */
#define NUMBER 5

static struct kvmprep_caps caps_of(const struct vm *vm) {
    struct kvmprep_error err;
    struct kvmprep_caps caps;
    CHECK_OK(kvmprep_probe(vm->kvm, vm->fd, &caps, sizeof(caps), &err), err);
    return caps;
}

/* What a rule says of a slot: no breach, or a breach of one kind. */
struct verdict {
    uint32_t breaches;
    uint64_t alignment, hva_shift, offset_shift;
};

/*
 * Checks a slot by a rule: the report as expected; with STRICT the same report, or, for a breach, an error
 * that names the numbers.
 */
static void check_verdict(const struct kvmprep_caps *caps, const struct kvmprep_memslot *slot, uint32_t rule,
                          struct verdict expected) {
    struct kvmprep_error err;
    struct kvmprep_memslot_report report;
    char number[32];

    CHECK_OK(kvmprep_memslot_check(caps, sizeof(*caps), NULL, 0, slot, rule, &report, sizeof(report), &err),
             err);
    CHECK_EQ(report.change, KVMPREP_CHANGE_CREATE);
    CHECK_EQ(report.breaches, expected.breaches);
    CHECK_EQ(report.alignment, expected.alignment);
    CHECK_EQ(report.hva_shift, expected.hva_shift);
    CHECK_EQ(report.offset_shift, expected.offset_shift);

    memset(&report, 0xa5, sizeof(report));
    rule |= KVMPREP_ALIGN_STRICT;
    if (expected.breaches == 0) {
        CHECK_OK(
            kvmprep_memslot_check(caps, sizeof(*caps), NULL, 0, slot, rule, &report, sizeof(report), &err),
            err);
        CHECK_EQ(report.breaches, 0);
        return;
    }
    CHECK_ERR(kvmprep_memslot_check(caps, sizeof(*caps), NULL, 0, slot, rule, &report, sizeof(report), &err),
              err, EINVAL, KVMPREP_REASON_MEMSLOT_MISALIGNED);
    CHECK_EQ(err.slot, NUMBER);
    CHECK_EQ(err.stage, KVMPREP_STAGE_MEMSLOT);
    CHECK_EQ(err.gpa, slot->gpa);
    CHECK_EQ(err.size, slot->size);
    CHECK(err.hint[0] != 0);
    bool is_hva = (expected.breaches & KVMPREP_BREACH_HVA) != 0;
    snprintf(number, sizeof(number), "%#llx",
             (unsigned long long)(is_hva ? slot->hva : slot->guest_memfd_offset));
    CHECK(strstr(err.message, number) != NULL);
    CHECK_EQ((unsigned char)report.message[0], 0xa5); /* on an error the report is not written */
}

/* ---- The offset in a guest_memfd ---- */

/* alignment(offset) >= alignment(gpa), by the lowest bit that is set; 0 is aligned to everything. */
static bool first_proposal(uint64_t gpa, uint64_t offset) {
    return offset == 0 || (gpa != 0 && __builtin_ctzll(offset) >= __builtin_ctzll(gpa));
}

/* The same, miscoded: the highest bit that is set says nothing of alignment. */
static bool by_last_set_bit(uint64_t gpa, uint64_t offset) {
    return offset == 0 || (gpa != 0 && __builtin_clzll(offset) <= __builtin_clzll(gpa));
}

/* The same, miscoded: the right bit, and the comparison turned round. */
static bool turned_round(uint64_t gpa, uint64_t offset) {
    return offset == 0 || (gpa != 0 && __builtin_ctzll(offset) <= __builtin_ctzll(gpa));
}

/* What a rule wants of an offset, and by how much it is off; 0: taken. */
struct wanted {
    uint64_t alignment, shift;
};

/* The hva is `offset` bytes into a block that is aligned to 2 MiB and more, as QEMU's is. */
static const struct offset_case {
    uint64_t gpa, offset, size;
    struct wanted by_size, by_slot, congruent;          /* the last of the hva */
    bool first_proposal, by_last_set_bit, turned_round; /* what these would have taken */
} offset_cases[] = {
    /* QEMU's memory above 4 GiB, of a machine with 2 or 3 GiB below. */
    {4 * GIB, 2 * GIB, GIB, {GIB, 0}, {GIB, 0}, {2 * MIB, 0}, false, false, true},
    {4 * GIB, 3 * GIB, 2 * GIB, {GIB, 0}, {GIB, 0}, {2 * MIB, 0}, false, false, true},
    {4 * GIB, 2 * GIB, 4 * MIB, {2 * MIB, 0}, {2 * MIB, 0}, {2 * MIB, 0}, false, false, true},
    /* QEMU's memory below 4 GiB, of which the first MiB is elsewhere. */
    {MIB, MIB, 2 * GIB - MIB, {GIB, GIB - MIB}, {4 * KIB, 0}, {2 * MIB, 0}, true, true, true},
    {MIB, MIB, MIB, {4 * KIB, 0}, {4 * KIB, 0}, {4 * KIB, 0}, true, true, true},
    {0, 0, 0xc3000, {4 * KIB, 0}, {4 * KIB, 0}, {4 * KIB, 0}, true, true, true},
    /* gpa 0 is aligned to everything, which is no reason to refuse each offset. */
    {0, GIB, GIB, {GIB, 0}, {GIB, 0}, {2 * MIB, 0}, false, false, false},
    {0, 2 * MIB, 2 * MIB, {2 * MIB, 0}, {2 * MIB, 0}, {2 * MIB, 0}, false, false, false},
    {0, 4 * KIB, 4 * KIB, {4 * KIB, 0}, {4 * KIB, 0}, {4 * KIB, 0}, false, false, false},
    {0,
     4 * KIB,
     2 * MIB,
     {2 * MIB, 2 * MIB - 4 * KIB},
     {2 * MIB, 2 * MIB - 4 * KIB},
     {2 * MIB, 2 * MIB - 4 * KIB},
     false,
     false,
     false},
    /* Offset 0 is aligned to everything too, and says nothing of the hva. */
    {4 * GIB, 0, GIB, {GIB, 0}, {GIB, 0}, {2 * MIB, 0}, true, true, true},
    {GIB + 4 * KIB, 0, GIB, {GIB, 0}, {4 * KIB, 0}, {2 * MIB, 4 * KIB}, true, true, true},
    /* Offsets that no huge page can be cut from, and that a miscoding would have taken. */
    {2 * MIB, 3 * MIB, 2 * MIB, {2 * MIB, MIB}, {2 * MIB, MIB}, {2 * MIB, MIB}, false, true, true},
    {GIB,
     GIB + 4 * KIB,
     GIB,
     {GIB, GIB - 4 * KIB},
     {GIB, GIB - 4 * KIB},
     {2 * MIB, 2 * MIB - 4 * KIB},
     false,
     true,
     true},
    {GIB, 2 * MIB, GIB, {GIB, GIB - 2 * MIB}, {GIB, GIB - 2 * MIB}, {2 * MIB, 0}, false, false, true},
    /* Offsets that are as good as can be, and that a miscoding would have refused. */
    {2 * MIB, 4 * MIB, 2 * MIB, {2 * MIB, 0}, {2 * MIB, 0}, {2 * MIB, 0}, true, true, false},
    {3 * GIB, GIB, GIB, {GIB, 0}, {GIB, 0}, {2 * MIB, 0}, true, false, true},
    {3 * GIB, 2 * GIB, GIB, {GIB, 0}, {GIB, 0}, {2 * MIB, 0}, true, true, false},
    /* The size alone promises larger pages than the slot can have at its gpa. */
    {2 * MIB, 2 * MIB, GIB, {GIB, GIB - 2 * MIB}, {2 * MIB, 0}, {2 * MIB, 0}, true, true, true},
    {4 * KIB, 4 * KIB, 2 * MIB, {2 * MIB, 2 * MIB - 4 * KIB}, {4 * KIB, 0}, {4 * KIB, 0}, true, true, true},
    {GIB + 4 * KIB, 2 * MIB, 4 * MIB, {2 * MIB, 0}, {4 * KIB, 0}, {2 * MIB, 4 * KIB}, true, false, false},
    /* One page short of a size that allows more. */
    {0, 4 * KIB, 2 * MIB - 4 * KIB, {4 * KIB, 0}, {4 * KIB, 0}, {4 * KIB, 0}, false, false, false},
    {0, 2 * MIB, GIB - 4 * KIB, {2 * MIB, 0}, {2 * MIB, 0}, {2 * MIB, 0}, false, false, false},
    {0, 2 * MIB, GIB, {GIB, GIB - 2 * MIB}, {GIB, GIB - 2 * MIB}, {2 * MIB, 0}, false, false, false},
};
#define OFFSET_CASES (sizeof(offset_cases) / sizeof(offset_cases[0]))

static struct kvmprep_memslot slot_at_offset(const struct offset_case *c, int gmem) {
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    slot.slot = NUMBER;
    slot.flags = KVM_MEM_GUEST_MEMFD;
    slot.gpa = c->gpa;
    slot.size = c->size;
    slot.hva = FREE_HVA + c->offset;
    slot.guest_memfd = gmem;
    slot.guest_memfd_offset = c->offset;
    return slot;
}

/* What a rule for offsets says. How far the hva is from congruence is in the report all the same. */
static struct verdict verdict_on_offset(struct wanted wanted, const struct offset_case *c) {
    struct verdict verdict = {wanted.shift != 0 ? KVMPREP_BREACH_OFFSET : 0, wanted.alignment,
                              c->congruent.shift, wanted.shift};
    return verdict;
}

static void offsets(void) {
    struct vm vm = vm_make();
    struct kvmprep_caps caps = caps_of(&vm);
    const struct wanted page = {4 * KIB, 0};
    if (!caps.guest_memfd)
        check_skipped("this kernel's default VMs have no guest_memfd: there is no offset to be aligned");
    int gmem = guest_memfd(&vm, 0, FILE_SIZE);
    CHECK_EQ(slot_delete(&vm, CODE_SLOT), 0); /* it lies at gpa 0 */
    /* As for a VM that has use for such a file: strict rules refuse it in others, whatever its offset. */
    caps.memory_attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE;

    for (size_t i = 0; i < OFFSET_CASES; i++) {
        const struct offset_case *c = &offset_cases[i];
        struct kvmprep_memslot slot = slot_at_offset(c, gmem);
        printf("  gpa %#llx, offset %#llx, size %#llx\n", (unsigned long long)c->gpa,
               (unsigned long long)c->offset, (unsigned long long)c->size);
        check_verdict(&caps, &slot, KVMPREP_ALIGN_SIZE, verdict_on_offset(c->by_size, c));
        check_verdict(&caps, &slot, KVMPREP_ALIGN_SLOT, verdict_on_offset(c->by_slot, c));
        check_verdict(&caps, &slot, KVMPREP_ALIGN_KERNEL, verdict_on_offset(page, c));
        /* That holds the hva; a guest_memfd has no huge pages that the offset would have to fit. */
        struct verdict congruent = {c->congruent.shift != 0 ? KVMPREP_BREACH_HVA : 0, c->congruent.alignment,
                                    c->congruent.shift, 0};
        check_verdict(&caps, &slot, KVMPREP_ALIGN_CONGRUENT, congruent);
        /* Today's kernel takes them all. */
        CHECK_EQ(slot_set(&vm, &slot), 0);
        CHECK_EQ(slot_delete(&vm, NUMBER), 0);
    }
    close(gmem);
    vm_end(&vm);
}

/* What the table is for: for each rule that was wrong, cases in which it differs from those that are offered.
 */
static void history_is_told_apart(void) {
    static bool (*const wrong[])(uint64_t, uint64_t) = {first_proposal, by_last_set_bit, turned_round};
    for (size_t rule = 0; rule < 3; rule++) {
        unsigned differs_from_size = 0, differs_from_slot = 0;
        for (size_t i = 0; i < OFFSET_CASES; i++) {
            const struct offset_case *c = &offset_cases[i];
            const bool listed[] = {c->first_proposal, c->by_last_set_bit, c->turned_round};
            CHECK_EQ(wrong[rule](c->gpa, c->offset), listed[rule]);
            differs_from_size += listed[rule] != (c->by_size.shift == 0);
            differs_from_slot += listed[rule] != (c->by_slot.shift == 0);
        }
        CHECK(differs_from_size > 0 && differs_from_slot > 0);
    }
}

/* Without a guest_memfd what stands in its offset means nothing. */
static void slots_without_a_guest_memfd(void) {
    struct vm vm = vm_make();
    struct kvmprep_caps caps = caps_of(&vm);
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    const struct verdict huge = {0, GIB, 0, 0}, page = {0, 4 * KIB, 0, 0};
    slot.slot = NUMBER;
    slot.gpa = GIB;
    slot.size = GIB;
    slot.hva = FREE_HVA;
    slot.guest_memfd_offset = 4 * KIB;
    check_verdict(&caps, &slot, KVMPREP_ALIGN_SIZE, huge);
    check_verdict(&caps, &slot, KVMPREP_ALIGN_SLOT, huge);
    check_verdict(&caps, &slot, KVMPREP_ALIGN_KERNEL, page);
    vm_end(&vm);
}

/* An offset that no page begins at, or beyond the file's end, is an error under each rule, never a mere
 * breach. */
static void what_no_rule_takes(void) {
    struct vm vm = vm_make();
    struct kvmprep_caps caps = caps_of(&vm);
    struct kvmprep_error err;
    if (!caps.guest_memfd)
        check_skipped("this kernel's default VMs have no guest_memfd");
    int gmem = guest_memfd(&vm, 0, 4 * MIB);
    const struct offset_case halfway = {GIB, 2 * KIB, 2 * MIB, {0, 0}, {0, 0}, {0, 0}, 0, 0, 0};
    const struct offset_case beyond = {GIB, 2 * MIB + 4 * KIB, 2 * MIB, {0, 0}, {0, 0}, {0, 0}, 0, 0, 0};
    for (uint32_t rule = 0; rule < 8; rule++) {
        uint32_t value = (rule & 3) | (rule > 3 ? KVMPREP_ALIGN_STRICT : 0);
        struct kvmprep_memslot slot = slot_at_offset(&halfway, gmem);
        CHECK_ERR(kvmprep_memslot_check(&caps, sizeof(caps), NULL, 0, &slot, value, NULL, 0, &err), err,
                  EINVAL, KVMPREP_REASON_RANGE_UNALIGNED);
        CHECK_EQ(slot_set(&vm, &slot), -EINVAL);
        slot = slot_at_offset(&beyond, gmem);
        CHECK_ERR(kvmprep_memslot_check(&caps, sizeof(caps), NULL, 0, &slot, value, NULL, 0, &err), err,
                  EINVAL, KVMPREP_REASON_GMEM_TOO_SHORT);
        CHECK_EQ(slot_set(&vm, &slot), -EINVAL);
    }
    close(gmem);
    vm_end(&vm);
}

/* ---- The hva ---- */

/*
 * Where memory is that nobody has mapped: it counts as anonymous, which has pages of up to 2 MiB. A slot that
 * none of those fits into may lie anywhere.
 */
static const struct hva_case {
    uint64_t gpa, hva, size; /* hva from FREE_HVA */
    struct wanted wanted;
} hva_cases[] = {
    {GIB, 0, 4 * MIB, {2 * MIB, 0}},
    {GIB, 6 * MIB, 4 * MIB, {2 * MIB, 0}}, /* not modulo 1 GiB: anonymous memory has no such pages */
    {GIB, 4 * KIB, 4 * MIB, {2 * MIB, 2 * MIB - 4 * KIB}},
    {GIB, 2 * MIB - 4 * KIB, 2 * MIB, {2 * MIB, 4 * KIB}},
    {GIB, MIB, 2 * GIB, {2 * MIB, MIB}},
    {MIB, MIB, 2 * GIB - MIB, {2 * MIB, 0}},
    {MIB, 0, 2 * GIB - MIB, {2 * MIB, MIB}},
    {MIB, 3 * MIB, 3 * MIB, {2 * MIB, 0}},
    {4 * GIB - 4 * KIB, 0, 4 * MIB, {2 * MIB, 2 * MIB - 4 * KIB}},
    /* No whole page of 2 MiB: 3 MiB can be placed so that none fits. */
    {MIB, 4 * KIB, 2 * MIB, {4 * KIB, 0}},
    {MIB, 4 * KIB, 3 * MIB - 4 * KIB, {4 * KIB, 0}},
    {MIB, 4 * KIB, 3 * MIB, {2 * MIB, MIB - 4 * KIB}},
    {GIB + 4 * KIB, 0, 4 * MIB - 8 * KIB, {4 * KIB, 0}},
    {GIB, 4 * KIB, 2 * MIB - 4 * KIB, {4 * KIB, 0}},
    {0xe0000, 4 * KIB, 0x20000, {4 * KIB, 0}},
    {0xfffe0000, 0, 0x20000, {4 * KIB, 0}},
};

static void addresses(void) {
    struct vm vm = vm_make();
    struct kvmprep_caps caps = caps_of(&vm);
    for (size_t i = 0; i < sizeof(hva_cases) / sizeof(hva_cases[0]); i++) {
        const struct hva_case *c = &hva_cases[i];
        struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
        slot.slot = NUMBER;
        slot.gpa = c->gpa;
        slot.size = c->size;
        slot.hva = FREE_HVA + c->hva;
        printf("  gpa %#llx, hva %#llx, size %#llx\n", (unsigned long long)slot.gpa,
               (unsigned long long)slot.hva, (unsigned long long)slot.size);
        struct verdict expected = {c->wanted.shift != 0 ? KVMPREP_BREACH_HVA : 0, c->wanted.alignment,
                                   c->wanted.shift, 0};
        check_verdict(&caps, &slot, KVMPREP_ALIGN_CONGRUENT, expected);
        if (c->wanted.shift != 0) { /* moved as the report says, it is taken */
            slot.hva += c->wanted.shift;
            expected.breaches = 0;
            expected.hva_shift = 0;
            check_verdict(&caps, &slot, KVMPREP_ALIGN_CONGRUENT, expected);
        }
    }
    vm_end(&vm);
}

static bool is_on_tmpfs(int fd) {
    struct statfs system;
    CHECK_EQ(fstatfs(fd, &system), 0);
    return system.f_type == TMPFS_MAGIC;
}

/* What lies at the hva decides which pages there could be: memory of each kind, 4 KiB off. */
static void backings(void) {
    static const uint64_t largest[KINDS] = {
        [ANON_4K] = 2 * MIB,        [ANON_THP] = 2 * MIB,        [MEMFD_PRIVATE] = 2 * MIB,
        [FILE_PRIVATE] = 4 * KIB,   [HUGETLB_PRIVATE] = 2 * MIB, [MEMFD_SHARED] = 2 * MIB,
        [HUGETLB_SHARED] = 2 * MIB, [GMEM_SHARED] = 4 * KIB,
    };
    for (enum kind kind = 0; kind < GMEM_PRIVATE; kind++) {
        struct vm vm = vm_make();
        struct kvmprep_caps caps = caps_of(&vm);
        const char *why;
        if (!kind_is_had(&vm, kind, &why)) {
            printf("  without %s: %s\n", kind_name(kind), why);
            vm_end(&vm);
            continue;
        }
        struct memory memory = memory_make(&vm, kind, 8 * MIB);
        struct kvmprep_memslot slot = slot_of(NUMBER, GIB + 4 * KIB, &memory);
        printf("  %s\n", kind_name(kind));
        /* Where files lie on a tmpfs, as in the bed, they are shared memory. */
        uint64_t page = kind == FILE_PRIVATE && is_on_tmpfs(memory.fd) ? 2 * MIB : largest[kind];
        bool is_breach = page > 4 * KIB;
        struct verdict expected = {is_breach ? KVMPREP_BREACH_HVA : 0, page, is_breach ? 4 * KIB : 0, 0};
        check_verdict(&caps, &slot, KVMPREP_ALIGN_CONGRUENT, expected);
        slot.gpa = GIB;
        expected.breaches = 0;
        expected.hva_shift = 0;
        check_verdict(&caps, &slot, KVMPREP_ALIGN_CONGRUENT, expected);
        memory_end(&memory);
        vm_end(&vm);
    }
}

/* Huge pages of 1 GiB take congruence modulo 1 GiB. The pool may be empty: no page is touched. */
static void pages_of_1g(void) {
    struct vm vm = vm_make();
    struct kvmprep_caps caps = caps_of(&vm);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | 30 << MAP_HUGE_SHIFT | MAP_NORESERVE;
    void *memory = mmap(NULL, 2 * GIB, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED)
        check_skipped("no huge pages of 1 GiB: %s", strerror(errno));
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    slot.slot = NUMBER;
    slot.gpa = 4 * GIB + 2 * MIB;
    slot.size = 2 * GIB;
    slot.hva = (uintptr_t)memory;
    struct verdict breach = {KVMPREP_BREACH_HVA, GIB, 2 * MIB, 0}, none = {0, GIB, 0, 0};
    check_verdict(&caps, &slot, KVMPREP_ALIGN_CONGRUENT, breach);
    slot.gpa = 5 * GIB;
    check_verdict(&caps, &slot, KVMPREP_ALIGN_CONGRUENT, none);
    munmap(memory, 2 * GIB);
    vm_end(&vm);
}

/* A rule that nobody has defined is refused, by the check and when a handle is made. */
static void rules_that_do_not_exist(void) {
    struct vm vm = vm_make();
    struct kvmprep_caps caps = caps_of(&vm);
    struct kvmprep_error err;
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_vm *handle = NULL;
    const uint32_t wrong[] = {4,         0xff, 0x200, KVMPREP_ALIGN_STRICT | 4, KVMPREP_ALIGN_STRICT << 1,
                              UINT32_MAX};
    config.vm_fd = vm.fd;
    slot.size = 4 * MIB;
    slot.gpa = GIB;
    slot.slot = NUMBER;
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        CHECK_ERR(kvmprep_memslot_check(&caps, sizeof(caps), NULL, 0, &slot, wrong[i], NULL, 0, &err), err,
                  EINVAL, KVMPREP_REASON_BAD_VALUE);
        config.alignment_rule = wrong[i];
        CHECK_ERR(kvmprep_vm_new(&config, &handle, &err), err, EINVAL, KVMPREP_REASON_BAD_VALUE);
        CHECK(handle == NULL);
    }
    vm_end(&vm);
}

/* kvmprep_memslot_set() holds slots to the rule that its handle was made with; what it refuses, KVM never
 * sees. */
static void rule_of_a_handle(void) {
    static const struct {
        uint32_t rule;
        bool is_taken;
    } rules[] = {
        {0, true},
        {KVMPREP_ALIGN_CONGRUENT | KVMPREP_ALIGN_STRICT, false},
        {KVMPREP_ALIGN_KERNEL | KVMPREP_ALIGN_STRICT, true},
        {KVMPREP_ALIGN_SIZE | KVMPREP_ALIGN_STRICT, true}, /* it holds offsets, and there is none */
        {KVMPREP_ALIGN_SLOT | KVMPREP_ALIGN_STRICT, true},
    };
    struct vm vm = vm_make();
    struct memory memory = memory_make(&vm, ANON_4K, 4 * MIB);
    struct kvmprep_error err;
    for (size_t i = 0; i < sizeof(rules) / sizeof(rules[0]); i++) {
        struct kvmprep_memslot slot = slot_of(NUMBER, GIB + 4 * KIB, &memory);
        struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
        struct kvmprep_memslot_report report;
        struct kvmprep_vm *handle;
        config.vm_fd = vm.fd;
        config.alignment_rule = rules[i].rule;
        CHECK_OK(kvmprep_vm_new(&config, &handle, &err), err);
        if (rules[i].is_taken) {
            CHECK_OK(kvmprep_memslot_set(handle, &slot, &err), err);
            slot.size = 0;
            CHECK_OK(kvmprep_memslot_set(handle, &slot, &err), err);
        } else {
            CHECK_ERR(kvmprep_memslot_set(handle, &slot, &err), err, EINVAL,
                      KVMPREP_REASON_MEMSLOT_MISALIGNED);
            CHECK_EQ(slot_delete(&vm, NUMBER), -EINVAL); /* KVM has no such slot, */
            CHECK_OK(kvmprep_vm_check_memslot(handle, &slot, 0, &report, sizeof(report), &err), err);
            CHECK_EQ(report.change, KVMPREP_CHANGE_CREATE); /* and the record neither */
            slot.gpa = GIB;
            CHECK_OK(kvmprep_memslot_set(handle, &slot, &err), err);
            CHECK_EQ(slot_delete(&vm, NUMBER), 0);
        }
        CHECK_EQ(kvmprep_vm_free(handle), 0);
    }
    memory_end(&memory);
    vm_end(&vm);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"history_is_told_apart", history_is_told_apart},
        {"offsets", offsets},
        {"slots_without_a_guest_memfd", slots_without_a_guest_memfd},
        {"what_no_rule_takes", what_no_rule_takes},
        {"addresses", addresses},
        {"backings", backings},
        {"pages_of_1g", pages_of_1g},
        {"rules_that_do_not_exist", rules_that_do_not_exist},
        {"rule_of_a_handle", rule_of_a_handle},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
