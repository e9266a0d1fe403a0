/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Guests that convert their memory back and forth, for real: four vCPUs on four threads, each asking for
 * random ranges by hypercall or by touching pages, over memory of several backings with holes between.
 *
 * Each vCPU has areas of its own. There it is known at any time what every page of either kind holds, and
 * checked after every conversion: what the guest writes to shared memory is what the host sees, and the other
 * way round; private memory holds what the guest wrote, and the host has no memory for it; a page that comes
 * into sight is zero, unless its content was to be kept. In the areas that all vCPUs convert at will only
 * that nothing fails can be told. At the end the handle's map is what the kernel has.
 *
 * The areas do not end where huge pages do, so that neighbours are pre-faulted, converted and dropped by
 * others at the same time.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/converting.h"
#include "support/guest.h"
#include "support/host.h"
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#define VCPUS 4
#define CONVERSIONS 5000 /* of all vCPUs together */

/* ---- The guest's memory ---- */

#define SLOT_SIZE (12 * MIB)
#define SLOT_PAGES (SLOT_SIZE / PAGE)
#define SLOTS 4
#define WINDOW_PAGES (50 * MIB / PAGE)
#define MOST_PAGES 1024 /* of one conversion */
#define REPORT_SLOT 10
#define REPORT_GPA (16 * MIB)
#define REPORT_SIZE (16 * PAGE) /* of one vCPU */

/* Two that touch, and two with holes before them. */
static const uint64_t slot_starts[SLOTS] = {0, 12 * MIB, 26 * MIB, 38 * MIB};
static const struct {
    enum kind kind;
    bool has_memory_fd; /* the handle is told of the file */
} backings[SLOTS] = {{ANON_4K, false}, {ANON_THP, false}, {MEMFD_SHARED, true}, {MEMFD_SHARED, false}};

/* Areas: every fifth is everybody's, the others belong to one vCPU each. */
#define AREAS 10
#define AREA_PAGES (WINDOW_PAGES / AREAS - 1)

/* What is known of a page. Its words are what either side would show, 0 for memory that is not there. */
struct page {
    uint32_t visibility;
    uint32_t words[2];
};

struct machine {
    struct vm vm;
    struct kvmprep_vm *handle;
    struct kvmprep_error err;
    struct convertible slots[SLOTS];
    struct memory reports;
    struct page pages[WINDOW_PAGES];
};

static struct machine m; /* one at a time, and too large for a stack */

static uint64_t gpa_of(size_t page) {
    return MEMORY_GPA + page * PAGE;
}

/* The number of the slot that holds a page, or -1 in a hole. */
static int slot_at(size_t page) {
    for (int i = 0; i < SLOTS; i++)
        if (page >= slot_starts[i] / PAGE && page < slot_starts[i] / PAGE + SLOT_PAGES)
            return i;
    return -1;
}

static void *hva_of(size_t page) {
    int slot = slot_at(page);
    return (char *)m.slots[slot].memory.hva + page * PAGE - slot_starts[slot];
}

/* The two words of a page that are ever written. */
static volatile uint32_t *first_word(size_t page) {
    return hva_of(page);
}

static volatile uint32_t *last_word(size_t page) {
    return (uint32_t *)((char *)hva_of(page) + PAGE) - 1;
}

static void make_machine(void) {
    memset(&m, 0, sizeof(m));
    m.vm = vm_make_private();
    converting_begin(&m.vm);
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    config.vm_fd = m.vm.fd;
    CHECK_OK(kvmprep_vm_new(&config, &m.handle, &m.err), m.err);
    for (uint32_t i = 0; i < SLOTS; i++) {
        m.slots[i] = convertible_make(&m.vm, MEMORY_SLOT + i, MEMORY_GPA + slot_starts[i], backings[i].kind,
                                      SLOT_SIZE);
        if (!backings[i].has_memory_fd) {
            m.slots[i].slot.attributes &= ~(uint32_t)KVMPREP_MEMSLOT_MEMORY_FD;
            m.slots[i].slot.memory_fd = -1;
        }
        convertible_tell(m.handle, &m.slots[i]);
    }
    for (size_t page = 0; page < WINDOW_PAGES; page++)
        m.pages[page].visibility = slot_at(page) < 0 ? KVMPREP_SHARED : KVMPREP_PRIVATE;

    m.reports = memory_make(&m.vm, ANON_4K, VCPUS * REPORT_SIZE);
    struct kvmprep_memslot slot = slot_of(REPORT_SLOT, REPORT_GPA, &m.reports);
    CHECK_EQ(slot_set(&m.vm, &slot), 0);
    CHECK_OK(kvmprep_memslot_note(m.handle, &slot, &m.err), m.err);
}

static void end_machine(void) {
    CHECK_EQ(kvmprep_vm_free(m.handle), 0);
    for (int i = 0; i < SLOTS; i++)
        convertible_end(&m.slots[i]);
    memory_end(&m.reports);
    vm_end(&m.vm);
}

/* ---- One vCPU and its thread ---- */

struct span {
    size_t first, pages;
};

struct worker {
    pthread_t thread;
    bool (*round)(struct worker *w); /* one conversion and what belongs to it */
    struct converter c;
    const uint32_t *report; /* what the guest has gathered */
    unsigned number, seed, to_do;
    unsigned tags;
    atomic_uint done;
    uint64_t conversions, pages; /* asked for */
    uint64_t refused;            /* of these, for holes */
    uint64_t looked_at;          /* pages that the host had given up */
    char finding[512];           /* "": nothing was wrong */
};

__attribute__((format(printf, 2, 3))) static bool wrong(struct worker *w, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(w->finding, sizeof(w->finding), format, arguments);
    va_end(arguments);
    return false;
}

static unsigned random_below(struct worker *w, unsigned n) {
    return (unsigned)rand_r(&w->seed) % n;
}

/* A new tag: odd ones are the guest's, even ones the host's. */
static uint32_t new_tag(struct worker *w, bool is_hosts) {
    w->tags = w->tags % 1000 + 1;
    return w->tags * 2 + !is_hosts;
}

/* Sizes of each magnitude are as likely as those of any other. */
static struct span random_span(struct worker *w, unsigned area) {
    unsigned most = 1u << random_below(w, 11);
    struct span span = {.pages = most / 2 + random_below(w, most - most / 2) + 1};
    span.first = area * AREA_PAGES + random_below(w, (unsigned)(AREA_PAGES - span.pages + 1));
    return span;
}

static unsigned own_area(struct worker *w) {
    return w->number + (VCPUS + 1) * random_below(w, AREAS / (VCPUS + 1));
}

static bool has_hole(struct span span) {
    for (size_t page = span.first; page < span.first + span.pages; page++)
        if (slot_at(page) < 0)
            return true;
    return false;
}

/* Long spans are looked at in three places. */
#define SAMPLE 8
static unsigned samples_of(struct span span, struct span samples[3]) {
    if (span.pages <= 3 * SAMPLE) {
        samples[0] = span;
        return 1;
    }
    samples[0] = (struct span){span.first, SAMPLE};
    samples[1] = (struct span){span.first + span.pages / 2, SAMPLE};
    samples[2] = (struct span){span.first + span.pages - SAMPLE, SAMPLE};
    return 3;
}

/* The part of `span` from `from` on that lies in one slot; empty at the end. */
static struct span next_in_slots(struct span span, size_t from) {
    size_t end = span.first + span.pages, last;
    while (from < end && slot_at(from) < 0)
        from++;
    for (last = from; last < end && slot_at(last) == slot_at(from) && slot_at(last) >= 0;)
        last++;
    return (struct span){from, last - from};
}

#define FOR_EACH_PART(part, whole)                                                                           \
    for (struct span part = next_in_slots(whole, (whole).first); part.pages != 0;                            \
         part = next_in_slots(whole, part.first + part.pages))

/* ---- What memory holds ---- */

static const char *name_of(uint32_t visibility) {
    return visibility == KVMPREP_PRIVATE ? "private" : "shared";
}

/* The guest finds in each page what it should. */
static bool guest_finds(struct worker *w, struct span span, const char *when) {
    FOR_EACH_PART(part, span) {
        int result = guest_gather(&w->c, gpa_of(part.first), part.pages * PAGE);
        if (result != 0)
            return wrong(w, "%s: reading failed: %d", when, result);
        for (size_t i = 0; i < part.pages; i++) {
            const struct page *page = &m.pages[part.first + i];
            uint32_t expected = page->words[page->visibility];
            if (w->report[2 * i] != expected || w->report[2 * i + 1] != expected)
                return wrong(
                    w, "%s: page %zu, %s, slot %d: the guest finds %#x %#x, not %#x (other side %#x)", when,
                    part.first + i, name_of(page->visibility), slot_at(part.first + i), w->report[2 * i],
                    w->report[2 * i + 1], expected, page->words[!page->visibility]);
        }
    }
    return true;
}

/* The host finds what it should in shared memory, and in what is kept of memory that was shared. */
static bool host_finds(struct worker *w, struct span span, const char *when) {
    for (size_t page = span.first; page < span.first + span.pages; page++) {
        if (slot_at(page) < 0)
            continue;
        uint32_t expected = m.pages[page].words[KVMPREP_SHARED];
        if (*first_word(page) != expected || *last_word(page) != expected)
            return wrong(w, "%s: page %zu, %s, slot %d: the host finds %#x %#x, not %#x (other side %#x)",
                         when, page, name_of(m.pages[page].visibility), slot_at(page), *first_word(page),
                         *last_word(page), expected, m.pages[page].words[KVMPREP_PRIVATE]);
    }
    return true;
}

static bool guest_writes(struct worker *w, struct span span) {
    uint32_t tag = new_tag(w, false);
    FOR_EACH_PART(part, span) {
        int result = guest_fill(&w->c, gpa_of(part.first), part.pages * PAGE, tag);
        if (result != 0)
            return wrong(w, "writing failed: %d", result);
        for (size_t page = part.first; page < part.first + part.pages; page++)
            m.pages[page].words[m.pages[page].visibility] = word_of(gpa_of(page), tag);
    }
    return true;
}

static void host_writes(struct worker *w, struct span span) {
    uint32_t tag = new_tag(w, true);
    for (size_t page = span.first; page < span.first + span.pages; page++)
        if (slot_at(page) >= 0) {
            *first_word(page) = *last_word(page) = word_of(gpa_of(page), tag);
            m.pages[page].words[KVMPREP_SHARED] = word_of(gpa_of(page), tag);
        }
}

/* ---- One conversion, and what must be true after it ---- */

struct conversion {
    struct span span;
    uint32_t to;
    bool by_touching, is_kept, has_prefault;
    bool has_content; /* the span is the vCPU's own */
    bool is_refused;  /* a hole cannot be private */
};

static struct conversion random_conversion(struct worker *w) {
    struct conversion v = {.has_content = random_below(w, 4) != 0};
    v.span = random_span(w, v.has_content ? own_area(w) : VCPUS + (VCPUS + 1) * random_below(w, 2));
    v.to = random_below(w, 2);
    v.by_touching = random_below(w, 8) == 0;
    v.is_kept = random_below(w, 5) == 0;
    v.has_prefault = random_below(w, 5) == 0;
    if (v.by_touching && v.span.pages > 16)
        v.span.pages = 16; /* each page is two exits and a conversion */
    /* Holes cannot be touched at all; asking for one is answered. */
    if (v.by_touching && has_hole(v.span))
        v.by_touching = false;
    v.is_refused = v.to == KVMPREP_PRIVATE && has_hole(v.span);
    return v;
}

/* What a conversion does to what is known of its pages. */
static void note(const struct conversion *v) {
    for (size_t i = v->span.first; i < v->span.first + v->span.pages; i++) {
        struct page *page = &m.pages[i];
        if (slot_at(i) < 0 || page->visibility == v->to)
            continue;
        if (v->to == KVMPREP_SHARED || !v->is_kept)
            page->words[page->visibility] = 0;
        page->visibility = v->to;
    }
}

static bool convert_by_touching(struct worker *w, const struct conversion *v) {
    uint32_t tag = new_tag(w, false);
    int result = guest_touch_as(&w->c, gpa_of(v->span.first), v->span.pages * PAGE, v->to, tag);
    if (result != 0)
        return wrong(w, "touching as %s failed: %d, %s", name_of(v->to), result, w->c.err.message);
    if (v->has_content) {
        note(v);
        for (size_t page = v->span.first; page < v->span.first + v->span.pages; page++)
            m.pages[page].words[v->to] = word_of(gpa_of(page), tag);
    }
    return true;
}

static bool convert_by_hypercall(struct worker *w, const struct conversion *v) {
    uint64_t answer, attributes = v->to == KVMPREP_PRIVATE ? TO_PRIVATE : TO_SHARED;
    int result = guest_convert(&w->c, gpa_of(v->span.first), v->span.pages * PAGE, attributes, &answer);
    if (result != 0)
        return wrong(w, "the hypercall failed: %d %s", result, w->c.odd);
    if (v->is_refused) {
        w->refused++;
        if (answer != EINVAL || w->c.result != -EINVAL || w->c.err.reason != KVMPREP_REASON_NO_MEMSLOT)
            return wrong(w, "a hole was made private: %d, %s", w->c.result, w->c.err.message);
        return true;
    }
    if (answer != 0 || w->c.result != 0)
        return wrong(w, "to %s: %d, the guest is told %llu: %s", name_of(v->to), w->c.result,
                     (unsigned long long)answer, w->c.err.message);
    if (v->has_content)
        note(v);
    return true;
}

static bool convert(struct worker *w, const struct conversion *v) {
    w->c.opts.steps = KVMPREP_CONVERT_ATTRIBUTES | KVMPREP_CONVERT_DROP;
    if (v->has_prefault)
        w->c.opts.steps |= KVMPREP_CONVERT_PREFAULT;
    w->c.opts.flags = v->is_kept ? KVMPREP_CONVERT_KEEP_SHARED : 0;
    w->conversions++;
    w->pages += v->span.pages;
    return v->by_touching ? convert_by_touching(w, v) : convert_by_hypercall(w, v);
}

/*
 * The host has given up the memory of pages that were shared before and are private now. Of transparent huge
 * pages that cannot be told: one comes whole when a page of it is touched, or the kernel makes it of what is
 * there.
 */
static bool is_given_up(struct worker *w, const struct conversion *v, const bool *was_shared) {
    unsigned char resident[MOST_PAGES];
    FOR_EACH_PART(part, v->span) {
        if (backings[slot_at(part.first)].kind == ANON_THP)
            continue;
        if (mincore(hva_of(part.first), part.pages * PAGE, resident) != 0)
            return wrong(w, "mincore: %s", strerror(errno));
        for (size_t i = 0; i < part.pages; i++) {
            if (!was_shared[part.first + i - v->span.first])
                continue;
            w->looked_at++;
            if (resident[i] & 1)
                return wrong(w, "page %zu of slot %d is private and the host still has it", part.first + i,
                             slot_at(part.first));
        }
    }
    return true;
}

static bool check_private(struct worker *w, const struct conversion *v, struct span sample) {
    if (!guest_finds(w, sample, "made private") || !guest_writes(w, sample) ||
        !guest_finds(w, sample, "written, private"))
        return false;
    /* Looking would bring memory back where none was kept. */
    return !v->is_kept || host_finds(w, sample, "kept");
}

static bool check_shared(struct worker *w, struct span sample) {
    if (!guest_finds(w, sample, "made shared") || !host_finds(w, sample, "made shared") ||
        !guest_writes(w, sample) || !host_finds(w, sample, "written by the guest"))
        return false;
    host_writes(w, sample);
    return guest_finds(w, sample, "written by the host");
}

/* Writes where others convert at the same time: what they make of it is not known, only that it can be done.
 */
static bool write_at_will(struct worker *w, struct span span) {
    struct span samples[3];
    unsigned n = samples_of(span, samples);
    for (unsigned i = 0; i < n; i++)
        FOR_EACH_PART(part, samples[i]) {
            int result = guest_fill(&w->c, gpa_of(part.first), part.pages * PAGE, new_tag(w, false));
            if (result != 0)
                return wrong(w, "writing to what all convert failed: %d, %s", result, w->c.err.message);
        }
    return true;
}

static bool convert_and_check(struct worker *w) {
    struct conversion v = random_conversion(w);
    struct span samples[3];
    bool was_shared[MOST_PAGES];
    if (!v.has_content)
        return convert(w, &v) && (v.is_refused || write_at_will(w, v.span));
    for (size_t i = 0; i < v.span.pages; i++)
        was_shared[i] = m.pages[v.span.first + i].visibility == KVMPREP_SHARED;
    if (!convert(w, &v))
        return false;
    if (v.to == KVMPREP_PRIVATE && !v.is_kept && !v.is_refused && !is_given_up(w, &v, was_shared))
        return false;
    unsigned n = samples_of(v.span, samples);
    for (unsigned i = 0; i < n; i++) {
        bool is_right = v.is_refused              ? guest_finds(w, samples[i], "refused")
                        : v.to == KVMPREP_PRIVATE ? check_private(w, &v, samples[i])
                                                  : check_shared(w, samples[i]);
        if (!is_right)
            return false;
    }
    struct span other = random_span(w, own_area(w));
    other.pages = other.pages > SAMPLE ? SAMPLE : other.pages;
    return guest_finds(w, other, "another range");
}

/* ---- All vCPUs ---- */

static void *work(void *argument) {
    struct worker *w = argument;
    while (atomic_load(&w->done) < w->to_do && w->finding[0] == 0) {
        if (!w->round(w))
            break;
        atomic_fetch_add(&w->done, 1);
    }
    return NULL;
}

static void make_worker(struct worker *w, unsigned number) {
    *w = (struct worker){.number = number, .seed = number + 1};
    w->c = converter_make(&m.vm, number, m.handle);
    w->c.report = REPORT_GPA + number * REPORT_SIZE;
    w->report = (const uint32_t *)((char *)m.reports.hva + number * REPORT_SIZE);
}

static void start_worker(struct worker *w, bool (*round)(struct worker *w), unsigned to_do) {
    w->round = round;
    w->to_do = to_do;
    atomic_store(&w->done, 0);
    CHECK_EQ(pthread_create(&w->thread, NULL, work, w), 0);
}

/* Waits for a worker's end; one that makes no progress hangs, and the watch of check.h says so. */
static void join_worker(struct worker *w) {
    unsigned seen = 0, waits = 0;
    while (pthread_tryjoin_np(w->thread, NULL) != 0) {
        unsigned done = atomic_load(&w->done);
        sleep_us(10000);
        if (done != seen) {
            check_is_alive();
            waits = 0;
        } else if (++waits % 300 == 0) {
            converter_kick(w->thread);
        }
        seen = done;
    }
}

static void join_workers(struct worker *workers, unsigned n) {
    for (unsigned i = 0; i < n; i++)
        join_worker(&workers[i]);
    for (unsigned i = 0; i < n; i++)
        if (workers[i].finding[0] != 0)
            check_failed(__FILE__, __LINE__, "vCPU %u, conversion %u: %s", i, atomic_load(&workers[i].done),
                         workers[i].finding);
}

static void end_workers(struct worker *workers, unsigned n) {
    for (unsigned i = 0; i < n; i++)
        converter_end(&m.vm, &workers[i].c);
}

/* What the workers have met. */
struct counts {
    uint64_t conversions, pages, refused, hypercalls, again, touches, memory_faults, looked_at, lost;
};

static struct counts print_counts(const struct worker *workers, unsigned n) {
    struct counts all = {0};
    for (unsigned i = 0; i < n; i++) {
        const struct worker *w = &workers[i];
        all.conversions += w->conversions;
        all.pages += w->pages;
        all.refused += w->refused;
        all.looked_at += w->looked_at;
        all.lost += w->c.lost;
        all.hypercalls += w->c.hypercalls;
        all.again += w->c.again;
        all.touches += w->c.touches;
        all.memory_faults += w->c.memory_faults;
    }
    printf("  %" PRIu64 " conversions of %" PRIu64 " pages: %" PRIu64 " hypercalls (%" PRIu64
           " told to come again), %" PRIu64 " touches, %" PRIu64 " memory faults of KVM's own; %" PRIu64
           " holes refused; %" PRIu64 " pages given up by the host; no errors\n",
           all.conversions, all.pages, all.hypercalls, all.again, all.touches, all.memory_faults, all.refused,
           all.looked_at);
    if (all.lost != 0)
        printf("  the emulator has lost a guest's registers %" PRIu64 " times\n", all.lost);
    return all;
}

/* ---- The map, against the kernel ---- */

#define HOST_TAG 2
#define GUEST_TAG 3

/*
 * Marks every page on the host's side, has the guest write each, wherever that goes, and looks whether the
 * host sees it: that is what the kernel has.
 */
static void check_map_against_kernel(struct worker *w) {
    uint64_t wrong_pages = 0, private_pages = 0, runs = 0;
    struct kvmprep_visibility_run run = {.gpa = gpa_of(0)};
    struct span all = {0, WINDOW_PAGES};
    check_is_alive();
    FOR_EACH_PART(part, all) {
        for (size_t page = part.first; page < part.first + part.pages; page++)
            *first_word(page) = word_of(gpa_of(page), HOST_TAG);
        CHECK_EQ(guest_fill(&w->c, gpa_of(part.first), part.pages * PAGE, GUEST_TAG), 0);
    }
    for (size_t page = 0; page < WINDOW_PAGES; page++) {
        if (gpa_of(page) >= run.gpa + run.size) {
            CHECK_OK(kvmprep_visibility_next(m.handle, gpa_of(page), &run, &m.err), m.err);
            CHECK_EQ(run.gpa, gpa_of(page));
            runs++;
        }
        uint32_t kernels = KVMPREP_SHARED;
        if (slot_at(page) >= 0 && *first_word(page) != word_of(gpa_of(page), GUEST_TAG)) {
            CHECK_EQ(*first_word(page), word_of(gpa_of(page), HOST_TAG));
            kernels = KVMPREP_PRIVATE;
        }
        private_pages += kernels == KVMPREP_PRIVATE;
        wrong_pages += run.visibility != kernels;
    }
    printf("  map against kernel: %" PRIu64 " runs, %" PRIu64 " private pages of %llu, %" PRIu64 " wrong\n",
           runs, private_pages, WINDOW_PAGES, wrong_pages);
    CHECK_EQ(wrong_pages, 0);
    CHECK(private_pages != 0 && private_pages < WINDOW_PAGES);
}

static void back_and_forth(void) {
    struct worker workers[VCPUS];
    make_machine();
    for (unsigned i = 0; i < VCPUS; i++)
        make_worker(&workers[i], i);
    for (unsigned i = 0; i < VCPUS; i++)
        start_worker(&workers[i], convert_and_check, check_rounds(CONVERSIONS) / VCPUS);
    join_workers(workers, VCPUS);
    struct counts counts = print_counts(workers, VCPUS);
    CHECK(counts.refused != 0 && counts.touches != 0 && counts.looked_at != 0);
    check_map_against_kernel(&workers[0]);
    end_workers(workers, VCPUS);
    end_machine();
}

/* ---- Exits of KVM's own ---- */

/* What all four vCPUs are at: small, so that they meet. */
static const struct span contested = {.first = 300, .pages = 64};

static bool convert_all_of_it(struct worker *w) {
    struct conversion v = {.span = contested, .to = random_below(w, 2)};
    return convert(w, &v);
}

static bool write_all_of_it(struct worker *w) {
    return write_at_will(w, contested);
}

/* Whether an access meets a conversion is chance, and on a busy machine a small one: so many times the
 * rounds, until one has. */
#define PATIENCE 25

/*
 * Memory that becomes something else while a guest touches it makes KVM exit, saying as what it was touched;
 * and that is what it is made.
 */
static void converted_under_an_access(void) {
    struct worker workers[VCPUS];
    uint64_t memory_faults = 0;
    make_machine();
    for (unsigned i = 0; i < VCPUS; i++)
        make_worker(&workers[i], i);
    for (unsigned time = 0; memory_faults == 0 && time < PATIENCE; time++) {
        for (unsigned i = 0; i < VCPUS; i++)
            start_worker(&workers[i], i % 2 == 0 ? convert_all_of_it : write_all_of_it, check_rounds(2000));
        join_workers(workers, VCPUS);
        memory_faults = print_counts(workers, VCPUS).memory_faults;
    }
    CHECK(memory_faults != 0);
    check_map_against_kernel(&workers[0]);
    end_workers(workers, VCPUS);
    end_machine();
}

/* ---- With slots that come and go ---- */

/* Only asks: memory of which nobody knows whether it is there cannot be looked at. */
static bool convert_at_will(struct worker *w) {
    struct conversion v = random_conversion(w);
    uint64_t answer;
    v.span = random_span(w, random_below(w, AREAS));
    w->c.opts.steps =
        v.has_prefault ? KVMPREP_CONVERT_ATTRIBUTES | KVMPREP_CONVERT_DROP | KVMPREP_CONVERT_PREFAULT : 0;
    int result = guest_convert(&w->c, gpa_of(v.span.first), v.span.pages * PAGE,
                               v.to == KVMPREP_PRIVATE ? TO_PRIVATE : TO_SHARED, &answer);
    w->conversions++;
    w->pages += v.span.pages;
    if (result != 0)
        return wrong(w, "the hypercall failed: %d %s", result, w->c.odd);
    if (answer == EINVAL && v.to == KVMPREP_PRIVATE && w->c.err.reason == KVMPREP_REASON_NO_MEMSLOT) {
        w->refused++;
        return true;
    }
    if (answer != 0)
        return wrong(w, "to %s: %d, the guest is told %llu: %s", name_of(v.to), w->c.result,
                     (unsigned long long)answer, w->c.err.message);
    return true;
}

/* A slot is deleted and made again while all vCPUs convert its memory: nobody hangs, and the map stays true.
 */
static void slots_come_and_go(void) {
    struct worker workers[VCPUS];
    struct kvmprep_memslot deletion = KVMPREP_MEMSLOT_INIT;
    unsigned changes = check_rounds(40), seed = 1;
    make_machine();
    for (unsigned i = 0; i < VCPUS; i++)
        make_worker(&workers[i], i);
    for (unsigned i = 0; i < VCPUS; i++)
        start_worker(&workers[i], convert_at_will, check_rounds(500));
    for (unsigned i = 0; i < changes; i++) {
        const struct kvmprep_memslot *slot = &m.slots[(unsigned)rand_r(&seed) % SLOTS].slot;
        deletion.slot = slot->slot;
        sleep_us((unsigned)rand_r(&seed) % 20000);
        CHECK_OK(kvmprep_memslot_set(m.handle, &deletion, &m.err), m.err);
        sleep_us((unsigned)rand_r(&seed) % 2000);
        CHECK_OK(kvmprep_memslot_set(m.handle, slot, &m.err), m.err);
        check_is_alive();
    }
    join_workers(workers, VCPUS);
    CHECK(print_counts(workers, VCPUS).again != 0); /* else no change has met a conversion */
    check_map_against_kernel(&workers[0]);
    end_workers(workers, VCPUS);
    end_machine();
}

/* ---- While all memory is being populated ---- */

/* Converts, and leaves all that it has touched ready. */
static bool convert_and_prefault(struct worker *w) {
    struct conversion v = random_conversion(w);
    v.has_content = v.by_touching = v.is_kept = false;
    v.has_prefault = true;
    return convert(w, &v);
}

/* Runs jobs over all memory, on two vCPUs, until the workers are done. */
static unsigned populate_meanwhile(struct worker *populators, struct worker *workers, unsigned n) {
    int vcpus[2] = {populators[0].c.vcpu.fd, populators[1].c.vcpu.fd};
    unsigned jobs = 0;
    bool is_over = false;
    while (!is_over) {
        struct kvmprep_populate_result result;
        struct kvmprep_job *job;
        is_over = true; /* when all was over before the last job began */
        for (unsigned i = 0; i < n; i++)
            is_over = is_over && (atomic_load(&workers[i].done) == workers[i].to_do || workers[i].finding[0]);
        CHECK_OK(kvmprep_job_new(m.handle, NULL, 0, NULL, &job, &m.err), m.err);
        CHECK_OK(kvmprep_job_spawn(job, vcpus, 2, 1, &m.err), m.err);
        CHECK_OK(kvmprep_job_wait(job, -1, &result, sizeof(result), &m.err), m.err);
        CHECK_EQ(result.remaining, 0);
        CHECK_EQ(kvmprep_job_free(job), 0);
        jobs++;
        check_is_alive();
    }
    return jobs;
}

/* The right side of every page is ready, and only that. */
static void check_all_is_ready(struct worker *w) {
    struct kvmprep_visibility_run run = {.gpa = 0};
    for (int i = 0; i < SLOTS; i++) {
        const struct convertible *slot = &m.slots[i];
        uint64_t faults = faults_of_touch(&w->c.vcpu, TOUCH_WRITE, slot->slot.gpa, SLOT_SIZE);
        printf("  %s: %" PRIu64 " faults\n", kind_name(slot->memory.kind), faults);
        if (faults > 1) /* the code page's */
            check_failed(__FILE__, __LINE__, "the guest took %" PRIu64 " faults in slot %d", faults, i);
        if (slot->memory.kind != ANON_4K)
            continue;
        for (uint64_t gpa = slot->slot.gpa; gpa < slot->slot.gpa + SLOT_SIZE; gpa = run.gpa + run.size) {
            CHECK_OK(kvmprep_visibility_next(m.handle, gpa, &run, &m.err), m.err);
            uint64_t end = slot->slot.gpa + SLOT_SIZE, size = run.size < end - gpa ? run.size : end - gpa;
            CHECK_EQ(present_bytes((char *)slot->memory.hva + (gpa - slot->slot.gpa), size),
                     run.visibility == KVMPREP_SHARED ? size : 0);
        }
    }
}

static void populated_meanwhile(void) {
    struct worker workers[VCPUS];
    make_machine();
    if (!has_pre_fault(&m.vm))
        check_skipped("no KVM_PRE_FAULT_MEMORY");
    for (unsigned i = 0; i < VCPUS; i++)
        make_worker(&workers[i], i);
    for (unsigned i = 0; i < 2; i++)
        start_worker(&workers[i], convert_and_prefault, check_rounds(150));
    unsigned jobs = populate_meanwhile(&workers[2], workers, 2);
    join_workers(workers, 2);
    printf("  %u jobs meanwhile\n", jobs);
    print_counts(workers, 2);
    check_all_is_ready(&workers[0]);
    check_map_against_kernel(&workers[0]);
    end_workers(workers, VCPUS);
    end_machine();
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"back_and_forth", back_and_forth},
        {"converted_under_an_access", converted_under_an_access},
        {"slots_come_and_go", slots_come_and_go},
        {"populated_meanwhile", populated_meanwhile},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
