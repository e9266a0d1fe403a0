/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Private memory, call by call: the files that it comes from, the record of what is private, the claims of an
 * initial image, and what each answers on a VM or a kernel that has no such thing.
 *
 * What this kernel can do is asked of KVM itself, and each answer of the library is held against that. Guests
 * that convert while they run are in conversions.c.
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/host.h"
#include "support/setting.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define SIZE (16 * MIB)
#define FRAME (2 * MIB)
#define KVM_CAP_MEMORY_ATTRIBUTES_NUMBER 233
#define SNP 4
#define TDX 5

static struct kvmprep_range part_of(uint64_t offset, uint64_t size) {
    struct kvmprep_range range = {MEMORY_GPA + offset, size, {0, 0}};
    return range;
}

static int extension(const struct vm *vm, unsigned long cap) {
    int answer = ioctl(vm->fd, KVM_CHECK_EXTENSION, cap);
    return answer > 0 ? answer : 0;
}

/* Whether KVM would let memory of this VM be private. */
static bool has_private_memory(const struct vm *vm) {
    return (extension(vm, KVM_CAP_MEMORY_ATTRIBUTES_NUMBER) & KVM_MEMORY_ATTRIBUTE_PRIVATE) != 0;
}

/* A handle that knows of no slots. */
static struct kvmprep_vm *handle_of(const struct vm *vm, uint32_t gpa_bits) {
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_vm *handle;
    struct kvmprep_error err;
    config.vm_fd = vm->fd;
    config.gpa_bits = gpa_bits;
    CHECK_OK(kvmprep_vm_new(&config, &handle, &err), err);
    return handle;
}

static struct kvmprep_visibility_run run_at(const struct kvmprep_vm *vm, uint64_t gpa) {
    struct kvmprep_visibility_run run;
    struct kvmprep_error err;
    CHECK_OK(kvmprep_visibility_next(vm, gpa, &run, &err), err);
    return run;
}

/* All of [gpa, gpa + size) is that. */
static void check_visibility(const struct kvmprep_vm *vm, struct kvmprep_range range, uint32_t visibility) {
    struct kvmprep_visibility_run run = run_at(vm, range.gpa);
    CHECK_EQ(run.visibility, visibility);
    CHECK(run.gpa == range.gpa && run.size >= range.size);
}

/* ---- Files ---- */

/* What KVM can do decides what is made: each flag, in each type of VM. */
static void check_files_of(const struct vm *vm) {
    const bool has_files = extension(vm, KVM_CAP_GUEST_MEMFD) != 0;
    const uint64_t supported = (uint64_t)extension(vm, KVM_CAP_GUEST_MEMFD_FLAGS);
    struct kvmprep_error err;
    for (uint64_t flags = 0; flags <= (KVMPREP_GMEM_MMAP | KVMPREP_GMEM_INIT_SHARED); flags++) {
        int code = 0, reason = KVMPREP_REASON_NONE;
        if (!has_files)
            code = EOPNOTSUPP, reason = KVMPREP_REASON_NO_PRIVATE_MEMORY;
        else if (flags & ~supported)
            code = EINVAL, reason = KVMPREP_REASON_FLAGS_UNSUPPORTED;
        else if (!(flags & KVMPREP_GMEM_MMAP) && !has_private_memory(vm))
            code = EINVAL, reason = KVMPREP_REASON_GMEM_UNUSED;
        const uint64_t size = 5 * PAGE; /* nothing's multiple but the page's: it is not rounded */
        int fd = kvmprep_gmem_create(vm->fd, size, flags, &err);
        printf("  %s VM, flags %d: %s\n", vm->is_private ? "private" : "default", (int)flags,
               fd >= 0 ? "made" : err.message);
        if (code != 0) {
            CHECK_ERR(fd, err, code, (uint32_t)reason);
            CHECK(err.hint[0] != 0);
            continue;
        }
        CHECK_OK(fd, err);
        struct stat status;
        CHECK_EQ(fcntl(fd, F_GETFD), FD_CLOEXEC);
        CHECK_EQ(fstat(fd, &status), 0);
        CHECK_EQ(status.st_size, size);
        void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        CHECK_EQ(memory != MAP_FAILED, (flags & KVMPREP_GMEM_MMAP) != 0);
        if (memory != MAP_FAILED && (flags & KVMPREP_GMEM_INIT_SHARED))
            memset(memory, 1, size);
        if (memory != MAP_FAILED)
            munmap(memory, size);
        close(fd);
        /* What it is closed on exec in spite of. */
        fd = guest_memfd(vm, flags, size);
        CHECK_EQ(fcntl(fd, F_GETFD), 0);
        close(fd);
    }
    const uint64_t unknown[] = {4, 8, 1ull << 32, 1ull << 63};
    for (size_t i = 0; has_files && i < sizeof(unknown) / sizeof(unknown[0]); i++)
        CHECK_ERR(kvmprep_gmem_create(vm->fd, PAGE, unknown[i] | KVMPREP_GMEM_MMAP, &err), err, EINVAL,
                  KVMPREP_REASON_UNKNOWN_FLAGS);
}

static void files(void) {
    struct vm vm = vm_make();
    check_files_of(&vm);
    vm_end(&vm);
}

static void files_of_a_private_vm(void) {
    struct vm vm = vm_make_private();
    check_files_of(&vm);
    vm_end(&vm);
}

/* The same on every kernel: a size is looked at first. */
static void sizes_of_files(void) {
    struct vm vm = vm_make();
    struct kvmprep_error err;
    const struct {
        uint64_t size;
        uint32_t reason;
    } wrong[] = {
        {0, KVMPREP_REASON_RANGE_EMPTY},
        {1, KVMPREP_REASON_RANGE_UNALIGNED},
        {PAGE - 1, KVMPREP_REASON_RANGE_UNALIGNED},
        {PAGE + 512, KVMPREP_REASON_RANGE_UNALIGNED},
        {UINT64_MAX, KVMPREP_REASON_RANGE_UNALIGNED},
        {1ull << 63, KVMPREP_REASON_RANGE_OVERFLOW},
        {0 - PAGE, KVMPREP_REASON_RANGE_OVERFLOW},
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        CHECK_ERR(kvmprep_gmem_create(vm.fd, wrong[i].size, KVMPREP_GMEM_MMAP, &err), err, EINVAL,
                  wrong[i].reason);
        CHECK(err.hint[0] != 0);
    }
    vm_end(&vm);
}

/* Where the process has no descriptor left. */
static void no_descriptor_left(void) {
    struct vm vm = vm_make();
    struct rlimit before, none;
    struct kvmprep_error err;
    if (!(extension(&vm, KVM_CAP_GUEST_MEMFD_FLAGS) & KVMPREP_GMEM_MMAP))
        check_skipped("this kernel makes no guest_memfd for a default VM: needs Linux 6.18");
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
    none = before;
    none.rlim_cur = 3;
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
    int result = kvmprep_gmem_create(vm.fd, PAGE, KVMPREP_GMEM_MMAP, &err);
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
    CHECK_ERR(result, err, EMFILE, KVMPREP_REASON_KERNEL_REFUSED);
    CHECK(err.hint[0] != 0);
    vm_end(&vm);
}

/* ---- The record ---- */

/* Runs are as long as they can be, and end with the guest's addresses. No slot is needed. */
static void runs(void) {
    struct vm vm = vm_make();
    struct kvmprep_error err;
    struct kvmprep_vm *handle = handle_of(&vm, 40);
    struct kvmprep_visibility_run run = run_at(handle, 0);
    CHECK(run.gpa == 0 && run.size == 1ull << 40 && run.visibility == KVMPREP_SHARED);

    struct kvmprep_range end = {(1ull << 40) - 3 * PAGE, 3 * PAGE, {0, 0}};
    struct kvmprep_range two[2] = {{MIB, MIB, {0, 0}}, {2 * MIB, 512 * MIB, {0, 0}}};
    CHECK_OK(kvmprep_visibility_note(handle, &end, KVMPREP_PRIVATE, &err), err);
    CHECK_OK(kvmprep_visibility_note(handle, &two[1], KVMPREP_PRIVATE, &err), err);
    CHECK_OK(kvmprep_visibility_note(handle, &two[0], KVMPREP_PRIVATE, &err), err);
    const struct {
        uint64_t gpa, size;
        uint32_t visibility;
    } expected[] = {
        {0, MIB, KVMPREP_SHARED},
        {MIB, 513 * MIB, KVMPREP_PRIVATE}, /* what touches is one run */
        {514 * MIB, (1ull << 40) - 514 * MIB - 3 * PAGE, KVMPREP_SHARED},
        {end.gpa, end.size, KVMPREP_PRIVATE},
    };
    uint64_t gpa = 0;
    for (size_t i = 0; i < sizeof(expected) / sizeof(expected[0]); i++) {
        run = run_at(handle, gpa);
        CHECK_EQ(run.gpa, expected[i].gpa);
        CHECK_EQ(run.size, expected[i].size);
        CHECK_EQ(run.visibility, expected[i].visibility);
        gpa = run.gpa + run.size;
    }
    CHECK_ERR(kvmprep_visibility_next(handle, gpa, &run, &err), err, ENOENT,
              KVMPREP_REASON_RANGE_BEYOND_GUEST);
    /* In the middle of a run it begins where it was asked for. */
    run = run_at(handle, 100 * MIB);
    CHECK(run.gpa == 100 * MIB && run.size == 414 * MIB && run.visibility == KVMPREP_PRIVATE);
    CHECK_EQ(kvmprep_vm_free(handle), 0);
    vm_end(&vm);
}

/* Many notes of all sizes, against an array with an entry for each page. */
static void many_notes(void) {
    enum { PAGES = 1 << 16 };
    static unsigned char naive[PAGES];
    struct vm vm = vm_make();
    struct kvmprep_error err;
    struct kvmprep_vm *handle = handle_of(&vm, 0);
    const uint64_t base = MEMORY_GPA - 5 * PAGE;
    unsigned seed = 1;
    memset(naive, KVMPREP_SHARED, sizeof(naive));
    for (unsigned i = 0; i < check_rounds(5000); i++) {
        unsigned first = (unsigned)rand_r(&seed) % PAGES, n = 1u << (unsigned)rand_r(&seed) % 8;
        unsigned char visibility = (unsigned char)((unsigned)rand_r(&seed) % 2);
        n = (unsigned)rand_r(&seed) % n + 1;
        n = n < PAGES - first ? n : PAGES - first;
        struct kvmprep_range range = {base + first * PAGE, n * PAGE, {0, 0}};
        CHECK_OK(kvmprep_visibility_note(handle, &range, visibility, &err), err);
        memset(naive + first, visibility, n);
    }
    unsigned n_runs = 0;
    for (unsigned at = 0; at < PAGES; n_runs++) {
        struct kvmprep_visibility_run run = run_at(handle, base + at * PAGE);
        unsigned end = at;
        while (end < PAGES && naive[end] == naive[at])
            end++;
        CHECK_EQ(run.visibility, naive[at]);
        if (end < PAGES) /* the last goes on beyond */
            CHECK_EQ(run.size, (end - at) * PAGE);
        at = end;
    }
    CHECK(n_runs > 1000); /* else little was tried */
    CHECK_EQ(kvmprep_vm_free(handle), 0);
    vm_end(&vm);
}

/* ---- Without private memory ---- */

/*
 * A VM that has none, on any kernel: what firmware asks of all memory, that it be shared, is so already and
 * succeeds, also where nothing lies; nothing can be private, and nothing becomes so.
 */
static void vm_without_private_memory(void) {
    struct setting s = setting_make(ANON_4K, SIZE);
    struct kvmprep_range ranges[] = {part_of(0, PAGE), part_of(0, SIZE), part_of(SIZE - PAGE, 2 * PAGE),
                                     part_of(SIZE, SIZE)};
    struct kvmprep_convert_result result;
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    opts.result = &result;
    opts.result_size = sizeof(result);
    CHECK(!has_private_memory(&s.vm));
    memset(s.memory.hva, 0x5a, SIZE);
    for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
        const struct kvmprep_range *range = &ranges[i];
        uint64_t args[3] = {range->gpa, range->size / PAGE, 0}, answer = 99;
        memset(&result, 0xa5, sizeof(result));
        CHECK_OK(kvmprep_convert(s.handle, range, KVMPREP_SHARED, &opts, &s.err), s.err);
        CHECK_EQ(result.converted | result.dropped | result.kept | result.calls, 0);
        CHECK_OK(kvmprep_handle_memory_fault(s.handle, range->gpa, range->size, 0, NULL, &s.err), s.err);
        CHECK_OK(kvmprep_handle_map_gpa_range(s.handle, args, NULL, &answer, &s.err), s.err);
        CHECK_EQ(answer, 0);

        args[2] = 16;
        CHECK_ERR(kvmprep_convert(s.handle, range, KVMPREP_PRIVATE, &opts, &s.err), s.err, EOPNOTSUPP,
                  KVMPREP_REASON_NO_PRIVATE_MEMORY);
        CHECK(s.err.gpa == range->gpa && s.err.size == range->size && s.err.hint[0] != 0);
        CHECK_ERR(kvmprep_handle_memory_fault(s.handle, range->gpa, range->size, 8, NULL, &s.err), s.err,
                  EOPNOTSUPP, KVMPREP_REASON_NO_PRIVATE_MEMORY);
        CHECK_ERR(kvmprep_handle_map_gpa_range(s.handle, args, NULL, &answer, &s.err), s.err, EOPNOTSUPP,
                  KVMPREP_REASON_NO_PRIVATE_MEMORY);
        CHECK_EQ(answer, EINVAL);
    }
    CHECK_EQ(run_at(s.handle, 0).visibility, KVMPREP_SHARED);
    check_visibility(s.handle, part_of(0, SIZE), KVMPREP_SHARED);
    for (size_t at = 0; at < SIZE; at += PAGE)
        CHECK_EQ(((unsigned char *)s.memory.hva)[at], 0x5a);
    setting_end(&s);
}

/* ---- With private memory ---- */

/* The memory's KVM attribute, straight from here. */
static void set_attribute(const struct vm *vm, struct kvmprep_range range, uint32_t visibility) {
    struct kvm_memory_attributes attributes = {
        .address = range.gpa,
        .size = range.size,
        .attributes = visibility == KVMPREP_PRIVATE ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0};
    CHECK_EQ(ioctl(vm->fd, KVM_SET_MEMORY_ATTRIBUTES, &attributes), 0);
}

/* A setting whose memory is private, in KVM and by the handle's record. */
static struct setting private_setting(void) {
    struct setting s = setting_make(GMEM_PRIVATE, SIZE);
    struct kvmprep_range all = part_of(0, SIZE);
    CHECK_OK(kvmprep_visibility_note(s.handle, &all, KVMPREP_PRIVATE, &s.err), s.err);
    return s;
}

/* The guest's word at that place, as it reads it; written by guest_touch(). */
#define GUEST_WORD 0x50524550

/*
 * Memory that is private in part is populated on the side that each part has: the host's memory behind the
 * private part stays untouched, and the guest faults nowhere.
 */
static void populate_goes_by_the_record(void) {
    struct setting s = private_setting();
    struct kvmprep_populate_result result;
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    const struct kvmprep_range shared[] = {part_of(3 * FRAME, 2 * FRAME), part_of(PAGE, 3 * PAGE),
                                           part_of(SIZE - PAGE, PAGE)};
    uint64_t shared_bytes = 0;
    for (size_t i = 0; i < sizeof(shared) / sizeof(shared[0]); i++) {
        set_attribute(&s.vm, shared[i], KVMPREP_SHARED);
        CHECK_OK(kvmprep_visibility_note(s.handle, &shared[i], KVMPREP_SHARED, &s.err), s.err);
        shared_bytes += shared[i].size;
    }
    opts.vcpu_fd = s.vcpus[0].fd;
    CHECK_EQ(present_bytes(s.memory.hva, SIZE), 0);
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, &result, sizeof(result), &s.err), s.err);
    CHECK_EQ(result.bytes, SIZE);
    CHECK_EQ(result.remaining, 0);
    CHECK_EQ(present_bytes(s.memory.hva, SIZE), shared_bytes);
    for (size_t i = 0; i < sizeof(shared) / sizeof(shared[0]); i++) {
        const char *part = (char *)s.memory.hva + (shared[i].gpa - MEMORY_GPA);
        CHECK_EQ(present_bytes(part, shared[i].size), shared[i].size);
    }
    check_all_is_done(&s, &result);
    /* It went to the side that it looks as if it went to. */
    const struct kvmprep_range first = shared[1];
    for (uint64_t offset = 0; offset < SIZE; offset += PAGE) {
        bool is_shared = false;
        for (size_t i = 0; i < sizeof(shared) / sizeof(shared[0]); i++)
            is_shared = is_shared || MEMORY_GPA + offset - shared[i].gpa < shared[i].size;
        if (is_shared || offset == first.gpa + first.size - MEMORY_GPA)
            CHECK_EQ(*(uint32_t *)((char *)s.memory.hva + offset), is_shared ? GUEST_WORD : 0);
    }
    setting_end(&s);
}

static unsigned changes_told;

static int count_changes(const struct kvmprep_range *range, uint32_t to, void *opaque) {
    (void)range;
    (void)to;
    (void)opaque;
    changes_told++;
    return 0;
}

/*
 * A guest_memfd that was closed under its slot is found before anything is done. Its number may be another
 * file's by then, which must not lose a byte.
 */
static void closed_file(void) {
    struct setting s = private_setting();
    struct kvmprep_range half = part_of(0, SIZE / 2), other = part_of(SIZE / 2, SIZE / 2);
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    struct kvmprep_convert_result result;
    opts.changed = count_changes;
    opts.result = &result;
    opts.result_size = sizeof(result);
    CHECK_OK(kvmprep_convert(s.handle, &half, KVMPREP_SHARED, NULL, &s.err), s.err);
    changes_told = 0;
    memset(s.memory.hva, 0x77, SIZE / 2);

    const int number = s.memory.gmem;
    char content[PAGE];
    memset(content, 0x33, sizeof(content));
    for (int is_reused = 0; is_reused < 2; is_reused++) {
        if (is_reused) {
            int file = memfd_create("kvmprep-test", MFD_CLOEXEC);
            CHECK(file >= 0);
            for (size_t at = 0; at < SIZE; at += PAGE)
                CHECK_EQ(pwrite(file, content, PAGE, (off_t)at), PAGE);
            CHECK_EQ(file, number); /* the lowest that is free */
        } else {
            CHECK_EQ(close(number), 0);
        }
        for (uint32_t to = KVMPREP_SHARED; to <= KVMPREP_PRIVATE; to++) {
            struct kvmprep_range *range = to == KVMPREP_PRIVATE ? &half : &other;
            CHECK_ERR(kvmprep_convert(s.handle, range, to, &opts, &s.err), s.err, EBADF,
                      KVMPREP_REASON_BAD_FD);
            CHECK_EQ(s.err.slot, MEMORY_SLOT);
            CHECK(s.err.gpa == range->gpa && s.err.size == range->size && s.err.hint[0] != 0);
            CHECK_EQ(result.converted | result.dropped | result.calls, 0);
            CHECK_EQ(changes_told, 0);
            check_visibility(s.handle, half, KVMPREP_SHARED);
            check_visibility(s.handle, other, KVMPREP_PRIVATE);
        }
        for (size_t at = 0; at < SIZE / 2; at += PAGE)
            CHECK_EQ(((unsigned char *)s.memory.hva)[at], 0x77);
    }
    for (size_t at = 0; at < SIZE; at += PAGE) {
        unsigned char byte = 0;
        CHECK_EQ(pread(number, &byte, 1, (off_t)at), 1);
        CHECK_EQ(byte, 0x33);
    }
    /* Where nothing is to be given up, the file is not needed. */
    opts.steps = KVMPREP_CONVERT_ATTRIBUTES;
    CHECK_OK(kvmprep_convert(s.handle, &other, KVMPREP_SHARED, &opts, &s.err), s.err);
    CHECK_EQ(result.converted, SIZE / 2);
    setting_end(&s);
}

/* What a conversion costs of a population is told; conversion with pre-fault brings it back. */
static void conversion_drops_coverage(void) {
    struct setting s = setting_make_with_stage2(GMEM_PRIVATE, SIZE);
    struct kvmprep_range all = part_of(0, SIZE), page = part_of(FRAME + PAGE, PAGE),
                         frame = part_of(FRAME, FRAME);
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_convert_opts convert = KVMPREP_CONVERT_OPTS_INIT;
    struct kvmprep_coverage coverage;
    CHECK_OK(kvmprep_visibility_note(s.handle, &all, KVMPREP_PRIVATE, &s.err), s.err);
    opts.vcpu_fd = s.vcpus[0].fd;
    CHECK_OK(kvmprep_populate(s.handle, NULL, 0, &opts, NULL, 0, &s.err), s.err);
#define COVERAGE(range)                                                                                      \
    CHECK_OK(kvmprep_get_coverage(s.handle, &(range), &coverage, sizeof(coverage), &s.err), s.err)
    COVERAGE(all);
    CHECK(coverage.stage2 == SIZE && coverage.lost == 0 && coverage.last_loss == KVMPREP_LOSS_NOTHING);

    CHECK_OK(kvmprep_convert(s.handle, &page, KVMPREP_SHARED, NULL, &s.err), s.err);
    COVERAGE(page);
    CHECK(coverage.stage2 == 0 && coverage.lost == PAGE);
    COVERAGE(all);
    CHECK_EQ(coverage.last_loss, KVMPREP_LOSS_CONVERTED);
    CHECK(coverage.lost >= PAGE && coverage.lost <= FRAME);
    CHECK_EQ(coverage.stage2, SIZE - coverage.lost);

    /* Told of, it is lost all the same; and what is noted as it was is not. */
    struct kvmprep_range noted = part_of(4 * FRAME, FRAME), as_it_is = part_of(6 * FRAME, FRAME);
    uint64_t lost = coverage.lost;
    CHECK_OK(kvmprep_visibility_note(s.handle, &as_it_is, KVMPREP_PRIVATE, &s.err), s.err);
    COVERAGE(all);
    CHECK_EQ(coverage.lost, lost);
    set_attribute(&s.vm, noted, KVMPREP_SHARED);
    CHECK_OK(kvmprep_visibility_note(s.handle, &noted, KVMPREP_SHARED, &s.err), s.err);
    COVERAGE(noted);
    CHECK(coverage.stage2 == 0 && coverage.lost == FRAME);

    convert.steps = KVMPREP_CONVERT_ATTRIBUTES | KVMPREP_CONVERT_DROP | KVMPREP_CONVERT_PREFAULT;
    convert.vcpu_fd = s.vcpus[0].fd;
    CHECK_OK(kvmprep_convert(s.handle, &frame, KVMPREP_SHARED, &convert, &s.err), s.err);
    COVERAGE(frame);
    CHECK_EQ(coverage.stage2, FRAME);
    check_writes_do_not_fault(&s, frame.gpa, frame.size);
#undef COVERAGE
    setting_end(&s);
}

/* Memory of a slot that could not be private, and memory of no slot, keeps all of a range from becoming so.
 */
static void not_all_can_be_private(void) {
    struct setting s = private_setting();
    struct memory plain = memory_make(&s.vm, ANON_4K, FRAME);
    struct kvmprep_memslot slot = slot_of(5, MEMORY_GPA + SIZE, &plain);
    struct kvmprep_range to_plain = part_of(SIZE - FRAME, 2 * FRAME), to_hole = part_of(SIZE + FRAME, PAGE),
                         shared = part_of(SIZE - FRAME, FRAME), whole = part_of(0, SIZE + 2 * FRAME);
    CHECK_OK(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err);
    CHECK_OK(kvmprep_convert(s.handle, &shared, KVMPREP_SHARED, NULL, &s.err), s.err);

    CHECK_ERR(kvmprep_convert(s.handle, &to_plain, KVMPREP_PRIVATE, NULL, &s.err), s.err, EINVAL,
              KVMPREP_REASON_NO_GMEM);
    CHECK(s.err.slot == 5 && s.err.gpa == slot.gpa && s.err.size == FRAME);
    CHECK_ERR(kvmprep_convert(s.handle, &to_hole, KVMPREP_PRIVATE, NULL, &s.err), s.err, EINVAL,
              KVMPREP_REASON_NO_MEMSLOT);
    CHECK(s.err.gpa == to_hole.gpa && s.err.size == to_hole.size);
    CHECK_ERR(kvmprep_handle_memory_fault(s.handle, to_hole.gpa, PAGE, 8, NULL, &s.err), s.err, EINVAL,
              KVMPREP_REASON_NO_MEMSLOT);
    check_visibility(s.handle, part_of(SIZE - FRAME, 3 * FRAME), KVMPREP_SHARED);

    /* Shared it can all be, holes and all; and a slot that is about to change can be neither. */
    CHECK_OK(kvmprep_memslot_changing(s.handle, 5, &s.err), s.err);
    CHECK_ERR(kvmprep_convert(s.handle, &whole, KVMPREP_SHARED, NULL, &s.err), s.err, EBUSY,
              KVMPREP_REASON_MEMSLOT_CHANGING);
    CHECK_EQ(s.err.slot, 5);
    uint64_t args[3] = {slot.gpa, 1, 0}, answer = 0;
    CHECK_ERR(kvmprep_handle_map_gpa_range(s.handle, args, NULL, &answer, &s.err), s.err, EBUSY,
              KVMPREP_REASON_MEMSLOT_CHANGING);
    CHECK_EQ(answer, EAGAIN);
    check_visibility(s.handle, part_of(0, SIZE - FRAME), KVMPREP_PRIVATE);
    CHECK_OK(kvmprep_memslot_note(s.handle, &slot, &s.err), s.err);
    CHECK_OK(kvmprep_convert(s.handle, &whole, KVMPREP_SHARED, NULL, &s.err), s.err);
    CHECK_EQ(run_at(s.handle, 0).size, run_at(s.handle, MIB).size + MIB); /* one run, all shared */
    check_visibility(s.handle, whole, KVMPREP_SHARED);
    memory_end(&plain);
    setting_end(&s);
}

/* A slot all of which is a guest_memfd that is mapped; its descriptor and mapping are the caller's to end. */
static struct kvmprep_memslot slot_of_mapped_file(const struct vm *vm) {
    struct kvmprep_error err;
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    int file = kvmprep_gmem_create(vm->fd, SIZE, KVMPREP_GMEM_MMAP, &err);
    CHECK_OK(file, err);
    void *mapping = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    CHECK(mapping != MAP_FAILED);
    slot.slot = MEMORY_SLOT;
    slot.flags = KVM_MEM_GUEST_MEMFD;
    slot.gpa = MEMORY_GPA;
    slot.size = SIZE;
    slot.hva = (uintptr_t)mapping;
    slot.guest_memfd = file;
    return slot;
}

static void end_mapped_file(const struct kvmprep_memslot *slot) {
    munmap((void *)(uintptr_t)slot->hva, SIZE);
    close(slot->guest_memfd);
}

/*
 * A guest_memfd that is mapped serves both sides of its slot. Nothing goes out of sight when it is converted,
 * so nothing is given up; and the guest, whose mappings are gone, gets them back.
 */
static void mapped_file_has_one_side(void) {
    struct vm vm = vm_make_private();
    if (!(extension(&vm, KVM_CAP_GUEST_MEMFD_FLAGS) & KVMPREP_GMEM_MMAP))
        check_skipped("this kernel's guest_memfd cannot be mapped: needs Linux 6.18");
    if (kvm_is_modelled())
        check_skipped(
            "the model cannot give SIGBUS for private memory, and takes the right to touch it away");
    struct vcpu vcpu = vcpu_make(&vm, 0);
    struct kvmprep_vm *handle = handle_of(&vm, 0);
    struct kvmprep_error err;
    struct kvmprep_memslot slot = slot_of_mapped_file(&vm);
    struct kvmprep_memslot_report report;
    struct kvmprep_range part = part_of(FRAME + PAGE, FRAME);
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    struct kvmprep_convert_result result;
    CHECK_OK(kvmprep_vm_check_memslot(handle, &slot, KVMPREP_ALIGN_STRICT | KVMPREP_ALIGN_KERNEL, &report,
                                      sizeof(report), &err),
             err);
    CHECK_EQ(report.warnings, 0);
    CHECK_OK(kvmprep_memslot_set(handle, &slot, &err), err);

    opts.steps = KVMPREP_CONVERT_ATTRIBUTES | KVMPREP_CONVERT_DROP | KVMPREP_CONVERT_PREFAULT;
    opts.vcpu_fd = vcpu.fd;
    opts.result = &result;
    opts.result_size = sizeof(result);
    CHECK_EQ(guest_touch(&vcpu, TOUCH_WRITE, MEMORY_GPA, SIZE), 0);
    for (int i = 0; i < 4; i++) {
        const uint32_t to = i % 2 == 0 ? KVMPREP_PRIVATE : KVMPREP_SHARED;
        CHECK_OK(kvmprep_convert(handle, &part, to, &opts, &err), err);
        CHECK_EQ(result.converted, part.size);
        CHECK_EQ(result.dropped | result.kept, 0);
        if (has_pre_fault(&vm))
            CHECK(faults_of_touch(&vcpu, TOUCH_WRITE, part.gpa, part.size) <= 1);
    }
    end_mapped_file(&slot);
    CHECK_EQ(kvmprep_vm_free(handle), 0);
    vcpu_end(&vm, &vcpu);
    vm_end(&vm);
}

/* A slot of a guest_memfd that can be mapped, and how a thread tells of it that is short of something. */
struct telling {
    struct kvmprep_vm *handle;
    struct kvmprep_memslot slot;
    struct kvmprep_error err;
    int result;
    bool is_short;
};

static void *tell_without_proc(void *argument) {
    struct telling *t = argument;
    t->is_short = unshare(CLONE_FS) == 0 && chroot(P_tmpdir) == 0;
    if (t->is_short)
        t->result = kvmprep_memslot_set(t->handle, &t->slot, &t->err);
    return NULL;
}

static void *tell_without_address_space(void *argument) {
    struct telling *t = argument;
    struct rlimit before, none;
    t->is_short = getrlimit(RLIMIT_AS, &before) == 0;
    none = (struct rlimit){.rlim_cur = PAGE, .rlim_max = before.rlim_max};
    t->is_short = t->is_short && setrlimit(RLIMIT_AS, &none) == 0;
    if (t->is_short) {
        t->result = kvmprep_memslot_note(t->handle, &t->slot, &t->err);
        setrlimit(RLIMIT_AS, &before);
    }
    return NULL;
}

static void convert_without_loss(struct kvmprep_vm *handle, uint32_t to) {
    struct kvmprep_range part = part_of(FRAME + PAGE, FRAME);
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    struct kvmprep_convert_result result;
    struct kvmprep_error err;
    opts.result = &result;
    opts.result_size = sizeof(result);
    CHECK_OK(kvmprep_convert(handle, &part, to, &opts, &err), err);
    CHECK_EQ(result.converted, part.size);
    CHECK_EQ(result.dropped, 0);
}

/* Nor is anything given up where it could not be seen, when the slot was told of, that the file can be
 * mapped. */
static void one_side_as_told_by(void *(*tell)(void *), bool is_set_before) {
    struct vm vm = vm_make_private();
    if (!(extension(&vm, KVM_CAP_GUEST_MEMFD_FLAGS) & KVMPREP_GMEM_MMAP))
        check_skipped("this kernel's guest_memfd cannot be mapped: needs Linux 6.18");
    struct telling t = {.handle = handle_of(&vm, 0), .slot = slot_of_mapped_file(&vm)};
    pthread_t thread;
    if (is_set_before)
        CHECK_EQ(slot_set(&vm, &t.slot), 0);
    CHECK_EQ(pthread_create(&thread, NULL, tell, &t), 0);
    pthread_join(thread, NULL);
    if (!t.is_short)
        check_skipped("this user may not take that from a thread");
    CHECK_OK(t.result, t.err);
    convert_without_loss(t.handle, KVMPREP_PRIVATE);
    convert_without_loss(t.handle, KVMPREP_SHARED);
    end_mapped_file(&t.slot);
    CHECK_EQ(kvmprep_vm_free(t.handle), 0);
    vm_end(&vm);
}

static void mapped_file_has_one_side_without_proc(void) {
    one_side_as_told_by(tell_without_proc, false);
}

static void mapped_file_has_one_side_without_address_space(void) {
    one_side_as_told_by(tell_without_address_space, true);
}

/* ---- The initial image ---- */

/* Each page once, and only what is private and has a guest_memfd; all of a range, or nothing. */
static void claims(void) {
    struct setting s = private_setting();
    struct memory plain = memory_make(&s.vm, ANON_4K, FRAME);
    struct kvmprep_memslot slot = slot_of(5, MEMORY_GPA + SIZE, &plain);
    struct kvmprep_range shared = part_of(FRAME, 2 * PAGE), first = part_of(0, 4 * PAGE),
                         second = part_of(4 * PAGE, 4 * PAGE), over_both = part_of(2 * PAGE, 4 * PAGE);
    CHECK_OK(kvmprep_memslot_set(s.handle, &slot, &s.err), s.err);
    CHECK_OK(kvmprep_convert(s.handle, &shared, KVMPREP_SHARED, NULL, &s.err), s.err);

    struct kvmprep_range list[3] = {first, second, over_both};
    CHECK_ERR(kvmprep_private_check_claims(s.handle, list, 3, &s.err), s.err, EEXIST, KVMPREP_REASON_CLAIMED);
    CHECK(strncmp(s.err.message, "ranges[2]: ", 11) == 0);
    CHECK(s.err.gpa == first.gpa && s.err.size == first.size);
    CHECK_OK(kvmprep_private_check_claims(s.handle, list, 2, &s.err), s.err);
    CHECK_OK(kvmprep_private_claim(s.handle, &first, &s.err), s.err); /* to ask has claimed nothing */
    CHECK_OK(kvmprep_private_claim(s.handle, &second, &s.err), s.err);
    const struct {
        struct kvmprep_range range, told;
        int code;
        uint32_t reason;
    } refused[] = {
        {first, first, EEXIST, KVMPREP_REASON_CLAIMED},
        {part_of(6 * PAGE, 40 * PAGE), second, EEXIST, KVMPREP_REASON_CLAIMED},
        {over_both, first, EEXIST, KVMPREP_REASON_CLAIMED},
        {part_of(FRAME - PAGE, 4 * PAGE), shared, EINVAL, KVMPREP_REASON_NOT_PRIVATE},
        {part_of(SIZE - PAGE, 2 * PAGE), part_of(SIZE, PAGE), EINVAL, KVMPREP_REASON_NO_GMEM},
        {part_of(SIZE + FRAME, PAGE), part_of(SIZE + FRAME, PAGE), EINVAL, KVMPREP_REASON_NO_MEMSLOT},
    };
    for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++) {
        const struct kvmprep_range *range = &refused[i].range, *told = &refused[i].told;
        CHECK_ERR(kvmprep_private_claim(s.handle, range, &s.err), s.err, refused[i].code, refused[i].reason);
        CHECK_EQ(s.err.gpa, told->gpa);
        CHECK_EQ(s.err.size, told->size);
        CHECK_ERR(kvmprep_private_check_claims(s.handle, range, 1, &s.err), s.err, refused[i].code,
                  refused[i].reason);
    }
    /* Of a range that was refused, nothing was claimed: what is not claimed cannot be given back. */
    struct kvmprep_range beyond = part_of(8 * PAGE, PAGE), too_much = part_of(6 * PAGE, 3 * PAGE);
    CHECK_ERR(kvmprep_private_unclaim(s.handle, &beyond, &s.err), s.err, ENOENT, KVMPREP_REASON_NOT_CLAIMED);
    CHECK_ERR(kvmprep_private_unclaim(s.handle, &too_much, &s.err), s.err, ENOENT,
              KVMPREP_REASON_NOT_CLAIMED);
    CHECK(s.err.gpa == beyond.gpa && s.err.size == PAGE);
    CHECK_ERR(kvmprep_private_claim(s.handle, &second, &s.err), s.err, EEXIST, KVMPREP_REASON_CLAIMED);
    CHECK(s.err.gpa == second.gpa && s.err.size == second.size);

    CHECK_OK(kvmprep_private_unclaim(s.handle, &over_both, &s.err), s.err);
    CHECK_OK(kvmprep_private_claim(s.handle, &over_both, &s.err), s.err);
    for (int again = 0; again < 2; again++)
        CHECK_OK(kvmprep_private_note_sealed(s.handle, &s.err), s.err);
    struct kvmprep_range free_page = part_of(2 * FRAME, PAGE);
    CHECK_ERR(kvmprep_private_claim(s.handle, &free_page, &s.err), s.err, EPERM, KVMPREP_REASON_SEALED);
    CHECK_ERR(kvmprep_private_check_claims(s.handle, &free_page, 1, &s.err), s.err, EPERM,
              KVMPREP_REASON_SEALED);
    CHECK_ERR(kvmprep_private_unclaim(s.handle, &first, &s.err), s.err, EPERM, KVMPREP_REASON_SEALED);
    memory_end(&plain);
    setting_end(&s);
}

/*
 * A handle that was told a type whose initial image is measured populates stage 2 only once that is closed.
 * KVM may make no VM of that type here; then the handle is not made either.
 */
static void populate_before_the_seal(void) {
    for (uint32_t type = SNP; type <= TDX; type++) {
        struct setting s = setting_make(GMEM_PRIVATE, SIZE);
        struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
        struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
        struct kvmprep_job *job = NULL;
        struct kvmprep_vm *vm = NULL;
        config.vm_fd = s.vm.fd;
        config.vm_type = type;
        int result = kvmprep_vm_new(&config, &vm, &s.err);
        if (!(extension(&s.vm, KVM_CAP_VM_TYPES) >> type & 1)) {
            CHECK_ERR(result, s.err, EINVAL, KVMPREP_REASON_BAD_VALUE);
            CHECK(vm == NULL);
            setting_end(&s);
            continue;
        }
        CHECK_OK(result, s.err);
        CHECK_OK(kvmprep_memslot_note(vm, &s.slot, &s.err), s.err);
        opts.vcpu_fd = s.vcpus[0].fd;
        CHECK_ERR(kvmprep_populate(vm, NULL, 0, &opts, NULL, 0, &s.err), s.err, EOPNOTSUPP,
                  KVMPREP_REASON_NOT_SEALED);
        CHECK_ERR(kvmprep_job_new(vm, NULL, 0, NULL, &job, &s.err), s.err, EOPNOTSUPP,
                  KVMPREP_REASON_NOT_SEALED);
        CHECK_OK(kvmprep_private_note_sealed(vm, &s.err), s.err);
        CHECK_OK(kvmprep_job_new(vm, NULL, 0, NULL, &job, &s.err), s.err);
        CHECK_EQ(kvmprep_job_free(job), 0);
        CHECK_EQ(kvmprep_vm_free(vm), 0);
        setting_end(&s);
    }
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"files", files},
        {"files_of_a_private_vm", files_of_a_private_vm},
        {"sizes_of_files", sizes_of_files},
        {"no_descriptor_left", no_descriptor_left},
        {"runs", runs},
        {"many_notes", many_notes},
        {"vm_without_private_memory", vm_without_private_memory},
        {"populate_goes_by_the_record", populate_goes_by_the_record},
        {"closed_file", closed_file},
        {"conversion_drops_coverage", conversion_drops_coverage},
        {"not_all_can_be_private", not_all_can_be_private},
        {"mapped_file_has_one_side", mapped_file_has_one_side},
        {"mapped_file_has_one_side_without_proc", mapped_file_has_one_side_without_proc},
        {"mapped_file_has_one_side_without_address_space", mapped_file_has_one_side_without_address_space},
        {"claims", claims},
        {"populate_before_the_seal", populate_before_the_seal},
    };
    return check_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));
}
