/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memslots that change while their memory is being populated, and what a change costs.
 *
 * A change that is announced (kvmprep_memslot_set, or kvmprep_memslot_changing and _note around the VMM's own
 * ioctl) never hangs, never makes a population fail, and leaves the memory to the VMM: once the announcement
 * has returned, no worker touches it. A change that is not announced ends with an answer of the kernel's
 * where the kernel has one, and on Linux 6.12, which has none, with a signal. Deleting a slot costs the
 * mappings of all others, unless they are kept.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/guest.h"
#include "support/host.h"
#include "support/setting.h"
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#define SIZE (16 * MIB)
#define PAGES (SIZE / PAGE)
#define OTHER_SLOT 2
#define OTHER_GPA (3ull << 30)

static const struct kvmprep_range all = {.gpa = MEMORY_GPA, .size = SIZE};
static const struct kvmprep_range upper_half = {.gpa = MEMORY_GPA + SIZE / 2, .size = SIZE / 2};

static struct kvmprep_memslot deletion_of(uint32_t slot) {
    struct kvmprep_memslot deletion = KVMPREP_MEMSLOT_INIT;
    deletion.slot = slot;
    return deletion;
}

static struct kvmprep_coverage coverage_of(struct setting *s, struct kvmprep_range range) {
    struct kvmprep_coverage coverage;
    CHECK_OK(kvmprep_get_coverage(s->handle, &range, &coverage, sizeof(coverage), &s->err), s->err);
    return coverage;
}

/* Populates all slots on the main thread. */
static struct kvmprep_populate_result populate(struct setting *s, uint32_t flags) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    opts.vcpu_fd = s->vcpus[0].fd;
    opts.flags = flags;
    CHECK_OK(kvmprep_populate(s->handle, NULL, 0, &opts, &result, sizeof(result), &s->err), s->err);
    return result;
}

/* Puts fresh memory, of which nothing is present, where the setting's was. */
static void renew_memory(struct setting *s) {
    void *fresh =
        mmap(s->memory.hva, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(fresh == s->memory.hva);
    madvise(s->memory.hva, SIZE, MADV_NOHUGEPAGE);
}

/* On a busy machine who is to be met may get little time, or all of its time at once: so many times the
 * rounds, until a change has met somebody. */
#define PATIENCE 25

static bool goes_on(unsigned round, unsigned rounds, bool has_met) {
    check_is_alive();
    return round < rounds || (!has_met && round < PATIENCE * rounds);
}

/* ---- Threads that populate all memory again and again ---- */

/*
 * How slots are changed: this one, with an announcement; this one, without; another one, with an
 * announcement.
 */
enum manners { ANNOUNCED, IN_SILENCE, ANOTHER_SLOT };

struct populator {
    pthread_t thread;
    struct setting *setting;
    int vcpu;
    enum manners manners; /* of those who change slots */
    atomic_bool *stop;
    unsigned rounds;
    atomic_uint met;            /* populations that met a change */
    atomic_uint interrupted;    /* of these: ended by a signal */
    unsigned gave_up;           /* of these: had waited too long for another slot's change */
    const char *what_was_wrong; /* NULL: nothing */
    int result;
    struct kvmprep_error err;
};

/* Changes of another slot are waited for, but no longer than two seconds. */
static bool has_given_up(const struct populator *p) {
    return p->manners == ANOTHER_SLOT && p->result == -EAGAIN &&
           p->err.reason == KVMPREP_REASON_RETRIES_EXHAUSTED;
}

/* What was wrong with one population, or NULL. */
static const char *judge(const struct populator *p, const struct kvmprep_populate_result *r) {
    const struct kvmprep_error *err = &p->err;
    if (p->result == 0) {
        if (p->manners == ANOTHER_SLOT)
            return r->stage2 == SIZE && r->remaining == 0 ? NULL : "another slot's change cost it memory";
        if (r->bytes != 0 && r->bytes != SIZE)
            return "it was neither of the slot nor of nothing";
        /* A chunk that was under way when its slot was announced may count as both. */
        if (r->stage2 + r->remaining < r->bytes)
            return "memory is neither populated nor remaining";
        if (r->remaining != 0 && p->manners == IN_SILENCE)
            return "memory was given up, though nothing was announced";
        return NULL;
    }
    if (has_given_up(p))
        return NULL;
    if (p->manners != IN_SILENCE)
        return "it failed, though all was announced";
    if (r->remaining == 0)
        return "it failed, and nothing remains";
    if (p->result == -EINTR && err->reason == KVMPREP_REASON_INTERRUPTED)
        return NULL;
    bool is_kernels_answer = (p->result == -ENOENT && err->reason == KVMPREP_REASON_NO_MEMSLOT) ||
                             (p->result == -EAGAIN && err->reason == KVMPREP_REASON_RETRIES_EXHAUSTED);
    if (!is_kernels_answer)
        return "it failed for another reason than the missing slot";
    if (err->stage != KVMPREP_STAGE_STAGE2 || err->slot != MEMORY_SLOT || err->size == 0 ||
        err->gpa < MEMORY_GPA || err->gpa + err->size > MEMORY_GPA + SIZE)
        return "its error does not name what it met";
    return NULL;
}

static void *populate_again_and_again(void *argument) {
    struct populator *p = argument;
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    opts.vcpu_fd = p->vcpu;
    while (!atomic_load(p->stop) && p->what_was_wrong == NULL) {
        bool is_named = p->manners == ANOTHER_SLOT;
        p->result = kvmprep_populate(p->setting->handle, is_named ? &all : NULL, is_named, &opts, &result,
                                     sizeof(result), &p->err);
        p->what_was_wrong = judge(p, &result);
        p->rounds++;
        p->met += p->result != 0 || result.lost != 0 || (result.remaining != 0 && result.remaining != SIZE);
        p->interrupted += p->result == -EINTR;
        p->gave_up += has_given_up(p);
    }
    return NULL;
}

static void start(struct populator *p, struct setting *s, int vcpu, enum manners manners, atomic_bool *stop) {
    *p = (struct populator){.setting = s, .vcpu = s->vcpus[vcpu].fd, .manners = manners, .stop = stop};
    CHECK_EQ(pthread_create(&p->thread, NULL, populate_again_and_again, p), 0);
}

static void join(struct populator *p) {
    CHECK_EQ(pthread_join(p->thread, NULL), 0);
    if (p->what_was_wrong != NULL)
        check_failed(__FILE__, __LINE__, "a population: %s: %d %s %s", p->what_was_wrong, p->result,
                     kvmprep_reason_name(p->err.reason), p->err.message);
}

/* Populations that met a change. */
static unsigned met(struct populator *populators) {
    return atomic_load(&populators[0].met) + atomic_load(&populators[1].met);
}

/* ---- Slots deleted and made while threads populate them ---- */

typedef void change_fn(struct setting *s, const struct kvmprep_memslot *slot);

static void change_by_the_library(struct setting *s, const struct kvmprep_memslot *slot) {
    CHECK_OK(kvmprep_memslot_set(s->handle, slot, &s->err), s->err);
}

static void change_by_own_ioctl(struct setting *s, const struct kvmprep_memslot *slot) {
    CHECK_OK(kvmprep_memslot_changing(s->handle, slot->slot, &s->err), s->err);
    CHECK_EQ(slot_set(&s->vm, slot), 0);
    CHECK_OK(kvmprep_memslot_note(s->handle, slot, &s->err), s->err);
}

/* The memory goes too, and comes anew: a worker that still touched it, or looked at it, would fail. */
static void change_with_its_memory(struct setting *s, const struct kvmprep_memslot *slot) {
    CHECK_OK(kvmprep_memslot_changing(s->handle, slot->slot, &s->err), s->err);
    if (slot->size == 0)
        CHECK_EQ(mprotect(s->memory.hva, SIZE, PROT_NONE), 0);
    else
        renew_memory(s);
    CHECK_EQ(slot_set(&s->vm, slot), 0);
    CHECK_OK(kvmprep_memslot_note(s->handle, slot, &s->err), s->err);
}

static void change_in_silence(struct setting *s, const struct kvmprep_memslot *slot) {
    CHECK_EQ(slot_set(&s->vm, slot), 0);
}

static void race(change_fn *change, enum manners manners) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct kvmprep_memslot deletion = deletion_of(MEMORY_SLOT);
    struct populator populators[2];
    atomic_bool stop = false;
    unsigned seed = 1, rounds = check_rounds(40);
    for (int i = 0; i < 2; i++)
        start(&populators[i], &s, i, manners, &stop);
    for (unsigned round = 0; goes_on(round, rounds, met(populators) > 0); round++) {
        sleep_us((unsigned)rand_r(&seed) % 8000);
        change(&s, &deletion);
        sleep_us((unsigned)rand_r(&seed) % 1000);
        change(&s, &s.slot);
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 2; i++)
        join(&populators[i]);
    printf("  %u of %u populations met a change\n", met(populators),
           populators[0].rounds + populators[1].rounds);
    /* Else the changes have missed every population, and nothing was shown. */
    CHECK(met(populators) > 0);

    struct kvmprep_populate_result result = populate(&s, 0);
    check_all_is_done(&s, &result);
    setting_end(&s);
}

/* Where changes take that long, who waits may be awake only during changes, and give up. */
#define SLOW_NS 100000000ull

static uint64_t time_of_change(struct setting *s, const struct kvmprep_memslot *slot) {
    uint64_t began = now_ns();
    change_by_own_ioctl(s, slot);
    return now_ns() - began;
}

/* Deleting a slot drops the mappings of all; who populates others at that time must not hang, and is told. */
static void another_slot_deleted_meanwhile(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct memory other = memory_make(&s.vm, ANON_4K, PAGE);
    struct kvmprep_memslot slot = slot_of(OTHER_SLOT, OTHER_GPA, &other), deletion = deletion_of(OTHER_SLOT);
    struct populator populators[2];
    atomic_bool stop = false;
    unsigned seed = 1, rounds = check_rounds(40), slow = 0;
    for (int i = 0; i < 2; i++)
        start(&populators[i], &s, i, ANOTHER_SLOT, &stop);
    for (unsigned round = 0; goes_on(round, rounds, met(populators) > 0); round++) {
        sleep_us((unsigned)rand_r(&seed) % 8000);
        const struct kvmprep_memslot *changes[2] = {&slot, &deletion};
        for (int i = 0; i < 2; i++)
            slow += time_of_change(&s, changes[i]) >= SLOW_NS;
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 2; i++)
        join(&populators[i]);
    printf("  %u of %u populations met a change\n", met(populators),
           populators[0].rounds + populators[1].rounds);
    CHECK(met(populators) > 0);
    CHECK(slow > 0 || populators[0].gave_up + populators[1].gave_up == 0);
    struct kvmprep_populate_result result = populate(&s, 0);
    check_all_is_done(&s, &result);
    memory_end(&other);
    setting_end(&s);
}

/*
 * A vCPU that has pre-faulted, and has not run since a slot was deleted, has the root of page tables that are
 * no more. Linux 6.11 to 6.14 do not look at that in a pre-fault, which then hangs, and in a library thread,
 * whose signals are blocked, for ever.
 */
static void populating_again_after_a_deletion(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct memory other = memory_make(&s.vm, ANON_4K, PAGE);
    struct kvmprep_memslot slot = slot_of(OTHER_SLOT, OTHER_GPA, &other), deletion = deletion_of(OTHER_SLOT);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    int vcpus[2] = {s.vcpus[0].fd, s.vcpus[1].fd};
    opts.vcpu_fds = vcpus;
    opts.n_vcpu_fds = 2;
    for (int i = 0; i < 3; i++) {
        CHECK_OK(kvmprep_populate(s.handle, &all, 1, &opts, &result, sizeof(result), &s.err), s.err);
        CHECK_EQ(result.stage2, SIZE);
        CHECK_EQ(result.lost, 0);
        /* Of a slot that nobody has told the handle of. */
        CHECK_EQ(slot_set(&s.vm, &slot), 0);
        CHECK_EQ(slot_set(&s.vm, &deletion), 0);
    }
    struct kvmprep_range range = all; /* the single call, too */
    CHECK_OK(kvmprep_vcpu_pre_fault(s.vcpus[1].fd, &range, &s.err), s.err);
    CHECK_EQ(range.size, 0);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA, SIZE), 1);
    memory_end(&other);
    setting_end(&s);
}

static void slots_set_by_the_library(void) {
    race(change_by_the_library, ANNOUNCED);
}

static void slots_announced_and_noted(void) {
    race(change_by_own_ioctl, ANNOUNCED);
}

static void slots_that_take_their_memory_along(void) {
    race(change_with_its_memory, ANNOUNCED);
}

/* Linux 6.18 answers a pre-fault on a slot that is being deleted; before, both wait for each other. */
static bool kernel_answers(void) {
    return kernel_release() >= 6018;
}

static void slots_changed_in_silence(void) {
    if (!kernel_answers())
        check_skipped("this kernel's pre-fault waits for ever on a slot that is being deleted");
    race(change_in_silence, IN_SILENCE);
}

/* Where the kernel has no answer, the two do wait for each other; a signal to the populating thread ends it.
 */
struct rescuer {
    pthread_t thread;
    pthread_t populator;
    atomic_uint changes_begun, changes_ended;
    atomic_bool stop;
    atomic_uint rescues;
};

static void come_out(int signal) {
    (void)signal;
}

/* A deletion may also be slow of itself, on a busy machine: the signal then comes to a population that waits
 * for nothing, and need not interrupt it. */
static void *rescue(void *argument) {
    struct rescuer *r = argument;
    while (!atomic_load(&r->stop)) {
        unsigned begun = atomic_load(&r->changes_begun);
        sleep_us(300000);
        /* One and the same deletion is still not done. */
        if (begun == atomic_load(&r->changes_begun) && begun != atomic_load(&r->changes_ended)) {
            pthread_kill(r->populator, SIGUSR1);
            atomic_fetch_add(&r->rescues, 1);
        }
    }
    return NULL;
}

static void a_signal_ends_what_hangs(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    if (kernel_answers())
        check_skipped("this kernel answers a pre-fault on a slot that is being deleted");
    struct sigaction action = {.sa_handler = come_out};
    CHECK_EQ(sigaction(SIGUSR1, &action, NULL), 0);
    struct kvmprep_memslot deletion = deletion_of(MEMORY_SLOT);
    struct populator populator;
    struct rescuer rescuer = {.stop = false};
    atomic_bool stop = false;
    start(&populator, &s, 0, IN_SILENCE, &stop);
    rescuer.populator = populator.thread;
    CHECK_EQ(pthread_create(&rescuer.thread, NULL, rescue, &rescuer), 0);
    /* Whether the two meet is chance: a deletion of a few milliseconds, and a population that comes and goes.
     */
    unsigned most = check_rounds(300), round;
    for (round = 0; round < most && atomic_load(&populator.interrupted) == 0; round++) {
        check_is_alive();
        sleep_us(5000);
        atomic_fetch_add(&rescuer.changes_begun, 1);
        change_in_silence(&s, &deletion);
        atomic_fetch_add(&rescuer.changes_ended, 1);
        change_in_silence(&s, &s.slot);
    }
    /* First who sends signals, while the thread that gets them is there. */
    atomic_store(&rescuer.stop, true);
    CHECK_EQ(pthread_join(rescuer.thread, NULL), 0);
    atomic_store(&stop, true);
    join(&populator);
    if (atomic_load(&rescuer.rescues) == 0)
        check_skipped("none of %u deletions met a population", round);
    printf("  of %u deletions one hung until a signal came; %u signals were sent\n", round,
           atomic_load(&rescuer.rescues));
    CHECK(atomic_load(&populator.interrupted) > 0);
    struct kvmprep_populate_result result = populate(&s, 0);
    check_all_is_done(&s, &result);
    setting_end(&s);
}

/* ---- Memory let go while library threads work on it ---- */

/* Starts a job over fresh memory, on both vCPUs, and returns it in the middle of its work. */
static struct kvmprep_job *job_at_work(struct setting *s, unsigned *seed) {
    int vcpus[2] = {s->vcpus[0].fd, s->vcpus[1].fd};
    uint64_t some = (unsigned)rand_r(seed) % (SIZE / 2);
    struct kvmprep_progress progress;
    struct kvmprep_job *job;
    CHECK_OK(kvmprep_job_new(s->handle, &all, 1, NULL, &job, &s->err), s->err);
    CHECK_OK(kvmprep_job_spawn(job, vcpus, s->has_pre_fault ? 2 : 0, s->has_pre_fault ? 0 : 2, &s->err),
             s->err);
    do
        CHECK_OK(kvmprep_job_progress(job, &progress, sizeof(progress), &s->err), s->err);
    while (progress.host_done < some && !progress.ended);
    return job;
}

/* The job has ended well; what of it was not done lies in `given_up`. */
static uint64_t end_job(struct setting *s, struct kvmprep_job *job, struct kvmprep_range given_up) {
    struct kvmprep_populate_result result;
    struct kvmprep_range remaining[32];
    size_t n;
    CHECK_OK(kvmprep_job_wait(job, -1, &result, sizeof(result), &s->err), s->err);
    CHECK((s->has_pre_fault ? result.stage2 : result.host) + result.remaining >= SIZE);
    CHECK_OK(kvmprep_job_remaining(job, remaining, 32, &n, &s->err), s->err);
    CHECK_EQ(n, result.n_remaining);
    for (size_t i = 0; i < n && i < 32; i++) {
        CHECK(remaining[i].gpa >= given_up.gpa);
        CHECK(remaining[i].gpa + remaining[i].size <= given_up.gpa + given_up.size);
    }
    CHECK_EQ(kvmprep_job_free(job), 0);
    return result.remaining;
}

/* Once the announcement has returned, the memory can be unmapped at once: no worker meets what is not there.
 */
static void memory_unmapped_after_the_announcement(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    unsigned seed = 1, rounds = check_rounds(20), caught = 0, round;
    for (round = 0; goes_on(round, rounds, caught > 0); round++) {
        renew_memory(&s);
        struct kvmprep_job *job = job_at_work(&s, &seed);
        CHECK_OK(kvmprep_memslot_changing(s.handle, MEMORY_SLOT, &s.err), s.err);
        CHECK(mmap(s.memory.hva, SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
              s.memory.hva);
        caught += end_job(&s, job, all) > 0;

        /* Until the change has been noted, nobody may begin: who names the slot is refused, others go
         * without. */
        CHECK_ERR(kvmprep_populate(s.handle, &all, 1, NULL, NULL, 0, &s.err), s.err, EBUSY,
                  KVMPREP_REASON_MEMSLOT_CHANGING);
        CHECK_EQ(s.err.slot, MEMORY_SLOT);
        struct kvmprep_populate_result result = populate(&s, 0);
        CHECK_EQ(result.remaining, SIZE);
        CHECK_EQ(result.host, 0);
        CHECK_OK(kvmprep_memslot_note(s.handle, &s.slot, &s.err), s.err);
    }
    printf("  %u of %u jobs were at work on it\n", caught, round);
    CHECK(caught > 0);
    setting_end(&s);
}

/* Likewise with a discard: what was discarded stays so, and is all that the job leaves. */
static void memory_discarded_stays_discarded(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    char *upper = (char *)s.memory.hva + SIZE / 2;
    unsigned seed = 1, rounds = check_rounds(20), caught = 0, round;
    for (round = 0; goes_on(round, rounds, caught > 0); round++) {
        renew_memory(&s);
        struct kvmprep_job *job = job_at_work(&s, &seed);
        CHECK_OK(kvmprep_range_discarded(s.handle, &upper_half, &s.err), s.err);
        CHECK_EQ(madvise(upper, SIZE / 2, MADV_DONTNEED), 0);
        caught += end_job(&s, job, upper_half) > 0;
        CHECK_EQ(present_bytes(upper, SIZE / 2), 0);
        CHECK_EQ(present_bytes(s.memory.hva, SIZE / 2), SIZE / 2);
        CHECK_EQ(coverage_of(&s, upper_half).host, 0);
        CHECK_EQ(coverage_of(&s, upper_half).stage2, 0);
        CHECK_EQ(coverage_of(&s, all).host, SIZE / 2);
    }
    printf("  %u of %u jobs were at work on it\n", caught, round);
    CHECK(caught > 0);
    struct kvmprep_populate_result result = populate(&s, KVMPREP_POPULATE_SKIP_COVERED);
    CHECK_EQ(result.skipped, SIZE / 2);
    check_writes_do_not_fault(&s, MEMORY_GPA, SIZE);
    setting_end(&s);
}

/* ---- What a deletion costs ---- */

/* Makes and deletes another slot, of one page, by the library. */
static void delete_another_slot(struct setting *s) {
    struct memory other = memory_make(&s->vm, ANON_4K, PAGE);
    struct kvmprep_memslot slot = slot_of(OTHER_SLOT, OTHER_GPA, &other);
    struct kvmprep_memslot deletion = deletion_of(OTHER_SLOT);
    change_by_the_library(s, &slot);
    CHECK_EQ(guest_touch(&s->vcpus[0], TOUCH_WRITE, OTHER_GPA, PAGE), 0);
    change_by_the_library(s, &deletion);
    memory_end(&other);
}

/* By default KVM drops every mapping of every slot when any slot is deleted. The handle knows. */
static void a_deletion_loses_all(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    populate(&s, 0);
    delete_another_slot(&s);
    struct kvmprep_coverage coverage = coverage_of(&s, all);
    CHECK_EQ(coverage.memory, SIZE);
    CHECK_EQ(coverage.host, SIZE); /* the host's own mappings stay */
    CHECK_EQ(coverage.stage2, 0);
    CHECK_EQ(coverage.stage2_writable, 0);
    CHECK_EQ(coverage.lost, SIZE);
    CHECK_EQ(coverage.last_loss, KVMPREP_LOSS_ZAP_ALL);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA, SIZE), PAGES + 1); /* and the code page */

    /* So what is missing is stage 2 alone, and populating mends it. */
    delete_another_slot(&s);
    struct kvmprep_populate_result result = populate(&s, KVMPREP_POPULATE_SKIP_COVERED);
    CHECK_EQ(result.host, 0);
    CHECK_EQ(result.stage2, SIZE);
    CHECK_EQ(coverage_of(&s, all).lost, 0);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA, SIZE), 1);
    setting_end(&s);
}

/* Unless the handle, or the VMM, has asked for the mappings to be kept. */
static void kept_mappings_outlive_a_deletion(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_caps caps;
    CHECK_OK(kvmprep_probe(-1, s.vm.fd, &caps, sizeof(caps), &s.err), s.err);
    if (!caps.keep_mappings)
        check_skipped("this kernel cannot keep mappings: needs Linux 6.12");
    CHECK_EQ(kvmprep_vm_free(s.handle), 0);
    config.vm_fd = s.vm.fd;
    config.flags = KVMPREP_VM_KEEP_MAPPINGS;
    CHECK_OK(kvmprep_vm_new(&config, &s.handle, &s.err), s.err);
    CHECK_OK(kvmprep_memslot_note(s.handle, &s.slot, &s.err), s.err);

    populate(&s, 0);
    delete_another_slot(&s); /* runs the guest's code page too */
    CHECK_EQ(coverage_of(&s, all).stage2_writable, SIZE);
    CHECK_EQ(coverage_of(&s, all).lost, 0);
    CHECK_EQ(coverage_of(&s, all).last_loss, KVMPREP_LOSS_NOTHING);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA, SIZE), 0);
    setting_end(&s);
}

/* ---- kvmprep_memslot_set, in all its uses ---- */

static void a_slot_made_moved_flagged_and_deleted(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct memory other = memory_make(&s.vm, ANON_4K, SIZE);
    struct kvmprep_memslot slot = slot_of(OTHER_SLOT, OTHER_GPA, &other);
    struct kvmprep_range at_first = {.gpa = OTHER_GPA, .size = SIZE};
    struct kvmprep_range later = {.gpa = OTHER_GPA + 4 * SIZE, .size = SIZE};

    change_by_the_library(&s, &slot); /* made: KVM has it, and so has the handle */
    CHECK_EQ(guest_touch(&s.vcpus[0], TOUCH_WRITE, at_first.gpa, SIZE), 0);
    populate(&s, 0);
    CHECK_EQ(coverage_of(&s, at_first).host, SIZE);

    slot.gpa = later.gpa;
    change_by_the_library(&s, &slot); /* moved: what was prepared at its old place is no memory any more */
    CHECK_EQ(coverage_of(&s, at_first).memory, 0);
    CHECK_EQ(coverage_of(&s, later).memory, SIZE);
    CHECK_EQ(coverage_of(&s, later).stage2, 0);
    CHECK_EQ(guest_touch(&s.vcpus[0], TOUCH_WRITE, at_first.gpa, PAGE), -EPROTO); /* MMIO there, now */
    populate(&s, 0);
    check_writes_do_not_fault(&s, later.gpa, SIZE);

    slot.flags = KVM_MEM_LOG_DIRTY_PAGES;
    change_by_the_library(&s, &slot); /* flagged: nothing but writing is lost */
    CHECK_EQ(coverage_of(&s, later).stage2, s.has_pre_fault ? SIZE : 0);
    CHECK_EQ(coverage_of(&s, later).stage2_writable, 0);
    CHECK_EQ(coverage_of(&s, later).lost, 0);
    if (s.has_pre_fault)
        CHECK_EQ(coverage_of(&s, later).last_loss, KVMPREP_LOSS_DIRTY_LOGGING);

    struct kvmprep_memslot deletion = deletion_of(OTHER_SLOT);
    change_by_the_library(&s, &deletion);
    CHECK_EQ(coverage_of(&s, later).memory, 0);
    CHECK_EQ(guest_touch(&s.vcpus[0], TOUCH_WRITE, later.gpa, PAGE), -EPROTO);
    memory_end(&other);
    setting_end(&s);
}

/* What the handle can see is wrong is refused before KVM is asked, and leaves the slot as it was. */
static void a_slot_refused_is_as_it_was(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_memslot slot = s.slot;
    slot.slot = OTHER_SLOT;
    slot.gpa += SIZE - PAGE;
    CHECK_ERR(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err, EEXIST, KVMPREP_REASON_MEMSLOT_OVERLAP);
    CHECK_EQ(s.err.slot, OTHER_SLOT);
    CHECK_EQ(s.err.other_slot, MEMORY_SLOT);
    CHECK_EQ(s.err.gpa, slot.gpa);
    CHECK_EQ(s.err.size, SIZE);

    slot = s.slot;
    slot.size = SIZE / 2; /* KVM never changes a slot's size */
    CHECK_ERR(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err, EINVAL, KVMPREP_REASON_MEMSLOT_FIXED);
    CHECK_EQ(s.err.slot, MEMORY_SLOT);
    CHECK_EQ(s.err.stage, KVMPREP_STAGE_MEMSLOT);
    struct kvmprep_populate_result result = populate(&s, 0);
    check_all_is_done(&s, &result);
    setting_end(&s);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"slots_set_by_the_library", slots_set_by_the_library},
        {"slots_announced_and_noted", slots_announced_and_noted},
        {"slots_that_take_their_memory_along", slots_that_take_their_memory_along},
        {"slots_changed_in_silence", slots_changed_in_silence},
        {"another_slot_deleted_meanwhile", another_slot_deleted_meanwhile},
        {"populating_again_after_a_deletion", populating_again_after_a_deletion},
        {"a_signal_ends_what_hangs", a_signal_ends_what_hangs},
        {"memory_unmapped_after_the_announcement", memory_unmapped_after_the_announcement},
        {"memory_discarded_stays_discarded", memory_discarded_stays_discarded},
        {"a_deletion_loses_all", a_deletion_loses_all},
        {"kept_mappings_outlive_a_deletion", kept_mappings_outlive_a_deletion},
        {"a_slot_made_moved_flagged_and_deleted", a_slot_made_moved_flagged_and_deleted},
        {"a_slot_refused_is_as_it_was", a_slot_refused_is_as_it_was},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
