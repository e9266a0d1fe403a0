/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * When to populate, and what undoes it: each case is a sentence of the header's, shown on a guest. Prepared
 * memory is not lost by what a vCPU is told before it runs; it is lost, in whole or part, by fork, by KSM and
 * by dirty logging; and a slot whose writes are logged is not filled unless that is wanted.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/guest.h"
#include "support/host.h"
#include "support/setting.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define SIZE (16 * MIB)
#define PAGES (SIZE / PAGE)

static const struct kvmprep_range all = {.gpa = MEMORY_GPA, .size = SIZE};

static struct kvmprep_populate_result populate_with(struct setting *s, int vcpu, uint32_t flags) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    opts.vcpu_fd = vcpu;
    opts.flags = flags;
    CHECK_OK(kvmprep_populate(s->handle, &all, 1, &opts, &result, sizeof(result), &s->err), s->err);
    return result;
}

static void populate(struct setting *s) {
    struct kvmprep_populate_result result = populate_with(s, s->vcpus[0].fd, 0);
    CHECK_EQ(result.stage2, SIZE);
    CHECK_EQ(result.remaining, 0);
}

/* ---- What a vCPU has been told ---- */

/* A vCPU of which nothing is set, neither CPUID nor registers. */
static struct vcpu bare_vcpu(const struct vm *vm) {
    struct vcpu vcpu = {.fd = ioctl(vm->fd, KVM_CREATE_VCPU, MOST_VCPUS)};
    CHECK(vcpu.fd >= 0);
    vcpu.run = mmap(NULL, vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu.fd, 0);
    CHECK(vcpu.run != MAP_FAILED);
    return vcpu;
}

/* Whether this CPU's page tables have as many levels whatever CPUID says. Intel's have 5 once it promises
 * more. */
static void skip_unless_levels_are_fixed(void) {
    FILE *file = fopen("/proc/cpuinfo", "r");
    char line[256];
    bool is_amd = false;
    CHECK(file != NULL);
    while (!is_amd && fgets(line, sizeof(line), file) != NULL)
        is_amd = strstr(line, "AuthenticAMD") != NULL;
    fclose(file);
    if (!is_amd && !kvm_is_modelled())
        check_skipped("CPUID may change the number of page-table levels here, which is why the header asks "
                      "for it first");
}

static void populated_by_a_vcpu_without_cpuid(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct {
        struct kvm_cpuid2 header;
        struct kvm_cpuid_entry2 entries[256];
    } cpuid = {.header = {.nent = 256}};
    skip_unless_levels_are_fixed();
    struct vcpu bare = bare_vcpu(&s.vm);
    CHECK_EQ(populate_with(&s, bare.fd, 0).stage2, SIZE);
    CHECK_EQ(ioctl(s.vm.kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), 0);
    CHECK_EQ(ioctl(s.vcpus[0].fd, KVM_SET_CPUID2, &cpuid), 0);
    CHECK_EQ(faults_beyond_code(&s), 0); /* on another vCPU, that has CPUID */
    vcpu_end(&s.vm, &bare);
    setting_end(&s);
}

static void populated_before_the_registers_are_set(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct kvm_sregs sregs;
    struct vcpu bare = bare_vcpu(&s.vm);
    CHECK_EQ(populate_with(&s, bare.fd, 0).stage2, SIZE);
    CHECK_EQ(ioctl(s.vcpus[0].fd, KVM_GET_SREGS, &sregs), 0);
    CHECK_EQ(ioctl(bare.fd, KVM_SET_SREGS, &sregs), 0);
    CHECK_EQ(faults_of_touch(&bare, TOUCH_WRITE, MEMORY_GPA, SIZE), 1); /* its code page */
    vcpu_end(&s.vm, &bare);
    setting_end(&s);
}

/* ---- Fork ---- */

enum child { LIVES, HAS_EXITED };

static pid_t make_child(enum child child) {
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* nobody ends it where the case fails */
        while (child == LIVES)
            pause();
        _exit(0);
    }
    if (child == HAS_EXITED)
        CHECK_EQ(waitpid(pid, NULL, 0), pid);
    return pid;
}

static void end_child(pid_t pid) {
    kill(pid, SIGKILL);
    CHECK_EQ(waitpid(pid, NULL, 0), pid);
}

/* Fork shares private memory with the child, which takes each page from the guest: its next write copies. */
static void a_living_child_costs_two_faults_a_page(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    populate(&s);
    pid_t child = make_child(LIVES);
    CHECK_EQ(faults_beyond_code(&s), 2 * PAGES);
    end_child(child);
    setting_end(&s);
}

/* A child that is gone has left the memory write-protected: one fault a page, and some more where its page
 * table lies. */
static void an_exited_child_costs_a_fault_a_page(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    populate(&s);
    make_child(HAS_EXITED);
    uint64_t faults = faults_beyond_code(&s);
    printf("  %llu faults for %llu pages\n", (unsigned long long)faults, (unsigned long long)PAGES);
    CHECK(faults >= PAGES);
    CHECK(faults < PAGES + PAGES / 64);
    setting_end(&s);
}

static void memory_kept_from_children_keeps_its_mappings(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    CHECK_EQ(madvise(s.memory.hva, SIZE, MADV_DONTFORK), 0);
    populate(&s);
    pid_t child = make_child(LIVES);
    CHECK_EQ(faults_beyond_code(&s), 0);
    end_child(child);
    setting_end(&s);
}

static void shared_with_a_child(enum kind kind) {
    struct setting s = setting_make_with_stage2(kind, SIZE);
    populate(&s);
    pid_t child = make_child(LIVES);
    CHECK_EQ(faults_beyond_code(&s), 0);
    end_child(child);
    setting_end(&s);
}

static void shared_memfd_is_not_touched_by_fork(void) {
    shared_with_a_child(MEMFD_SHARED);
}

static void mapped_gmem_is_not_touched_by_fork(void) {
    shared_with_a_child(GMEM_SHARED);
}

static void private_gmem_is_not_touched_by_fork(void) {
    shared_with_a_child(GMEM_PRIVATE);
}

/* The process forks while library threads work: the job goes on, and the child, which must not use it, is
 * none the wiser. */
static void fork_while_populating(bool is_kept_from_children) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct kvmprep_populate_result result;
    struct kvmprep_progress progress;
    int vcpus[2] = {s.vcpus[0].fd, s.vcpus[1].fd};
    unsigned rounds = check_rounds(5);
    if (is_kept_from_children)
        CHECK_EQ(madvise(s.memory.hva, SIZE, MADV_DONTFORK), 0);
    for (unsigned round = 0; round < rounds; round++) {
        struct kvmprep_job *job;
        CHECK_OK(kvmprep_range_discarded(s.handle, &all, &s.err), s.err);
        CHECK_EQ(madvise(s.memory.hva, SIZE, MADV_DONTNEED), 0);
        CHECK_OK(kvmprep_job_new(s.handle, &all, 1, NULL, &job, &s.err), s.err);
        CHECK_OK(kvmprep_job_spawn(job, vcpus, 2, 0, &s.err), s.err);
        do {
            make_child(HAS_EXITED);
            CHECK_OK(kvmprep_job_progress(job, &progress, sizeof(progress), &s.err), s.err);
        } while (!progress.ended);
        CHECK_OK(kvmprep_job_wait(job, -1, &result, sizeof(result), &s.err), s.err);
        CHECK_EQ(result.host, SIZE);
        CHECK_EQ(result.stage2, SIZE);
        CHECK_EQ(result.remaining, 0);
        CHECK_EQ(kvmprep_job_free(job), 0);
    }
    if (is_kept_from_children)
        CHECK_EQ(faults_beyond_code(&s), 0);
    else
        CHECK(faults_beyond_code(&s) <= 2 * PAGES);
    setting_end(&s);
}

static void a_fork_while_populating(void) {
    fork_while_populating(false);
}

static void a_fork_while_populating_memory_kept_from_children(void) {
    fork_while_populating(true);
}

/* ---- KSM ---- */

static long number_in(const char *path) {
    long number = -1;
    FILE *file = fopen(path, "r");
    if (file == NULL)
        check_skipped("no KSM: %s: %s", path, strerror(errno));
    CHECK_EQ(fscanf(file, "%ld", &number), 1);
    fclose(file);
    return number;
}

static long ksm_number(const char *name) {
    char path[64];
    snprintf(path, sizeof(path), "/sys/kernel/mm/ksm/%s", name);
    return number_in(path);
}

static void set_ksm(const char *name, long number) {
    char path[64];
    snprintf(path, sizeof(path), "/sys/kernel/mm/ksm/%s", name);
    FILE *file = machine_may_be_changed() ? fopen(path, "w") : NULL;
    if (file == NULL)
        check_skipped("KSM cannot be set: %s: %s", path,
                      machine_may_be_changed() ? strerror(errno) : "others use this machine");
    fprintf(file, "%ld", number);
    CHECK_EQ(fclose(file), 0);
}

/* Merged pages cost the guest two faults each, as if nothing had been populated and more. */
static void merged_memory_is_worse_than_unpopulated(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    long pages_to_scan = ksm_number("pages_to_scan"), pause = ksm_number("sleep_millisecs");
    /* On the software model it is this machine's own KSM: two runs of the tests take turns. The bed's kernels
     * need not have locks, and have one run. */
    int turn = open("/sys/kernel/mm/ksm/run", O_RDONLY | O_CLOEXEC);
    CHECK(turn >= 0 && (flock(turn, LOCK_EX) == 0 || errno == ENOSYS));
    if (ksm_number("run") != 0)
        check_skipped("KSM is at work for others");
    CHECK_EQ(madvise(s.memory.hva, SIZE, MADV_MERGEABLE), 0);
    populate(&s);
    set_ksm("pages_to_scan", 100000);
    set_ksm("sleep_millisecs", 1);
    set_ksm("run", 1);
    /* A page is merged when it is seen unchanged for the second time; the first scan may have begun before.
     */
    long until = ksm_number("full_scans") + 4;
    while (ksm_number("full_scans") < until)
        sleep_us(10000);
    set_ksm("run", 0);
    long merged = number_in("/proc/self/ksm_merging_pages"); /* others may have such memory too */
    uint64_t faults = faults_beyond_code(&s);
    set_ksm("run", 2); /* unmerges all */
    set_ksm("run", 0);
    set_ksm("pages_to_scan", pages_to_scan);
    set_ksm("sleep_millisecs", pause);
    close(turn);
    CHECK_EQ(merged, PAGES);
    /* The model takes a merged page that nobody shares any more for one that was never merged. */
    const uint64_t unseen = kvm_is_modelled() ? PAGES / 64 : 0;
    CHECK(faults <= 2 * PAGES && faults >= 2 * PAGES - unseen);
    setting_end(&s);
}

/* ---- Dirty logging ---- */

static void log_writes_of(enum kind kind) {
    struct setting s = setting_make_with_stage2(kind, SIZE);
    populate(&s);
    s.slot.flags |= KVM_MEM_LOG_DIRTY_PAGES;
    CHECK_OK(kvmprep_memslot_set(s.handle, &s.slot, &s.err), s.err);
    CHECK_EQ(faults_beyond_code(&s), PAGES);
    setting_end(&s);
}

static void dirty_logging_turned_on_costs_a_fault_a_page(void) {
    log_writes_of(ANON_4K);
}

static void huge_pages_too_cost_a_fault_for_each_small_one(void) {
    log_writes_of(ANON_THP);
}

static uint64_t dirty_pages(struct setting *s) {
    static uint64_t words[PAGES / 64];
    struct kvm_dirty_log log = {.slot = MEMORY_SLOT, .dirty_bitmap = words};
    uint64_t pages = 0;
    CHECK_EQ(ioctl(s->vm.fd, KVM_GET_DIRTY_LOG, &log), 0);
    for (size_t i = 0; i < PAGES / 64; i++)
        pages += (uint64_t)__builtin_popcountll(words[i]);
    return pages;
}

static struct setting setting_with_dirty_log(void) {
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    s.slot.flags |= KVM_MEM_LOG_DIRTY_PAGES;
    CHECK_OK(kvmprep_memslot_set(s.handle, &s.slot, &s.err), s.err);
    return s;
}

/* A pre-fault would mark every page dirty, so the host stage is all that such a slot gets. */
static void a_dirty_logged_slot_is_kept_out_of_stage_2(void) {
    struct setting s = setting_with_dirty_log();
    struct kvmprep_populate_result result = populate_with(&s, s.vcpus[0].fd, 0);
    CHECK_EQ(result.bytes, SIZE);
    CHECK_EQ(result.host, SIZE);
    CHECK_EQ(result.stage2, 0);
    CHECK_EQ(result.dirty_logged, SIZE);
    CHECK_EQ(dirty_pages(&s), 0);
    CHECK_EQ(faults_beyond_code(&s), PAGES);
    CHECK_EQ(dirty_pages(&s), PAGES); /* the guest's own writes */
    setting_end(&s);
}

static void required_stage_2_of_a_dirty_logged_slot_is_refused(void) {
    struct setting s = setting_with_dirty_log();
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    opts.vcpu_fd = s.vcpus[0].fd;
    opts.flags = KVMPREP_POPULATE_REQUIRE_STAGE2;
    for (size_t n = 0; n < 2; n++) { /* in "all memory" as well as named */
        CHECK_ERR(kvmprep_populate(s.handle, &all, n, &opts, NULL, 0, &s.err), s.err, EBUSY,
                  KVMPREP_REASON_MEMSLOT_DIRTY_LOGGED);
        CHECK_EQ(s.err.slot, MEMORY_SLOT);
        CHECK_EQ(s.err.gpa, MEMORY_GPA);
        CHECK_EQ(s.err.size, SIZE);
    }
    CHECK_EQ(present_bytes(s.memory.hva, SIZE), 0);
    setting_end(&s);
}

/* Who insists gets a guest that takes no fault, and a log that is full. */
static void a_dirty_logged_slot_filled_is_all_dirty(void) {
    struct setting s = setting_with_dirty_log();
    struct kvmprep_populate_result result =
        populate_with(&s, s.vcpus[0].fd, KVMPREP_POPULATE_DIRTY_LOGGED | KVMPREP_POPULATE_REQUIRE_STAGE2);
    CHECK_EQ(result.stage2, SIZE);
    CHECK_EQ(result.dirty_logged, 0);
    CHECK_EQ(faults_beyond_code(&s), 0);
    CHECK_EQ(dirty_pages(&s), PAGES);
    setting_end(&s);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"populated_by_a_vcpu_without_cpuid", populated_by_a_vcpu_without_cpuid},
        {"populated_before_the_registers_are_set", populated_before_the_registers_are_set},
        {"a_living_child_costs_two_faults_a_page", a_living_child_costs_two_faults_a_page},
        {"an_exited_child_costs_a_fault_a_page", an_exited_child_costs_a_fault_a_page},
        {"memory_kept_from_children_keeps_its_mappings", memory_kept_from_children_keeps_its_mappings},
        {"shared_memfd_is_not_touched_by_fork", shared_memfd_is_not_touched_by_fork},
        {"mapped_gmem_is_not_touched_by_fork", mapped_gmem_is_not_touched_by_fork},
        {"private_gmem_is_not_touched_by_fork", private_gmem_is_not_touched_by_fork},
        {"a_fork_while_populating", a_fork_while_populating},
        {"a_fork_while_populating_memory_kept_from_children",
         a_fork_while_populating_memory_kept_from_children},
        {"merged_memory_is_worse_than_unpopulated", merged_memory_is_worse_than_unpopulated},
        {"dirty_logging_turned_on_costs_a_fault_a_page", dirty_logging_turned_on_costs_a_fault_a_page},
        {"huge_pages_too_cost_a_fault_for_each_small_one", huge_pages_too_cost_a_fault_for_each_small_one},
        {"a_dirty_logged_slot_is_kept_out_of_stage_2", a_dirty_logged_slot_is_kept_out_of_stage_2},
        {"required_stage_2_of_a_dirty_logged_slot_is_refused",
         required_stage_2_of_a_dirty_logged_slot_is_refused},
        {"a_dirty_logged_slot_filled_is_all_dirty", a_dirty_logged_slot_filled_is_all_dirty},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
