/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KVMPREP_INTENT_RESIDENT: the guest is given what this process has in memory, and nothing else is touched.
 * For memory that comes later (userfaultfd: postcopy, lazy restore), and for running guests.
 *
 * First memory registered with userfaultfd, of which a half has arrived, then every backing with every other
 * page touched. Each case shows what was mapped by the faults that the guest takes, page by page, and that
 * nothing was allocated by what the process has in memory before and after. Which pages are resident is asked
 * by PAGEMAP_SCAN wherever stage 2 can be filled at all (Linux 6.11); the older way, /proc/self/pagemap, is
 * only met on kernels where there is nothing to fill.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/guest.h"
#include "support/host.h"
#include "support/policy.h"
#include "support/setting.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIZE (4 * MIB)
#define PAGES (SIZE / PAGE)
#define HUGE_PAGE (2 * MIB)

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

static struct kvmprep_populate_result resident(struct setting *s) {
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    opts.intent = KVMPREP_INTENT_RESIDENT;
    opts.vcpu_fd = s->vcpus[0].fd;
    CHECK_OK(kvmprep_populate(s->handle, NULL, 0, &opts, &result, sizeof(result), &s->err), s->err);
    CHECK_EQ(result.bytes, s->memory.size);
    CHECK_EQ(result.host, 0); /* the host stage allocates, so there is none */
    return result;
}

/* ---- Memory under userfaultfd ---- */

/* Registers all memory with a new userfaultfd; kernel's faults, and so KVM's, are its too where that is
 * allowed. */
static int register_all(struct setting *s) {
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (uffd < 0)
        check_skipped("userfaultfd: %s", strerror(errno));
    struct uffdio_api api = {.api = UFFD_API};
    CHECK_EQ(ioctl(uffd, UFFDIO_API, &api), 0);
    struct uffdio_register all = {.range = {.start = (uintptr_t)s->memory.hva, .len = s->memory.size},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING};
    CHECK_EQ(ioctl(uffd, UFFDIO_REGISTER, &all), 0);
    return uffd;
}

/* Memory arrives from a source. */
static void arrive(struct setting *s, int uffd, size_t offset, size_t size) {
    void *source = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(source != MAP_FAILED);
    memset(source, 7, size);
    struct uffdio_copy copy = {
        .dst = (uintptr_t)s->memory.hva + offset, .src = (uintptr_t)source, .len = size};
    CHECK_EQ(ioctl(uffd, UFFDIO_COPY, &copy), 0);
    munmap(source, size);
}

static void check_nobody_waits(int uffd) {
    struct pollfd events = {.fd = uffd, .events = POLLIN};
    CHECK_EQ(poll(&events, 1, 0), 0);
}

static struct setting setting_with_userfaultfd(enum kind kind, int *uffd) {
    struct setting s = setting_make(kind, SIZE);
    *uffd = register_all(&s);
    s.slot.attributes |= KVMPREP_MEMSLOT_USERFAULTFD;
    CHECK_OK(kvmprep_memslot_note(s.handle, &s.slot, &s.err), s.err);
    return s;
}

static void what_has_arrived(enum kind kind) {
    int uffd;
    struct setting s = setting_with_userfaultfd(kind, &uffd);
    arrive(&s, uffd, 0, SIZE / 2);
    struct kvmprep_populate_result result = resident(&s);
    check_nobody_waits(uffd);
    CHECK_EQ(present_bytes(s.memory.hva, SIZE), SIZE / 2);
    CHECK_EQ(result.remaining, 0);
    if (s.has_pre_fault) {
        CHECK_EQ(result.stage2, SIZE / 2);
        CHECK_EQ(result.absent, SIZE / 2);
        CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA, SIZE / 2), 1); /* the code page */
    } else {
        CHECK_EQ(result.stage2_state, KVMPREP_STAGE2_UNAVAILABLE);
    }
    check_nobody_waits(uffd);
    close(uffd);
    setting_end(&s);
}

static void what_has_arrived_is_mapped(void) {
    what_has_arrived(ANON_4K);
}

static void what_has_arrived_of_shared_memory_is_mapped(void) {
    what_has_arrived(MEMFD_SHARED);
}

/* Memory goes on arriving; populating again maps what is new. */
static void what_arrives_later_is_mapped_later(void) {
    int uffd;
    struct setting s = setting_with_userfaultfd(ANON_4K, &uffd);
    if (!s.has_pre_fault)
        check_skipped("no KVM_PRE_FAULT_MEMORY: needs Linux 6.11 with nested paging");
    CHECK_EQ(resident(&s).absent, SIZE);
    for (size_t size = HUGE_PAGE / 2; size <= SIZE; size += HUGE_PAGE / 2) {
        arrive(&s, uffd, size - HUGE_PAGE / 2, HUGE_PAGE / 2);
        CHECK_EQ(resident(&s).stage2, size);
    }
    check_nobody_waits(uffd);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA, SIZE), 1);
    close(uffd);
    setting_end(&s);
}

/* Anything else than RESIDENT would wait for the handler, in places where no signal ends the wait. */
static void other_intents_are_refused(void) {
    int uffd;
    struct setting s = setting_with_userfaultfd(ANON_4K, &uffd);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_range all = {.gpa = MEMORY_GPA, .size = SIZE};
    for (opts.intent = KVMPREP_INTENT_WRITE; opts.intent <= KVMPREP_INTENT_READ; opts.intent++) {
        CHECK_ERR(kvmprep_populate(s.handle, &all, 1, &opts, NULL, 0, &s.err), s.err, EBUSY,
                  KVMPREP_REASON_MEMSLOT_USERFAULTFD);
        CHECK_EQ(s.err.slot, MEMORY_SLOT);
        CHECK_EQ(s.err.gpa, MEMORY_GPA);
        CHECK_EQ(s.err.size, SIZE);
        /* Nobody has named the slot: it is left out. */
        struct kvmprep_range remaining;
        opts.remaining = &remaining;
        opts.remaining_capacity = 1;
        CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
        CHECK_EQ(result.host, 0);
        CHECK_EQ(result.remaining, SIZE);
        CHECK_EQ(result.n_remaining, 1);
        CHECK_EQ(remaining.gpa, MEMORY_GPA);
        CHECK_EQ(remaining.size, SIZE);
        opts.remaining = NULL;
        opts.remaining_capacity = 0;
    }
    check_nobody_waits(uffd);
    CHECK_EQ(present_bytes(s.memory.hva, SIZE), 0);
    close(uffd);
    setting_end(&s);
}

/* ---- Every backing, every other page ---- */

static void every_other_page(enum kind kind, size_t size, size_t page) {
    struct setting s = setting_make(kind, size);
    volatile char *memory = s.memory.hva;
    for (size_t at = 0; at < size; at += 2 * page)
        memory[at] = 1;
    uint64_t present = present_bytes(s.memory.hva, size);
    CHECK_EQ(present, size / 2);
    struct kvmprep_populate_result result = resident(&s);
    CHECK_EQ(present_bytes(s.memory.hva, size), present);
    CHECK_EQ(result.remaining, 0);
    if (s.has_pre_fault) {
        CHECK_EQ(result.stage2, size / 2);
        CHECK_EQ(result.absent, size / 2);
        uint64_t there = 0, absent = 0;
        for (size_t at = 0; at < size; at += page) {
            uint64_t faults = faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA + at, page);
            if (at / page % 2 == 0)
                there += faults;
            else
                absent += faults;
        }
        CHECK_EQ(there, 1); /* the code page */
        CHECK(absent >= size / page / 2);
    }
    setting_end(&s);
}

static void anonymous_memory(void) {
    every_other_page(ANON_4K, SIZE / 4, PAGE);
}

static void huge_anonymous_memory(void) {
    need_huge_pages_on_advice();
    every_other_page(ANON_THP, 4 * HUGE_PAGE, HUGE_PAGE);
}

static void private_memfd(void) {
    every_other_page(MEMFD_PRIVATE, SIZE / 4, PAGE);
}

static void private_file(void) {
    every_other_page(FILE_PRIVATE, SIZE / 4, PAGE);
}

static void shared_memfd(void) {
    every_other_page(MEMFD_SHARED, SIZE / 4, PAGE);
}

static void private_hugetlb(void) {
    every_other_page(HUGETLB_PRIVATE, 4 * HUGE_PAGE, HUGE_PAGE);
}

static void shared_hugetlb(void) {
    every_other_page(HUGETLB_SHARED, 4 * HUGE_PAGE, HUGE_PAGE);
}

static void mapped_gmem(void) {
    every_other_page(GMEM_SHARED, SIZE / 4, PAGE);
}

/* What has only been read is the zero page, which is no memory: to map it would make the first write dearer.
 */
static void only_zeroes(enum kind kind, size_t size) {
    struct setting s = setting_make_with_stage2(kind, size);
    volatile char *memory = s.memory.hva;
    char sum = 0;
    for (size_t at = 0; at < size; at += PAGE)
        sum = (char)(sum + memory[at]);
    CHECK_EQ(sum, 0);
    CHECK_EQ(present_bytes(s.memory.hva, size), size);
    struct kvmprep_populate_result result = resident(&s);
    CHECK_EQ(result.stage2, 0);
    CHECK_EQ(result.absent, size);
    setting_end(&s);
}

static void the_zero_page_is_not_resident(void) {
    only_zeroes(ANON_4K, SIZE);
}

static void the_huge_zero_page_is_not_resident(void) {
    need_huge_zero_page();
    only_zeroes(ANON_THP, SIZE);
}

/* Pages that the host cannot see cannot be asked about. */
static void private_gmem_is_left_out(void) {
    struct setting s = setting_make_with_stage2(GMEM_PRIVATE, SIZE);
    struct kvmprep_populate_result result = resident(&s);
    CHECK_EQ(result.remaining, SIZE);
    CHECK_EQ(result.stage2, 0);
    CHECK_EQ(result.absent, 0);
    CHECK_EQ(faults_of_touch(&s.vcpus[0], TOUCH_WRITE, MEMORY_GPA, SIZE), PAGES + 1);
    setting_end(&s);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"what_has_arrived_is_mapped", what_has_arrived_is_mapped},
        {"what_has_arrived_of_shared_memory_is_mapped", what_has_arrived_of_shared_memory_is_mapped},
        {"what_arrives_later_is_mapped_later", what_arrives_later_is_mapped_later},
        {"other_intents_are_refused", other_intents_are_refused},
        {"anonymous_memory", anonymous_memory},
        {"huge_anonymous_memory", huge_anonymous_memory},
        {"private_memfd", private_memfd},
        {"private_file", private_file},
        {"shared_memfd", shared_memfd},
        {"private_hugetlb", private_hugetlb},
        {"shared_hugetlb", shared_hugetlb},
        {"mapped_gmem", mapped_gmem},
        {"the_zero_page_is_not_resident", the_zero_page_is_not_resident},
        {"the_huge_zero_page_is_not_resident", the_huge_zero_page_is_not_resident},
        {"private_gmem_is_left_out", private_gmem_is_left_out},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
