/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Conversions that the real kernel does not let through: memory that cannot be given up the usual way,
 * nothing mapped, no descriptor left, a VM of another process. What failed is named, what is converted stays
 * so, and the same call ends the work once the cause is gone; and many conversions leave nothing behind.
 *
 * Each call failing with each errno is tests/failing_calls.rs, on a kernel that fails when it is told to.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/guest.h"
#include "support/host.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define SIZE (8 * MIB)
#define FRAME (2 * MIB)
#define NO_FD (-1)

/* A VM with one slot at MEMORY_GPA, all shared, and its handle. */
struct machine {
    struct vm vm;
    struct vcpu vcpu;
    struct kvmprep_vm *handle;
    int gmem;
    unsigned char *hva;
    struct kvmprep_error err;
};

static struct kvmprep_range part_of(uint64_t offset, uint64_t size) {
    struct kvmprep_range range = {MEMORY_GPA + offset, size, {0, 0}};
    return range;
}

static struct machine machine_make(void) {
    struct machine m = {.vm = vm_make_private()};
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    m.vcpu = vcpu_make(&m.vm, 0);
    m.gmem = kvmprep_gmem_create(m.vm.fd, SIZE, 0, &m.err);
    CHECK_OK(m.gmem, m.err);
    config.vm_fd = m.vm.fd;
    CHECK_OK(kvmprep_vm_new(&config, &m.handle, &m.err), m.err);
    return m;
}

/* Maps memory, fills it, and makes it the slot's; `memory_fd` is what the handle is told of the file. */
static void map_memory(struct machine *m, int file, int flags, int memory_fd) {
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    m->hva = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, flags, file, 0);
    CHECK(m->hva != MAP_FAILED);
    madvise(m->hva, SIZE, MADV_NOHUGEPAGE);
    memset(m->hva, 1, SIZE);
    slot.slot = MEMORY_SLOT;
    slot.flags = KVM_MEM_GUEST_MEMFD;
    slot.gpa = MEMORY_GPA;
    slot.size = SIZE;
    slot.hva = (uintptr_t)m->hva;
    slot.guest_memfd = m->gmem;
    if (memory_fd != NO_FD) {
        slot.attributes |= KVMPREP_MEMSLOT_MEMORY_FD;
        slot.memory_fd = memory_fd;
    }
    CHECK_OK(kvmprep_memslot_set(m->handle, &slot, &m->err), m->err);
}

static void machine_end(struct machine *m) {
    CHECK_EQ(kvmprep_vm_free(m->handle), 0);
    munmap(m->hva, SIZE);
    close(m->gmem);
    vcpu_end(&m->vm, &m->vcpu);
    vm_end(&m->vm);
}

static int make_private(struct machine *m, struct kvmprep_range range) {
    return kvmprep_convert(m->handle, &range, KVMPREP_PRIVATE, NULL, &m->err);
}

static int convert(struct machine *m, struct kvmprep_range range, uint32_t to, uint32_t steps, uint32_t flags,
                   struct kvmprep_convert_result *result) {
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    opts.steps = steps;
    opts.flags = flags;
    opts.vcpu_fd = steps & KVMPREP_CONVERT_PREFAULT ? m->vcpu.fd : -1;
    opts.result = result;
    opts.result_size = result != NULL ? sizeof(*result) : 0;
    return kvmprep_convert(m->handle, &range, to, &opts, &m->err);
}

static const uint32_t all_steps =
    KVMPREP_CONVERT_ATTRIBUTES | KVMPREP_CONVERT_DROP | KVMPREP_CONVERT_PREFAULT;

static void check_is(struct machine *m, struct kvmprep_range range, uint32_t visibility) {
    struct kvmprep_visibility_run run;
    CHECK_OK(kvmprep_visibility_next(m->handle, range.gpa, &run, &m->err), m->err);
    CHECK_EQ(run.visibility, visibility);
    CHECK(run.size >= range.size);
}

/* The error is of that stage, and about memory that begins there. */
static void check_error_is_at(const struct machine *m, uint32_t stage, uint64_t offset) {
    CHECK_EQ(m->err.stage, stage);
    CHECK_EQ(m->err.gpa, MEMORY_GPA + offset);
    CHECK(m->err.size > 0 && m->err.hint[0] != 0);
}

static int memfd(void) {
    int fd = memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(fd >= 0 && ftruncate(fd, SIZE) == 0);
    return fd;
}

/* What a file has in memory, in bytes. */
static uint64_t bytes_of(int fd) {
    struct stat status;
    CHECK_EQ(fstat(fd, &status), 0);
    return (uint64_t)status.st_blocks * 512;
}

/* ---- Memory that does not go the usual way ---- */

static void a_file_opened_for_reading(void) {
    struct machine m = machine_make();
    char path[64];
    int file = memfd();
    snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
    int reading = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(reading >= 0);
    CHECK(fallocate(reading, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE) < 0 && errno == EBADF);
    map_memory(&m, file, MAP_SHARED, reading);
    CHECK_OK(make_private(&m, part_of(MIB, 3 * MIB)), m.err);
    CHECK_EQ(bytes_of(file), SIZE - 3 * MIB);
    machine_end(&m);
    close(reading);
    close(file);
}

static void locked_memory(void) {
    struct machine m = machine_make();
    map_memory(&m, NO_FD, MAP_PRIVATE | MAP_ANONYMOUS, NO_FD);
    CHECK_EQ(mlock(m.hva, SIZE), 0);
    CHECK(madvise(m.hva, PAGE, MADV_DONTNEED) < 0 && errno == EINVAL);
    CHECK_OK(make_private(&m, part_of(MIB, 3 * MIB)), m.err);
    CHECK_EQ(present_bytes(m.hva, SIZE), SIZE - 3 * MIB);
    machine_end(&m);
}

/* MADV_REMOVE does not take it; by its descriptor it goes. */
static void a_locked_file(void) {
    struct machine m = machine_make();
    int file = memfd();
    map_memory(&m, file, MAP_SHARED, file);
    CHECK_EQ(mlock(m.hva, SIZE), 0);
    CHECK_OK(make_private(&m, part_of(MIB, 3 * MIB)), m.err);
    CHECK_EQ(bytes_of(file), SIZE - 3 * MIB);
    machine_end(&m);
    close(file);
}

/* All of `range` is kept, and told as kept, and that is the end of it. */
static void check_is_kept(struct machine *m, struct kvmprep_range range, int file) {
    struct kvmprep_convert_result result;
    CHECK_OK(convert(m, range, KVMPREP_PRIVATE, 0, 0, &result), m->err);
    CHECK(result.dropped == 0 && result.kept == range.size);
    CHECK_EQ(bytes_of(file), SIZE);
    check_is(m, range, KVMPREP_PRIVATE);
    CHECK_OK(convert(m, range, KVMPREP_PRIVATE, 0, 0, &result), m->err);
    CHECK(result.dropped == 0 && result.kept == 0 && result.calls == 0);
}

static void a_locked_file_whose_descriptor_was_not_told(void) {
    struct machine m = machine_make();
    const struct kvmprep_range range = part_of(MIB, 3 * MIB);
    int file = memfd();
    map_memory(&m, file, MAP_SHARED, NO_FD);
    CHECK_EQ(mlock(m.hva, SIZE), 0);
    CHECK(madvise(m.hva, PAGE, MADV_REMOVE) < 0 && errno == EINVAL);
    check_is_kept(&m, range, file);
    /* Unlocked, it goes the next time. */
    CHECK_EQ(munlock(m.hva, SIZE), 0);
    CHECK_OK(convert(&m, range, KVMPREP_SHARED, 0, 0, NULL), m.err);
    CHECK_OK(make_private(&m, range), m.err);
    CHECK_EQ(bytes_of(file), SIZE - range.size);
    machine_end(&m);
    close(file);
}

static void a_sealed_file(void) {
    struct machine m = machine_make();
    int file = memfd();
    map_memory(&m, file, MAP_SHARED, file);
    CHECK_EQ(fcntl(file, F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
    CHECK(madvise(m.hva, PAGE, MADV_REMOVE) < 0 && errno == EPERM);
    check_is_kept(&m, part_of(MIB, 3 * MIB), file);
    machine_end(&m);
    close(file);
}

/* A number that has become another file's: that must lose nothing. */
static void a_descriptor_that_is_another_file_s(void) {
    struct machine m = machine_make();
    int file = memfd(), told = memfd();
    memset(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, told, 0), 1, SIZE);
    map_memory(&m, file, MAP_SHARED, told);
    CHECK_EQ(mlock(m.hva, SIZE), 0);
    check_is_kept(&m, part_of(MIB, 3 * MIB), file);
    CHECK_EQ(bytes_of(told), SIZE);
    machine_end(&m);
    close(file);
    close(told);
}

/* ---- What populating lacks ---- */

static void nothing_mapped(void) {
    struct machine m = machine_make();
    const struct kvmprep_range range = part_of(MIB, 3 * MIB);
    struct kvmprep_convert_result result;
    map_memory(&m, NO_FD, MAP_PRIVATE | MAP_ANONYMOUS, NO_FD);
    CHECK_OK(make_private(&m, range), m.err);
    CHECK_EQ(munmap(m.hva + 2 * MIB, MIB), 0);
    CHECK_ERR(convert(&m, range, KVMPREP_SHARED, all_steps, 0, NULL), m.err, EFAULT,
              KVMPREP_REASON_NO_HOST_MAPPING);
    check_error_is_at(&m, KVMPREP_STAGE_HOST, 2 * MIB);
    check_is(&m, range, KVMPREP_SHARED);
    void *again = mmap(m.hva + 2 * MIB, MIB, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    CHECK(again == m.hva + 2 * MIB);
    CHECK_OK(convert(&m, range, KVMPREP_SHARED, all_steps, 0, &result), m.err);
    CHECK_EQ(result.converted, 0);
    CHECK_EQ(result.prefaulted, range.size);
    CHECK(faults_of_touch(&m.vcpu, TOUCH_WRITE, range.gpa, range.size) <= 1); /* that of its code */
    machine_end(&m);
}

static int open_descriptors(void) {
    DIR *directory = opendir("/proc/self/fd");
    int n = 0;
    CHECK(directory != NULL);
    while (readdir(directory) != NULL)
        n++;
    closedir(directory);
    return n;
}

/* A population needs one for a moment, a conversion none. */
static void no_descriptor_left(void) {
    struct machine m = machine_make();
    const struct kvmprep_range range = part_of(MIB, 3 * MIB);
    struct rlimit before, none;
    struct kvmprep_convert_result result;
    map_memory(&m, NO_FD, MAP_PRIVATE | MAP_ANONYMOUS, NO_FD);
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
    none = before;
    none.rlim_cur = 3;
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
    int code = convert(&m, range, KVMPREP_PRIVATE, all_steps, 0, &result);
    uint32_t stage = m.err.stage;
    int plain = make_private(&m, part_of(0, PAGE));
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
    CHECK_EQ(plain, 0);
    CHECK_EQ(code, -EMFILE);
    CHECK_EQ(stage, KVMPREP_STAGE_STAGE2);
    CHECK_EQ(result.converted, range.size);
    check_is(&m, range, KVMPREP_PRIVATE);
    CHECK_OK(convert(&m, range, KVMPREP_PRIVATE, all_steps, 0, &result), m.err);
    CHECK_EQ(result.converted, 0);
    CHECK_EQ(result.prefaulted, range.size);
    CHECK(faults_of_touch(&m.vcpu, TOUCH_WRITE, range.gpa, range.size) <= 1);
    machine_end(&m);
}

/* ---- Another process ---- */

/* What a forked child gets; its copy of the handle still says what was true. */
static void a_child_s_vm_is_dead(void) {
    struct machine m = machine_make();
    const struct kvmprep_range range = part_of(MIB, PAGE);
    map_memory(&m, NO_FD, MAP_PRIVATE | MAP_ANONYMOUS, NO_FD);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        struct kvmprep_visibility_run run;
        int code = make_private(&m, range);
        bool is_told = code == -EIO && m.err.reason == KVMPREP_REASON_VM_DEAD &&
                       m.err.stage == KVMPREP_STAGE_ATTRIBUTES && m.err.gpa == range.gpa;
        bool is_shared =
            kvmprep_visibility_next(m.handle, range.gpa, &run, NULL) == 0 && run.visibility == KVMPREP_SHARED;
        _exit(is_told && is_shared ? 0 : 1);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK_OK(make_private(&m, range), m.err);
    machine_end(&m);
}

/* ---- What is left behind ---- */

static void nothing_is_left_behind(void) {
    struct machine m = machine_make();
    map_memory(&m, NO_FD, MAP_PRIVATE | MAP_ANONYMOUS, NO_FD);
    int descriptors = 0;
    size_t allocated = 0;
    unsigned rounds = check_rounds(1000);
    for (unsigned round = 0; round < rounds; round++) {
        /* A page here and there, and a few frames: every second round puts back what the one before did. */
        uint64_t at = (uint64_t)(round / 2) * 37 % (SIZE / PAGE - 600) * PAGE;
        uint64_t size = round / 2 % 10 == 9 ? FRAME : (1 + round / 2 % 5) * PAGE;
        uint32_t to = round % 2 == 0 ? KVMPREP_PRIVATE : KVMPREP_SHARED;
        CHECK_OK(convert(&m, part_of(at, size), to, all_steps, 0, NULL), m.err);
        if (round == 99) {
            descriptors = open_descriptors();
            allocated = mallinfo2().uordblks;
        }
    }
    printf("  %u conversions, %zu bytes allocated, then %zu\n", rounds, allocated, mallinfo2().uordblks);
    CHECK_EQ(open_descriptors(), descriptors);
    /* The model keeps its tables on this heap, too. */
    const size_t others = kvm_is_modelled() ? 256 << 10 : 0;
    CHECK(mallinfo2().uordblks <= allocated + 4096 + others);
    check_is(&m, part_of(0, SIZE), KVMPREP_SHARED);
    CHECK_EQ(present_bytes(m.hva, SIZE), SIZE);
    machine_end(&m);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"a file opened for reading", a_file_opened_for_reading},
        {"locked memory", locked_memory},
        {"a locked file", a_locked_file},
        {"a locked file whose descriptor was not told", a_locked_file_whose_descriptor_was_not_told},
        {"a sealed file", a_sealed_file},
        {"a descriptor that is another file's", a_descriptor_that_is_another_file_s},
        {"nothing mapped", nothing_mapped},
        {"no descriptor left", no_descriptor_left},
        {"a child's VM is dead", a_child_s_vm_is_dead},
        {"nothing is left behind", nothing_is_left_behind},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
