/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A guest's memory set up, prepared and used where there is no KVM: on the preloaded model, with the program
 * as it would be on a real one. What only the model can do, running a guest's accesses, is asked of it by its
 * header; without the model the program says so and ends as skipped.
 *
 * usage: without_kvm MIB, of the guest's memory that this kernel maps before the guest runs
 */
#include "populate.h"
#include <kvmprep-model.h>
#include <unistd.h>

#define WORD 0x1000u /* what the guest writes to its first page; one more to each further */

/* How much of the guest's memory KVM has mapped for it, in bytes. */
static uint64_t mapped(const struct guest *guest) {
    struct kvmprep_model_counts counts;
    REQUIRE(kvmprep_model_get_counts(guest->vm, &counts, sizeof(counts)) == 0);
    return (counts.pages_4k << 12) + (counts.pages_2m << 21) + (counts.pages_1g << 30);
}

/* The guest writes a word to each of its pages, and halts. */
static void run(const struct guest *guest) {
    struct kvmprep_model_step steps[2] = {KVMPREP_MODEL_STEP_INIT, KVMPREP_MODEL_STEP_INIT};
    struct kvm_run *vcpu = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, guest->vcpu, 0);
    REQUIRE(vcpu != MAP_FAILED);
    steps[0].kind = KVMPREP_MODEL_WRITE;
    steps[0].count = RAM_SIZE / PAGE_SIZE;
    steps[0].stride = PAGE_SIZE;
    steps[0].value = WORD;
    steps[0].value_stride = 1;
    steps[1].kind = KVMPREP_MODEL_HALT;
    REQUIRE(kvmprep_model_set_steps(guest->vcpu, steps, 2) == 0);
    REQUIRE(ioctl(guest->vcpu, KVM_RUN, 0) == 0);
    REQUIRE(vcpu->exit_reason == KVM_EXIT_HLT);
}

/* KVM refuses a second slot over the first one, by any name. */
static void overlap(const struct guest *guest) {
    struct kvm_userspace_memory_region region = {
        .slot = 1,
        .guest_phys_addr = RAM_SIZE / 2,
        .memory_size = RAM_SIZE,
        .userspace_addr = (uintptr_t)guest->ram,
    };
    REQUIRE(ioctl(guest->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0 && errno == EEXIST);
}

int main(int argc, char **argv) {
    struct guest guest;
    char why[256];
    REQUIRE(argc == 2);
    if (!kvmprep_model_is_here()) {
        printf("skipped: the model is not preloaded\n");
        return SKIPPED;
    }
    guest = guest_make();
    populate(&guest);
    REQUIRE(mapped(&guest) == strtoull(argv[1], NULL, 10) << 20);
    run(&guest);
    REQUIRE(mapped(&guest) == RAM_SIZE);
    for (size_t page = 0; page < RAM_SIZE / PAGE_SIZE; page++)
        REQUIRE(*(uint32_t *)((char *)guest.ram + page * PAGE_SIZE) == WORD + page);
    overlap(&guest);
    if (kvmprep_model_check(guest.vm, why, sizeof(why)) != 0) {
        fprintf(stderr, "%s\n", why);
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
