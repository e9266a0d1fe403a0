/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Signals while memory is populated. A caller's thread comes out with -EINTR, so that a VMM gets its vCPU
 * threads back by the means it has already: a signal with a handler, and kvm_run.immediate_exit. Nothing is
 * lost by it; the caller comes again until all is done. The library's own threads take no signal at all.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/policy.h"
#include "support/setting.h"
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SIZE (32 * MIB)
#define CHUNK (2 * MIB)
#define MOST_CALLS 100000
#define MOST_STORMS 20

static atomic_uint signals_taken;
static atomic_uint signals_taken_elsewhere; /* by a thread that is not the main one */
static _Atomic(struct kvm_run *) run_to_leave;
static pid_t main_thread;

static pid_t this_thread(void) {
    return (pid_t)syscall(SYS_gettid);
}

static void on_signal(int number) {
    (void)number;
    atomic_fetch_add(&signals_taken, 1);
    if (this_thread() != main_thread)
        atomic_fetch_add(&signals_taken_elsewhere, 1);
    /* As VMMs do: whether KVM_RUN or the library sees the signal or not, it sees this. */
    struct kvm_run *run = atomic_load(&run_to_leave);
    if (run != NULL)
        *(volatile __u8 *)&run->immediate_exit = 1;
}

static void install_handlers(void) {
    struct sigaction action = {.sa_handler = on_signal};
    main_thread = this_thread();
    CHECK_EQ(sigaction(SIGUSR1, &action, NULL), 0);
    CHECK_EQ(sigaction(SIGALRM, &action, NULL), 0);
    atomic_store(&signals_taken, 0);
    atomic_store(&signals_taken_elsewhere, 0);
    atomic_store(&run_to_leave, NULL);
}

/* ---- A storm: about a thousand signals a second by a timer, and as many from another thread ---- */

struct storm {
    pthread_t thread, target;
    timer_t timer;
    bool is_for_process;
    atomic_bool is_over;
};

static void *keep_kicking(void *argument) {
    struct storm *storm = argument;
    while (!atomic_load(&storm->is_over)) {
        if (storm->is_for_process)
            kill(getpid(), SIGUSR1);
        else
            pthread_kill(storm->target, SIGUSR1);
        usleep(700);
    }
    return NULL;
}

static void storm_begin(struct storm *storm, bool is_for_process) {
    struct sigevent event = {.sigev_notify = is_for_process ? SIGEV_SIGNAL : SIGEV_THREAD_ID,
                             .sigev_signo = SIGALRM};
    struct itimerspec period = {{0, 1000000}, {0, 1000000}};
    sigset_t both, old;
    sigemptyset(&both);
    sigaddset(&both, SIGUSR1);
    sigaddset(&both, SIGALRM);

    storm->target = pthread_self();
    storm->is_for_process = is_for_process;
    atomic_init(&storm->is_over, false);
#ifdef sigev_notify_thread_id
    event.sigev_notify_thread_id = this_thread();
#else
    event._sigev_un._tid = this_thread();
#endif
    /* The storm's own thread stays out of it. */
    CHECK_EQ(pthread_sigmask(SIG_BLOCK, &both, &old), 0);
    CHECK_EQ(pthread_create(&storm->thread, NULL, keep_kicking, storm), 0);
    CHECK_EQ(pthread_sigmask(SIG_SETMASK, &old, NULL), 0);
    CHECK_EQ(timer_create(CLOCK_MONOTONIC, &event, &storm->timer), 0);
    CHECK_EQ(timer_settime(storm->timer, 0, &period, NULL), 0);
}

static void storm_end(struct storm *storm) {
    timer_delete(storm->timer);
    atomic_store(&storm->is_over, true);
    pthread_join(storm->thread, NULL);
}

/*
 * Runs `once` in settings of its own until a call was interrupted in one of them: where stage 2 is filled
 * that is all but certain in each, and elsewhere the kernel takes no notice of the signals at all.
 */
static void in_storms(enum kind kind, unsigned (*once)(struct setting *s)) {
    unsigned interrupted = 0;
    for (int i = 0; i < MOST_STORMS && interrupted == 0; i++) {
        struct storm storm;
        install_handlers();
        struct setting s = setting_make(kind, SIZE);
        storm_begin(&storm, false);
        interrupted = once(&s);
        storm_end(&storm);
        if (s.has_pre_fault)
            check_writes_do_not_fault(&s, MEMORY_GPA, SIZE);
        else
            interrupted = 1;
        setting_end(&s);
    }
    CHECK(interrupted > 0);
}

/* Sums up what calls did; in the end each byte must have been done once, none twice and none not. */
struct sum {
    uint64_t host, stage2;
    unsigned interrupted;
};

static void check_sum(const struct setting *s, const struct sum *sum) {
    CHECK_EQ(sum->host, SIZE);
    CHECK_EQ(sum->stage2, s->has_pre_fault ? SIZE : 0);
}

/* ---- Coming again ---- */

/* Call again and again, with SKIP_COVERED: each call does what is missing still. */
static unsigned again_skipping_what_is_covered(struct setting *s) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct sum sum = {0, 0, 0};
    int done = -EINTR;
    opts.vcpu_fd = s->vcpus[0].fd;
    opts.flags = KVMPREP_POPULATE_SKIP_COVERED;
    for (int i = 0; i < MOST_CALLS && done == -EINTR; i++) {
        done = kvmprep_populate(s->handle, NULL, 0, &opts, &result, sizeof(result), &s->err);
        sum.host += result.host;
        sum.stage2 += result.stage2;
        CHECK_EQ(result.bytes, SIZE);
        if (done == -EINTR) {
            CHECK_EQ(s->err.reason, KVMPREP_REASON_INTERRUPTED);
            CHECK(strstr(s->err.hint, "KVMPREP_POPULATE_SKIP_COVERED") != NULL);
            if (s->has_pre_fault)
                CHECK_EQ(result.skipped + result.stage2 + result.remaining, SIZE);
            sum.interrupted++;
        }
    }
    CHECK_OK(done, s->err);
    CHECK_EQ(result.remaining, 0);
    /* The host's side takes no notice of signals, so that a storm of them cannot hold it up. */
    if (!s->has_pre_fault)
        CHECK_EQ(sum.interrupted, 0);
    check_sum(s, &sum);
    return sum.interrupted;
}

static void populate_skipping_what_is_covered(void) {
    in_storms(ANON_4K, again_skipping_what_is_covered);
}

static void populate_shared_memory(void) {
    need_small_shared_pages();
    in_storms(MEMFD_SHARED, again_skipping_what_is_covered);
}

/* The same by hand: what remained of the last call is what the next one is given. */
static unsigned again_with_what_remained(struct setting *s) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_range ranges[8] = {{MEMORY_GPA, SIZE, {0, 0}}}, left[8];
    struct sum sum = {0, 0, 0};
    size_t n = 1;
    int done = -EINTR;
    opts.vcpu_fd = s->vcpus[0].fd;
    opts.remaining = left;
    opts.remaining_capacity = 8;
    for (int i = 0; i < MOST_CALLS && done == -EINTR; i++) {
        done = kvmprep_populate(s->handle, ranges, n, &opts, &result, sizeof(result), &s->err);
        sum.stage2 += result.stage2;
        if (done == -EINTR) {
            CHECK(result.n_remaining <= 8);
            n = (size_t)result.n_remaining;
            memcpy(ranges, left, sizeof(ranges));
            sum.interrupted++;
            if (n == 0) /* the signal came when all was done */
                done = 0;
        }
    }
    CHECK_OK(done, s->err);
    CHECK_EQ(result.remaining, 0);
    if (s->has_pre_fault)
        CHECK_EQ(sum.stage2, SIZE);
    return sum.interrupted;
}

static void populate_what_remained(void) {
    in_storms(ANON_4K, again_with_what_remained);
}

/* The same job, entered until it is done; it counts the interruptions itself. */
static unsigned again_on_the_same_job(struct setting *s) {
    struct kvmprep_job *job;
    struct kvmprep_populate_result result;
    unsigned interrupted = 0;
    int done = -EINTR;
    CHECK_OK(kvmprep_job_new(s->handle, NULL, 0, NULL, &job, &s->err), s->err);
    for (int i = 0; i < MOST_CALLS && done == -EINTR; i++) {
        done = kvmprep_job_run(job, s->vcpus[0].fd, &s->err);
        if (done == -EINTR) {
            CHECK_EQ(s->err.reason, KVMPREP_REASON_INTERRUPTED);
            interrupted++;
        }
    }
    CHECK_OK(done, s->err);
    CHECK_OK(kvmprep_job_wait(job, 0, &result, sizeof(result), &s->err), s->err);
    CHECK_EQ(result.interruptions, interrupted);
    CHECK_EQ(result.remaining, 0);
    check_sum(s, &(struct sum){result.host, result.stage2, interrupted});
    CHECK_EQ(kvmprep_job_free(job), 0);
    return interrupted;
}

static void run_a_job(void) {
    in_storms(ANON_4K, again_on_the_same_job);
}

/* One pre-fault: the range that is left is the caller's own, and shrinks with each call. */
static unsigned again_with_one_range(struct setting *s) {
    struct kvmprep_range range = {MEMORY_GPA, SIZE, {0, 0}};
    unsigned interrupted = 0;
    if (!s->has_pre_fault) {
        int result;
        while ((result = kvmprep_vcpu_pre_fault(s->vcpus[0].fd, &range, &s->err)) == -EINTR)
            ;
        CHECK_EQ(result, -EOPNOTSUPP);
        CHECK_EQ(s->err.reason,
                 kernel_release() < 6011 ? KVMPREP_REASON_NO_STAGE2 : KVMPREP_REASON_VCPU_REFUSED);
        /* Nobody is to try for ever where there is no nested paging: the probe knows. */
        CHECK(kernel_release() < 6011 || strstr(s->err.hint, "kvmprep_probe") != NULL);
        CHECK_EQ(range.size, SIZE);
        return 1;
    }
    for (int i = 0; i < MOST_CALLS && range.size > 0; i++) {
        uint64_t before = range.size;
        int result = kvmprep_vcpu_pre_fault(s->vcpus[0].fd, &range, &s->err);
        CHECK(range.size <= before);
        CHECK_EQ(range.gpa + range.size, MEMORY_GPA + SIZE);
        if (result == -EINTR)
            interrupted++;
        else
            CHECK_OK(result, s->err);
    }
    CHECK_EQ(range.size, 0);
    return interrupted;
}

static void pre_fault(void) {
    in_storms(MEMFD_SHARED, again_with_one_range);
}

static atomic_bool is_inside; /* the main thread, in the call that is to be interrupted */
static atomic_uint signals_taken_inside;

static void on_signal_inside(int number) {
    (void)number;
    if (atomic_load(&is_inside))
        atomic_fetch_add(&signals_taken_inside, 1);
}

static void *send_one_signal_later(void *argument) {
    usleep(3000);
    pthread_kill(*(pthread_t *)argument, SIGUSR1);
    return NULL;
}

/*
 * One signal is enough. The kernel stops a pre-fault for it but tells of what it has mapped, not of the
 * signal: that must not pass for a mere short step. (The moments between two system calls are the exception
 * that the header names, hence "most".)
 */
static void one_signal_ends_a_pre_fault(void) {
    struct sigaction action = {.sa_handler = on_signal_inside};
    unsigned taken = 0, interrupted = 0;
    CHECK_EQ(sigaction(SIGUSR1, &action, NULL), 0);
    /* On a busy machine many come before the call or after it, and one alone shows nothing. */
    for (int i = 0; i < 10 || (taken > 0 && taken < 5 && i < 200); i++) {
        check_is_alive();
        struct setting s = setting_make_with_stage2(MEMFD_SHARED, 2 * SIZE);
        struct kvmprep_range range = {MEMORY_GPA, 2 * SIZE, {0, 0}};
        pthread_t thread, self = pthread_self();
        atomic_store(&signals_taken_inside, 0);
        CHECK_EQ(pthread_create(&thread, NULL, send_one_signal_later, &self), 0);
        atomic_store(&is_inside, true);
        int result = kvmprep_vcpu_pre_fault(s.vcpus[0].fd, &range, &s.err);
        atomic_store(&is_inside, false);
        pthread_join(thread, NULL);
        taken += atomic_load(&signals_taken_inside);
        if (result == -EINTR) {
            CHECK_EQ(atomic_load(&signals_taken_inside), 1);
            CHECK(range.size > 0);
            interrupted++;
        } else {
            CHECK_OK(result, s.err);
        }
        setting_end(&s);
    }
    if (taken == 0)
        check_skipped("this machine is done before a signal can be sent");
    CHECK(2 * interrupted > taken);
}

/* A wait ends by a signal too, and the job goes on. Nobody works on this one, so that the wait cannot end
 * else. */
static void wait_for_a_job(void) {
    struct storm storm;
    install_handlers();
    struct setting s = setting_make(ANON_4K, CHUNK);
    struct kvmprep_job *job;
    CHECK_OK(kvmprep_job_new(s.handle, NULL, 0, NULL, &job, &s.err), s.err);
    storm_begin(&storm, false);
    int result = kvmprep_job_wait(job, -1, NULL, 0, &s.err);
    storm_end(&storm);
    CHECK_EQ(result, -EINTR);
    CHECK_EQ(s.err.reason, KVMPREP_REASON_INTERRUPTED);
    CHECK_OK(kvmprep_job_run(job, s.vcpus[0].fd, &s.err), s.err);
    CHECK_OK(kvmprep_job_wait(job, -1, NULL, 0, &s.err), s.err);
    CHECK_EQ(kvmprep_job_free(job), 0);
    setting_end(&s);
}

/* ---- The library's threads ---- */

/*
 * Signals to the process go to any thread that does not block them. When the caller blocks them, there must
 * be none: a handler that ran on a thread of the library's would be a surprise to every VMM.
 */
static void library_threads_take_no_signal(void) {
    struct storm storm;
    sigset_t both, old;
    install_handlers();
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    const int vcpus[] = {s.vcpus[0].fd, s.vcpus[1].fd};
    opts.vcpu_fds = vcpus;
    opts.n_vcpu_fds = 2;
    opts.host_threads = 1;
    sigemptyset(&both);
    sigaddset(&both, SIGUSR1);
    sigaddset(&both, SIGALRM);
    CHECK_EQ(pthread_sigmask(SIG_BLOCK, &both, &old), 0);
    storm_begin(&storm, true);
    int done = kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err);
    storm_end(&storm);
    CHECK_EQ(atomic_load(&signals_taken), 0);
    CHECK_EQ(pthread_sigmask(SIG_SETMASK, &old, NULL), 0);
    CHECK_OK(done, s.err);
    CHECK_EQ(result.interruptions, 0);
    CHECK(atomic_load(&signals_taken) > 0); /* they had been waiting for this thread */
    CHECK_EQ(atomic_load(&signals_taken_elsewhere), 0);
    check_all_is_done(&s, &result);
    setting_end(&s);
}

/* The same while a caller's thread takes the signals itself: only that one does, and is the only one
 * disturbed. */
static void library_threads_go_on(void) {
    struct storm storm;
    struct kvmprep_job *job;
    struct kvmprep_populate_result result;
    install_handlers();
    struct setting s = setting_make(ANON_4K, SIZE);
    CHECK_OK(kvmprep_job_new(s.handle, NULL, 0, NULL, &job, &s.err), s.err);
    storm_begin(&storm, true);
    CHECK_OK(kvmprep_job_spawn(job, &s.vcpus[0].fd, 1, 1, &s.err), s.err);
    int done = -EINTR;
    for (int i = 0; i < MOST_CALLS && done == -EINTR; i++)
        done = kvmprep_job_wait(job, -1, &result, sizeof(result), &s.err);
    storm_end(&storm);
    CHECK_OK(done, s.err);
    CHECK_EQ(result.interruptions, 0); /* no caller's thread was at work */
    CHECK_EQ(atomic_load(&signals_taken_elsewhere), 0);
    check_all_is_done(&s, &result);
    CHECK_EQ(kvmprep_job_free(job), 0);
    setting_end(&s);
}

/* ---- immediate_exit ---- */

/* Set before the call, it is seen before the first chunk. */
static void immediate_exit_comes_first(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_progress progress;
    struct kvmprep_job *job;
    opts.vcpu_fd = s.vcpus[0].fd;
    s.vcpus[0].run->immediate_exit = 1;
    CHECK_ERR(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err, EINTR,
              KVMPREP_REASON_INTERRUPTED);
    CHECK_EQ(result.host, 0);
    CHECK_EQ(result.stage2, 0);
    CHECK_EQ(result.remaining, SIZE);
    CHECK_EQ(result.n_remaining, 1);
    CHECK_EQ(result.interruptions, 1);

    CHECK_OK(kvmprep_job_new(s.handle, NULL, 0, NULL, &job, &s.err), s.err);
    CHECK_ERR(kvmprep_job_run(job, s.vcpus[0].fd, &s.err), s.err, EINTR, KVMPREP_REASON_INTERRUPTED);
    CHECK_OK(kvmprep_job_progress(job, &progress, sizeof(progress), &s.err), s.err);
    CHECK_EQ(progress.host_done, 0);
    CHECK_EQ(progress.ended, 0);
    /* It belongs to that vCPU: a thread with another one works, and so does this one once it is cleared. */
    s.vcpus[0].run->immediate_exit = 0;
    s.vcpus[1].run->immediate_exit = 1;
    CHECK_OK(kvmprep_job_run(job, s.vcpus[0].fd, &s.err), s.err);
    s.vcpus[1].run->immediate_exit = 0;
    CHECK_OK(kvmprep_job_wait(job, 0, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.interruptions, 1);
    check_all_is_done(&s, &result);
    CHECK_EQ(kvmprep_job_free(job), 0);
    setting_end(&s);
}

/* Another thread that wants the main thread back: one signal, sent once, at some moment. */
struct kick {
    pthread_t target;
    struct kvmprep_job *job;
    unsigned delay_us;
    struct kvmprep_progress after; /* how far the job was when the signal had been sent */
    int result;
};

static void *send_one_signal(void *argument) {
    struct kick *kick = argument;
    usleep(kick->delay_us);
    pthread_kill(kick->target, SIGUSR1);
    kick->result = kvmprep_job_progress(kick->job, &kick->after, sizeof(kick->after), NULL);
    return NULL;
}

/* No kick is lost, whenever it comes, and the thread comes back within the chunk that it has in hand. */
static void every_kick_brings_the_thread_back(void) {
    unsigned seed = 1, rounds = check_rounds(5);
    install_handlers();
    for (unsigned round = 0; round < rounds; round++) {
        struct setting s = setting_make(ANON_4K, SIZE);
        struct kvmprep_job *job;
        struct kvmprep_populate_result result;
        unsigned interrupted = 0;
        int done = -EINTR;
        CHECK_OK(kvmprep_job_new(s.handle, NULL, 0, NULL, &job, &s.err), s.err);
        atomic_store(&run_to_leave, s.vcpus[0].run);
        while (done == -EINTR) {
            struct kick kick = {
                .target = pthread_self(), .job = job, .delay_us = (unsigned)rand_r(&seed) % 5000};
            struct kvmprep_progress now;
            pthread_t thread;
            CHECK_EQ(pthread_create(&thread, NULL, send_one_signal, &kick), 0);
            done = kvmprep_job_run(job, s.vcpus[0].fd, &s.err);
            CHECK_OK(kvmprep_job_progress(job, &now, sizeof(now), &s.err), s.err);
            pthread_join(thread, NULL);
            CHECK_EQ(kick.result, 0);
            /* Had the signal been lost, the job would have been done to its end. */
            uint64_t left = s.has_pre_fault ? SIZE - kick.after.stage2_done : SIZE - kick.after.host_done;
            if (left > 3 * CHUNK)
                CHECK_EQ(done, -EINTR);
            if (done == -EINTR) {
                CHECK_EQ(s.vcpus[0].run->immediate_exit, 1);
                interrupted++;
                if (now.stage2_done > kick.after.stage2_done)
                    CHECK(now.stage2_done - kick.after.stage2_done <= 2 * CHUNK);
                if (now.host_done > kick.after.host_done)
                    CHECK(now.host_done - kick.after.host_done <= 2 * CHUNK);
            }
            s.vcpus[0].run->immediate_exit = 0;
        }
        atomic_store(&run_to_leave, NULL);
        CHECK_OK(done, s.err);
        CHECK_OK(kvmprep_job_wait(job, 0, &result, sizeof(result), &s.err), s.err);
        CHECK_EQ(result.interruptions, interrupted);
        check_sum(&s, &(struct sum){result.host, result.stage2, interrupted});
        check_all_is_done(&s, &result);
        CHECK_EQ(kvmprep_job_free(job), 0);
        setting_end(&s);
    }
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"populate_skipping_what_is_covered", populate_skipping_what_is_covered},
        {"populate_shared_memory", populate_shared_memory},
        {"populate_what_remained", populate_what_remained},
        {"run_a_job", run_a_job},
        {"pre_fault", pre_fault},
        {"one_signal_ends_a_pre_fault", one_signal_ends_a_pre_fault},
        {"wait_for_a_job", wait_for_a_job},
        {"library_threads_take_no_signal", library_threads_take_no_signal},
        {"library_threads_go_on", library_threads_go_on},
        {"immediate_exit_comes_first", immediate_exit_comes_first},
        {"every_kick_brings_the_thread_back", every_kick_brings_the_thread_back},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
