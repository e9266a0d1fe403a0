#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

/* What the headers of a few years ago lack. */
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

/* A program uses some of what is here. */
#pragma GCC diagnostic ignored "-Wunused-function"

#define SET_REGION2 _IOW(KVMIO, 0x49, struct region2)
#define SET_MEMORY_ATTRIBUTES _IOW(KVMIO, 0xd2, struct attributes)
#define CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct new_file)
#define PRE_FAULT_MEMORY _IOWR(KVMIO, 0xd5, struct pre_fault)
#define EXIT_MEMORY_FAULT 39
#define EFER_SVME (1u << 12)
#define HOLE (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
#define PAGE 4096ul
#define HUGE_PAGE (2ul << 20)
#define MOST_FIELDS 16384

struct region2 {
    uint32_t slot, flags;
    uint64_t gpa, size, hva, offset;
    uint32_t file, padding;
    uint64_t more[14];
};

struct attributes {
    uint64_t address, size, attributes, flags;
};

struct new_file {
    uint64_t size, flags, reserved[6];
};

struct pre_fault {
    uint64_t gpa, size, flags, padding[5];
};

struct counters {
    int fd, n;
    const char *names[8];
    off_t places[8];
};

struct program {
    unsigned long vm_type;
    const char *thp;
    unsigned pool, promised;
    uint32_t code_slot;
    uint64_t code_gpa;
    uintptr_t code, spare, promised_at;
    uint32_t mmio_word;
    uintptr_t areas;
    size_t area_stride, area_size;
};

static struct program program;
static int kvm, vm, other_file = -2, scratch, vcpus[2], memfds[8], files[1024], files_made;
static struct kvm_run *runs[2];
static struct counters vm_counters, vcpu_counters[2];
static struct {
    const char *name;
    int64_t value;
} fields[MOST_FIELDS];
static int field_count;

static void must(bool is_so, const char *what) {
    if (!is_so) {
        perror(what);
        exit(1);
    }
}

static void add(const char *name, int64_t value) {
    must(field_count < MOST_FIELDS, "too much to show");
    fields[field_count].name = name;
    fields[field_count++].value = value;
}

static long answer(long result) {
    return result < 0 ? -errno : result;
}

/* ---- KVM's counters ---- */

static struct counters find_counters(int owner, const char *const *names, int n) {
    struct counters found = {.fd = ioctl(owner, KVM_GET_STATS_FD, NULL)};
    struct kvm_stats_header header;
    must(pread(found.fd, &header, sizeof(header), 0) == sizeof(header), "KVM_GET_STATS_FD");
    size_t stride = sizeof(struct kvm_stats_desc) + header.name_size;
    struct kvm_stats_desc *descriptor = malloc(stride);
    for (int nth = 0; nth < n; nth++)
        for (unsigned i = 0; i < header.num_desc; i++) {
            off_t at = (off_t)(header.desc_offset + i * stride);
            must(pread(found.fd, descriptor, stride, at) == (ssize_t)stride, "a statistics file");
            if (strcmp(descriptor->name, names[nth]) == 0) {
                found.names[found.n] = names[nth];
                found.places[found.n++] = header.data_offset + descriptor->offset;
            }
        }
    free(descriptor);
    return found;
}

static void add_counters(const struct counters *counters) {
    for (int i = 0; i < counters->n; i++) {
        uint64_t value = 0;
        must(pread(counters->fd, &value, sizeof(value), counters->places[i]) == sizeof(value),
             "a statistics file");
        add(counters->names[i], (int64_t)value);
    }
}

static void show(int step, long result) {
    printf("%d: result=%ld", step, result);
    add_counters(&vm_counters);
    for (int vcpu = 0; vcpu < 2; vcpu++)
        add_counters(&vcpu_counters[vcpu]);
    for (int i = 0; i < field_count; i++)
        printf(" %s=%lld", fields[i].name, (long long)fields[i].value);
    printf("\n");
    field_count = 0;
}

/* ---- The host's memory ---- */

static bool has_forked;
static int child, line;

/* Where a child has had a page, it matters who else holds it: has the kernel let go of what it holds to sort
 * later. */
static void settle(void) {
    if (has_forked)
        madvise((void *)program.spare, PAGE, MADV_COLD);
}

static long map(unsigned area, uintptr_t at, size_t size, int flags, int fd, off_t offset) {
    int own = memfds[area];
    munmap((void *)(program.areas + area * program.area_stride), program.area_size);
    memfds[area] = -1;
    if (own >= 0)
        close(own);
    return answer(mmap((void *)at, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED_NOREPLACE, fd, offset) ==
                          MAP_FAILED
                      ? -1
                      : 0);
}

/* The same of a new memfd. */
static long map_memfd(unsigned area, uintptr_t at, size_t size, int flags, unsigned kind) {
    munmap((void *)(program.areas + area * program.area_stride), program.area_size);
    int made = memfd_create("memory", kind);
    if (made < 0 || ftruncate(made, (off_t)size) < 0)
        return answer(-1);
    long result = map(area, at, size, flags, made, 0);
    memfds[area] = made;
    return result;
}

static long store(uintptr_t at, uint32_t word) {
    must(pwrite(scratch, &word, sizeof(word), 0) == sizeof(word), "pwrite");
    ssize_t done = pread(scratch, (void *)at, sizeof(word), 0);
    return done < 0 ? answer(-1) : done == sizeof(word) ? 0 : -EFAULT;
}

static long load(uintptr_t at) {
    uint32_t word = 0;
    ssize_t done = pwrite(scratch, (void *)at, sizeof(word), 0);
    if (done != sizeof(word))
        return done < 0 ? answer(-1) : -EFAULT;
    must(pread(scratch, &word, sizeof(word), 0) == sizeof(word), "pread");
    add("word", word);
    return 0;
}

static long make_child(void) {
    int ends[2];
    char byte = 0;
    if (child != 0)
        return -EBUSY;
    must(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, "socketpair");
    fflush(NULL);
    child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        dup2(ends[1], 0);
        syscall(SYS_close_range, 1u, ~0u, 0u);
        if (write(0, &byte, 1) == 1 && read(0, &byte, 1) >= 0)
            _exit(0);
        _exit(1);
    }
    has_forked = true;
    close(ends[1]);
    must(read(ends[0], &byte, 1) == 1, "the child");
    line = ends[0];
    return 0;
}

static long end_child(void) {
    if (child == 0)
        return -ECHILD;
    close(line);
    int reaped = child;
    child = 0;
    return waitpid(reaped, NULL, 0) < 0 ? answer(-1) : 0;
}

/* ---- The VM ---- */

static long set_region(uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size, uint64_t hva) {
    struct kvm_userspace_memory_region region = {slot, flags, gpa, size, hva};
    return answer(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
}

static long set_region2(uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size, uint64_t hva, int file,
                        uint64_t offset) {
    struct region2 region = {.slot = slot,
                             .flags = flags,
                             .gpa = gpa,
                             .size = size,
                             .hva = hva,
                             .offset = offset,
                             .file = (uint32_t)file};
    return answer(ioctl(vm, SET_REGION2, &region));
}

static int new_file(int of, uint64_t size, uint64_t flags) {
    struct new_file create = {.size = size, .flags = flags};
    return ioctl(of, CREATE_GUEST_MEMFD, &create);
}

static long create_guest_memfd(uint64_t size, uint64_t flags) {
    int made = new_file(vm, size, flags);
    files[files_made++] = made;
    return made < 0 ? answer(-1) : 0;
}

/* One that another VM made. */
static int another_vms_file(void) {
    if (other_file == -2) {
        int other = ioctl(kvm, KVM_CREATE_VM, program.vm_type);
        other_file = new_file(other, program.area_size, 0);
        close(other);
    }
    return other_file;
}

static long close_file(int number) {
    int file = files[number];
    files[number] = -1;
    return file < 0 ? -EBADF : answer(close(file));
}

static long get_dirty_log(uint32_t slot) {
    static uint64_t words[4096];
    memset(words, 0, sizeof(words));
    struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = words};
    long result = answer(ioctl(vm, KVM_GET_DIRTY_LOG, &log));
    for (int i = 0; i < 4096; i++)
        if (words[i] != 0) {
            add("dirty.at", i);
            add("dirty", (int64_t)words[i]);
        }
    return result;
}

static long clear_dirty_log(uint32_t slot, uint64_t first_page, uint32_t pages, uint64_t bits) {
    size_t n = pages / 64 + 1;
    uint64_t *words = calloc(n, sizeof(*words));
    for (size_t i = 0; i < n; i++)
        words[i] = bits;
    struct kvm_clear_dirty_log log = {
        .slot = slot, .num_pages = pages, .first_page = first_page, .dirty_bitmap = words};
    long result = answer(ioctl(vm, KVM_CLEAR_DIRTY_LOG, &log));
    free(words);
    return result;
}

static long set_attributes(uint64_t address, uint64_t size, uint64_t attributes, uint64_t flags) {
    struct attributes argument = {address, size, attributes, flags};
    return answer(ioctl(vm, SET_MEMORY_ATTRIBUTES, &argument));
}

static long enable_cap(uint32_t cap, uint64_t argument) {
    struct kvm_enable_cap enable = {.cap = cap, .args = {argument}};
    return answer(ioctl(vm, KVM_ENABLE_CAP, &enable));
}

/* ---- vCPUs ---- */

static volatile sig_atomic_t is_over;

static void note_alarm(int number) {
    (void)number;
    is_over = true;
}

static void limit(int milliseconds) {
    struct itimerval timer = {.it_value = {milliseconds / 1000, milliseconds % 1000 * 1000}};
    setitimer(ITIMER_REAL, &timer, NULL);
}

static void add_memory_fault(const struct kvm_run *run) {
    uint64_t fault[3]; /* flags, gpa, size: where older headers have no name for them */
    memcpy(fault, &run->mmio, sizeof(fault));
    add("memory_fault.flags", (int64_t)fault[0]);
    add("memory_fault.gpa", (int64_t)fault[1]);
    add("memory_fault.size", (int64_t)fault[2]);
}

/* A kernel may not come back from a pre-fault until there is a signal. */
static long pre_fault(int vcpu, uint64_t gpa, uint64_t size, uint64_t flags) {
    struct pre_fault range = {.gpa = gpa, .size = size, .flags = flags};
    long result;
    uint64_t before;
    runs[vcpu]->exit_reason = ~0u;
    do {
        before = range.size;
        is_over = false;
        limit(1000);
        result = answer(ioctl(vcpus[vcpu], PRE_FAULT_MEMORY, &range));
        limit(0);
    } while (is_over && range.size != 0 && range.size != before);
    if (result < 0 && range.size < size)
        result = 0;
    add("gpa", (int64_t)range.gpa);
    add("size", (int64_t)range.size);
    if (runs[vcpu]->exit_reason == EXIT_MEMORY_FAULT)
        add_memory_fault(runs[vcpu]);
    return result;
}

/* The word at an offset of AMD's block that describes a guest (AMD64 manual, volume 2, appendix B). */
#define VMCB(offset) [(offset) / 8]

/* From within a guest of the guest's, with page tables of its own or without, which is stopped then. */
static long pre_fault_nested(int vcpu, bool has_tables, uint64_t gpa, uint64_t size) {
    struct {
        struct kvm_nested_state header;
        uint64_t vmcb[512];
    } nested = {.header = {.flags = KVM_STATE_NESTED_GUEST_MODE | KVM_STATE_NESTED_GIF_SET,
                           .format = KVM_STATE_NESTED_FORMAT_SVM,
                           .size = sizeof(nested)},
                .vmcb = {VMCB(0x10) = 1 /* VMRUN */, VMCB(0x58) = 1 /* ASID */, VMCB(0x90) = has_tables,
                         VMCB(0xb0) = 1ull << 35 /* no memory */, VMCB(0x4d0) = EFER_SVME,
                         VMCB(0x558) = 1u << 31 | 1 /* CR0: PG, PE */}};
    struct kvm_nested_state none = {
        .flags = KVM_STATE_NESTED_GIF_SET, .format = KVM_STATE_NESTED_FORMAT_SVM, .size = sizeof(none)};
    struct kvm_sregs before, allowed;
    must(ioctl(vcpus[vcpu], KVM_GET_SREGS, &before) == 0, "KVM_GET_SREGS");
    allowed = before;
    allowed.efer |= EFER_SVME;
    must(ioctl(vcpus[vcpu], KVM_SET_SREGS, &allowed) == 0, "KVM_SET_SREGS");
    long result = answer(ioctl(vcpus[vcpu], KVM_SET_NESTED_STATE, &nested));
    if (result == 0)
        result = pre_fault(vcpu, gpa, size, 0);
    must(ioctl(vcpus[vcpu], KVM_SET_NESTED_STATE, &none) == 0, "KVM_SET_NESTED_STATE");
    must(ioctl(vcpus[vcpu], KVM_SET_SREGS, &before) == 0, "KVM_SET_SREGS");
    return result;
}

static long set_smm(int vcpu, bool is_in_smm) {
    struct kvm_vcpu_events events;
    must(ioctl(vcpus[vcpu], KVM_GET_VCPU_EVENTS, &events) == 0, "KVM_GET_VCPU_EVENTS");
    events.flags = KVM_VCPUEVENT_VALID_SMM;
    events.smi.smm = is_in_smm;
    return answer(ioctl(vcpus[vcpu], KVM_SET_VCPU_EVENTS, &events));
}

static void add_mmio(struct kvm_run *run) {
    add("mmio.gpa", (int64_t)run->mmio.phys_addr);
    add("mmio.len", run->mmio.len);
    add("mmio.is_write", run->mmio.is_write);
    if (run->mmio.is_write) {
        uint32_t word;
        memcpy(&word, run->mmio.data, sizeof(word));
        add("mmio.word", word);
    } else {
        memcpy(run->mmio.data, &program.mmio_word, sizeof(program.mmio_word));
    }
}

static long guest_access(int vcpu, bool is_read, uint64_t gpa, uint32_t word) {
    struct kvm_regs regs = {
        .rip = program.code_gpa + (is_read ? 16 : 0), .rdi = gpa, .rax = word, .rflags = 2};
    struct kvm_run *run = runs[vcpu];
    must(ioctl(vcpus[vcpu], KVM_SET_REGS, &regs) == 0, "KVM_SET_REGS");
    limit(10000);
    run->exit_reason = KVM_EXIT_UNKNOWN;
    long result = answer(ioctl(vcpus[vcpu], KVM_RUN, 0));
    if (result == 0 && run->exit_reason == KVM_EXIT_MMIO) {
        add_mmio(run);
        run->exit_reason = KVM_EXIT_UNKNOWN;
        result = answer(ioctl(vcpus[vcpu], KVM_RUN, 0));
    }
    limit(0);
    if (run->exit_reason == KVM_EXIT_IO && run->io.port == 0x10) {
        memcpy(&word, (char *)run + run->io.data_offset, sizeof(word));
        if (is_read)
            add("word", word);
    } else if (run->exit_reason == EXIT_MEMORY_FAULT) {
        add_memory_fault(run);
    } else {
        add("exit_reason", run->exit_reason);
    }
    return result;
}

static long guest_write(int vcpu, uint64_t gpa, uint32_t word) {
    return guest_access(vcpu, false, gpa, word);
}

static long guest_read(int vcpu, uint64_t gpa) {
    return guest_access(vcpu, true, gpa, 0);
}

/* A signal is pending that KVM_RUN does not block. */
static long guest_interrupted(int vcpu, uint64_t gpa) {
    sigset_t user;
    sigemptyset(&user);
    sigaddset(&user, SIGUSR1);
    raise(SIGUSR1);
    long result = guest_access(vcpu, true, gpa, 0);
    sigwaitinfo(&user, NULL);
    return result;
}

/* ---- The beginning ---- */

static void set(const char *path, const char *value) {
    int fd = open(path, O_WRONLY);
    if (fd >= 0 && write(fd, value, strlen(value)) < 0)
        perror(path);
    if (fd >= 0)
        close(fd);
}

#define THP "/sys/kernel/mm/transparent_hugepage/"

static void prepare_machine(void) {
    char pool[16];
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(0, &cpus);
    sched_setaffinity(0, sizeof(cpus), &cpus);
    set(THP "khugepaged/scan_sleep_millisecs", "1000000000");
    set(THP "khugepaged/pages_to_scan", "1");
    set(THP "khugepaged/max_ptes_none", "0");
    set(THP "defrag", "always");
    set(THP "shmem_enabled", "never");
    set(THP "enabled", program.thp);
    snprintf(pool, sizeof(pool), "%u", program.pool);
    set("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", pool);
    struct sigaction action = {.sa_handler = note_alarm};
    sigaction(SIGALRM, &action, NULL);
    sigset_t user;
    sigemptyset(&user);
    sigaddset(&user, SIGUSR1);
    sigprocmask(SIG_BLOCK, &user, NULL);
}

static void *map_own(uintptr_t at, size_t size, int flags) {
    void *got = mmap((void *)at, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | flags, -1, 0);
    must(got != MAP_FAILED, "mmap");
    return got;
}

/* Lets a vCPU's guest have guests, on AMD's processors. */
static void allow_nested(int vcpu) {
    struct {
        struct kvm_cpuid2 header;
        struct kvm_cpuid_entry2 entries[2];
    } cpuid = {.header = {.nent = 2},
               .entries = {{.function = 0x80000001, .ecx = 1u << 2 /* SVM */},
                           {.function = 0x8000000a, .edx = 1u << 0 /* nested paging */}}};
    must(ioctl(vcpu, KVM_SET_CPUID2, &cpuid) == 0, "KVM_SET_CPUID2");
}

static void make_vcpu(int id) {
    static const char *const names[] = {"pf_taken",    "pf_fixed", "pf_emulate",
                                        "pf_spurious", "pf_fast",  "pf_mmio_spte_created"};
    const struct kvm_segment data = {
        .limit = 0xffffffff, .selector = 0x10, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    struct {
        uint32_t size;
        uint8_t none[8];
    } signals = {.size = 8};
    struct kvm_sregs sregs;
    int vcpu = vcpus[id] = ioctl(vm, KVM_CREATE_VCPU, (unsigned long)id);
    size_t size = (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    runs[id] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    must(runs[id] != MAP_FAILED, "kvm_run");
    vcpu_counters[id] = find_counters(vcpu, names, 6);
    allow_nested(vcpu);
    must(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0, "KVM_GET_SREGS");
    sregs.cs = sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cs.selector = 8;
    sregs.cs.type = 11;
    sregs.cr0 |= 1;
    must(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0, "KVM_SET_SREGS");
    must(ioctl(vcpu, KVM_SET_SIGNAL_MASK, &signals) == 0, "KVM_SET_SIGNAL_MASK");
}

static void begin(const struct program *it) {
    static const unsigned char write_code[] = {0x89, 0x07, 0xe7, 0x10},
                               read_code[] = {0x8b, 0x07, 0xe7, 0x10};
    static const char *const names[] = {"pages_4k", "pages_2m", "pages_1g"};
    program = *it;
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    must(kvm >= 0, "/dev/kvm");
    prepare_machine();
    unsigned char *code = map_own(program.code, PAGE, 0);
    memset(code, 0xf4, 20); /* hlt */
    memcpy(code, write_code, sizeof(write_code));
    memcpy(code + 16, read_code, sizeof(read_code));
    *(char *)map_own(program.spare, PAGE, 0) = 1;
    if (program.promised != 0) {
        void *promised = map_own(program.promised_at, program.promised * HUGE_PAGE, MAP_HUGETLB);
        must(madvise(promised, program.promised * HUGE_PAGE, MADV_DONTFORK) == 0, "MADV_DONTFORK");
    }
    scratch = memfd_create("scratch", 0);
    must(scratch >= 0 && ftruncate(scratch, PAGE) == 0, "memfd_create");
    memset(memfds, -1, sizeof(memfds));
    memset(files, -1, sizeof(files));
    vm = ioctl(kvm, KVM_CREATE_VM, program.vm_type);
    must(vm >= 0, "KVM_CREATE_VM");
    int spaces = ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_MULTI_ADDRESS_SPACE);
    for (int space = 0; space < spaces || space < 1; space++)
        must(set_region(program.code_slot | (uint32_t)space << 16, 0, program.code_gpa, PAGE, program.code) ==
                 0,
             "the code's slot");
    vm_counters = find_counters(vm, names, 3);
    make_vcpu(0);
    make_vcpu(1);
}
