/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See confidential.h. */
#define _GNU_SOURCE
#define KVMPREP_EXPERIMENTAL
#include "confidential.h"
#include "check.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm_para.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- KVM's commands. Their names are the kernel's without KVM_, since only newer headers have these. ----
 */

enum { TDX_CAPABILITIES, TDX_INIT_VM, TDX_INIT_VCPU, TDX_INIT_MEM_REGION, TDX_FINALIZE_VM, TDX_GET_CPUID };
enum { SEV_INIT2 = 22, SEV_SNP_LAUNCH_START = 100, SEV_SNP_LAUNCH_UPDATE, SEV_SNP_LAUNCH_FINISH };

struct tdx_cmd {
    __u32 id, flags;
    __u64 data, hw_error;
};
struct tdx_capabilities {
    __u64 attributes, xfam, kernel_r11, user_r11, kernel_r12, user_r12, reserved[250];
    struct kvm_cpuid2 cpuid;
};
struct tdx_init_vm {
    __u64 attributes, xfam, mrconfigid[6], mrowner[6], mrownerconfig[6], reserved[12];
    struct kvm_cpuid2 cpuid;
    struct kvm_cpuid_entry2 entries[1];
};
struct tdx_init_mem_region {
    __u64 source_addr, gpa, nr_pages;
};
struct sev_cmd {
    __u32 id, pad0;
    __u64 data;
    __u32 error, sev_fd;
};
struct sev_init {
    __u64 vmsa_features;
    __u32 flags;
    __u16 ghcb_version, pad1;
    __u32 pad2[8];
};
struct sev_snp_launch_start {
    __u64 policy;
    __u8 gosvw[16];
    __u16 flags;
    __u8 pad0[6];
    __u64 pad1[4];
};
struct sev_snp_launch_update {
    __u64 gfn_start, uaddr, len;
    __u8 type, pad0;
    __u16 flags;
    __u32 pad1;
    __u64 pad2[4];
};
struct sev_snp_launch_finish {
    __u64 id_block_uaddr, id_auth_uaddr;
    __u8 id_block_en, auth_key_en, vcek_disabled, host_data[32], pad0[3];
    __u16 flags;
    __u64 pad1[4];
};
_Static_assert(sizeof(struct tdx_capabilities) == 2048 + 8, "the kernel's layout");
_Static_assert(sizeof(struct tdx_init_vm) == 256 + 8 + 40, "the kernel's layout");
_Static_assert(sizeof(struct sev_snp_launch_finish) == 88, "the kernel's layout");

#define TDX_SEPT_VE_DISABLE (1ull << 28)
#define TDX_XFAM 0xe7 /* the state of the x87, of SSE, of AVX and of AVX-512 */
#define TDX_ADDRESS_WIDTHS 0x80000008
#define TDX_ADDRESS_BITS 48u
#define SNP_POLICY (1ull << 16 | 1ull << 17) /* hyperthreading, and a bit that must be one */

static int tdx_command(int fd, uint32_t id, void *data, uint64_t flags) {
    struct tdx_cmd command = {.id = id, .flags = (uint32_t)flags, .data = (uintptr_t)data};
    return ioctl(fd, KVM_MEMORY_ENCRYPT_OP, &command) < 0 ? -errno : 0;
}

static int snp_command(const struct confidential *c, uint32_t id, void *data) {
    struct sev_cmd command = {.id = id, .data = (uintptr_t)data, .sev_fd = (uint32_t)c->sev};
    return ioctl(c->vm.fd, KVM_MEMORY_ENCRYPT_OP, &command) < 0 ? -errno : 0;
}

/* ---- Its making ---- */

/* What a guest can be. For how much room that needs is not told, so it is tried with ever more. To be freed.
 */
static struct tdx_capabilities *tdx_capabilities(int vm_fd) {
    for (__u32 room = 4;; room *= 2) {
        struct tdx_capabilities *caps = calloc(1, sizeof(*caps) + room * sizeof(struct kvm_cpuid_entry2));
        CHECK(caps != NULL);
        caps->cpuid.nent = room;
        int result = tdx_command(vm_fd, TDX_CAPABILITIES, caps, 0);
        if (result == 0)
            return caps;
        CHECK_EQ(result, -E2BIG);
        CHECK(room < 256);
        free(caps);
    }
}

static const struct kvm_cpuid_entry2 *leaf_of(const struct kvm_cpuid2 *cpuid, __u32 function) {
    for (__u32 i = 0; i < cpuid->nent; i++)
        if (cpuid->entries[i].function == function)
            return &cpuid->entries[i];
    check_failed(__FILE__, __LINE__, "there is no leaf %#x", function);
}

/* Asks for no more than can be had. */
static void init_tdx(struct confidential *c) {
    struct tdx_capabilities *caps = tdx_capabilities(c->vm.fd);
    struct tdx_init_vm init = {.attributes = TDX_SEPT_VE_DISABLE, .cpuid = {.nent = 1}};
    CHECK_EQ(init.attributes & ~caps->attributes, 0);
    init.xfam = TDX_XFAM & caps->xfam;
    init.entries[0].function = TDX_ADDRESS_WIDTHS;
    init.entries[0].eax =
        (TDX_ADDRESS_BITS << 16 | TDX_ADDRESS_BITS) & leaf_of(&caps->cpuid, TDX_ADDRESS_WIDTHS)->eax;
    CHECK_EQ(init.entries[0].eax >> 16, TDX_ADDRESS_BITS);
    CHECK_EQ(tdx_command(c->vm.fd, TDX_INIT_VM, &init, 0), 0);
    free(caps);
}

/* The guest has become what was asked for. */
static void check_tdx_cpuid(int vcpu_fd) {
    const __u32 room = 256;
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + room * sizeof(cpuid->entries[0]));
    CHECK(cpuid != NULL);
    CHECK_EQ(tdx_command(vcpu_fd, TDX_GET_CPUID, cpuid, 0), -E2BIG);
    CHECK(cpuid->nent > 0 && cpuid->nent <= room);
    CHECK_EQ(tdx_command(vcpu_fd, TDX_GET_CPUID, cpuid, 0), 0);
    CHECK_EQ(leaf_of(cpuid, TDX_ADDRESS_WIDTHS)->eax >> 16 & 0xff, TDX_ADDRESS_BITS);
    free(cpuid);
}

static void init_snp(struct confidential *c) {
    struct sev_init init = {.ghcb_version = 2};
    c->sev = open("/dev/sev", O_RDWR | O_CLOEXEC);
    CHECK(c->sev >= 0);
    CHECK_EQ(snp_command(c, SEV_INIT2, &init), 0);
}

static void make_vcpu(struct confidential *c, int id) {
    struct vcpu *vcpu = &c->vcpus[id];
    vcpu->fd = ioctl(c->vm.fd, KVM_CREATE_VCPU, id);
    CHECK(vcpu->fd >= 0);
    vcpu->run = mmap(NULL, c->vm.run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    CHECK(vcpu->run != MAP_FAILED);
    if (c->type == TDX) {
        check_tdx_cpuid(vcpu->fd);
        CHECK_EQ(tdx_command(vcpu->fd, TDX_INIT_VCPU, NULL, 0), 0);
    }
}

static void start_launch(struct confidential *c) {
    struct sev_snp_launch_start start = {.policy = SNP_POLICY};
    if (c->type == SNP)
        CHECK_EQ(snp_command(c, SEV_SNP_LAUNCH_START, &start), 0);
}

static void make_memory(struct confidential *c, size_t size) {
    struct kvmprep_range all = {.gpa = MEMORY_GPA, .size = size};
    c->memory = memory_make(&c->vm, ANON_4K, size);
    c->gmem = kvmprep_gmem_create(c->vm.fd, size, 0, &c->err);
    CHECK_OK(c->gmem, c->err);
    c->slot = slot_of(MEMORY_SLOT, MEMORY_GPA, &c->memory);
    c->slot.flags |= KVM_MEM_GUEST_MEMFD;
    c->slot.guest_memfd = c->gmem;
    CHECK_OK(kvmprep_memslot_set(c->handle, &c->slot, &c->err), c->err);
    CHECK_OK(kvmprep_convert(c->handle, &all, KVMPREP_PRIVATE, NULL, &c->err), c->err);
    c->source = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(c->source != MAP_FAILED);
}

struct confidential confidential_make(enum confidential_type type, size_t size) {
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    if (!kvm_is_modelled())
        check_skipped("for the software model, which was not preloaded");
    struct confidential c = {.type = type, .vm = vm_make_of_type(type), .sev = -1};
    struct kvm_enable_cap cap = {.cap = KVM_CAP_EXIT_HYPERCALL, .args = {1 << KVM_HC_MAP_GPA_RANGE}};
    CHECK_EQ(ioctl(c.vm.fd, KVM_ENABLE_CAP, &cap), 0);
    if (type == TDX)
        init_tdx(&c);
    else
        init_snp(&c);
    for (int id = 0; id < CONFIDENTIAL_VCPUS; id++)
        make_vcpu(&c, id);
    start_launch(&c);
    config.vm_fd = c.vm.fd;
    config.vm_type = type;
    config.gpa_shared_bit = type == TDX ? 47 : 0;
    CHECK_OK(kvmprep_vm_new(&config, &c.handle, &c.err), c.err);
    make_memory(&c, size);
    return c;
}

void confidential_end(struct confidential *c) {
    CHECK_EQ(kvmprep_vm_free(c->handle), 0);
    munmap(c->source, c->memory.size);
    memory_end(&c->memory);
    close(c->gmem);
    if (c->sev >= 0)
        close(c->sev);
    for (int id = 0; id < CONFIDENTIAL_VCPUS; id++)
        vcpu_end(&c->vm, &c->vcpus[id]);
    vm_end(&c->vm);
}

void confidential_fail(const char *what) {
    if (kvmprep_model_fail(what) != 0)
        check_failed(__FILE__, __LINE__, "the model does not take '%s'", what);
}

struct kvmprep_range pages_of(uint64_t first, uint64_t n) {
    return (struct kvmprep_range){.gpa = MEMORY_GPA + first * PAGE, .size = n * PAGE};
}

/* ---- The initial image ---- */

static unsigned char *source_of(struct confidential *c, uint64_t gpa) {
    return c->source + (gpa - MEMORY_GPA);
}

void fill_source(struct confidential *c, struct kvmprep_range range, uint64_t tag) {
    for (uint64_t gpa = range.gpa; gpa < range.gpa + range.size; gpa += PAGE) {
        uint64_t word = word_of_page(gpa, tag);
        memcpy(source_of(c, gpa), &word, sizeof(word));
    }
}

int confidential_add(struct confidential *c, struct kvmprep_range range, enum image how,
                     struct kvmprep_range *rest) {
    void *source = source_of(c, range.gpa);
    if (c->type == TDX)
        return kvmprep_tdx_init_mem_region(c->handle, c->vcpus[0].fd, &range, source,
                                           how == MEASURED ? KVMPREP_TDX_MEASURE : 0, rest, &c->err);
    return kvmprep_snp_launch_update(c->handle, c->sev, &range, source,
                                     how == MEASURED ? KVMPREP_SNP_PAGE_NORMAL : KVMPREP_SNP_PAGE_UNMEASURED,
                                     rest, &c->err);
}

int confidential_add_raw(struct confidential *c, uint64_t page) {
    const uint64_t gpa = MEMORY_GPA + page * PAGE, source = (uintptr_t)source_of(c, gpa);
    struct tdx_init_mem_region region = {.source_addr = source, .gpa = gpa, .nr_pages = 1};
    struct sev_snp_launch_update update = {
        .gfn_start = gpa / PAGE, .uaddr = source, .len = PAGE, .type = KVMPREP_SNP_PAGE_NORMAL};
    if (c->type == TDX)
        return tdx_command(c->vcpus[0].fd, TDX_INIT_MEM_REGION, &region, KVMPREP_TDX_MEASURE);
    return snp_command(c, SEV_SNP_LAUNCH_UPDATE, &update);
}

int confidential_seal(struct confidential *c) {
    struct sev_snp_launch_finish finish = {.flags = 0};
    int result = c->type == TDX ? tdx_command(c->vm.fd, TDX_FINALIZE_VM, NULL, 0)
                                : snp_command(c, SEV_SNP_LAUNCH_FINISH, &finish);
    if (result == 0)
        CHECK_OK(kvmprep_private_note_sealed(c->handle, &c->err), c->err);
    return result;
}

void confidential_measure(const struct confidential *c, unsigned char digest[DIGEST_SIZE]) {
    CHECK_EQ(kvmprep_model_measurement(c->vm.fd, digest, DIGEST_SIZE), DIGEST_SIZE);
}

/* ---- The guest ---- */

#define DONE_PORT 0x20

/* What the guest exits with is answered; false: it cannot go on. */
static bool is_answered(struct confidential *c, struct kvm_run *run, int vcpu) {
    struct kvmprep_convert_opts opts = KVMPREP_CONVERT_OPTS_INIT;
    opts.steps |= KVMPREP_CONVERT_PREFAULT;
    opts.vcpu_fd = c->vcpus[vcpu].fd;
    if (run->exit_reason == KVM_EXIT_HYPERCALL) {
        uint64_t args[3];
        memcpy(args, run->hypercall.args, sizeof(args));
        kvmprep_handle_map_gpa_range(c->handle, args, &opts, &c->answer, &c->err);
        run->hypercall.ret = c->answer;
        c->hypercalls++;
        return true;
    }
    struct memory_fault_exit fault = memory_fault_of(run);
    c->memory_faults++;
    return kvmprep_handle_memory_fault(c->handle, fault.gpa, fault.size, fault.flags, &opts, &c->err) == 0;
}

static int run_to_end(struct confidential *c, int vcpu) {
    struct kvm_run *run = c->vcpus[vcpu].run;
    for (;;) {
        int result = ioctl(c->vcpus[vcpu].fd, KVM_RUN, 0) < 0 ? -errno : 0;
        bool is_fault = result == -EFAULT && run->exit_reason == KVM_EXIT_MEMORY_FAULT;
        if (result == 0 && run->exit_reason == KVM_EXIT_IO)
            return run->io.port == DONE_PORT ? 0 : -EPROTO;
        if (!is_fault && !(result == 0 && run->exit_reason == KVM_EXIT_HYPERCALL))
            return result != 0 ? result : -EPROTO;
        if (!is_answered(c, run, vcpu))
            return c->err.code;
    }
}

int confidential_run(struct confidential *c, int vcpu, const struct kvmprep_model_step *steps, size_t n) {
    struct kvmprep_model_step *all = calloc(n + 1, sizeof(*all));
    if (all == NULL)
        return -ENOMEM;
    memcpy(all, steps, n * sizeof(*all));
    all[n] = (struct kvmprep_model_step){.kind = KVMPREP_MODEL_OUT, .port = DONE_PORT, .width = 1};
    int result = kvmprep_model_set_steps(c->vcpus[vcpu].fd, all, n + 1);
    free(all);
    return result != 0 ? result : run_to_end(c, vcpu);
}

struct kvmprep_model_step step_of(uint32_t kind, struct kvmprep_range range, uint32_t visibility) {
    struct kvmprep_model_step step = {.kind = kind, .gpa = range.gpa, .width = 8};
    step.flags = visibility == KVMPREP_PRIVATE ? KVMPREP_MODEL_STEP_PRIVATE : 0;
    step.count = range.size / PAGE;
    step.stride = PAGE;
    return step;
}

void guest_accepts(struct confidential *c, struct kvmprep_range range) {
    struct kvmprep_model_step step = step_of(KVMPREP_MODEL_ACCEPT, range, KVMPREP_PRIVATE);
    CHECK_EQ(confidential_run(c, 0, &step, 1), 0);
}

void guest_writes_words(struct confidential *c, struct kvmprep_range range, uint32_t visibility,
                        uint64_t tag) {
    struct kvmprep_model_step step = step_of(KVMPREP_MODEL_WRITE, range, visibility);
    step.value = word_of_page(range.gpa, tag);
    step.value_stride = PAGE;
    CHECK_EQ(confidential_run(c, 0, &step, 1), 0);
}

void check_guest_reads(struct confidential *c, struct kvmprep_range range, uint32_t visibility,
                       uint64_t tag) {
    struct kvmprep_model_step step = step_of(KVMPREP_MODEL_READ, range, visibility);
    step.values = malloc(step.count * sizeof(*step.values));
    CHECK(step.values != NULL);
    memset(step.values, 0xff, step.count * sizeof(*step.values));
    CHECK_EQ(confidential_run(c, 0, &step, 1), 0);
    for (uint64_t i = 0; i < step.count; i++)
        CHECK_EQ(step.values[i], tag == 0 ? 0 : word_of_page(range.gpa + i * PAGE, tag));
    free(step.values);
}

uint64_t guest_asks_for(struct confidential *c, struct kvmprep_range range, uint32_t visibility) {
    struct kvmprep_model_step step = {.kind = KVMPREP_MODEL_HYPERCALL, .value = KVM_HC_MAP_GPA_RANGE};
    step.args[0] = range.gpa;
    step.args[1] = range.size / PAGE;
    step.args[2] = visibility == KVMPREP_PRIVATE ? 1u << 4 : 0;
    CHECK_EQ(confidential_run(c, 0, &step, 1), 0);
    return c->answer;
}

uint64_t faults_taken(const struct confidential *c) {
    uint64_t faults = 0;
    for (int id = 0; id < CONFIDENTIAL_VCPUS; id++)
        faults += stat_of(c->vcpus[id].fd, "pf_taken");
    return faults;
}
