/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Who does the work: no vCPU, one, several, threads of the caller's and of the library's, two jobs at once.
 * Whoever does it, the sums are the same, and nothing is done twice that was asked for once.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/policy.h"
#include "support/setting.h"
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#define SIZE (32 * MIB)

static struct kvmprep_range range_of(uint64_t gpa, uint64_t size) {
    struct kvmprep_range range = {gpa, size, {0, 0}};
    return range;
}

static struct kvmprep_coverage coverage_of(struct setting *s) {
    struct kvmprep_range all = range_of(MEMORY_GPA, s->memory.size);
    struct kvmprep_coverage coverage;
    CHECK_OK(kvmprep_get_coverage(s->handle, &all, &coverage, sizeof(coverage), &s->err), s->err);
    return coverage;
}

/* Every byte once through each stage, whatever threads there were. */
static void check_done_once(struct setting *s, const struct kvmprep_populate_result *result) {
    CHECK_EQ(result->host, SIZE);
    CHECK_EQ(result->stage2, s->has_pre_fault ? SIZE : 0);
    CHECK_EQ(result->skipped, 0);
    CHECK_EQ(result->lost, 0);
    CHECK_EQ(result->interruptions, 0);
    check_all_is_done(s, result);
}

/* ---- Without stage 2 ---- */

/* No vCPU, no options: the host's side alone, by the calling thread. The guest still faults, once a page. */
static void no_vcpu(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, NULL, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.stage2_state, KVMPREP_STAGE2_NO_VCPU);
    CHECK_EQ(result.bytes, SIZE);
    CHECK_EQ(result.host, SIZE);
    CHECK_EQ(result.stage2, 0);
    CHECK_EQ(result.stage2_ns, 0);
    CHECK_EQ(result.remaining, 0); /* all that was to be done */
    CHECK_EQ(coverage_of(&s).host, SIZE);
    CHECK_EQ(coverage_of(&s).stage2, 0);
    if (s.has_pre_fault)
        CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA, SIZE), SIZE / PAGE + 1);
    opts.flags = KVMPREP_POPULATE_REQUIRE_STAGE2;
    CHECK_ERR(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err, EOPNOTSUPP,
              KVMPREP_REASON_NO_STAGE2);
    setting_end(&s);
}

/* A job for the host's side, done by library threads; then the other half of the work, on a vCPU, later. */
static void host_only_and_later_the_rest(void) {
    struct setting s = setting_make(MEMFD_SHARED, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_job *job;
    opts.flags = KVMPREP_POPULATE_HOST_ONLY;
    CHECK_OK(kvmprep_job_new(s.handle, NULL, 0, &opts, &job, &s.err), s.err);
    CHECK_OK(kvmprep_job_spawn(job, NULL, 0, 2, &s.err), s.err);
    CHECK_OK(kvmprep_job_wait(job, -1, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(kvmprep_job_free(job), 0);
    CHECK_EQ(result.stage2_state, KVMPREP_STAGE2_NOT_WANTED);
    CHECK_EQ(result.host, SIZE);
    CHECK_EQ(result.stage2, 0);
    CHECK_EQ(result.remaining, 0);

    opts.flags = KVMPREP_POPULATE_SKIP_COVERED;
    opts.vcpu_fd = s.vcpus[0].fd;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.host, 0); /* it is there already */
    CHECK_EQ(result.skipped, s.has_pre_fault ? 0 : SIZE);
    CHECK_EQ(result.stage2, s.has_pre_fault ? SIZE : 0);
    check_all_is_done(&s, &result);
    setting_end(&s);
}

/* Who cannot do without stage 2 says so, and hears before anything is done that it cannot be had. */
static void stage2_is_required(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_job *job;
    opts.flags = KVMPREP_POPULATE_REQUIRE_STAGE2;
    if (s.has_pre_fault) {
        opts.vcpu_fd = s.vcpus[0].fd;
        CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
        check_done_once(&s, &result);
    } else {
        CHECK_ERR(kvmprep_job_new(s.handle, NULL, 0, &opts, &job, &s.err), s.err, EOPNOTSUPP,
                  KVMPREP_REASON_NO_STAGE2);
        opts.vcpu_fd = s.vcpus[0].fd;
        CHECK_ERR(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err,
                  EOPNOTSUPP, KVMPREP_REASON_NO_STAGE2);
        CHECK_EQ(s.err.stage, KVMPREP_STAGE_STAGE2);
        CHECK_EQ(coverage_of(&s).host, 0);
    }
    setting_end(&s);
}

/* ---- Threads ---- */

static void populate_with(enum kind kind, bool own_vcpu, size_t library_vcpus, uint32_t host_threads) {
    struct setting s = setting_make(kind, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    int vcpus[MOST_VCPUS];
    for (size_t i = 0; i < library_vcpus; i++)
        vcpus[i] = s.vcpus[own_vcpu + i].fd;
    if (own_vcpu)
        opts.vcpu_fd = s.vcpus[0].fd;
    opts.vcpu_fds = vcpus;
    opts.n_vcpu_fds = library_vcpus;
    opts.host_threads = host_threads;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    check_done_once(&s, &result);
    setting_end(&s);
}

static void one_vcpu_and_host_threads(void) {
    populate_with(ANON_4K, true, 0, 2);
    populate_with(MEMFD_SHARED, true, 0, 2);
}

static void two_library_vcpus(void) {
    populate_with(ANON_4K, false, 2, 0);
    populate_with(MEMFD_SHARED, false, 2, 3);
}

static void own_vcpu_and_a_library_one(void) {
    populate_with(ANON_4K, true, 1, 0);
    populate_with(ANON_THP, true, 1, 1);
}

/* A caller's thread that has no vCPU does the host's side, and leaves the rest to whoever comes with one. */
static void stages_by_different_threads(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_result result;
    struct kvmprep_progress progress;
    struct kvmprep_job *job;
    CHECK_OK(kvmprep_job_new(s.handle, NULL, 0, NULL, &job, &s.err), s.err);
    CHECK_OK(kvmprep_job_run(job, -1, &s.err), s.err);
    CHECK_OK(kvmprep_job_progress(job, &progress, sizeof(progress), &s.err), s.err);
    CHECK_EQ(progress.host_done, SIZE);
    CHECK_EQ(progress.stage2_done, 0);
    CHECK_EQ(progress.stage2_total, s.has_pre_fault ? SIZE : 0);
    CHECK_EQ(progress.ended, !s.has_pre_fault);
    CHECK_OK(kvmprep_job_run(job, s.vcpus[1].fd, &s.err), s.err);
    CHECK_OK(kvmprep_job_wait(job, 0, &result, sizeof(result), &s.err), s.err);
    check_done_once(&s, &result);
    CHECK_EQ(kvmprep_job_free(job), 0);
    setting_end(&s);
}

struct worker {
    struct kvmprep_job *job;
    int vcpu, result;
    struct kvmprep_range own;
    struct kvmprep_error err;
};

static void *work(void *argument) {
    struct worker *worker = argument;
    worker->result = kvmprep_job_run_near(worker->job, worker->vcpu, &worker->own, 1, &worker->err);
    return NULL;
}

/* A node's threads come with the node's memory, each with its own; together they do all of it. */
static void threads_with_memory_of_their_own(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_result result;
    struct kvmprep_job *job;
    pthread_t threads[2];
    CHECK_OK(kvmprep_job_new(s.handle, NULL, 0, NULL, &job, &s.err), s.err);
    struct worker workers[2] = {
        {.job = job, .vcpu = s.vcpus[0].fd, .own = range_of(MEMORY_GPA + SIZE / 2, SIZE / 2)},
        {.job = job, .vcpu = s.vcpus[1].fd, .own = range_of(MEMORY_GPA, SIZE / 2)},
    };
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, work, &workers[i]), 0);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 2; i++)
        CHECK_OK(workers[i].result, workers[i].err);
    CHECK_OK(kvmprep_job_wait(job, 0, &result, sizeof(result), &s.err), s.err);
    check_done_once(&s, &result);
    CHECK_EQ(kvmprep_job_free(job), 0);
    setting_end(&s);
}

/* A thread's own memory goes first: stopped before it has done that much, it has touched nothing else. */
static void own_memory_goes_first(void) {
    for (int i = 0; i < 20; i++) {
        struct setting s = setting_make(ANON_4K, SIZE);
        struct kvmprep_progress progress = {0};
        struct kvmprep_range left[8];
        pthread_t thread;
        size_t n;
        struct worker worker = {.vcpu = s.vcpus[0].fd, .own = range_of(MEMORY_GPA + SIZE / 2, SIZE / 2)};
        CHECK_OK(kvmprep_job_new(s.handle, NULL, 0, NULL, &worker.job, &s.err), s.err);
        CHECK_EQ(pthread_create(&thread, NULL, work, &worker), 0);
        while (progress.host_done == 0)
            CHECK_OK(kvmprep_job_progress(worker.job, &progress, sizeof(progress), &s.err), s.err);
        CHECK_OK(kvmprep_job_cancel(worker.job, &s.err), s.err);
        pthread_join(thread, NULL);
        CHECK_OK(kvmprep_job_remaining(worker.job, left, 8, &n, &s.err), s.err);
        uint64_t host = coverage_of(&s).host;
        bool is_early = host <= SIZE / 2;
        if (is_early) {
            CHECK(n >= 1);
            CHECK_EQ(left[0].gpa, MEMORY_GPA);
            CHECK(left[0].size >= SIZE / 2);
            struct kvmprep_range other = range_of(MEMORY_GPA, SIZE / 2);
            struct kvmprep_coverage coverage;
            CHECK_OK(kvmprep_get_coverage(s.handle, &other, &coverage, sizeof(coverage), &s.err), s.err);
            CHECK_EQ(coverage.host, 0);
        }
        CHECK_EQ(kvmprep_job_free(worker.job), 0);
        setting_end(&s);
        if (is_early)
            return;
    }
    check_skipped("this machine is done with half the memory before it can be stopped");
}

/* ---- More than one job, more than one slot ---- */

/* Two jobs at once on one VM, each with a vCPU and a host thread of its own. */
static void two_jobs(struct kvmprep_range first, struct kvmprep_range second) {
    struct setting s = setting_make(ANON_4K, SIZE);
    const struct kvmprep_range *ranges[2] = {&first, &second};
    struct kvmprep_populate_result result;
    struct kvmprep_job *jobs[2];
    for (int i = 0; i < 2; i++)
        CHECK_OK(kvmprep_job_new(s.handle, ranges[i], 1, NULL, &jobs[i], &s.err), s.err);
    for (int i = 0; i < 2; i++)
        CHECK_OK(kvmprep_job_spawn(jobs[i], &s.vcpus[i].fd, 1, 1, &s.err), s.err);
    for (int i = 0; i < 2; i++) {
        CHECK_OK(kvmprep_job_wait(jobs[i], -1, &result, sizeof(result), &s.err), s.err);
        CHECK_EQ(result.bytes, ranges[i]->size);
        CHECK_EQ(result.host, ranges[i]->size);
        CHECK_EQ(result.stage2, s.has_pre_fault ? ranges[i]->size : 0);
        CHECK_EQ(result.remaining, 0);
        CHECK_EQ(kvmprep_vm_free(s.handle), -EBUSY);
    }
    for (int i = 0; i < 2; i++)
        CHECK_EQ(kvmprep_job_free(jobs[i]), 0);
    CHECK_EQ(coverage_of(&s).host, SIZE);
    check_writes_do_not_fault(&s, MEMORY_GPA, SIZE);
    setting_end(&s);
}

static void two_jobs_side_by_side(void) {
    two_jobs(range_of(MEMORY_GPA, SIZE / 2 + PAGE), range_of(MEMORY_GPA + SIZE / 2 + PAGE, SIZE / 2 - PAGE));
}

static void two_jobs_over_the_same_memory(void) {
    two_jobs(range_of(MEMORY_GPA, SIZE), range_of(MEMORY_GPA, SIZE));
    two_jobs(range_of(MEMORY_GPA, SIZE - 2 * MIB), range_of(MEMORY_GPA + 3 * MIB, SIZE - 3 * MIB));
}

/* Five hundred slots of sixteen pages with holes between, told to the handle in one list. */
static void many_small_slots(void) {
    enum { SLOTS = 500 };
    const uint64_t size = 16 * PAGE, stride = 32 * PAGE;
    struct setting s = setting_make(MEMFD_SHARED, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_memslot *slots = calloc(SLOTS, sizeof(*slots));
    uint64_t faults = 0;
    CHECK(slots != NULL);
    CHECK_EQ(slot_delete(&s.vm, MEMORY_SLOT), 0);
    for (uint32_t i = 0; i < SLOTS; i++) {
        slots[i] = s.slot;
        slots[i].slot = 10 + i;
        slots[i].gpa = MEMORY_GPA + i * stride;
        slots[i].size = size;
        slots[i].hva += i * size;
        slots[i].memory_fd_offset += i * size;
        CHECK_EQ(slot_set(&s.vm, &slots[i]), 0);
    }
    CHECK_OK(kvmprep_vm_set_memslots(s.handle, slots, SLOTS, &s.err), s.err);
    opts.vcpu_fd = s.vcpus[0].fd;
    opts.vcpu_fds = &s.vcpus[1].fd;
    opts.n_vcpu_fds = 1;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.bytes, SLOTS * size);
    CHECK_EQ(result.host, SLOTS * size);
    CHECK_EQ(result.stage2, s.has_pre_fault ? SLOTS * size : 0);
    CHECK_EQ(result.remaining, 0);
    if (s.has_pre_fault) {
        for (uint32_t i = 0; i < SLOTS; i++)
            faults += faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA + i * stride, size);
        CHECK_EQ(faults, 1); /* the code page */
    }
    free(slots);
    setting_end(&s);
}

/* ---- What the result says ---- */

/* Two slots of different backings: what each took, and what KVM says has come of it. */
static void sums(void) {
    need_small_shared_pages();
    struct setting s = setting_make(ANON_4K, SIZE);
    struct memory shared = memory_make(&s.vm, MEMFD_SHARED, SIZE / 2);
    struct kvmprep_memslot slot = slot_of(2, MEMORY_GPA + SIZE, &shared);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    CHECK_OK(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err);
    opts.vcpu_fd = s.vcpus[0].fd;
    opts.vcpu_fds = &s.vcpus[1].fd;
    opts.n_vcpu_fds = 1;
    uint64_t began = now_ns();
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    uint64_t took = now_ns() - began;
    CHECK_EQ(result.bytes, SIZE + SIZE / 2);
    CHECK_EQ(result.host, SIZE + SIZE / 2);
    CHECK(result.wall_ns > 0 && result.wall_ns <= took);
    CHECK(result.host_ns > 0 && result.host_ns + result.stage2_ns <= 2 * took); /* two threads */
    for (int i = 0; i < 16; i++) {
        uint64_t bytes = i == KVMPREP_BACKING_ANONYMOUS      ? SIZE
                         : i == KVMPREP_BACKING_SHMEM_SHARED ? SIZE / 2
                                                             : 0;
        CHECK_EQ(result.backings[i].bytes, bytes);
        if (bytes > 0)
            CHECK_EQ(result.backings[i].writable, 1);
    }
    CHECK_EQ(result.backings[KVMPREP_BACKING_ANONYMOUS].host, KVMPREP_HOST_POPULATE_WRITE);
    /* The slot's file is known, so its pages are allocated first: that is the faster way. */
    CHECK_EQ(result.backings[KVMPREP_BACKING_SHMEM_SHARED].host, KVMPREP_HOST_ALLOCATE_AND_POPULATE);
    CHECK_EQ(result.pages_known, 1);
    CHECK_EQ(result.pages_4k, s.has_pre_fault ? (SIZE + SIZE / 2) / PAGE : 0);
    CHECK_EQ(result.pages_2m, 0);
    CHECK_EQ(result.pages_1g, 0);
    if (s.has_pre_fault)
        CHECK(result.stage2_ns > 0);
    setting_end(&s);
    memory_end(&shared);
}

/* Huge pages of the host become huge mappings of the guest. */
static void sums_of_huge_pages(void) {
    struct setting s = setting_make_with_stage2(HUGETLB_SHARED, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    opts.vcpu_fd = s.vcpus[0].fd;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    check_done_once(&s, &result);
    CHECK_EQ(result.pages_2m, SIZE / (2 * MIB));
    CHECK_EQ(result.pages_4k, 0);
    CHECK_EQ(result.backings[KVMPREP_BACKING_HUGETLB_SHARED].bytes, SIZE);
    setting_end(&s);
}

/* What is covered is known, and skipped where that is wished; by default all is done again. */
static void covered_memory_is_skipped(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_range half = range_of(MEMORY_GPA, SIZE / 2);
    opts.vcpu_fd = s.vcpus[0].fd;
    opts.flags = KVMPREP_POPULATE_SKIP_COVERED;
    CHECK_EQ(coverage_of(&s).memory, SIZE);
    CHECK_EQ(coverage_of(&s).host, 0);
    CHECK_OK(kvmprep_populate(s.handle, &half, 1, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.skipped, 0);
    CHECK_EQ(coverage_of(&s).host, SIZE / 2);
    CHECK_EQ(coverage_of(&s).stage2, s.has_pre_fault ? SIZE / 2 : 0);
    CHECK_EQ(coverage_of(&s).stage2_writable, s.has_pre_fault ? SIZE / 2 : 0);
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.bytes, SIZE);
    CHECK_EQ(result.skipped, SIZE / 2);
    CHECK_EQ(result.host, SIZE / 2);
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.bytes, SIZE);
    CHECK_EQ(result.skipped, SIZE);
    CHECK_EQ(result.host, 0);
    CHECK_EQ(result.stage2, 0);
    check_all_is_done(&s, &result);
    CHECK_EQ(coverage_of(&s).host, SIZE);
    CHECK_EQ(coverage_of(&s).lost, 0);
    CHECK_EQ(coverage_of(&s).last_loss, KVMPREP_LOSS_NOTHING);
    opts.flags = 0;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.skipped, 0);
    CHECK_EQ(result.host, SIZE);
    CHECK_EQ(result.pages_4k, 0); /* nothing new */
    setting_end(&s);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"no_vcpu", no_vcpu},
        {"host_only_and_later_the_rest", host_only_and_later_the_rest},
        {"stage2_is_required", stage2_is_required},
        {"one_vcpu_and_host_threads", one_vcpu_and_host_threads},
        {"two_library_vcpus", two_library_vcpus},
        {"own_vcpu_and_a_library_one", own_vcpu_and_a_library_one},
        {"stages_by_different_threads", stages_by_different_threads},
        {"threads_with_memory_of_their_own", threads_with_memory_of_their_own},
        {"own_memory_goes_first", own_memory_goes_first},
        {"two_jobs_side_by_side", two_jobs_side_by_side},
        {"two_jobs_over_the_same_memory", two_jobs_over_the_same_memory},
        {"many_small_slots", many_small_slots},
        {"sums", sums},
        {"sums_of_huge_pages", sums_of_huge_pages},
        {"covered_memory_is_skipped", covered_memory_is_skipped},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
