/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The host stage alone, against a plain threaded prealloc as QEMU does it: as many threads as asked, started
 * together, each with MADV_POPULATE_WRITE over its own contiguous share. And, for shared memfd memory, the
 * host methods among which the library has chosen, against each other. `cargo xtask bench` runs it and
 * judges.
 *
 * It needs no KVM: the library is given a VM that offers nothing, since the host stage asks nothing of it.
 *
 * usage: bench_host ROUNDS MEBIBYTES [CASE...]
 */
#define _GNU_SOURCE
#include "support/check.h"
#include "support/guest.h"
#include "support/sample.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CHUNK (2 * MIB)
#define MOST_THREADS 2

static unsigned rounds;
static size_t size;
static int no_vm; /* stands for a VM */

/* Stands before the C library's, for the shared library too: answers for the VM that is none. */
int ioctl(int fd, unsigned long request, ...) {
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (fd == no_vm && request == KVM_CHECK_EXTENSION)
        return 0;
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

/* ---- theirs ---- */

struct share {
    pthread_barrier_t *start;
    char *hva;
    size_t size;
    int result;
};

static void *populate_share(void *opaque) {
    struct share *share = opaque;
    pthread_barrier_wait(share->start);
    share->result = madvise(share->hva, share->size, MADV_POPULATE_WRITE) == 0 ? 0 : -errno;
    return NULL;
}

static void prealloc(const struct memory *memory, unsigned threads) {
    pthread_t ids[MOST_THREADS];
    struct share shares[MOST_THREADS];
    pthread_barrier_t start;

    if (threads == 1) {
        CHECK_EQ(madvise(memory->hva, memory->size, MADV_POPULATE_WRITE), 0);
        return;
    }
    CHECK_EQ(pthread_barrier_init(&start, NULL, threads), 0);
    for (unsigned i = 0; i < threads; i++) {
        size_t each = memory->size / threads;
        shares[i] = (struct share){&start, (char *)memory->hva + i * each, each, 0};
        CHECK_EQ(pthread_create(&ids[i], NULL, populate_share, &shares[i]), 0);
    }
    for (unsigned i = 0; i < threads; i++)
        pthread_join(ids[i], NULL);
    for (unsigned i = 0; i < threads; i++)
        CHECK_EQ(shares[i].result, 0);
    pthread_barrier_destroy(&start);
}

/* ---- ours: the calling thread and as many of the library's as are lacking ---- */

static uint64_t time_of_kvmprep(const struct memory *memory, unsigned threads) {
    struct kvmprep_error err;
    struct kvmprep_vm *handle;
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;
    struct kvmprep_memslot slot = slot_of(MEMORY_SLOT, MEMORY_GPA, memory);

    config.vm_fd = no_vm;
    CHECK_OK(kvmprep_vm_new(&config, &handle, &err), err);
    CHECK_OK(kvmprep_memslot_note(handle, &slot, &err), err);
    opts.flags = KVMPREP_POPULATE_HOST_ONLY;
    opts.host_threads = threads - 1;
    uint64_t start = now_ns();
    CHECK_OK(kvmprep_populate(handle, NULL, 0, &opts, &result, sizeof(result), &err), err);
    uint64_t taken = now_ns() - start;
    CHECK_EQ(result.host, memory->size);
    CHECK_EQ(kvmprep_vm_free(handle), 0);
    return taken;
}

/* ---- a round ---- */

enum way { PREALLOC, KVMPREP, WAYS };

static void compare(enum kind kind, unsigned threads) {
    static const char *const names[WAYS] = {"prealloc", "kvmprep"};
    char what[64];

    snprintf(what, sizeof(what), "%s, %ut", kind_name(kind), threads);
    /* The first round warms up the memory, which this machine's own host may not have given it yet. */
    for (unsigned round = 0; round <= rounds; round++) {
        for (unsigned i = 0; i < WAYS; i++) {
            enum way way = in_turn(round, i, WAYS);
            struct memory memory = memory_make(NULL, kind, size);
            uint64_t taken;
            if (way == PREALLOC) {
                uint64_t start = now_ns();
                prealloc(&memory, threads);
                taken = now_ns() - start;
            } else {
                taken = time_of_kvmprep(&memory, threads);
            }
            if (round > 0)
                sample(what, names[way], taken);
            memory_end(&memory);
        }
    }
}

/* ---- the methods among which the library has chosen for shared memfd memory ---- */

enum method {
    POPULATE_WHOLE,
    POPULATE_CHUNKS,
    ALLOCATE_CHUNKS,
    BOTH_CHUNKS,
    BOTH_CHUNKS_READ,
    BOTH_WHOLE,
    METHODS
};

struct method_job {
    enum method method;
    const struct memory *memory;
    size_t chunk;
    atomic_size_t next;
    atomic_int result;
};

static void *work_by_method(void *opaque) {
    struct method_job *job = opaque;
    bool allocates = job->method != POPULATE_WHOLE && job->method != POPULATE_CHUNKS;
    bool populates = job->method != ALLOCATE_CHUNKS;
    int advice = job->method == BOTH_CHUNKS_READ ? MADV_POPULATE_READ : MADV_POPULATE_WRITE;
    for (;;) {
        size_t at = atomic_fetch_add(&job->next, job->chunk);
        if (at >= job->memory->size)
            return NULL;
        if (allocates && fallocate(job->memory->fd, 0, (off_t)at, (off_t)job->chunk) < 0)
            job->result = -errno;
        if (populates && madvise((char *)job->memory->hva + at, job->chunk, advice) < 0)
            job->result = -errno;
    }
}

static uint64_t time_of_method(enum method method, unsigned threads) {
    struct memory memory = memory_make(NULL, MEMFD_SHARED, size);
    bool is_whole = method == POPULATE_WHOLE || method == BOTH_WHOLE;
    struct method_job job = {.method = method, .memory = &memory, .chunk = is_whole ? size / threads : CHUNK};
    pthread_t ids[MOST_THREADS];

    uint64_t start = now_ns();
    for (unsigned i = 1; i < threads; i++)
        CHECK_EQ(pthread_create(&ids[i], NULL, work_by_method, &job), 0);
    work_by_method(&job);
    for (unsigned i = 1; i < threads; i++)
        pthread_join(ids[i], NULL);
    uint64_t taken = now_ns() - start;
    CHECK_EQ(job.result, 0);
    memory_end(&memory);
    return taken;
}

static void methods_of_memfd_shared(void) {
    static const char *const names[METHODS] = {
        "populate whole",
        "populate, 2 MiB",
        "allocate, 2 MiB",
        "allocate+populate, 2 MiB",
        "allocate+populate-read, 2 MiB",
        "allocate+populate whole",
    };
    for (unsigned threads = 1; threads <= MOST_THREADS; threads++) {
        char what[64];
        snprintf(what, sizeof(what), "memfd, shared, methods, %ut", threads);
        for (unsigned round = 0; round <= rounds; round++) {
            for (unsigned i = 0; i < METHODS; i++) {
                enum method method = in_turn(round, i, METHODS);
                uint64_t taken = time_of_method(method, threads);
                if (round > 0)
                    sample(what, names[method], taken);
            }
        }
    }
}

#define CASE(name, kind)                                                                                     \
    static void name(void) {                                                                                 \
        for (unsigned threads = 1; threads <= MOST_THREADS; threads++)                                       \
            compare(kind, threads);                                                                          \
    }
CASE(host_anon_4k, ANON_4K)
CASE(host_anon_thp, ANON_THP)
CASE(host_memfd_private, MEMFD_PRIVATE)
CASE(host_file_private, FILE_PRIVATE)
CASE(host_hugetlb_private, HUGETLB_PRIVATE)
CASE(host_memfd_shared, MEMFD_SHARED)
CASE(host_hugetlb_shared, HUGETLB_SHARED)

/* ---- the pool of huge pages, which is grown for two cases, is left as it was found ---- */

#define POOL "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"

static long pool_before = -1;

static void note_pool(void) {
    FILE *file = fopen(POOL, "r");
    if (file == NULL)
        return;
    if (fscanf(file, "%ld", &pool_before) != 1)
        pool_before = -1;
    fclose(file);
}

static void restore_pool(void) {
    FILE *file = pool_before < 0 ? NULL : fopen(POOL, "w");
    if (file == NULL)
        return;
    fprintf(file, "%ld", pool_before);
    fclose(file);
}

int main(int argc, char **argv) {
    static const struct check_case cases[] = {
        {"host_anon_4k", host_anon_4k},
        {"host_anon_thp", host_anon_thp},
        {"host_memfd_private", host_memfd_private},
        {"host_file_private", host_file_private},
        {"host_hugetlb_private", host_hugetlb_private},
        {"host_memfd_shared", host_memfd_shared},
        {"host_hugetlb_shared", host_hugetlb_shared},
        {"methods_of_memfd_shared", methods_of_memfd_shared},
    };
    if (argc < 3)
        return 2;
    rounds = (unsigned)atoi(argv[1]);
    size = (size_t)atoll(argv[2]) * MIB;
    no_vm = memfd_create("kvm-vm", MFD_CLOEXEC); /* the library knows a VM by its descriptor's name */
    note_pool();
    int result = check_main(argc - 2, argv + 2, cases, sizeof(cases) / sizeof(cases[0]));
    restore_pool();
    return result;
}
