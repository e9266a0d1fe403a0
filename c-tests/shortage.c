/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memory that is not there, or not as it should be: an empty pool of huge pages, a file that is too short, a
 * hole, a mapping that cannot be written. Each is an error that names the place, never a SIGBUS, and what was
 * done before stays done. And memory of odd shapes that is all right: many mappings in one slot, addresses
 * that do not fit each other, huge pages on advice.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/guest.h"
#include "support/host.h"
#include "support/policy.h"
#include "support/setting.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (16 * MIB)
#define PAGES (SIZE / PAGE)
#define HUGE_PAGE (2 * MIB)
#define OTHER_SLOT 2
#define OTHER_GPA (4ull << 30)
#define POOL "/sys/kernel/mm/hugepages/hugepages-2048kB/"

static struct kvmprep_range range_of(uint64_t gpa, uint64_t size) {
    struct kvmprep_range range = {.gpa = gpa, .size = size};
    return range;
}

static int populate(struct setting *s, struct kvmprep_range range, uint32_t flags,
                    struct kvmprep_populate_result *result) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    opts.vcpu_fd = s->vcpus[0].fd;
    opts.flags = flags;
    return kvmprep_populate(s->handle, &range, 1, &opts, result, sizeof(*result), &s->err);
}

/* Another slot, over memory that the case has mapped itself. */
static void add_slot(struct setting *s, void *hva, size_t size, uint32_t flags) {
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    slot.slot = OTHER_SLOT;
    slot.flags = flags;
    slot.gpa = OTHER_GPA;
    slot.size = size;
    slot.hva = (uintptr_t)hva;
    CHECK_OK(kvmprep_memslot_set(s->handle, &slot, &s->err), s->err);
}

/* The error names the slot, the stage, and memory that begins here. */
static void check_error_is_at(const struct setting *s, uint32_t slot, uint64_t gpa) {
    CHECK_EQ(s->err.stage, KVMPREP_STAGE_HOST);
    CHECK_EQ(s->err.slot, slot);
    CHECK_EQ(s->err.gpa, gpa);
    CHECK(s->err.size > 0);
    CHECK(s->err.hint[0] != 0);
}

static long number_after(const char *path, const char *name) {
    FILE *file = fopen(path, "r");
    char line[256];
    long number = -1;
    if (file == NULL)
        check_skipped("%s: %s", path, strerror(errno));
    while (number < 0 && fgets(line, sizeof(line), file) != NULL)
        if (strncmp(line, name, strlen(name)) == 0)
            number = atol(line + strlen(name));
    fclose(file);
    CHECK(number >= 0);
    return number;
}

/* ---- Huge pages ---- */

/* Maps four huge pages more than the pool has, without a reservation; *available is how many it has. */
static void *map_more_than_the_pool(struct setting *s, size_t *available, size_t *size) {
    struct memory some = memory_make(&s->vm, HUGETLB_PRIVATE, 4 * HUGE_PAGE); /* so that the pool has some */
    memory_end(&some);
    *available = (size_t)(number_after(POOL "free_hugepages", "") - number_after(POOL "resv_hugepages", ""));
    *size = (*available + 4) * HUGE_PAGE;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE;
    void *hva = mmap(NULL, *size, PROT_READ | PROT_WRITE, flags, -1, 0);
    CHECK(hva != MAP_FAILED);
    add_slot(s, hva, *size, 0);
    return hva;
}

static void an_empty_pool_of_huge_pages(void) {
    struct setting s = setting_make(ANON_4K, PAGE);
    struct kvmprep_populate_result result;
    size_t available, size;
    void *hva = map_more_than_the_pool(&s, &available, &size);
    CHECK_ERR(populate(&s, range_of(OTHER_GPA, size), 0, &result), s.err, ENOMEM,
              KVMPREP_REASON_HUGETLB_SHORTAGE);
    check_error_is_at(&s, OTHER_SLOT, OTHER_GPA + available * HUGE_PAGE);
    CHECK_EQ(s.err.size, HUGE_PAGE);
    CHECK(strstr(s.err.message, "2 MiB pages") != NULL);
    CHECK(strstr(s.err.hint, POOL) != NULL);
    /* What the pool had is used, and stays. */
    CHECK_EQ(result.host, available * HUGE_PAGE);
    CHECK_EQ(result.stage2, s.has_pre_fault ? available * HUGE_PAGE : 0);
    CHECK_EQ(result.remaining, 4 * HUGE_PAGE);
    CHECK_EQ(present_bytes(hva, size), available * HUGE_PAGE);
    munmap(hva, size);
    setting_end(&s);
}

static void more_huge_pages_than_the_pool_has_are_refused_first(void) {
    struct setting s = setting_make(ANON_4K, PAGE);
    struct kvmprep_populate_result result;
    size_t available, size;
    void *hva = map_more_than_the_pool(&s, &available, &size);
    CHECK_ERR(populate(&s, range_of(OTHER_GPA, size), KVMPREP_POPULATE_CHECK_FREE, &result), s.err, ENOMEM,
              KVMPREP_REASON_HUGETLB_SHORTAGE);
    CHECK_EQ(present_bytes(hva, size), 0);
    /* What fits is not. */
    CHECK_OK(populate(&s, range_of(OTHER_GPA, available * HUGE_PAGE), KVMPREP_POPULATE_CHECK_FREE, &result),
             s.err);
    CHECK_EQ(result.host, available * HUGE_PAGE);
    munmap(hva, size);
    setting_end(&s);
}

/* ---- Memory ---- */

static void more_memory_than_the_machine_has_is_refused_first(void) {
    struct setting s = setting_make(ANON_4K, PAGE);
    struct kvmprep_populate_result result;
    long available =
        number_after("/proc/meminfo", "MemAvailable:") + number_after("/proc/meminfo", "SwapFree:");
    size_t size = ((size_t)available << 10) + (1ull << 30);
    size &= ~(size_t)(PAGE - 1);
    void *hva = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(hva != MAP_FAILED);
    add_slot(&s, hva, size, 0);
    CHECK_ERR(populate(&s, range_of(OTHER_GPA, size), KVMPREP_POPULATE_CHECK_FREE, &result), s.err, ENOMEM,
              KVMPREP_REASON_MEMORY_SHORTAGE);
    CHECK_EQ(s.err.stage, KVMPREP_STAGE_HOST);
    CHECK_EQ(present_bytes(hva, size), 0);
    CHECK_OK(populate(&s, range_of(OTHER_GPA, SIZE), KVMPREP_POPULATE_CHECK_FREE, &result), s.err);
    CHECK_EQ(result.host, SIZE);
    munmap(hva, size);
    setting_end(&s);
}

/* ---- Mappings that are not as they should be ---- */

/* Half of the mapping lies beyond the end of the file, where a touch would be a SIGBUS. */
static void file_too_short(enum kind kind) {
    struct setting s = setting_make(kind, SIZE);
    struct kvmprep_populate_result result;
    CHECK_EQ(ftruncate(s.memory.fd, SIZE / 2), 0);
    CHECK_ERR(populate(&s, range_of(MEMORY_GPA, SIZE), 0, &result), s.err, EFAULT,
              KVMPREP_REASON_NO_HOST_MAPPING);
    check_error_is_at(&s, MEMORY_SLOT, MEMORY_GPA + SIZE / 2);
    CHECK(strstr(s.err.hint, "what its file system has free") != NULL); /* it says which limit */
    CHECK_EQ(result.host, SIZE / 2);
    CHECK_EQ(result.stage2, s.has_pre_fault ? SIZE / 2 : 0);
    CHECK_EQ(result.remaining, SIZE / 2);
    check_writes_do_not_fault(&s, MEMORY_GPA, SIZE / 2);
    setting_end(&s);
}

static void a_private_file_that_is_too_short(void) {
    file_too_short(FILE_PRIVATE);
}

static void a_shared_memfd_that_is_too_short(void) {
    file_too_short(MEMFD_SHARED);
}

static void a_hole_in_the_middle_of_a_slot(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_result result;
    const size_t hole = 5 * MIB + PAGE;
    CHECK_EQ(munmap((char *)s.memory.hva + hole, PAGE), 0);
    CHECK_ERR(populate(&s, range_of(MEMORY_GPA, SIZE), 0, &result), s.err, EFAULT,
              KVMPREP_REASON_NO_HOST_MAPPING);
    check_error_is_at(&s, MEMORY_SLOT, MEMORY_GPA + hole);
    /* It is seen before anything is done; and what is around it can be populated. */
    CHECK_EQ(present_bytes(s.memory.hva, SIZE), 0);
    CHECK_OK(populate(&s, range_of(MEMORY_GPA, hole), 0, &result), s.err);
    CHECK_OK(populate(&s, range_of(MEMORY_GPA + hole + PAGE, SIZE - hole - PAGE), 0, &result), s.err);
    check_writes_do_not_fault(&s, MEMORY_GPA, hole);
    check_writes_do_not_fault(&s, MEMORY_GPA + hole + PAGE, SIZE - hole - PAGE);
    setting_end(&s);
}

static void a_mapping_that_cannot_be_written(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_result result;
    char *upper = (char *)s.memory.hva + SIZE / 2;
    memset(upper, 1, SIZE / 2);
    CHECK_EQ(mprotect(upper, SIZE / 2, PROT_READ), 0);
    CHECK_ERR(populate(&s, range_of(MEMORY_GPA, SIZE), 0, &result), s.err, EACCES,
              KVMPREP_REASON_HOST_MAPPING_READ_ONLY);
    check_error_is_at(&s, MEMORY_SLOT, MEMORY_GPA + SIZE / 2);
    CHECK_EQ(s.err.size, SIZE / 2);
    CHECK_EQ(present_bytes(s.memory.hva, SIZE / 2), 0);

    /* Behind a slot that the guest may only read it is all right. */
    add_slot(&s, upper, SIZE / 2, KVM_MEM_READONLY);
    CHECK_OK(populate(&s, range_of(OTHER_GPA, SIZE / 2), 0, &result), s.err);
    CHECK_EQ(result.host, SIZE / 2);
    CHECK_EQ(result.remaining, 0);
    setting_end(&s);
}

/* ---- Odd shapes ---- */

static void huge_pages_on_advice(void) {
    need_huge_pages_on_advice();
    struct setting s = setting_make_with_stage2(ANON_4K, SIZE);
    struct kvmprep_populate_result result;
    CHECK_OK(populate(&s, range_of(MEMORY_GPA, SIZE), 0, &result), s.err);
    CHECK_EQ(result.pages_known, 1);
    CHECK_EQ(result.pages_4k, PAGES);
    CHECK_EQ(result.pages_2m, 0);

    /* Advice comes too late for memory that is there: the next is for fresh memory. */
    CHECK_OK(
        kvmprep_range_discarded(s.handle, &(struct kvmprep_range){.gpa = MEMORY_GPA, .size = SIZE}, &s.err),
        s.err);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    CHECK(mmap(s.memory.hva, SIZE, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED);
    CHECK_OK(populate(&s, range_of(MEMORY_GPA, SIZE), KVMPREP_POPULATE_HUGE_ADVICE, &result), s.err);
    CHECK_EQ(result.advice_refused, 0);
    CHECK_EQ(result.pages_4k, 0);
    CHECK_EQ(result.pages_2m, SIZE / HUGE_PAGE);
    check_writes_do_not_fault(&s, MEMORY_GPA, SIZE);
    setting_end(&s);
}

/* Guest and host addresses that differ by a small page: no huge mapping can be made, and none is missed. */
static void addresses_that_do_not_fit_each_other(void) {
    struct setting s = setting_make_with_stage2(ANON_THP, SIZE);
    struct kvmprep_memslot slot = s.slot, deletion = KVMPREP_MEMSLOT_INIT;
    struct kvmprep_populate_result result;
    deletion.slot = MEMORY_SLOT;
    CHECK_OK(kvmprep_memslot_set(s.handle, &deletion, &s.err), s.err);
    slot.hva += PAGE;
    slot.size -= PAGE;
    CHECK_OK(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err);
    CHECK_OK(populate(&s, range_of(MEMORY_GPA, slot.size), 0, &result), s.err);
    CHECK_EQ(result.stage2, slot.size);
    CHECK_EQ(result.remaining, 0);
    CHECK_EQ(result.pages_4k, PAGES - 1);
    CHECK_EQ(result.pages_2m, 0);
    check_writes_do_not_fault(&s, MEMORY_GPA, slot.size);
    setting_end(&s);
}

static void many_mappings_in_one_slot(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_populate_result result;
    char *memory = s.memory.hva;
    int memfd = memfd_create("kvmprep-test", MFD_CLOEXEC);
    const int rw = PROT_READ | PROT_WRITE, fixed = MAP_FIXED;
    const size_t quarter = SIZE / 4;
    CHECK_EQ(ftruncate(memfd, (off_t)(2 * quarter)), 0);
    for (size_t at = 0; at < 2 * quarter; at += PAGE)
        CHECK_EQ(pwrite(memfd, "kvmprep", 7, (off_t)at), 7);
    /* None of them ends where a huge page does. */
    CHECK(mmap(memory + quarter + PAGE, quarter, rw, MAP_SHARED | fixed, memfd, 0) != MAP_FAILED);
    CHECK(mmap(memory + 2 * quarter + PAGE, PAGE, rw, MAP_SHARED | MAP_ANONYMOUS | fixed, -1, 0) !=
          MAP_FAILED);
    CHECK(mmap(memory + 2 * quarter + 2 * PAGE, quarter, rw, MAP_PRIVATE | fixed, memfd, (off_t)quarter) !=
          MAP_FAILED);
    CHECK_EQ(mprotect(memory + SIZE - PAGE, PAGE, rw | PROT_EXEC), 0);

    CHECK_OK(populate(&s, range_of(MEMORY_GPA, SIZE), 0, &result), s.err);
    CHECK_EQ(result.host, SIZE);
    CHECK_EQ(result.backings[KVMPREP_BACKING_SHMEM_SHARED].bytes, quarter + PAGE);
    CHECK_EQ(result.backings[KVMPREP_BACKING_SHMEM_PRIVATE].bytes, quarter);
    CHECK_EQ(result.backings[KVMPREP_BACKING_ANONYMOUS].bytes, SIZE - 2 * quarter - PAGE);
    check_all_is_done(&s, &result);
    close(memfd);
    setting_end(&s);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"an_empty_pool_of_huge_pages", an_empty_pool_of_huge_pages},
        {"more_huge_pages_than_the_pool_has_are_refused_first",
         more_huge_pages_than_the_pool_has_are_refused_first},
        {"more_memory_than_the_machine_has_is_refused_first",
         more_memory_than_the_machine_has_is_refused_first},
        {"a_private_file_that_is_too_short", a_private_file_that_is_too_short},
        {"a_shared_memfd_that_is_too_short", a_shared_memfd_that_is_too_short},
        {"a_hole_in_the_middle_of_a_slot", a_hole_in_the_middle_of_a_slot},
        {"a_mapping_that_cannot_be_written", a_mapping_that_cannot_be_written},
        {"huge_pages_on_advice", huge_pages_on_advice},
        {"addresses_that_do_not_fit_each_other", addresses_that_do_not_fit_each_other},
        {"many_mappings_in_one_slot", many_mappings_in_one_slot},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
