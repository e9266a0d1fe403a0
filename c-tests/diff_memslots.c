/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The check of memslots against the kernel's own, by random operations.
 *
 * Each operation, plausible or at an edge, is put to kvmprep_memslot_check(), to kvmprep_vm_check_memslot()
 * and to KVM itself: the verdict and the errno must be the same. What only the kernel can know, that a
 * guest_memfd is another VM's, the library must say it does not know, and name afterwards. A mismatch is
 * shrunk and printed as a C program. At the end every rule that this kernel has must have been met: a test
 * that met no overlap says nothing of overlaps.
 */
#define _GNU_SOURCE
#include "diff_memslots/generator.h"
#include "diff_memslots/program.h"
#include "diff_memslots/rules.h"
#include "diff_memslots/shrinker.h"
#include "diff_memslots/world.h"
#include "support/check.h"
#include "support/diff.h"
#include "support/guest.h"
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/utsname.h>

#define USUAL_OPERATIONS 6000
/* Mismatches that are shown; the first as a program. */
#define MOST_SHOWN 10
/* The kernel may be short of memory once in so many operations. */
#define SHORTAGE_ONE_IN 1000

/* ---- What is right ---- */

static bool overlap(uint64_t a, uint64_t b, uint64_t a_size, uint64_t b_size) {
    return a < b + b_size && b < a + a_size;
}

/* An overlap names the slot in the way, a binding the slot that has the bytes. */
static bool names_the_other(const struct world *w, const struct kvmprep_memslot *slot,
                            const struct kvmprep_error *err) {
    const struct kvmprep_memslot *other = world_find(w, err->other_slot);
    if (err->reason == KVMPREP_REASON_MEMSLOT_OVERLAP)
        return other != NULL && other->slot != slot->slot && other->slot >> 16 == slot->slot >> 16 &&
               overlap(other->gpa, slot->gpa, other->size, slot->size);
    if (err->reason == KVMPREP_REASON_GMEM_BOUND)
        return other != NULL && (other->flags & KVM_MEM_GUEST_MEMFD) &&
               overlap(other->guest_memfd_offset, slot->guest_memfd_offset, other->size, slot->size);
    return err->other_slot == KVMPREP_NO_SLOT;
}

static const char *judge_error(const struct world *w, const struct kvmprep_memslot *slot,
                               const struct answers *a) {
    const struct kvmprep_error *err = &a->check_err;
    if (err->code != a->check || err->stage != KVMPREP_STAGE_MEMSLOT || err->slot != slot->slot ||
        err->message[0] == 0 || err->hint[0] == 0)
        return "the error does not say all it should";
    return names_the_other(w, slot, err) ? NULL : "the error does not name the other slot";
}

static const char *judge_report(const struct kvmprep_memslot *slot, const struct answers *a) {
    bool binds = a->change == KVMPREP_CHANGE_CREATE && (slot->flags & KVM_MEM_GUEST_MEMFD);
    if (a->report.change != a->change)
        return "the report tells of another change";
    if (a->report.unknown != (binds ? KVMPREP_UNKNOWN_GMEM_OWNER : 0u))
        return "the report is wrong about what is unknown";
    return memcmp(&a->report, &a->handle_report, sizeof(a->report)) == 0 ? NULL : "the two reports differ";
}

/* Another VM's guest_memfd passes the check, and only the kernel can refuse it. */
static bool is_settled_by_kernel(const struct operation *step, const struct answers *a) {
    return a->check == 0 && a->kernel == -EINVAL && step->file == FILE_OF_OTHER_VM &&
           a->report.unknown == KVMPREP_UNKNOWN_GMEM_OWNER;
}

/* What the kernel alone could refuse, kvmprep_memslot_set() explains. */
static const char *judge_explanation(struct world *w, const struct kvmprep_memslot *slot, struct answers *a) {
    if (!a->is_set_by_library && kvmprep_memslot_set(w->handle, slot, &a->set_err) != -EINVAL)
        return "kvmprep_memslot_set() does not refuse another VM's guest_memfd";
    return a->set_err.reason == KVMPREP_REASON_GMEM_OTHER_VM ? NULL : "another VM's guest_memfd is not named";
}

/*
 * Before 7.2 the kernel adds a guest_memfd's offset and the slot's size as signed numbers, and takes a slot
 * whose end passes 2^63, which nobody can use. The library refuses it everywhere.
 */
static bool is_taken_by_overflow(const struct world *w, const struct operation *step,
                                 const struct answers *a) {
    uint64_t top = 1ull << 63;
    return a->kernel == 0 && a->check_err.reason == KVMPREP_REASON_GMEM_TOO_SHORT &&
           w->caps.kernel_release < (7u << 16 | 2u << 8) && step->offset < top &&
           step->offset + step->size >= top;
}

/* The table of rules must know why the kernel refuses, and the library must call the rule by its name. */
static const char *judge_by_rules(const struct answers *a) {
    bool is_one = a->broken != 0 && (a->broken & (a->broken - 1)) == 0;
    if ((a->broken == 0) != (a->kernel == 0))
        return "the table of rules (rules.c) and the kernel differ";
    if (!is_one || a->check == 0)
        return NULL;
    uint32_t reason = rule_facts[__builtin_ctz(a->broken)].reason;
    return a->check_err.reason == reason ? NULL : "the error names another rule than the one broken";
}

/* What is wrong with the answers, which were given when the slots were as in `before`; or NULL. */
static const char *judge(struct world *w, const struct world *before, const struct operation *step,
                         struct answers *a) {
    struct kvmprep_memslot slot = world_slot(before, step);
    if (a->aftermath != NULL)
        return a->aftermath;
    if (a->check != a->handle || a->check_err.reason != a->handle_err.reason)
        return "the two checks differ";
    if (step->by_library && a->handle < 0 &&
        (a->set != a->handle || a->set_err.reason != a->handle_err.reason))
        return "kvmprep_memslot_set() and the check differ";
    if (a->kernel == -ENOMEM || is_taken_by_overflow(before, step, a))
        return NULL;
    if (is_settled_by_kernel(step, a))
        return judge_explanation(w, &slot, a);
    if (a->check != a->kernel)
        return "the check and the kernel differ";
    const char *wrong = judge_by_rules(a);
    if (wrong != NULL)
        return wrong;
    return a->check < 0 ? judge_error(before, &slot, a) : judge_report(&slot, a);
}

/* ---- What was met ---- */

#define VM_TYPES 2
#define CHANGES (KVMPREP_CHANGE_FLAGS + 1)

static struct {
    uint64_t operations, mismatches, sequences, file_changes;
    uint64_t shortages, settled, overflows;
    uint64_t internal[VM_TYPES]; /* a slot of KVM's own was in the way */
    uint64_t refused[4];
    uint64_t changed[CHANGES];
    uint64_t alone[VM_TYPES][RULES]; /* refused, for that rule and no other */
} met;

static const struct {
    int code;
    const char *name;
} codes[] = {{-EINVAL, "EINVAL"}, {-EEXIST, "EEXIST"}, {-EBADF, "EBADF"}, {-ENOTTY, "ENOTTY"}};

static void count(const struct world *w, const struct operation *step, const struct answers *a) {
    met.shortages += a->kernel == -ENOMEM;
    met.settled += is_settled_by_kernel(step, a);
    met.overflows += is_taken_by_overflow(w, step, a);
    met.internal[w->vm_type] += a->kernel == -EEXIST &&
                                a->check_err.reason == KVMPREP_REASON_MEMSLOT_OVERLAP &&
                                (a->check_err.other_slot & 0xffff) >= w->caps.memslots;
    if (a->kernel == 0)
        met.changed[a->change]++;
    for (size_t i = 0; i < sizeof(codes) / sizeof(codes[0]); i++)
        met.refused[i] += a->kernel == codes[i].code;
    for (unsigned rule = 0; rule < RULES; rule++)
        met.alone[w->vm_type][rule] += a->kernel < 0 && a->broken == 1u << rule;
}

static void print_what_was_met(void) {
    static const char *const changes[CHANGES] = {"no change", "created", "deleted", "moved", "flags changed"};
    printf("  %" PRIu64 " VMs, %" PRIu64 " changes of files; taken:", met.sequences, met.file_changes);
    for (unsigned i = 0; i < CHANGES; i++)
        printf(" %s %" PRIu64, changes[i], met.changed[i]);
    printf("\n  refused:");
    for (size_t i = 0; i < sizeof(codes) / sizeof(codes[0]); i++)
        printf(" %s %" PRIu64, codes[i].name, met.refused[i]);
    printf("; settled by the kernel %" PRIu64 ", taken by its overflow %" PRIu64 ", short of memory %" PRIu64
           "\n",
           met.settled, met.overflows, met.shortages);
    for (unsigned type = 0; type < world_vm_types(); type++) {
        printf("  VM type %u: KVM's own slots met %" PRIu64 "; one rule broken:", type, met.internal[type]);
        for (unsigned rule = 0; rule < RULES; rule++)
            if (rules_there(world_caps(type)) & 1u << rule)
                printf(" %s %" PRIu64, rule_facts[rule].name, met.alone[type][rule]);
        printf("\n");
    }
}

/* KVM's own slots, where it makes any; whoever has seen to it that it does says so. */
static void check_that_internal_slots_were_met(void) {
    bool are_wanted = getenv("KVMPREP_DIFF_INTERNAL_SLOTS") != NULL;
    for (unsigned type = 0; type < world_vm_types(); type++) {
        CHECK(!are_wanted || world_has_internal_slots(type));
        CHECK(!world_has_internal_slots(type) || met.internal[type] > 0);
    }
}

/* Each rule by itself, for each type of VM that has it. */
static void check_that_all_was_met(void) {
    check_that_internal_slots_were_met();
    for (uint32_t change = 0; change < CHANGES; change++)
        CHECK(met.changed[change] > 0);
    for (unsigned type = 0; type < world_vm_types(); type++)
        for (unsigned rule = 0; rule < RULES; rule++)
            if ((rules_there(world_caps(type)) & 1u << rule) && met.alone[type][rule] == 0)
                check_failed(__FILE__, __LINE__, "in VMs of type %u the rule %s was never met by itself",
                             type, rule_facts[rule].name);
}

/* ---- One step, one sequence ---- */

/* Does the step; returns what is wrong, or NULL. */
static const char *do_step(struct world *w, const struct operation *step, struct answers *a) {
    static struct world before;
    memset(a, 0, sizeof(*a));
    if (step->deed != SET_SLOT) {
        world_change_file(w, step);
        return NULL;
    }
    before = *w;
    a->broken = rules_broken(w, step);
    world_set_slot(w, step, a);
    return judge(w, &before, step, a);
}

/* The mismatch that is being shrunk; another must not take its place. */
static struct {
    const char *what;
    int kernel, check;
} sought;

static bool is_sought(const char *what, const struct answers *a) {
    return what == sought.what && a->kernel == sought.kernel && a->check == sought.check;
}

/* For the shrinker. */
static int find_sought(const struct sequence *sequence) {
    static struct world w;
    struct answers answers;
    int at = -1;
    check_is_alive();
    world_make(&w, sequence->vm_type);
    for (unsigned i = 0; i < sequence->n && at < 0; i++) {
        const char *what = do_step(&w, &sequence->steps[i], &answers);
        if (what != NULL && is_sought(what, &answers))
            at = (int)i;
    }
    world_end(&w);
    return at;
}

static void show(const char *what, const struct operation *step, const struct answers *a) {
    printf("  MISMATCH at operation %" PRIu64 ": %s\n", met.operations, what);
    printf("    kernel %d, check %d (%s) \"%s\", handle %d (%s)\n", a->kernel, a->check,
           kvmprep_reason_name(a->check_err.reason), a->check_err.message, a->handle,
           kvmprep_reason_name(a->handle_err.reason));
    printf("    change %u, reported %u, unknown %u; slot %#x flags %#x gpa %#" PRIx64 " size %#" PRIx64
           " hva %#" PRIx64 " file %d offset %#" PRIx64 "\n",
           a->change, a->report.change, a->report.unknown, step->slot, step->flags, step->gpa, step->size,
           step->hva, (int)step->file, step->offset);
}

static const char *said(int answer) {
    return answer == 0 ? "yes" : strerrorname_np(-answer);
}

/* Does the shrunk sequence once more, for what is said to its last step. */
static void print_shrunk(const struct sequence *sequence) {
    static struct world w;
    struct answers a;
    const char *what = NULL;
    char found[512];
    struct utsname kernel;
    world_make(&w, sequence->vm_type);
    for (unsigned i = 0; i < sequence->n; i++)
        what = do_step(&w, &sequence->steps[i], &a);
    world_end(&w);
    CHECK_EQ(uname(&kernel), 0);
    snprintf(found, sizeof(found), "Linux %s: %s: to the last slot the kernel says %s, the library %s (%s)",
             kernel.release, what == NULL ? "not seen again" : what, said(a.kernel), said(a.check),
             kvmprep_reason_name(a.check_err.reason));
    printf("  shrunk to %u steps:\n", sequence->n);
    program_print(sequence, found, world_has_internal_slots(sequence->vm_type));
}

static void tell_of_mismatch(const struct sequence *sequence, const char *what, const struct answers *a) {
    if (met.mismatches++ >= MOST_SHOWN)
        return;
    show(what, &sequence->steps[sequence->n - 1], a);
    if (met.mismatches > 1)
        return;
    static struct sequence shrunk;
    shrunk = *sequence;
    sought.what = what;
    sought.kernel = a->kernel;
    sought.check = a->check;
    if (find_sought(&shrunk) < 0) {
        printf("  it does not come again in a new VM\n");
        return;
    }
    shrink(&shrunk, find_sought);
    print_shrunk(&shrunk);
}

static void run_sequence(struct diff_random *random, uint64_t operations) {
    static struct world w;
    static struct sequence sequence;
    struct answers answers;
    sequence = (struct sequence){.vm_type = diff_below(random, world_vm_types())};
    met.sequences++;
    world_make(&w, sequence.vm_type);
    for (uint64_t done = 0; done < operations && sequence.n < LONGEST_SEQUENCE;) {
        struct operation *step = &sequence.steps[sequence.n++];
        *step = generate_step(random, &w);
        const char *what = do_step(&w, step, &answers);
        if (step->deed != SET_SLOT) {
            met.file_changes++;
            continue;
        }
        done++;
        met.operations++;
        count(&w, step, &answers);
        if (what != NULL)
            tell_of_mismatch(&sequence, what, &answers);
    }
    world_end(&w);
}

static void library_and_kernel_agree(void) {
    uint64_t seed = diff_seed(), operations = diff_operations(USUAL_OPERATIONS);
    struct diff_random random = {seed};
    memset(&met, 0, sizeof(met));
    world_prepare();
    while (met.operations < operations) {
        check_is_alive();
        run_sequence(&random, operations - met.operations);
    }
    print_what_was_met();
    diff_report(seed, met.operations, met.mismatches);
    CHECK_EQ(met.mismatches, 0);
    CHECK(met.shortages <= operations / SHORTAGE_ONE_IN);
    if (operations >= USUAL_OPERATIONS)
        check_that_all_was_met();
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {{"library_and_kernel_agree", library_and_kernel_agree}};
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
