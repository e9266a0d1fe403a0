/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See combination.h. */
#define _GNU_SOURCE
#include "combination.h"
#include "check.h"
#include "host.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MFD_HUGE_SHIFT
#define MFD_HUGE_SHIFT 26
#endif

static bool is_anonymous(enum kind kind) {
    return kind == ANON_4K || kind == ANON_THP || kind == GMEM_PRIVATE;
}

struct combination combination_of(enum kind kind, uint64_t size) {
    struct combination c = {.kind = kind, .size = size, .policy = POLICY_ADVISED, .range_size = size};
    if (is_anonymous(kind)) {
        c.advice = ADVICE_HUGE;
        c.advised_size = size;
    }
    return c;
}

#define GIGANTIC_POOL "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"

static bool has_gigantic_page(void) {
    FILE *file = machine_may_be_changed() ? fopen(GIGANTIC_POOL, "r+") : NULL;
    long pages = 0;
    if (file == NULL)
        return false;
    bool is_asked = fscanf(file, "%ld", &pages) == 1;
    if (is_asked && pages == 0) { /* the kernel finds room for one only in a large and empty machine */
        rewind(file);
        is_asked = fprintf(file, "1") > 0 && fflush(file) == 0;
        rewind(file);
        is_asked = is_asked && fscanf(file, "%ld", &pages) == 1;
    }
    fclose(file);
    return is_asked && pages > 0;
}

bool combination_is_had(const struct vm *vm, const struct combination *c) {
    const char *why;
    if (c->has_idle_gmem && ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_GUEST_MEMFD) <= 0)
        return false;
    if (c->is_gigantic && !has_gigantic_page())
        return false;
    return kind_is_had(vm, c->kind, &why) && policy_set(c->policy);
}

void combination_print(const struct combination *c) {
    static const char *const advice[] = {"none", "huge", "huge, small elsewhere"};
    static const char *const resident[] = {"nothing",
                                           "a page written",
                                           "a page read",
                                           "a page in the cache",
                                           "the huge zero page",
                                           "a frame with a page dropped",
                                           "a frame advised against later"};
    printf("%s%s, size %#" PRIx64 ", gpa %% 2M %#" PRIx64 ", hva %% 2M %#" PRIx64
           ", flags %u%s, policy '%s', advice %s",
           kind_name(c->kind), c->has_idle_gmem ? " beside an idle guest_memfd" : "", c->size, c->gpa_offset,
           c->hva_offset, c->flags, c->is_trimmed ? ", trimmed" : "", policy_name(c->policy),
           advice[c->advice]);
    if (c->advice != ADVICE_NONE)
        printf(" at %#" PRIx64 "+%#" PRIx64, c->advised_start, c->advised_size);
    printf(", resident %s", resident[c->resident]);
    if (c->resident != RESIDENT_NOTHING)
        printf(" at %#" PRIx64, c->resident_at);
    if (c->hole_size != 0)
        printf(", hole at %#" PRIx64 "+%#" PRIx64, c->hole_at, c->hole_size);
    printf(", range %#" PRIx64 "+%#" PRIx64, c->range_start, c->range_size);
    for (unsigned i = 0; i < c->n_private; i++)
        printf(", private %#" PRIx64 "+%#" PRIx64, c->private_memory[i].gpa, c->private_memory[i].size);
    printf("%s\n", c->is_file_named ? ", its file named" : "");
}

/* ---- Making it ---- */

static char *at(const struct scene *scene, uint64_t place) {
    return (char *)(uintptr_t)(scene->slot.hva + place);
}

static struct memory gigantic_memory(void) {
    struct memory memory = {.kind = HUGETLB_SHARED, .size = GIB, .gmem = -1};
    memory.fd = memfd_create("kvmprep-test", MFD_CLOEXEC | MFD_HUGETLB | 30u << MFD_HUGE_SHIFT);
    CHECK(memory.fd >= 0);
    CHECK_EQ(ftruncate(memory.fd, (off_t)GIB), 0);
    memory.hva = mmap(NULL, GIB, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd, 0);
    CHECK(memory.hva != MAP_FAILED);
    return memory;
}

/* Memory of whole frames, with a frame more, in which the slot's own begins at the offset. */
static void make_memory(struct scene *scene, const struct combination *c) {
    if (c->is_gigantic) {
        scene->memory = gigantic_memory();
        return;
    }
    uint64_t whole = (c->hva_offset + c->size + 2 * FRAME - 1) / FRAME * FRAME;
    scene->memory = memory_make(&scene->vm, c->kind, whole);
    if (is_anonymous(c->kind)) /* without the advice that it came with */
        CHECK(mmap(scene->memory.hva, whole, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS,
                   -1, 0) == scene->memory.hva);
}

static void describe_slot(struct scene *scene, const struct combination *c) {
    scene->slot = slot_of(MEMORY_SLOT, MEMORY_GPA + c->gpa_offset, &scene->memory);
    scene->slot.hva += c->hva_offset;
    scene->slot.size = c->size;
    scene->slot.flags |= c->flags;
    if (scene->memory.gmem >= 0)
        scene->slot.guest_memfd_offset = c->hva_offset;
    if (c->has_idle_gmem) {
        scene->idle_gmem = guest_memfd(&scene->vm, 0, c->size);
        scene->slot.flags |= KVM_MEM_GUEST_MEMFD;
        scene->slot.guest_memfd = scene->idle_gmem;
    }
    if (!c->is_file_named)
        scene->slot.attributes &= ~(uint32_t)KVMPREP_MEMSLOT_MEMORY_FD;
    else if (scene->slot.attributes & KVMPREP_MEMSLOT_MEMORY_FD)
        scene->slot.memory_fd_offset = c->hva_offset;
}

/* Puts a mapping that nothing may touch over it, so that nobody else's comes to lie there. */
static void cut_off(char *start, uint64_t size) {
    int flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (size != 0)
        CHECK(mmap(start, size, PROT_NONE, flags, -1, 0) == start);
}

static void trim(struct scene *scene, const struct combination *c) {
    cut_off(scene->memory.hva, c->hva_offset);
    cut_off(at(scene, c->size), scene->memory.size - c->hva_offset - c->size);
}

static void make_resident_before_advice(struct scene *scene, const struct combination *c) {
    char *page = at(scene, c->resident_at);
    switch (c->resident) {
    case RESIDENT_WRITTEN:
        *(volatile char *)page = 1;
        break;
    case RESIDENT_READ:
        (void)*(volatile char *)page;
        break;
    case RESIDENT_CACHED:
        CHECK_EQ(pwrite(scene->memory.fd, "kvmprep", 7, (off_t)(c->hva_offset + c->resident_at)), 7);
        break;
    default:
        break;
    }
}

static void advise(struct scene *scene, const struct combination *c) {
    if (c->advice == ADVICE_SMALL)
        CHECK_EQ(madvise(at(scene, 0), c->size, MADV_NOHUGEPAGE), 0);
    if (c->advice != ADVICE_NONE && c->advised_size != 0)
        CHECK_EQ(madvise(at(scene, c->advised_start), c->advised_size, MADV_HUGEPAGE), 0);
}

static void make_resident_after_advice(struct scene *scene, const struct combination *c) {
    char *page = at(scene, c->resident_at);
    if (c->resident == RESIDENT_ZERO_HUGE) {
        (void)*(volatile char *)page;
    } else if (c->resident == RESIDENT_PUNCHED) {
        *(volatile char *)page = 1;
        CHECK_EQ(madvise(page, PAGE, MADV_DONTNEED), 0);
    } else if (c->resident == RESIDENT_HUGE) {
        *(volatile char *)page = 1;
        CHECK_EQ(madvise(at(scene, 0), c->size, MADV_NOHUGEPAGE), 0);
    }
}

static void set_attribute(const struct vm *vm, uint64_t gpa, uint64_t size, uint64_t attribute) {
    struct kvm_memory_attributes attributes = {.address = gpa, .size = size, .attributes = attribute};
    CHECK_EQ(ioctl(vm->fd, KVM_SET_MEMORY_ATTRIBUTES, &attributes), 0);
}

static void make_private(struct scene *scene, const struct combination *c) {
    set_attribute(&scene->vm, scene->slot.gpa, c->size, 0);
    for (unsigned i = 0; i < c->n_private; i++) {
        scene->private_memory[i].gpa = scene->slot.gpa + c->private_memory[i].gpa;
        scene->private_memory[i].size = c->private_memory[i].size;
        set_attribute(&scene->vm, scene->private_memory[i].gpa, scene->private_memory[i].size,
                      KVM_MEMORY_ATTRIBUTE_PRIVATE);
    }
    scene->n_private = c->n_private;
}

struct scene scene_make(const struct combination *c) {
    struct scene scene = {.idle_gmem = -1};
    CHECK(policy_set(c->policy));
    scene.vm = vm_make_for(c->kind);
    scene.vcpu = vcpu_make(&scene.vm, 0);
    scene.has_pre_fault = has_pre_fault(&scene.vm);
    make_memory(&scene, c);
    describe_slot(&scene, c);
    if (c->is_trimmed)
        trim(&scene, c);
    make_resident_before_advice(&scene, c);
    advise(&scene, c);
    make_resident_after_advice(&scene, c);
    if (c->hole_size != 0)
        CHECK_EQ(munmap(at(&scene, c->hole_at), c->hole_size), 0);
    CHECK_EQ(slot_set(&scene.vm, &scene.slot), 0);
    if (scene.vm.is_private)
        make_private(&scene, c);
    scene.range.gpa = scene.slot.gpa + c->range_start;
    scene.range.size = c->range_size;
    return scene;
}

void scene_end(struct scene *scene) {
    vcpu_end(&scene->vm, &scene->vcpu);
    memory_end(&scene->memory);
    if (scene->idle_gmem >= 0)
        close(scene->idle_gmem);
    vm_end(&scene->vm);
}

struct kvmprep_memslot_report scene_predict(const struct scene *scene) {
    struct kvmprep_error err;
    struct kvmprep_caps caps;
    struct kvmprep_memslot_report report;
    const struct kvmprep_range *private_memory = scene->vm.is_private ? scene->private_memory : NULL;
    CHECK_OK(kvmprep_probe(scene->vm.kvm, scene->vm.fd, &caps, sizeof(caps), &err), err);
    caps.vm_type = scene->vm.is_private ? KVM_X86_SW_PROTECTED_VM : 0;
    CHECK_OK(kvmprep_memslot_predict(&caps, sizeof(caps), &scene->slot, &scene->range, private_memory,
                                     scene->n_private, &report, sizeof(report), &err),
             err);
    return report;
}

/* ---- Populating and counting it ---- */

static bool parameter_is_on(const char *path) {
    FILE *file = fopen(path, "r");
    int first = file == NULL ? 0 : fgetc(file);
    if (file != NULL)
        fclose(file);
    return first == 'Y' || first == '1';
}

bool scene_has_nested_paging(void) {
    return kvm_is_modelled() || parameter_is_on("/sys/module/kvm_amd/parameters/npt") ||
           parameter_is_on("/sys/module/kvm_intel/parameters/ept");
}

struct kvmprep_page_counts scene_counts(const struct scene *scene) {
    struct kvmprep_page_counts counts = {.pages_4k = stat_of(scene->vm.fd, "pages_4k"),
                                         .pages_2m = stat_of(scene->vm.fd, "pages_2m"),
                                         .pages_1g = stat_of(scene->vm.fd, "pages_1g")};
    return counts;
}

static void populate_host(struct scene *scene, uint64_t start, uint64_t end) {
    while (madvise(at(scene, start), end - start, MADV_POPULATE_WRITE) != 0)
        if (errno != EINTR && errno != EAGAIN)
            check_failed(__FILE__, __LINE__, "MADV_POPULATE_WRITE: %s", strerror(errno));
}

static void populate_stage2(struct scene *scene, uint64_t start, uint64_t end) {
    uint64_t gpa = scene->slot.gpa + start, size = end - start;
    if (!scene->has_pre_fault) {
        CHECK_EQ(guest_touch(&scene->vcpu, TOUCH_READ, gpa, size), 0);
        return;
    }
    while (size > 0) {
        int result = raw_pre_fault(scene->vcpu.fd, &gpa, &size);
        if (result != 0 && result != -EINTR && result != -EAGAIN)
            check_failed(__FILE__, __LINE__, "KVM_PRE_FAULT_MEMORY at %#" PRIx64 ": %s", gpa,
                         strerror(-result));
    }
}

static void populate_part(struct scene *scene, uint64_t start, uint64_t end) {
    if (start >= end)
        return;
    populate_host(scene, start, end);
    populate_stage2(scene, start, end);
}

static uint64_t smaller(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

static uint64_t larger(uint64_t a, uint64_t b) {
    return a < b ? b : a;
}

struct kvmprep_page_counts scene_populate(struct scene *scene, const struct combination *c) {
    uint64_t start = c->range_start, end = start + c->range_size;
    if (!scene->has_pre_fault) /* the guest's own code is mapped by running it, and is not to be counted */
        CHECK_EQ(guest_touch(&scene->vcpu, TOUCH_READ, 0, PAGE), 0);
    struct kvmprep_page_counts before = scene_counts(scene);
    if (c->hole_size == 0) {
        populate_part(scene, start, end);
    } else {
        populate_part(scene, start, smaller(end, c->hole_at));
        populate_part(scene, larger(start, c->hole_at + c->hole_size), end);
    }
    struct kvmprep_page_counts after = scene_counts(scene);
    after.pages_4k -= before.pages_4k;
    after.pages_2m -= before.pages_2m;
    after.pages_1g -= before.pages_1g;
    return after;
}
