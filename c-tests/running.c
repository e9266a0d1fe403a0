/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Populating the memory of a guest that runs already, on its own vCPU threads: each is kicked out of KVM_RUN
 * as a VMM does for anything else (immediate_exit and a signal), works on the job with its own vCPU, and goes
 * back in.
 *
 * And what happens when a vCPU is given to the library without being kicked out: the kernel makes a vCPU
 * ioctl wait while another thread is in KVM_RUN, so the job waits, and says so, and ends when the vCPU comes
 * out.
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
#include <sys/ioctl.h>
#include <sys/mman.h>

#define SIZE (16 * MIB)

static const struct kvmprep_range all = {.gpa = MEMORY_GPA, .size = SIZE};

/* ---- A VMM's vCPU thread ---- */

struct runner {
    pthread_t thread;
    struct vcpu *vcpu;
    _Atomic(struct kvmprep_job *) job; /* to be worked on when kicked, or NULL */
    atomic_bool stop;
    atomic_uint joined; /* times that it has come back from a job */
    int job_result;     /* of the last */
    unsigned interrupted;
    int run_errno; /* what KVM_RUN answered that was not expected, or 0 */
};

static void come_out(int signal) {
    (void)signal;
}

static void *run_vcpu(void *argument) {
    struct runner *r = argument;
    while (!atomic_load(&r->stop)) {
        if (ioctl(r->vcpu->fd, KVM_RUN, 0) == 0 || errno != EINTR) {
            r->run_errno = errno;
            return NULL;
        }
        r->vcpu->run->immediate_exit = 0;
        struct kvmprep_job *job = atomic_exchange(&r->job, NULL);
        if (job == NULL)
            continue;
        do {
            r->job_result = kvmprep_job_run(job, r->vcpu->fd, NULL);
            r->vcpu->run->immediate_exit = 0;
            r->interrupted += r->job_result == -EINTR;
        } while (r->job_result == -EINTR);
        atomic_fetch_add(&r->joined, 1);
    }
    return NULL;
}

static void kick(struct runner *r) {
    r->vcpu->run->immediate_exit = 1;
    pthread_kill(r->thread, SIGUSR1);
}

/* Where the guests of the vCPUs say that they are inside: in the page of code, behind it. */
#define INSIDE_GPA (PAGE / 2)

/* Starts a thread whose guest loops until it is kicked out, and returns when the guest itself says that it is
 * inside: whoever else wants the vCPU from then on has to wait. */
static void start(struct runner *r, struct setting *s, unsigned id) {
    struct sigaction action = {.sa_handler = come_out};
    volatile uint32_t *is_inside = (uint32_t *)((char *)s->vm.code + INSIDE_GPA) + id;
    CHECK_EQ(sigaction(SIGUSR1, &action, NULL), 0);
    memset(r, 0, sizeof(*r));
    r->vcpu = &s->vcpus[id];
    *is_inside = 0;
    CHECK_EQ(guest_prepare_loop(r->vcpu, INSIDE_GPA + id * sizeof(*is_inside)), 0);
    CHECK_EQ(pthread_create(&r->thread, NULL, run_vcpu, r), 0);
    while (*is_inside == 0)
        sleep_us(1000);
}

static void stop(struct runner *r) {
    atomic_store(&r->stop, true);
    kick(r);
    CHECK_EQ(pthread_join(r->thread, NULL), 0);
    CHECK_EQ(r->run_errno, 0);
    r->vcpu->run->immediate_exit = 0;
}

static struct kvmprep_job *job_of(struct setting *s, uint32_t intent) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_job *job;
    opts.intent = intent;
    CHECK_OK(kvmprep_job_new(s->handle, &all, 1, &opts, &job, &s->err), s->err);
    return job;
}

/* Kicks both vCPU threads into the job, waits for its end and for their return, and frees it. */
static struct kvmprep_populate_result run_on_its_vcpus(struct setting *s, struct runner *runners,
                                                       uint32_t intent, unsigned more_kicks) {
    struct kvmprep_job *job = job_of(s, intent);
    struct kvmprep_populate_result result;
    unsigned joined[2];
    for (int i = 0; i < 2; i++) {
        joined[i] = atomic_load(&runners[i].joined);
        atomic_store(&runners[i].job, job);
        kick(&runners[i]);
    }
    for (unsigned i = 0; i < more_kicks; i++) {
        kick(&runners[i % 2]);
        sleep_us(500);
    }
    CHECK_OK(kvmprep_job_wait(job, -1, &result, sizeof(result), &s->err), s->err);
    for (int i = 0; i < 2; i++) {
        while (atomic_load(&runners[i].joined) == joined[i])
            sleep_us(1000);
        CHECK_EQ(runners[i].job_result, 0);
    }
    /* Who was kicked as the job ended is counted by now. */
    CHECK_OK(kvmprep_job_wait(job, 0, &result, sizeof(result), &s->err), s->err);
    CHECK_EQ(kvmprep_job_free(job), 0);
    CHECK_EQ(result.bytes, SIZE);
    CHECK_EQ(result.remaining, 0);
    return result;
}

/* ---- Populated by kicks ---- */

/* Memory comes and goes while the guest runs; each time its own threads populate it. */
static void populated_from_its_own_threads(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct runner runners[2];
    for (unsigned i = 0; i < 2; i++)
        start(&runners[i], &s, i);
    for (unsigned round = 0; round < check_rounds(5); round++) {
        CHECK_OK(kvmprep_range_discarded(s.handle, &all, &s.err), s.err);
        CHECK_EQ(madvise(s.memory.hva, SIZE, MADV_DONTNEED), 0);

        /* Nothing is there: nothing is mapped, nothing allocated. */
        struct kvmprep_populate_result result = run_on_its_vcpus(&s, runners, KVMPREP_INTENT_RESIDENT, 0);
        CHECK_EQ(result.absent, s.has_pre_fault ? SIZE : 0);
        CHECK_EQ(result.stage2, 0);
        CHECK_EQ(present_bytes(s.memory.hva, SIZE), 0);

        /* What the VMM has put there is what is mapped. */
        memset(s.memory.hva, 1, SIZE / 2);
        result = run_on_its_vcpus(&s, runners, KVMPREP_INTENT_RESIDENT, 0);
        CHECK_EQ(result.absent, s.has_pre_fault ? SIZE / 2 : 0);
        CHECK_EQ(result.stage2, s.has_pre_fault ? SIZE / 2 : 0);
        CHECK_EQ(present_bytes(s.memory.hva, SIZE), SIZE / 2);

        result = run_on_its_vcpus(&s, runners, KVMPREP_INTENT_WRITE, 0);
        CHECK_EQ(result.host, SIZE);
        CHECK_EQ(result.stage2, s.has_pre_fault ? SIZE : 0);
    }
    for (int i = 0; i < 2; i++)
        stop(&runners[i]);
    check_writes_do_not_fault(&s, MEMORY_GPA, SIZE);
    setting_end(&s);
}

/* On a busy machine a thread may get to work when all kicks are over: so many times the rounds, until one
 * was in time. */
#define PATIENCE 25

/* A thread kicked again while it works comes out at once, and comes again: nothing is lost. */
static void kicked_while_populating(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct runner runners[2];
    uint64_t interruptions = 0;
    unsigned rounds = check_rounds(10);
    for (unsigned i = 0; i < 2; i++)
        start(&runners[i], &s, i);
    for (unsigned round = 0; round < rounds || (interruptions == 0 && round < PATIENCE * rounds); round++) {
        check_is_alive();
        CHECK_OK(kvmprep_range_discarded(s.handle, &all, &s.err), s.err);
        CHECK_EQ(madvise(s.memory.hva, SIZE, MADV_DONTNEED), 0);
        interruptions += run_on_its_vcpus(&s, runners, KVMPREP_INTENT_WRITE, 20).interruptions;
    }
    for (int i = 0; i < 2; i++)
        stop(&runners[i]);
    CHECK_EQ(interruptions, runners[0].interrupted + runners[1].interrupted);
    printf("  %llu interruptions\n", (unsigned long long)interruptions);
    CHECK(interruptions > 0);
    check_writes_do_not_fault(&s, MEMORY_GPA, SIZE);
    setting_end(&s);
}

/* ---- A vCPU that is busy ---- */

/* Gives the busy first vCPU and a host thread to a job, and returns when the host stage is as far as it gets.
 */
static struct kvmprep_job *job_on_a_busy_vcpu(struct setting *s) {
    struct kvmprep_job *job = job_of(s, KVMPREP_INTENT_WRITE);
    struct kvmprep_progress progress;
    CHECK_OK(kvmprep_job_spawn(job, &s->vcpus[0].fd, 1, 1, &s->err), s->err);
    CHECK_ERR(kvmprep_job_wait(job, 300, NULL, 0, &s->err), s->err, ETIMEDOUT, KVMPREP_REASON_NOT_FINISHED);
    do /* the vCPU's own thread has one chunk in hand, and the host thread does all others */
        CHECK_OK(kvmprep_job_progress(job, &progress, sizeof(progress), &s->err), s->err);
    while (progress.host_done < progress.host_total);
    CHECK_EQ(progress.host_done, SIZE);
    CHECK_EQ(progress.stage2_done, 0);
    CHECK_EQ(progress.ended, 0);
    return job;
}

/* The job waits for the vCPU, and goes on by itself when the guest has come out. */
static void a_busy_vcpu_is_waited_for(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct kvmprep_populate_result result;
    struct runner runner;
    start(&runner, &s, 0);
    struct kvmprep_job *job = job_on_a_busy_vcpu(&s);
    stop(&runner);
    CHECK_OK(kvmprep_job_wait(job, -1, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.stage2, SIZE);
    CHECK_EQ(result.stage2_state, KVMPREP_STAGE2_DONE);
    CHECK_EQ(kvmprep_job_free(job), 0);
    check_writes_do_not_fault(&s, MEMORY_GPA, SIZE);
    setting_end(&s);
}

/* Cancelling waits for nobody; the job's end, and what it has done, are known when the vCPU has come out. */
static void a_job_on_a_busy_vcpu_cancelled(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct kvmprep_populate_result result;
    struct runner runner;
    start(&runner, &s, 0);
    struct kvmprep_job *job = job_on_a_busy_vcpu(&s);
    CHECK_OK(kvmprep_job_cancel(job, &s.err), s.err);
    stop(&runner);
    CHECK_ERR(kvmprep_job_wait(job, -1, &result, sizeof(result), &s.err), s.err, ECANCELED,
              KVMPREP_REASON_CANCELLED);
    CHECK_EQ(result.host, SIZE);
    /* The chunk in the vCPU's hands was under way in the kernel, and is done now. */
    CHECK(result.stage2 <= 2 * MIB);
    CHECK_EQ(result.remaining, SIZE - result.stage2);
    CHECK_EQ(result.stage2_state, KVMPREP_STAGE2_UNFINISHED);
    CHECK_EQ(kvmprep_job_free(job), 0);
    setting_end(&s);
}

/* Another vCPU does what the busy one cannot; the busy one holds back the chunk in its hands, no more. */
static void another_vcpu_does_the_rest(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct kvmprep_populate_result result;
    struct kvmprep_progress progress;
    struct runner runner;
    start(&runner, &s, 0);
    struct kvmprep_job *job = job_on_a_busy_vcpu(&s);
    CHECK_OK(kvmprep_job_spawn(job, &s.vcpus[1].fd, 1, 0, &s.err), s.err);
    do
        CHECK_OK(kvmprep_job_progress(job, &progress, sizeof(progress), &s.err), s.err);
    while (progress.stage2_done < SIZE - 2 * MIB);
    sleep_us(50000);
    CHECK_OK(kvmprep_job_progress(job, &progress, sizeof(progress), &s.err), s.err);
    CHECK_EQ(progress.stage2_done, SIZE - 2 * MIB);
    CHECK_EQ(progress.ended, 0);
    stop(&runner);
    CHECK_OK(kvmprep_job_wait(job, -1, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.stage2, SIZE);
    CHECK_EQ(kvmprep_job_free(job), 0);
    check_writes_do_not_fault(&s, MEMORY_GPA, SIZE);
    setting_end(&s);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"populated_from_its_own_threads", populated_from_its_own_threads},
        {"kicked_while_populating", kicked_while_populating},
        {"a_busy_vcpu_is_waited_for", a_busy_vcpu_is_waited_for},
        {"a_job_on_a_busy_vcpu_cancelled", a_job_on_a_busy_vcpu_cancelled},
        {"another_vcpu_does_the_rest", another_vcpu_does_the_rest},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
