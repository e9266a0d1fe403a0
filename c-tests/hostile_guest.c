/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A guest that means harm: four vCPUs ask for conversions of whatever numbers they like and touch whatever
 * they like, in memory and in holes, while the VMM changes slots under them; and two threads hand the library
 * exits that no 32-bit guest can make. Whatever they do, nothing crashes or hangs, the guest is told one of
 * the answers that KVM takes, only memory with a guest_memfd becomes private, the library keeps no more than
 * a stated amount of memory and no descriptor, its map is KVM's, and afterwards the guest reaches each page.
 *
 * It goes in bursts, between which all of that is looked at with everybody standing still.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/converting.h"
#include "support/guest.h"
#include "support/host.h"
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <malloc.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#define VCPUS 4
#define CALLERS 2 /* threads that call the handlers with what no guest of this kind can ask for */
#define THREADS (VCPUS + CALLERS)
#define SECONDS 12        /* as many, times KVMPREP_TEST_SCALE */
#define BURST_ACTIONS 150 /* of each thread */

/* ---- The guest's memory ---- */

static const struct {
    enum kind kind;
    uint64_t offset, size;
    bool has_gmem, has_memory_fd;
} places[] = {
    {ANON_4K, 0, 6 * MIB, true, false},
    {MEMFD_SHARED, 6 * MIB, 3 * MIB, true, true}, /* they touch, and not where a huge page ends */
    {ANON_THP, 12 * MIB, 6 * MIB, true, false},
    {ANON_4K, 20 * MIB, 2 * MIB, false, false}, /* never private */
    {MEMFD_SHARED, 24 * MIB, 4 * MIB, true, false},
};
#define SLOTS (sizeof(places) / sizeof(places[0]))
#define ROVER (SLOTS - 1) /* comes and goes */
#define WINDOW (30 * MIB)

/*
 * What may be in memory of this process: all of the guest's (its private side is no mapping), and beside it
 * the program, its libraries, stacks and heap, which take less than half of this.
 */
#define MOST_RESIDENT (21 * MIB + 16 * MIB)
/*
 * What may be on the heap: the map takes at most a few bits of each page of the window, which is kilobytes;
 * all the rest is of the calls under way and of the C library.
 */
#define MOST_HEAP (1 * MIB)

struct machine {
    struct vm vm;
    struct kvmprep_vm *handle;
    struct kvmprep_error err;
    struct convertible slots[SLOTS];
    struct kvmprep_memslot code;
    uint64_t resident, heap; /* the most there was */
    uint64_t longest_change; /* of a slot, in ns */
    unsigned changes;
};

static struct machine m;

static void make_slot(size_t i) {
    struct convertible *made = &m.slots[i];
    uint64_t gpa = MEMORY_GPA + places[i].offset;
    uint32_t number = MEMORY_SLOT + (uint32_t)i;
    if (places[i].has_gmem) {
        *made = convertible_make(&m.vm, number, gpa, places[i].kind, places[i].size);
    } else {
        made->memory = memory_make(&m.vm, places[i].kind, places[i].size);
        made->slot = slot_of(number, gpa, &made->memory);
        CHECK_EQ(slot_set(&m.vm, &made->slot), 0);
    }
    if (!places[i].has_memory_fd) {
        made->slot.attributes &= ~(uint32_t)KVMPREP_MEMSLOT_MEMORY_FD;
        made->slot.memory_fd = -1;
    }
    if (places[i].has_gmem)
        convertible_tell(m.handle, made);
    else
        CHECK_OK(kvmprep_memslot_note(m.handle, &made->slot, &m.err), m.err);
}

static void make_machine(void) {
    memset(&m, 0, sizeof(m));
    m.vm = vm_make_private();
    converting_begin(&m.vm);
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    config.vm_fd = m.vm.fd;
    CHECK_OK(kvmprep_vm_new(&config, &m.handle, &m.err), m.err);
    struct kvmprep_memslot code = KVMPREP_MEMSLOT_INIT;
    code.slot = CODE_SLOT;
    code.size = PAGE;
    code.hva = (uintptr_t)m.vm.code;
    CHECK_OK(kvmprep_memslot_note(m.handle, &code, &m.err), m.err);
    for (size_t i = 0; i < SLOTS; i++)
        make_slot(i);
}

static void end_machine(void) {
    CHECK_EQ(kvmprep_vm_free(m.handle), 0);
    for (size_t i = 0; i < SLOTS; i++)
        if (places[i].has_gmem)
            convertible_end(&m.slots[i]);
        else
            memory_end(&m.slots[i].memory);
    vm_end(&m.vm);
}

/* ---- Those who mean harm ---- */

struct villain {
    pthread_t thread;
    unsigned number;
    uint64_t random;
    struct converter c; /* of the vCPUs */
    struct kvmprep_convert_opts opts;
    unsigned told;       /* times that opts.changed was called */
    atomic_uint actions; /* done in this burst */
    uint64_t calls, refused, holes, conversions;
    char finding[256];
};

static uint64_t next_random(struct villain *v) {
    v->random ^= v->random << 13;
    v->random ^= v->random >> 7;
    v->random ^= v->random << 17;
    return v->random;
}

static uint64_t below(struct villain *v, uint64_t n) {
    return next_random(v) % n;
}

static bool wrong(struct villain *v, const char *format, ...) __attribute__((format(printf, 2, 3)));
static bool wrong(struct villain *v, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(v->finding, sizeof(v->finding), format, arguments);
    va_end(arguments);
    return false;
}

/* A page of the window, or where something ends. */
static uint64_t some_gpa(struct villain *v) {
    static const uint64_t edges[] = {0,
                                     PAGE,
                                     MEMORY_GPA - PAGE,
                                     MEMORY_GPA,
                                     MEMORY_GPA + 6 * MIB - PAGE,
                                     MEMORY_GPA + 9 * MIB - PAGE,
                                     MEMORY_GPA + 24 * MIB - PAGE,
                                     MEMORY_GPA + WINDOW,
                                     0xfee00000,
                                     0xfffff000};
    switch (below(v, 8)) {
    case 0:
        return edges[below(v, sizeof(edges) / sizeof(edges[0]))];
    case 1:
        return next_random(v) >> 32;
    default:
        return MEMORY_GPA + below(v, WINDOW / PAGE) * PAGE;
    }
}

static uint64_t some_pages(struct villain *v) {
    static const uint64_t edges[] = {0, WINDOW / PAGE, 0xffffffff, 0x100000, 0xc0000, 0x80000000};
    switch (below(v, 8)) {
    case 0:
        return edges[below(v, sizeof(edges) / sizeof(edges[0]))];
    case 1:
        return 1 + below(v, 1500);
    default:
        return 1 + below(v, 64);
    }
}

static uint64_t some_attributes(struct villain *v) {
    static const uint64_t known[] = {TO_PRIVATE, TO_SHARED, TO_PRIVATE | 1, 1, TO_PRIVATE | 2, 2};
    return below(v, 16) == 0 ? next_random(v) >> 32 : known[below(v, sizeof(known) / sizeof(known[0]))];
}

/* Fails at times, as a VMM's listeners do. */
static int changed(const struct kvmprep_range *range, uint32_t to, void *villain) {
    struct villain *v = villain;
    (void)range, (void)to;
    return ++v->told % 7 == 0 ? -EIO : 0;
}

/* How the VMM answers this time. */
static void change_manners(struct villain *v, struct kvmprep_convert_opts *opts, int vcpu) {
    *opts = (struct kvmprep_convert_opts)KVMPREP_CONVERT_OPTS_INIT;
    bool has_prefault = below(v, 4) == 0;
    if (has_prefault)
        opts->steps = KVMPREP_CONVERT_ATTRIBUTES | KVMPREP_CONVERT_DROP | KVMPREP_CONVERT_PREFAULT;
    opts->vcpu_fd = vcpu;
    opts->flags = below(v, 8) == 0 ? KVMPREP_CONVERT_KEEP_SHARED : 0;
    opts->max_size = below(v, 4) == 0 ? 1 * MIB : 0;
    if (v->number % 2 != 0) {
        opts->changed = changed;
        opts->opaque = v;
    }
}

/* The hypercall, from the guest. What is not aligned, or no page at all, KVM itself refuses. */
static bool ask(struct villain *v) {
    uint64_t gpa = some_gpa(v), pages = some_pages(v), attributes = some_attributes(v), answer;
    uint32_t by_kvm = (uint32_t)-EINVAL;
    int result = guest_convert(&v->c, gpa, pages * PAGE, attributes, &answer);
    if (result != 0)
        return wrong(v, "a hypercall ended with %d, %s", result, v->c.odd);
    v->conversions += answer == 0;
    v->refused += answer != 0;
    if (answer != 0 && answer != EINVAL && answer != by_kvm)
        return wrong(v, "the guest was told %" PRIu64, answer);
    return true;
}

/*
 * The guest writes to some pages, whatever is there. A hole that is shared is an MMIO exit, and one that is
 * private, as a slot leaves it, a fault that cannot be answered. Nor can one that changed() says no to.
 */
static bool touch(struct villain *v) {
    uint64_t gpa = MEMORY_GPA + below(v, WINDOW / PAGE) * PAGE;
    int result = guest_fill(&v->c, gpa, (1 + below(v, 16)) * PAGE, 1);
    bool is_mmio = result == -EPROTO && v->c.vcpu.run->exit_reason == KVM_EXIT_MMIO;
    bool has_no_slot = result == -EINVAL && v->c.err.reason == KVMPREP_REASON_NO_MEMSLOT;
    bool has_not_followed = result == -EIO && v->c.err.reason == KVMPREP_REASON_CALLBACK_FAILED;
    v->holes += is_mmio || has_no_slot;
    v->refused += has_not_followed;
    if (result != 0 && !is_mmio && !has_no_slot && !has_not_followed)
        return wrong(v, "writing ended with %d, %s: %s", result, v->c.odd, v->c.err.message);
    return true;
}

static uint64_t any_number(struct villain *v) {
    uint64_t bit = 1ull << below(v, 64);
    switch (below(v, 4)) {
    case 0:
        return next_random(v);
    case 1:
        return bit - below(v, 2) * PAGE;
    case 2:
        return bit - below(v, 2);
    default:
        return ~(below(v, 4) * PAGE);
    }
}

/* An exit that the host makes up: mostly of memory that there is, with a number or two that cannot be. */
static bool call_hypercall(struct villain *v) {
    uint64_t args[3] = {some_gpa(v), some_pages(v), some_attributes(v)}, answer = 99;
    if (below(v, 2) == 0)
        args[below(v, 3)] = any_number(v);
    int result = kvmprep_handle_map_gpa_range(m.handle, args, &v->opts, &answer, &v->c.err);
    v->calls++;
    v->conversions += answer == 0;
    v->refused += answer != 0;
    if (answer != 0 && answer != EINVAL && answer != EAGAIN)
        return wrong(v, "the guest would be told %" PRIu64, answer);
    if (result > 0 || (result == 0 && answer != 0))
        return wrong(v, "%d, and the guest would be told %" PRIu64, result, answer);
    return true;
}

static bool call_memory_fault(struct villain *v) {
    uint64_t numbers[3] = {some_gpa(v) & ~(PAGE - 1), PAGE, below(v, 2) * KVM_MEMORY_EXIT_FLAG_PRIVATE};
    if (below(v, 2) == 0)
        numbers[below(v, 3)] = any_number(v);
    int result =
        kvmprep_handle_memory_fault(m.handle, numbers[0], numbers[1], numbers[2], &v->opts, &v->c.err);
    v->calls++;
    v->conversions += result == 0;
    v->refused += result != 0;
    return result <= 0 ? true : wrong(v, "an answer of %d", result);
}

static bool act(struct villain *v) {
    if (v->number < VCPUS) {
        change_manners(v, &v->c.opts, v->c.vcpu.fd);
        return below(v, 3) == 0 ? touch(v) : ask(v);
    }
    change_manners(v, &v->opts, -1);
    return below(v, 2) == 0 ? call_hypercall(v) : call_memory_fault(v);
}

static void *misbehave(void *villain) {
    struct villain *v = villain;
    while (atomic_load(&v->actions) < BURST_ACTIONS && act(v))
        atomic_fetch_add(&v->actions, 1);
    return NULL;
}

/* ---- The VMM meanwhile ---- */

static bool is_busy(const struct villain *v) {
    return atomic_load(&v->actions) < BURST_ACTIONS && v->finding[0] == 0;
}

/* Deletes or makes a slot, which must not have to wait for the guest to be quiet. */
static void change_rover(bool is_there) {
    struct kvmprep_memslot deletion = KVMPREP_MEMSLOT_INIT;
    deletion.slot = m.slots[ROVER].slot.slot;
    uint64_t began = now_ns();
    CHECK_OK(kvmprep_memslot_set(m.handle, is_there ? &m.slots[ROVER].slot : &deletion, &m.err), m.err);
    uint64_t took = now_ns() - began;
    m.longest_change = took > m.longest_change ? took : m.longest_change;
    m.changes++;
}

static void burst(struct villain *villains) {
    unsigned seed = m.changes + 1, seen[VCPUS] = {0};
    for (unsigned i = 0; i < THREADS; i++) {
        atomic_store(&villains[i].actions, 0);
        CHECK_EQ(pthread_create(&villains[i].thread, NULL, misbehave, &villains[i]), 0);
    }
    uint64_t looked = now_ns();
    for (bool is_over = false; !is_over;) {
        sleep_us((unsigned)rand_r(&seed) % 40000);
        change_rover(false);
        sleep_us((unsigned)rand_r(&seed) % 4000);
        change_rover(true);
        is_over = true;
        for (unsigned i = 0; i < THREADS; i++)
            is_over = is_over && !is_busy(&villains[i]);
        if (now_ns() - looked < 2000000000)
            continue;
        looked = now_ns();
        for (unsigned i = 0; i < VCPUS; i++) {
            unsigned done = atomic_load(&villains[i].actions);
            if (done == seen[i] && is_busy(&villains[i]))
                converter_kick(villains[i].thread);
            seen[i] = done;
        }
    }
    for (unsigned i = 0; i < THREADS; i++)
        CHECK_EQ(pthread_join(villains[i].thread, NULL), 0);
    for (unsigned i = 0; i < THREADS; i++)
        if (villains[i].finding[0] != 0)
            check_failed(__FILE__, __LINE__, "thread %u: %s", i, villains[i].finding);
    check_is_alive();
}

/* ---- What is looked at between bursts ---- */

/* Whether all of a run lies in slots that have a guest_memfd. */
static bool can_be_private(uint64_t gpa, uint64_t end) {
    for (size_t i = 0; i < SLOTS && gpa < end; i++) {
        uint64_t start = MEMORY_GPA + places[i].offset;
        if (places[i].has_gmem && gpa >= start && gpa < start + places[i].size)
            gpa = start + places[i].size;
    }
    return gpa >= end;
}

static void check_nothing_else_is_private(void) {
    struct kvmprep_visibility_run run;
    for (uint64_t gpa = 0; kvmprep_visibility_next(m.handle, gpa, &run, &m.err) == 0;
         gpa = run.gpa + run.size)
        if (run.visibility == KVMPREP_PRIVATE && !can_be_private(run.gpa, run.gpa + run.size))
            check_failed(__FILE__, __LINE__, "guest [%#" PRIx64 ", %#" PRIx64 ") is private", run.gpa,
                         run.gpa + run.size);
    CHECK_EQ(m.err.code, -ENOENT);
}

/*
 * The guest writes all of its memory: what is shared by the handle's map must show it to the host, and what
 * is private must not. So the map is KVM's. Nothing of that needs an exit, but where the guest has touched
 * the hole that the rover left: to an SW_PROTECTED VM's KVM a fault on what it kept of a hole is one of a
 * shared access, whatever is there now.
 */
static void check_map_against_kernel(struct converter *c, uint32_t tag) {
    struct kvmprep_visibility_run run = {.gpa = 0};
    c->opts = (struct kvmprep_convert_opts)KVMPREP_CONVERT_OPTS_INIT;
    for (size_t i = 0; i < SLOTS; i++) {
        const struct kvmprep_memslot *slot = &m.slots[i].slot;
        uint64_t faults = c->memory_faults;
        CHECK_EQ(guest_fill(c, slot->gpa, slot->size, tag), 0);
        if (i != ROVER)
            CHECK_EQ(c->memory_faults, faults);
        for (uint64_t gpa = slot->gpa; gpa < slot->gpa + slot->size; gpa += PAGE) {
            if (gpa == slot->gpa || gpa >= run.gpa + run.size)
                CHECK_OK(kvmprep_visibility_next(m.handle, gpa, &run, &m.err), m.err);
            uint32_t word = *(volatile uint32_t *)(uintptr_t)(slot->hva + (gpa - slot->gpa));
            if ((word == word_of(gpa, tag)) != (run.visibility == KVMPREP_SHARED))
                check_failed(__FILE__, __LINE__, "guest page %#" PRIx64 " is %s by the map, and not in KVM",
                             gpa, run.visibility == KVMPREP_SHARED ? "shared" : "private");
        }
    }
}

static uint64_t resident_now(void) {
    unsigned long all, resident;
    FILE *statm = fopen("/proc/self/statm", "r");
    CHECK(statm != NULL);
    CHECK_EQ(fscanf(statm, "%lu %lu", &all, &resident), 2);
    fclose(statm);
    return resident * PAGE;
}

static void check_memory_of_the_process(void) {
    uint64_t resident = resident_now();
    struct mallinfo2 heap = mallinfo2();
    m.resident = resident > m.resident ? resident : m.resident;
    m.heap = heap.uordblks > m.heap ? heap.uordblks : m.heap;
    if (m.resident > MOST_RESIDENT || m.heap > MOST_HEAP)
        check_failed(__FILE__, __LINE__, "%" PRIu64 " KiB are in memory, %" PRIu64 " KiB on the heap",
                     m.resident >> 10, m.heap >> 10);
}

static unsigned open_descriptors(void) {
    unsigned n = 0;
    DIR *directory = opendir("/proc/self/fd");
    CHECK(directory != NULL);
    while (readdir(directory) != NULL)
        n++;
    closedir(directory);
    return n;
}

/* ---- The cases ---- */

/* Makes all of the guest's memory that, from the VMM's side. */
static void convert_all(uint32_t to) {
    for (size_t i = 0; i < SLOTS; i++) {
        struct kvmprep_range range = {.gpa = m.slots[i].slot.gpa, .size = m.slots[i].slot.size};
        if (places[i].has_gmem || to == KVMPREP_SHARED)
            CHECK_OK(kvmprep_convert(m.handle, &range, to, NULL, &m.err), m.err);
    }
}

static void print_counts(const struct villain *villains, unsigned bursts) {
    uint64_t hypercalls = 0, faults = 0, again = 0, calls = 0, refused = 0, holes = 0, lost = 0, done = 0;
    for (unsigned i = 0; i < THREADS; i++) {
        const struct villain *v = &villains[i];
        hypercalls += v->c.hypercalls, again += v->c.again, faults += v->c.memory_faults, lost += v->c.lost;
        calls += v->calls, refused += v->refused, holes += v->holes, done += v->conversions;
    }
    printf("  %u bursts: %" PRIu64 " hypercalls (%" PRIu64 " told to come again), %" PRIu64
           " memory faults, %" PRIu64 " exits made up; %" PRIu64 " granted, %" PRIu64 " refused, %" PRIu64
           " holes touched, %" PRIu64 " guests put back\n",
           bursts, hypercalls, again, faults, calls, done, refused, holes, lost);
    printf("  %u changes of a slot, the longest %" PRIu64 " ms; at most %" PRIu64 " KiB in memory, %" PRIu64
           " KiB on the heap\n",
           m.changes, m.longest_change / 1000000, m.resident >> 10, m.heap >> 10);
    /* Else nothing was shown. */
    CHECK(hypercalls != 0 && calls != 0 && holes != 0 && done != 0 && refused != 0);
}

static void whatever_it_asks_for(void) {
    static struct villain villains[THREADS]; /* too large for a stack beside others */
    memset(villains, 0, sizeof(villains));
    make_machine();
    for (unsigned i = 0; i < THREADS; i++) {
        villains[i].number = i;
        villains[i].random = 0x9e3779b97f4a7c15 * (i + 1);
        if (i < VCPUS)
            villains[i].c = converter_make(&m.vm, i, m.handle);
    }
    uint64_t end = now_ns() + check_rounds(SECONDS) * 1000000000ull;
    unsigned bursts = 0, descriptors = open_descriptors();
    do {
        burst(villains);
        check_nothing_else_is_private();
        check_map_against_kernel(&villains[bursts % VCPUS].c, 2 + bursts % 4000);
        check_memory_of_the_process();
        CHECK_EQ(open_descriptors(), descriptors);
        bursts++;
    } while (now_ns() < end);
    print_counts(villains, bursts);

    /* Whatever it has left: each page can be had, as either. */
    convert_all(KVMPREP_SHARED);
    check_map_against_kernel(&villains[0].c, 4001);
    convert_all(KVMPREP_PRIVATE);
    check_map_against_kernel(&villains[0].c, 4002);
    check_nothing_else_is_private();
    for (unsigned i = 0; i < VCPUS; i++)
        converter_end(&m.vm, &villains[i].c);
    end_machine();
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {{"whatever_it_asks_for", whatever_it_asks_for}};
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
