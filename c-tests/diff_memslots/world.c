/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See world.h. */
#define _GNU_SOURCE
#include "world.h"
#include "support/check.h"
#include "support/guest.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* Descriptors of own files lie from here on. */
#define FIRST_DESCRIPTOR 64
#define CLOSED_DESCRIPTOR 1000
#define TSS_ADDR 0xfffbd000ull
#define IDENTITY_MAP_ADDR 0xfffbc000ull
#define APIC_ACCESS_ADDR 0xfee00000ull

/* What KVM may put in the way of a VMM's slots, by its number behind the last. */
static const struct {
    uint64_t gpa, size;
} internal_places[] = {{APIC_ACCESS_ADDR, PAGE}, {TSS_ADDR, 3 * PAGE}, {IDENTITY_MAP_ADDR, PAGE}};
#define INTERNAL_PLACES (sizeof(internal_places) / sizeof(internal_places[0]))

/* One type of VM. */
struct type {
    struct kvmprep_caps caps;
    bool is_internal[INTERNAL_PLACES]; /* KVM makes a slot of its own there */
    bool has_internal;
};

static struct {
    bool is_prepared;
    int kvm;
    unsigned types;
    struct type type[2];
    int other_vm, gmem_of_other_vm, memfd, device, named;
} shared;

uint64_t length_of(enum file file) {
    return file == FILE_SHORT ? 16 * PAGE : file == FILE_MAPPABLE ? 32 * PAGE : 1024 * PAGE;
}

/* ---- What all VMs share ---- */

static int vm_of_type(unsigned long type) {
    int vm = ioctl(shared.kvm, KVM_CREATE_VM, type);
    CHECK(vm >= 0);
    return vm;
}

/* A guest_memfd of the VM, or any other file where the kernel has none. */
static int make_guest_memfd(int vm, uint64_t length, uint64_t flags) {
    struct kvm_create_guest_memfd create = {.size = length, .flags = flags};
    int fd = ioctl(vm, KVM_CREATE_GUEST_MEMFD, &create);
    if (fd >= 0)
        return fd;
    CHECK(errno == ENOTTY);
    fd = memfd_create("kvmprep-test", MFD_CLOEXEC);
    CHECK(fd >= 0);
    CHECK_EQ(ftruncate(fd, (off_t)length), 0);
    return fd;
}

/* A descriptor that names a file without opening it. */
static int named_only(int fd) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    int named = open(path, O_PATH | O_CLOEXEC);
    CHECK(named >= 0);
    return named;
}

/* Has KVM make whatever slots of its own it makes for such a VM; returns its vCPU. */
static int provoke_internal_slots(int vm) {
    uint64_t identity_map = IDENTITY_MAP_ADDR;
    if (!kvm_is_modelled()) { /* the model makes none, and has no interrupt controllers */
        CHECK_EQ(ioctl(vm, KVM_SET_TSS_ADDR, TSS_ADDR), 0);
        CHECK_EQ(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map), 0);
        CHECK_EQ(ioctl(vm, KVM_CREATE_IRQCHIP, 0), 0);
    }
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    CHECK(vcpu >= 0);
    return vcpu;
}

/* A slot in the place of one of KVM's own is refused, and that is how they are found. */
static bool is_occupied(int vm, uint64_t gpa) {
    struct kvm_userspace_memory_region region = {
        .slot = 0, .guest_phys_addr = gpa, .memory_size = PAGE, .userspace_addr = PAGE};
    if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0) {
        CHECK_EQ(errno, EEXIST);
        return true;
    }
    region.memory_size = 0;
    CHECK_EQ(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), 0);
    return false;
}

static void study_type(struct type *type, unsigned long vm_type) {
    struct kvmprep_error err;
    int vm = vm_of_type(vm_type), vcpu = provoke_internal_slots(vm);
    CHECK_OK(kvmprep_probe(shared.kvm, vm, &type->caps, sizeof(type->caps), &err), err);
    type->caps.vm_type = (uint32_t)vm_type;
    for (unsigned i = 0; i < INTERNAL_PLACES; i++) {
        type->is_internal[i] = is_occupied(vm, internal_places[i].gpa);
        type->has_internal |= type->is_internal[i];
    }
    close(vcpu);
    close(vm);
}

void world_prepare(void) {
    if (shared.is_prepared)
        return;
    shared.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (shared.kvm < 0)
        check_skipped("/dev/kvm: %s", strerror(errno));
    bool has_private = (ioctl(shared.kvm, KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES) & 2) != 0;
    shared.types = has_private ? 2 : 1;
    for (unsigned i = 0; i < shared.types; i++)
        study_type(&shared.type[i], i);
    shared.other_vm = vm_of_type(0);
    shared.gmem_of_other_vm = make_guest_memfd(shared.other_vm, length_of(FILE_OF_OTHER_VM), 0);
    shared.memfd = memfd_create("kvmprep-test", MFD_CLOEXEC);
    shared.device = open("/dev/null", O_RDWR | O_CLOEXEC);
    CHECK(shared.memfd >= 0 && shared.device >= 0);
    shared.named = named_only(shared.gmem_of_other_vm);
    CHECK_EQ(ftruncate(shared.memfd, (off_t)length_of(FILE_LONG)), 0);
    shared.is_prepared = true;
}

unsigned world_vm_types(void) {
    return shared.types;
}

bool world_has_internal_slots(unsigned long vm_type) {
    return shared.type[vm_type].has_internal;
}

const struct kvmprep_caps *world_caps(unsigned long vm_type) {
    return &shared.type[vm_type].caps;
}

/* ---- One VM ---- */

/* Under a number of its own, the lowest free of the range. */
static int renumbered(int fd, int lowest) {
    int result = fcntl(fd, F_DUPFD_CLOEXEC, lowest);
    CHECK(result >= lowest && result < CLOSED_DESCRIPTOR);
    close(fd);
    return result;
}

static void make_file(struct world *w, enum file file, int lowest) {
    uint64_t flags = file == FILE_MAPPABLE ? w->caps.guest_memfd_flags & GUEST_MEMFD_FLAG_MMAP : 0;
    w->files[file][0] = renumbered(make_guest_memfd(w->vm, length_of(file), flags), lowest);
    w->files[file][1] = fcntl(w->files[file][0], F_DUPFD_CLOEXEC, lowest);
    CHECK(w->files[file][1] > w->files[file][0]);
}

static void set_file(struct world *w, enum file file, int fd) {
    w->files[file][0] = w->files[file][1] = fd;
}

static void add_internal_slots(struct world *w, const struct type *type) {
    for (uint32_t space = 0; space < type->caps.address_spaces; space++)
        for (uint32_t i = 0; i < INTERNAL_PLACES; i++)
            if (type->is_internal[i]) {
                struct kvmprep_memslot *slot = &w->slots[w->n_slots++];
                *slot = (struct kvmprep_memslot)KVMPREP_MEMSLOT_INIT;
                slot->slot = (type->caps.memslots + i) | space << 16;
                slot->gpa = internal_places[i].gpa;
                slot->size = internal_places[i].size;
            }
    w->n_internal = w->n_slots;
}

/* The handle learns of KVM's own slots as it does of all others. */
static void make_handle(struct world *w) {
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_error err;
    config.vm_fd = w->vm;
    config.vm_type = (uint32_t)w->vm_type;
    CHECK_OK(kvmprep_vm_new(&config, &w->handle, &err), err);
    for (size_t i = 0; i < w->n_slots; i++)
        CHECK_OK(kvmprep_memslot_note(w->handle, &w->slots[i], &err), err);
}

void world_make(struct world *w, unsigned long vm_type) {
    const struct type *type = &shared.type[vm_type];
    *w = (struct world){.vm_type = vm_type, .vm = vm_of_type(vm_type), .caps = type->caps};
    if (type->has_internal)
        close(provoke_internal_slots(w->vm));
    add_internal_slots(w, type);
    for (enum file file = 0; file < OWN_FILES; file++)
        make_file(w, file, FIRST_DESCRIPTOR);
    set_file(w, FILE_OF_OTHER_VM, shared.gmem_of_other_vm);
    set_file(w, FILE_MEMFD, shared.memfd);
    set_file(w, FILE_DEVICE, shared.device);
    set_file(w, FILE_VM, w->vm);
    set_file(w, FILE_NAMED, shared.named);
    set_file(w, FILE_CLOSED, CLOSED_DESCRIPTOR);
    set_file(w, FILE_NEGATIVE, -1);
    make_handle(w);
}

static void close_file(struct world *w, enum file file) {
    close(w->files[file][0]);
    close(w->files[file][1]);
}

void world_end(struct world *w) {
    CHECK_EQ(kvmprep_vm_free(w->handle), 0);
    for (enum file file = 0; file < OWN_FILES; file++)
        close_file(w, file);
    close(w->vm);
}

static int highest_descriptor(const struct world *w) {
    int highest = FIRST_DESCRIPTOR;
    for (enum file file = 0; file < OWN_FILES; file++)
        if (w->files[file][1] > highest)
            highest = w->files[file][1];
    return highest;
}

/* Whoever has closed a slot's guest_memfd must not name another file by the old number. */
static void forget_file(struct world *w, enum file file) {
    for (size_t i = 0; i < w->n_slots; i++)
        if (w->slots[i].guest_memfd == w->files[file][0] || w->slots[i].guest_memfd == w->files[file][1])
            w->slots[i].guest_memfd = -1;
}

void world_change_file(struct world *w, const struct operation *step) {
    bool second = step->second_descriptor;
    if (step->deed == CLOSE_ONE) {
        CHECK(dup3(w->files[step->file][!second], w->files[step->file][second], O_CLOEXEC) >= 0);
        return;
    }
    int lowest = step->deed == RENEW_FILE ? highest_descriptor(w) + 1 : w->files[step->file][0];
    if (step->deed == REUSE_NUMBERS)
        forget_file(w, step->file);
    close_file(w, step->file);
    make_file(w, step->file, lowest);
}

/* ---- One slot ---- */

struct kvmprep_memslot world_slot(const struct world *w, const struct operation *step) {
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    slot.slot = step->slot;
    slot.flags = step->flags;
    slot.gpa = step->gpa;
    slot.size = step->size;
    slot.hva = step->hva;
    slot.guest_memfd = w->files[step->file][step->second_descriptor];
    slot.guest_memfd_offset = step->offset;
    return slot;
}

static struct kvmprep_memslot *find(struct world *w, uint32_t number) {
    for (size_t i = 0; i < w->n_slots; i++)
        if (w->slots[i].slot == number)
            return &w->slots[i];
    return NULL;
}

const struct kvmprep_memslot *world_find(const struct world *w, uint32_t number) {
    return find((struct world *)w, number);
}

static uint32_t change_of(const struct kvmprep_memslot *old, const struct kvmprep_memslot *slot) {
    if (slot->size == 0)
        return KVMPREP_CHANGE_DELETE;
    if (old == NULL)
        return KVMPREP_CHANGE_CREATE;
    if (slot->gpa != old->gpa)
        return KVMPREP_CHANGE_MOVE;
    return slot->flags != old->flags ? KVMPREP_CHANGE_FLAGS : KVMPREP_CHANGE_NONE;
}

static int ask_kernel(const struct world *w, const struct operation *step,
                      const struct kvmprep_memslot *slot) {
    struct kvm_userspace_memory_region2 region = {.slot = slot->slot,
                                                  .flags = slot->flags,
                                                  .guest_phys_addr = slot->gpa,
                                                  .memory_size = slot->size,
                                                  .userspace_addr = slot->hva,
                                                  .guest_memfd_offset = slot->guest_memfd_offset,
                                                  .guest_memfd = (uint32_t)slot->guest_memfd};
    bool is_version2 = step->version2 || (slot->flags & KVM_MEM_GUEST_MEMFD);
    /* The first version's struct is the beginning of the second's. */
    unsigned long request = is_version2 ? KVM_SET_USER_MEMORY_REGION2 : KVM_SET_USER_MEMORY_REGION;
    return ioctl(w->vm, request, &region) < 0 ? -errno : 0;
}

/* Keeps what the kernel has done. */
static void keep(struct world *w, const struct kvmprep_memslot *slot) {
    struct kvmprep_memslot *old = find(w, slot->slot);
    if (slot->size == 0) {
        CHECK(old != NULL);
        *old = w->slots[--w->n_slots];
        return;
    }
    if (old == NULL) {
        CHECK(w->n_slots < MOST_SLOTS);
        old = &w->slots[w->n_slots++];
    }
    *old = *slot;
}

/* Whether the kernel logs that slot's writes, as it has a bitmap to give away; small slots only. */
static int logs_writes(const struct world *w, uint32_t slot) {
    static uint64_t bitmap[1024];
    struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = bitmap};
    return ioctl(w->vm, KVM_GET_DIRTY_LOG, &log) == 0;
}

static const char *aftermath_of(const struct world *w, const struct kvmprep_memslot *slot) {
    if (slot->size > sizeof(uint64_t[1024]) * 8 * PAGE)
        return NULL;
    bool wants_log = slot->size != 0 && (slot->flags & KVM_MEM_LOG_DIRTY_PAGES) != 0;
    return logs_writes(w, slot->slot) == wants_log ? NULL
                                                   : "the kernel does not log writes as it was asked to";
}

static void ask_library(const struct world *w, const struct kvmprep_memslot *slot, struct answers *a) {
    a->check = kvmprep_memslot_check(&w->caps, sizeof(w->caps), w->slots, w->n_slots, slot,
                                     KVMPREP_ALIGN_CONGRUENT, &a->report, sizeof(a->report), &a->check_err);
    a->handle = kvmprep_vm_check_memslot(w->handle, slot, KVMPREP_ALIGN_CONGRUENT, &a->handle_report,
                                         sizeof(a->handle_report), &a->handle_err);
}

void world_set_slot(struct world *w, const struct operation *step, struct answers *a) {
    struct kvmprep_memslot slot = world_slot(w, step);
    struct kvmprep_error err;
    a->change = change_of(find(w, slot.slot), &slot);
    ask_library(w, &slot, a);
    if (step->by_library)
        a->set = kvmprep_memslot_set(w->handle, &slot, &a->set_err);
    /* What the library refuses it does not even ask the kernel. */
    a->is_set_by_library = step->by_library && a->handle == 0;
    a->kernel = a->is_set_by_library ? a->set : ask_kernel(w, step, &slot);
    if (a->kernel != 0)
        return;
    keep(w, &slot);
    a->aftermath = aftermath_of(w, &slot);
    if (!a->is_set_by_library && kvmprep_memslot_note(w->handle, &slot, &err) != 0)
        a->aftermath = "the handle does not take note of it";
}
