/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Populations that end early: cancelled from another thread, from the progress callback, by a time limit, by
 * being freed; at random moments. Whatever the moment: what was done and what remains make up the memory
 * exactly, a new population does the rest and only that, and then the guest takes no fault.
 *
 * And how one hears of a job's end: by waiting, by its descriptor, by entering it.
 *
 * The random moments come from a seed that is printed; KVMPREP_TEST_SEED repeats them.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/setting.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define SIZE (32 * MIB)
#define MOST_RANGES 64

static unsigned new_seed(void) {
    const char *given = getenv("KVMPREP_TEST_SEED");
    unsigned seed = given != NULL ? (unsigned)strtoul(given, NULL, 10) : (unsigned)now_ns();
    printf("  seed %u\n", seed);
    return seed;
}

static struct kvmprep_job *job_of(struct setting *s) {
    struct kvmprep_job *job = NULL;
    CHECK_OK(kvmprep_job_new(s->handle, NULL, 0, NULL, &job, &s->err), s->err);
    return job;
}

/* How much a result says is done: in stage 2 where that is filled, else on the host's side. */
static uint64_t done_of(const struct setting *s, const struct kvmprep_populate_result *result) {
    return s->has_pre_fault ? result->stage2 : result->host;
}

/* What is done and what remains are the whole, to the page; and what is not named as remaining is really
 * done. */
static void check_partition(struct setting *s, const struct kvmprep_populate_result *result,
                            const struct kvmprep_range *remaining, size_t n) {
    uint64_t sum = 0, at = MEMORY_GPA;
    CHECK(n <= MOST_RANGES);
    CHECK_EQ(result->bytes, SIZE);
    CHECK_EQ(result->n_remaining, n);
    CHECK_EQ(done_of(s, result) + result->remaining, SIZE);
    CHECK(result->stage2 <= result->host && result->host <= SIZE);
    for (size_t i = 0; i < n; i++) {
        /* In order, apart from each other, inside the memory. */
        CHECK(remaining[i].gpa > at || (i == 0 && remaining[i].gpa == at));
        CHECK(remaining[i].size > 0 && remaining[i].size % PAGE == 0);
        if (remaining[i].gpa > at)
            check_writes_do_not_fault(s, at, remaining[i].gpa - at);
        sum += remaining[i].size;
        at = remaining[i].gpa + remaining[i].size;
    }
    CHECK(at <= MEMORY_GPA + SIZE);
    if (at < MEMORY_GPA + SIZE)
        check_writes_do_not_fault(s, at, MEMORY_GPA + SIZE - at);
    CHECK_EQ(sum, result->remaining);
}

/* A new population does what the last one left, and nothing else. */
static void check_the_rest_can_be_done(struct setting *s, uint64_t done) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    opts.vcpu_fd = s->vcpus[0].fd;
    opts.flags = KVMPREP_POPULATE_SKIP_COVERED;
    CHECK_OK(kvmprep_populate(s->handle, NULL, 0, &opts, &result, sizeof(result), &s->err), s->err);
    CHECK_EQ(result.skipped, done);
    CHECK_EQ(done_of(s, &result), SIZE - done);
    check_all_is_done(s, &result);
}

/* ---- Ways to end early ---- */

struct canceller {
    struct kvmprep_job *job;
    unsigned delay_us;
    int result;
};

static void *cancel_later(void *argument) {
    struct canceller *canceller = argument;
    usleep(canceller->delay_us);
    canceller->result = kvmprep_job_cancel(canceller->job, NULL);
    return NULL;
}

static void by_another_thread(void) {
    unsigned seed = new_seed(), rounds = check_rounds(8);
    for (unsigned round = 0; round < rounds; round++) {
        struct setting s = setting_make(round % 2 == 0 ? ANON_4K : MEMFD_SHARED, SIZE);
        struct kvmprep_populate_result result;
        struct kvmprep_progress progress;
        struct kvmprep_range remaining[MOST_RANGES];
        struct canceller canceller = {.job = job_of(&s), .delay_us = (unsigned)rand_r(&seed) % 40000};
        struct kvmprep_job *job = canceller.job;
        pthread_t thread;
        size_t n;
        CHECK_EQ(pthread_create(&thread, NULL, cancel_later, &canceller), 0);
        CHECK_OK(kvmprep_job_spawn(job, &s.vcpus[1].fd, 1, 1, &s.err), s.err);
        int left = kvmprep_job_run(job, s.vcpus[0].fd, &s.err);
        int verdict = kvmprep_job_wait(job, -1, &result, sizeof(result), &s.err);
        CHECK_OK(kvmprep_job_progress(job, &progress, sizeof(progress), NULL), s.err);
        CHECK_OK(kvmprep_job_remaining(job, remaining, MOST_RANGES, &n, NULL), s.err);
        pthread_join(thread, NULL);
        CHECK_EQ(canceller.result, 0);
        /* It may have come too late. */
        CHECK(verdict == 0 || (verdict == -ECANCELED && s.err.reason == KVMPREP_REASON_CANCELLED));
        CHECK(left == verdict || left == 0);
        CHECK_EQ(progress.ended, 1);
        CHECK_EQ(progress.host_total, SIZE);
        CHECK_EQ(progress.host_done, result.host);
        CHECK_EQ(progress.stage2_done, result.stage2);
        CHECK_EQ(progress.elapsed_ns, result.wall_ns);
        /* A chunk that was in hand is finished; if it was the last, a cancelled job may have nothing left. */
        if (verdict == 0)
            CHECK_EQ(result.remaining, 0);
        check_partition(&s, &result, remaining, n);
        CHECK_EQ(kvmprep_job_free(job), 0);
        check_the_rest_can_be_done(&s, done_of(&s, &result));
        setting_end(&s);
    }
}

/* With one vCPU, two, or library threads beside; a time limit that may or may not be enough. */
static void by_a_time_limit(void) {
    unsigned seed = new_seed(), rounds = check_rounds(8);
    for (unsigned round = 0; round < rounds; round++) {
        struct setting s = setting_make(round % 2 == 0 ? ANON_4K : MEMFD_SHARED, SIZE);
        struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
        struct kvmprep_populate_result result;
        struct kvmprep_range remaining[MOST_RANGES];
        opts.timeout_ms = 1 + (unsigned)rand_r(&seed) % 30;
        opts.remaining = remaining;
        opts.remaining_capacity = MOST_RANGES;
        opts.vcpu_fd = s.vcpus[0].fd;
        opts.vcpu_fds = &s.vcpus[1].fd;
        opts.n_vcpu_fds = round % 3 == 1;
        opts.host_threads = round % 3 == 2;
        int verdict = kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err);
        CHECK(verdict == 0 || (verdict == -ETIMEDOUT && s.err.reason == KVMPREP_REASON_TIMED_OUT));
        if (verdict == 0)
            CHECK_EQ(result.remaining, 0);
        if (s.has_pre_fault)
            CHECK_EQ(result.stage2_state, verdict == 0 ? KVMPREP_STAGE2_DONE : KVMPREP_STAGE2_UNFINISHED);
        check_partition(&s, &result, remaining, (size_t)result.n_remaining);
        check_the_rest_can_be_done(&s, done_of(&s, &result));
        setting_end(&s);
    }
}

struct listener {
    pthread_t thread;
    const struct setting *s;
    struct kvmprep_progress last;
    unsigned calls, cancel_at;
    const char *wrong; /* what the callback found */
};

static int listen(const struct kvmprep_progress *progress, void *opaque) {
    struct listener *listener = opaque;
    struct kvmprep_range range = {MEMORY_GPA, SIZE, {0, 0}};
    struct kvmprep_coverage coverage;
    if (!pthread_equal(listener->thread, pthread_self()))
        listener->wrong = "it was called on another thread";
    if (progress->host_done < listener->last.host_done || progress->stage2_done < listener->last.stage2_done)
        listener->wrong = "progress went back";
    if (progress->host_done > progress->host_total || progress->stage2_done > progress->stage2_total)
        listener->wrong = "there was more progress than there is to do";
    if (progress->elapsed_ns < listener->last.elapsed_ns)
        listener->wrong = "time went back";
    /* It holds no lock. */
    if (kvmprep_get_coverage(listener->s->handle, &range, &coverage, sizeof(coverage), NULL) != 0)
        listener->wrong = "a function could not be called from it";
    listener->last = *progress;
    listener->calls++;
    return listener->calls == listener->cancel_at;
}

/* The callback comes some twenty times a second, so it takes memory enough for it to come at all. */
static void by_the_progress_callback(void) {
    const uint64_t size = 256 * MIB;
    struct setting s = setting_make(MEMFD_SHARED, size);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct listener listener = {.thread = pthread_self(), .s = &s, .cancel_at = 1};
    opts.vcpu_fd = s.vcpus[0].fd;
    opts.progress = listen;
    opts.opaque = &listener;
    int verdict = kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err);
    if (listener.wrong != NULL)
        check_failed(__FILE__, __LINE__, "%s", listener.wrong);
    if (listener.calls == 0)
        check_skipped("this machine is done before the callback is due");
    CHECK_EQ(verdict, -ECANCELED);
    CHECK_EQ(s.err.reason, KVMPREP_REASON_CANCELLED);
    CHECK_EQ(listener.calls, 1);
    CHECK_EQ(done_of(&s, &result) + result.remaining, size);
    /* Nothing was begun since: what was in hand then had been done. */
    CHECK_EQ(result.host, listener.last.host_done);
    CHECK_EQ(result.stage2, listener.last.stage2_done);
    /* The same, listened to till the end, with library threads at work: nothing is cancelled by a zero. */
    listener.calls = listener.cancel_at = 0;
    memset(&listener.last, 0, sizeof(listener.last));
    opts.host_threads = 1;
    opts.vcpu_fds = &s.vcpus[1].fd;
    opts.n_vcpu_fds = 1;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    if (listener.wrong != NULL)
        check_failed(__FILE__, __LINE__, "%s", listener.wrong);
    check_all_is_done(&s, &result);
    setting_end(&s);
}

/* A job under way may simply be freed: its threads are gone when the call returns. */
static void by_being_freed(void) {
    unsigned seed = new_seed(), rounds = check_rounds(8);
    for (unsigned round = 0; round < rounds; round++) {
        struct setting s = setting_make(ANON_4K, SIZE);
        struct kvmprep_job *job = job_of(&s);
        struct kvmprep_range all = {MEMORY_GPA, SIZE, {0, 0}};
        struct kvmprep_coverage coverage;
        const int vcpus[] = {s.vcpus[0].fd, s.vcpus[1].fd};
        CHECK_OK(kvmprep_job_spawn(job, vcpus, 2, 1, &s.err), s.err);
        usleep((unsigned)rand_r(&seed) % 20000);
        CHECK_EQ(kvmprep_job_free(job), 0);
        CHECK_OK(kvmprep_get_coverage(s.handle, &all, &coverage, sizeof(coverage), &s.err), s.err);
        check_the_rest_can_be_done(&s, s.has_pre_fault ? coverage.stage2_writable : coverage.host);
        setting_end(&s);
    }
}

struct visitor {
    struct kvmprep_job *job;
    int vcpu, result;
};

static void *visit(void *argument) {
    struct visitor *visitor = argument;
    visitor->result = kvmprep_job_run(visitor->job, visitor->vcpu, NULL);
    return NULL;
}

/* Not under a caller's thread, though: that one has to leave first, and is told to. */
static void freed_under_a_callers_thread(void) {
    struct setting s = setting_make(ANON_4K, 4 * SIZE);
    unsigned refused = 0;
    /* On a busy machine this thread may come too late: until it did not once. */
    for (int i = 0; i < 20 || (refused == 0 && i < 500); i++) {
        check_is_alive();
        struct visitor visitor = {.job = job_of(&s), .vcpu = s.vcpus[0].fd};
        pthread_t thread;
        CHECK_EQ(pthread_create(&thread, NULL, visit, &visitor), 0);
        struct kvmprep_progress progress = {0};
        while (progress.host_done == 0) /* until the thread is surely inside */
            CHECK_OK(kvmprep_job_progress(visitor.job, &progress, sizeof(progress), &s.err), s.err);
        int result;
        while ((result = kvmprep_job_free(visitor.job)) == -EBUSY)
            refused++;
        CHECK_EQ(result, 0);
        pthread_join(thread, NULL);
        CHECK(visitor.result == -ECANCELED || visitor.result == 0);
    }
    CHECK(refused > 0);
    setting_end(&s);
}

/* ---- How one hears of the end ---- */

static bool is_readable(int fd) {
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    CHECK(poll(&poll_fd, 1, 0) >= 0);
    CHECK_EQ(poll_fd.revents & ~POLLIN, 0);
    return poll_fd.revents != 0;
}

/* Readable when there is progress that nobody has asked for yet, and for good at the end. */
static void the_descriptor(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_job *job = job_of(&s);
    struct kvmprep_progress progress;
    int fd = kvmprep_job_fd(job, &s.err);
    CHECK_OK(fd, s.err);
    CHECK_EQ(kvmprep_job_fd(job, NULL), fd);
    CHECK_EQ(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    CHECK(!is_readable(fd));
    CHECK_OK(kvmprep_job_progress(job, &progress, sizeof(progress), &s.err), s.err);
    CHECK_EQ(progress.host_done, 0);
    CHECK(!is_readable(fd));
    usleep(60000); /* it is told of at most twenty times a second, and the job has only begun */
    CHECK_OK(kvmprep_job_run(job, -1, &s.err), s.err); /* the host stage only */
    CHECK(is_readable(fd));
    /* A call that is refused does not use up what there is to say. */
    CHECK_ERR(kvmprep_job_progress(job, &progress, 0, &s.err), s.err, EINVAL, KVMPREP_REASON_STRUCT_SIZE);
    CHECK(is_readable(fd));
    CHECK_OK(kvmprep_job_progress(job, &progress, sizeof(progress), &s.err), s.err);
    CHECK_EQ(progress.host_done, SIZE);
    CHECK_EQ(progress.ended, !s.has_pre_fault); /* where there is no second stage, that was all */
    CHECK_EQ(is_readable(fd), !s.has_pre_fault);
    CHECK_OK(kvmprep_job_run(job, s.vcpus[0].fd, &s.err), s.err);
    for (int i = 0; i < 3; i++) {
        CHECK(is_readable(fd));
        CHECK_OK(kvmprep_job_progress(job, &progress, sizeof(progress), &s.err), s.err);
        CHECK_EQ(progress.ended, 1);
    }
    CHECK_EQ(kvmprep_job_free(job), 0);
    CHECK_EQ(fcntl(fd, F_GETFD), -1); /* it belonged to the job */
    setting_end(&s);
}

/* A thread that does nothing but poll hears of the end of a job that library threads do. */
static void polling_for_the_end(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_job *job = job_of(&s);
    struct kvmprep_populate_result result;
    struct kvmprep_progress progress = {0};
    struct pollfd poll_fd = {.fd = kvmprep_job_fd(job, NULL), .events = POLLIN};
    CHECK_OK(kvmprep_job_spawn(job, &s.vcpus[0].fd, 1, 0, &s.err), s.err);
    while (!progress.ended) {
        uint64_t before = progress.host_done + progress.stage2_done;
        CHECK_EQ(poll(&poll_fd, 1, -1), 1);
        CHECK_OK(kvmprep_job_progress(job, &progress, sizeof(progress), &s.err), s.err);
        CHECK(progress.host_done + progress.stage2_done >= before);
    }
    CHECK_OK(kvmprep_job_wait(job, 0, &result, sizeof(result), &s.err), s.err);
    check_all_is_done(&s, &result);
    CHECK_EQ(kvmprep_job_free(job), 0);
    setting_end(&s);
}

/* To wait is to ask, for a while: before the end the answer is "not yet", afterwards always what became of
 * it. */
static void waiting(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_job *job = job_of(&s);
    struct kvmprep_populate_result result;
    memset(&result, 0xa5, sizeof(result));
    for (int timeout = 0; timeout <= 30; timeout += 15) {
        CHECK_ERR(kvmprep_job_wait(job, timeout, &result, sizeof(result), &s.err), s.err, ETIMEDOUT,
                  KVMPREP_REASON_NOT_FINISHED);
        CHECK_EQ((unsigned char)result.bytes, 0xa5);
    }
    CHECK_OK(kvmprep_job_run(job, s.vcpus[0].fd, &s.err), s.err);
    for (int timeout = -1; timeout <= 1; timeout++) {
        CHECK_OK(kvmprep_job_wait(job, timeout, &result, sizeof(result), &s.err), s.err);
        check_all_is_done(&s, &result);
    }
    /* What is over stays as it was: cancelling comes too late, and there is nothing to do for who comes now.
     */
    CHECK_OK(kvmprep_job_cancel(job, &s.err), s.err);
    CHECK_OK(kvmprep_job_run(job, s.vcpus[0].fd, &s.err), s.err);
    CHECK_OK(kvmprep_job_run(job, -1, &s.err), s.err);
    CHECK_OK(kvmprep_job_spawn(job, &s.vcpus[0].fd, 1, 1, &s.err), s.err);
    CHECK_OK(kvmprep_job_wait(job, -1, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.host, SIZE);
    CHECK_EQ(kvmprep_job_free(job), 0);
    setting_end(&s);
}

/* A cancelled job says so to everyone who comes, and does nothing more. */
static void after_cancelling(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_job *job = job_of(&s);
    struct kvmprep_populate_result result;
    struct kvmprep_range own = {MEMORY_GPA, PAGE, {0, 0}};
    CHECK_OK(kvmprep_job_cancel(job, &s.err), s.err);
    CHECK_OK(kvmprep_job_cancel(job, &s.err), s.err);
    CHECK(is_readable(kvmprep_job_fd(job, NULL)));
    CHECK_ERR(kvmprep_job_run(job, s.vcpus[0].fd, &s.err), s.err, ECANCELED, KVMPREP_REASON_CANCELLED);
    CHECK_ERR(kvmprep_job_run_near(job, -1, &own, 1, &s.err), s.err, ECANCELED, KVMPREP_REASON_CANCELLED);
    CHECK_OK(kvmprep_job_spawn(job, &s.vcpus[0].fd, 1, 1, &s.err), s.err);
    for (int timeout = -1; timeout <= 1; timeout++)
        CHECK_ERR(kvmprep_job_wait(job, timeout, &result, sizeof(result), &s.err), s.err, ECANCELED,
                  KVMPREP_REASON_CANCELLED);
    CHECK_EQ(result.host, 0);
    CHECK_EQ(result.remaining, SIZE);
    CHECK_EQ(result.n_remaining, 1);
    CHECK_EQ(kvmprep_job_free(job), 0);
    check_the_rest_can_be_done(&s, 0);
    setting_end(&s);
}

/* A job's time runs from its making, whether anybody works on it or not. */
static void time_limit_of_an_idle_job(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_job *job;
    opts.timeout_ms = 20;
    CHECK_OK(kvmprep_job_new(s.handle, NULL, 0, &opts, &job, &s.err), s.err);
    CHECK_ERR(kvmprep_job_wait(job, -1, &result, sizeof(result), &s.err), s.err, ETIMEDOUT,
              KVMPREP_REASON_TIMED_OUT);
    CHECK(result.wall_ns >= 20000000);
    CHECK_EQ(result.remaining, SIZE);
    CHECK_ERR(kvmprep_job_run(job, s.vcpus[0].fd, &s.err), s.err, ETIMEDOUT, KVMPREP_REASON_TIMED_OUT);
    CHECK(is_readable(kvmprep_job_fd(job, NULL)));
    CHECK_EQ(kvmprep_job_free(job), 0);
    check_the_rest_can_be_done(&s, 0);
    setting_end(&s);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"by_another_thread", by_another_thread},
        {"by_a_time_limit", by_a_time_limit},
        {"by_the_progress_callback", by_the_progress_callback},
        {"by_being_freed", by_being_freed},
        {"freed_under_a_callers_thread", freed_under_a_callers_thread},
        {"the_descriptor", the_descriptor},
        {"polling_for_the_end", polling_for_the_end},
        {"waiting", waiting},
        {"after_cancelling", after_cancelling},
        {"time_limit_of_an_idle_job", time_limit_of_an_idle_job},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
