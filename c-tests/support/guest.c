/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The smallest guest, on plain KVM. See guest.h. */
#define _GNU_SOURCE
#include "guest.h"
#include "check.h"
#include "host.h"
#include "routines.h"
#include <errno.h>
#include <fcntl.h>
#include <kvmprep-model.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define HUGE_PAGE (2 * MIB)

const char *kind_name(enum kind kind) {
    static const char *const names[KINDS] = {
        [ANON_4K] = "anonymous, 4K",
        [ANON_THP] = "anonymous, THP",
        [MEMFD_PRIVATE] = "memfd, private",
        [FILE_PRIVATE] = "file, private",
        [HUGETLB_PRIVATE] = "hugetlb 2M, private",
        [MEMFD_SHARED] = "memfd, shared",
        [HUGETLB_SHARED] = "hugetlb 2M, shared",
        [GMEM_SHARED] = "guest_memfd, mapped",
        [GMEM_PRIVATE] = "guest_memfd, private",
    };
    return names[kind];
}

struct vm vm_make_of_type(unsigned long type) {
    struct vm vm = {.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), .is_private = type != 0};
    if (vm.kvm < 0)
        check_skipped("/dev/kvm: %s", strerror(errno));
    vm.fd = ioctl(vm.kvm, KVM_CREATE_VM, type);
    if (vm.fd < 0 && type != 0)
        check_skipped("KVM_CREATE_VM of type %lu: %s", type, strerror(errno));
    CHECK(vm.fd >= 0);
    int run_size = ioctl(vm.kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    CHECK(run_size > 0);
    vm.run_size = (size_t)run_size;

    vm.code = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(vm.code != MAP_FAILED);
    routines_put(vm.code);
    struct kvm_userspace_memory_region region = {
        .slot = CODE_SLOT, .memory_size = PAGE, .userspace_addr = (uintptr_t)vm.code};
    CHECK_EQ(ioctl(vm.fd, KVM_SET_USER_MEMORY_REGION, &region), 0);
    return vm;
}

struct vm vm_make(void) {
    return vm_make_of_type(0);
}

struct vm vm_make_private(void) {
    return vm_make_of_type(KVM_X86_SW_PROTECTED_VM);
}

struct vm vm_make_for(enum kind kind) {
    return kind == GMEM_PRIVATE ? vm_make_private() : vm_make();
}

/* At a case's end nobody uses the VM any more, and the model can say whether it is still sound. */
static void check_model(const struct vm *vm) {
    char why[256] = "";
    if (kvm_is_modelled() && kvmprep_model_check(vm->fd, why, sizeof(why)) < 0)
        check_failed(__FILE__, __LINE__, "the model is not sound: %s", why);
}

void vm_end(struct vm *vm) {
    check_model(vm);
    close(vm->fd);
    close(vm->kvm);
    munmap(vm->code, PAGE);
}

static void set_flat_mode(int fd) {
    struct kvm_sregs sregs;
    CHECK_EQ(ioctl(fd, KVM_GET_SREGS, &sregs), 0);
    struct kvm_segment data = {
        .limit = 0xffffffff, .selector = 0x10, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    struct kvm_segment code = data;
    code.selector = 8;
    code.type = 11;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr0 |= 1;
    CHECK_EQ(ioctl(fd, KVM_SET_SREGS, &sregs), 0);
}

struct vcpu vcpu_make(const struct vm *vm, unsigned id) {
    struct vcpu vcpu = {.fd = ioctl(vm->fd, KVM_CREATE_VCPU, id)};
    CHECK(vcpu.fd >= 0);
    vcpu.run = mmap(NULL, vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu.fd, 0);
    CHECK(vcpu.run != MAP_FAILED);
    set_flat_mode(vcpu.fd);
    return vcpu;
}

void vcpu_end(const struct vm *vm, struct vcpu *vcpu) {
    munmap(vcpu->run, vm->run_size);
    close(vcpu->fd);
}

void vcpu_set_smm(const struct vm *vm, const struct vcpu *vcpu, bool is_in_smm) {
    struct kvm_vcpu_events events;
    if (ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_X86_SMM) <= 0)
        check_skipped("this kernel has no system management mode");
    CHECK_EQ(ioctl(vcpu->fd, KVM_GET_VCPU_EVENTS, &events), 0);
    events.flags = KVM_VCPUEVENT_VALID_SMM;
    events.smi.smm = is_in_smm;
    CHECK_EQ(ioctl(vcpu->fd, KVM_SET_VCPU_EVENTS, &events), 0);
}

static long number_in(const char *path) {
    FILE *file = fopen(path, "r");
    long number = -1;
    if (file == NULL)
        return -1;
    if (fscanf(file, "%ld", &number) != 1)
        number = -1;
    fclose(file);
    return number;
}

static int extension(const struct vm *vm, unsigned long cap) {
    return ioctl(vm->fd, KVM_CHECK_EXTENSION, cap);
}

bool kind_is_had(const struct vm *vm, enum kind kind, const char **why) {
    *why = "";
    switch (kind) {
    case HUGETLB_PRIVATE:
    case HUGETLB_SHARED:
        *why = "no pool of 2 MiB pages, or one that others use at the same time";
        return number_in("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages") >= 0 &&
               machine_may_be_changed();
    case ANON_THP:
        *why = "no transparent huge pages";
        return access("/sys/kernel/mm/transparent_hugepage/enabled", F_OK) == 0;
    case GMEM_SHARED:
        *why = "this kernel's guest_memfd cannot be mapped";
        return (extension(vm, KVM_CAP_GUEST_MEMFD_FLAGS) & 3) == 3;
    case GMEM_PRIVATE:
        *why = "this kernel has no VM type SW_PROTECTED";
        return vm->is_private || (ioctl(vm->kvm, KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES) & 2) != 0;
    default:
        return true;
    }
}

/* Grows the pool of huge pages so that `size` more bytes fit. */
static void want_huge_pages(size_t size) {
    const char *pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    long all = number_in(pool),
         available = number_in("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") -
                     number_in("/sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages");
    long need = (long)(size / HUGE_PAGE) - available;
    if (need <= 0)
        return;
    FILE *file = fopen(pool, "w");
    if (file == NULL)
        check_skipped("%s: %s", pool, strerror(errno));
    fprintf(file, "%ld", all + need);
    fclose(file);
    if (number_in(pool) < all + need)
        check_skipped("only %ld huge pages could be had", number_in(pool));
}

/* Address space of `size` at a 2 MiB boundary, for a mapping to be put over. */
static void *aligned_space(size_t size) {
    char *space = mmap(NULL, size + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(space != MAP_FAILED);
    char *start = (char *)(((uintptr_t)space + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
    if (start > space)
        munmap(space, (size_t)(start - space));
    munmap(start + size, (size_t)(space + HUGE_PAGE - start));
    return start;
}

static int temporary_file(size_t size) {
    char name[] = "kvmprep-test-XXXXXX";
    int directory_is = chdir(P_tmpdir);
    int fd = directory_is == 0 ? mkstemp(name) : -1;
    CHECK(fd >= 0);
    unlink(name);
    char page[PAGE];
    memset(page, 0x5a, sizeof(page));
    for (size_t at = 0; at < size; at += sizeof(page))
        CHECK_EQ(pwrite(fd, page, sizeof(page), (off_t)at), sizeof(page));
    return fd;
}

static int memfd(const char *name, unsigned flags, size_t size) {
    int fd = memfd_create(name, MFD_CLOEXEC | flags);
    CHECK(fd >= 0);
    CHECK_EQ(ftruncate(fd, (off_t)size), 0);
    return fd;
}

int guest_memfd(const struct vm *vm, uint64_t flags, size_t size) {
    struct kvm_create_guest_memfd create = {.size = size, .flags = flags};
    int fd = ioctl(vm->fd, KVM_CREATE_GUEST_MEMFD, &create);
    CHECK(fd >= 0);
    return fd;
}

struct memory memory_make(const struct vm *vm, enum kind kind, size_t size) {
    struct memory memory = {.kind = kind, .size = size, .fd = -1, .gmem = -1};
    int flags =
        MAP_FIXED |
        (kind == MEMFD_SHARED || kind == HUGETLB_SHARED || kind == GMEM_SHARED ? MAP_SHARED : MAP_PRIVATE);
    const char *why;
    if (!kind_is_had(vm, kind, &why))
        check_skipped("%s: %s", kind_name(kind), why);
    if (kind == HUGETLB_PRIVATE || kind == HUGETLB_SHARED)
        want_huge_pages(size);
    switch (kind) {
    case MEMFD_PRIVATE:
        /* Content of its own, as a snapshot has: a hole would read as a page that does not exist yet. */
        memory.fd = memfd("kvmprep-test", 0, size);
        for (size_t at = 0; at < size; at += PAGE)
            CHECK_EQ(pwrite(memory.fd, "kvmprep", 7, (off_t)at), 7);
        break;
    case MEMFD_SHARED:
        memory.fd = memfd("kvmprep-test", 0, size);
        break;
    case FILE_PRIVATE:
        memory.fd = temporary_file(size);
        break;
    case HUGETLB_SHARED:
        memory.fd = memfd("kvmprep-test", MFD_HUGETLB, size);
        break;
    case GMEM_SHARED:
        memory.gmem = guest_memfd(vm, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED, size);
        memory.fd = memory.gmem;
        break;
    case GMEM_PRIVATE:
        memory.gmem = guest_memfd(vm, 0, size);
        flags |= MAP_ANONYMOUS;
        break;
    case HUGETLB_PRIVATE:
        flags |= MAP_ANONYMOUS | MAP_HUGETLB;
        break;
    default:
        flags |= MAP_ANONYMOUS;
        break;
    }
    memory.hva = mmap(aligned_space(size), size, PROT_READ | PROT_WRITE, flags, memory.fd, 0);
    if (memory.hva == MAP_FAILED)
        check_failed(__FILE__, __LINE__, "mmap of %s: %s", kind_name(kind), strerror(errno));
    if (kind == ANON_THP)
        CHECK_EQ(madvise(memory.hva, size, MADV_HUGEPAGE), 0);
    if (kind == ANON_4K || kind == GMEM_PRIVATE) {
        /*
         * Fails only where there are none. It also keeps the kernel from joining what is untouched to other
         * memory: then fork() would tell KVM of it.
         */
        madvise(memory.hva, size, MADV_NOHUGEPAGE);
    }
    return memory;
}

void memory_end(struct memory *memory) {
    munmap(memory->hva, memory->size);
    if (memory->fd >= 0)
        close(memory->fd);
    else if (memory->gmem >= 0)
        close(memory->gmem);
}

struct kvmprep_memslot slot_of(uint32_t slot, uint64_t gpa, const struct memory *memory) {
    struct kvmprep_memslot description = KVMPREP_MEMSLOT_INIT;
    description.slot = slot;
    description.gpa = gpa;
    description.size = memory->size;
    description.hva = (uintptr_t)memory->hva;
    if (memory->gmem >= 0) {
        description.flags |= KVM_MEM_GUEST_MEMFD;
        description.guest_memfd = memory->gmem;
    } else if (memory->fd >= 0) {
        description.attributes |= KVMPREP_MEMSLOT_MEMORY_FD;
        description.memory_fd = memory->fd;
    }
    return description;
}

int slot_set(const struct vm *vm, const struct kvmprep_memslot *slot) {
    int result;
    if (slot->flags & KVM_MEM_GUEST_MEMFD) {
        struct kvm_userspace_memory_region2 region = {.slot = slot->slot,
                                                      .flags = slot->flags,
                                                      .guest_phys_addr = slot->gpa,
                                                      .memory_size = slot->size,
                                                      .userspace_addr = slot->hva,
                                                      .guest_memfd_offset = slot->guest_memfd_offset,
                                                      .guest_memfd = (uint32_t)slot->guest_memfd};
        result = ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION2, &region);
    } else {
        struct kvm_userspace_memory_region region = {.slot = slot->slot,
                                                     .flags = slot->flags,
                                                     .guest_phys_addr = slot->gpa,
                                                     .memory_size = slot->size,
                                                     .userspace_addr = slot->hva};
        result = ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region);
    }
    if (result == 0 && vm->is_private && slot->size != 0 && (slot->flags & KVM_MEM_GUEST_MEMFD)) {
        struct kvm_memory_attributes attributes = {
            .address = slot->gpa, .size = slot->size, .attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE};
        result = ioctl(vm->fd, KVM_SET_MEMORY_ATTRIBUTES, &attributes);
    }
    return result < 0 ? -errno : 0;
}

int slot_delete(const struct vm *vm, uint32_t slot) {
    struct kvmprep_memslot deletion = KVMPREP_MEMSLOT_INIT;
    deletion.slot = slot;
    return slot_set(vm, &deletion);
}

int guest_prepare_touch(struct vcpu *vcpu, enum touch touch, uint64_t gpa, uint64_t size) {
    struct kvm_regs regs = {.rip = touch == TOUCH_WRITE ? ROUTINE_WRITE : ROUTINE_READ,
                            .rdi = gpa,
                            .rcx = size / PAGE,
                            .rax = 0x50524550,
                            .rflags = 2};
    return routine_begin(vcpu, &regs);
}

int guest_prepare_loop(struct vcpu *vcpu, uint64_t gpa) {
    struct kvm_regs regs = {.rip = ROUTINE_LOOP, .rdi = gpa, .rcx = 1, .rax = 1, .rflags = 2};
    return routine_begin(vcpu, &regs);
}

int guest_touch(struct vcpu *vcpu, enum touch touch, uint64_t gpa, uint64_t size) {
    int result = guest_prepare_touch(vcpu, touch, gpa, size);
    if (result < 0)
        return result;
    if (ioctl(vcpu->fd, KVM_RUN, 0) < 0)
        return -errno;
    bool is_done = vcpu->run->exit_reason == KVM_EXIT_IO && vcpu->run->io.port == TOUCHED_PORT;
    return is_done ? 0 : -EPROTO;
}

uint64_t stat_of(int fd, const char *name) {
    struct kvm_stats_header header;
    int stats = ioctl(fd, KVM_GET_STATS_FD, NULL);
    CHECK(stats >= 0);
    CHECK_EQ(pread(stats, &header, sizeof(header), 0), sizeof(header));
    size_t stride = sizeof(struct kvm_stats_desc) + header.name_size;
    struct kvm_stats_desc *descriptor = malloc(stride);
    uint64_t value = 0;
    bool is_found = false;
    for (unsigned i = 0; i < header.num_desc && !is_found; i++) {
        off_t at = (off_t)(header.desc_offset + i * stride);
        CHECK_EQ(pread(stats, descriptor, stride, at), stride);
        if (strcmp(descriptor->name, name) == 0) {
            off_t data = (off_t)(header.data_offset + descriptor->offset);
            CHECK_EQ(pread(stats, &value, sizeof(value), data), sizeof(value));
            is_found = true;
        }
    }
    free(descriptor);
    close(stats);
    if (!is_found)
        check_failed(__FILE__, __LINE__, "KVM has no statistic %s", name);
    return value;
}

uint64_t faults_of_touch(struct vcpu *vcpu, enum touch touch, uint64_t gpa, uint64_t size) {
    uint64_t before = stat_of(vcpu->fd, "pf_taken");
    CHECK_EQ(guest_touch(vcpu, touch, gpa, size), 0);
    return stat_of(vcpu->fd, "pf_taken") - before;
}

int raw_pre_fault(int vcpu, uint64_t *gpa, uint64_t *size) {
    struct kvm_pre_fault_memory range = {.gpa = *gpa, .size = *size};
    int result = ioctl(vcpu, KVM_PRE_FAULT_MEMORY, &range) < 0 ? -errno : 0;
    *gpa = range.gpa;
    *size = range.size;
    return result;
}

bool has_pre_fault(const struct vm *vm) {
    return extension(vm, KVM_CAP_PRE_FAULT_MEMORY) > 0;
}

bool kvm_is_modelled(void) {
    return kvmprep_model_is_here();
}

static int release_of(const struct utsname *name) {
    int major = 0, minor = 0;
    CHECK_EQ(sscanf(name->release, "%d.%d", &major, &minor), 2);
    return major * 1000 + minor;
}

int kernel_release(void) {
    struct utsname name;
    CHECK_EQ(uname(&name), 0);
    return release_of(&name);
}

int host_release(void) {
    struct utsname name;
    CHECK_EQ(syscall(SYS_uname, &name), 0);
    return release_of(&name);
}

uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}
