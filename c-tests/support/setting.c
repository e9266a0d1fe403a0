/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* See setting.h. */
#include "setting.h"
#include "check.h"

struct setting setting_make(enum kind kind, size_t size) {
    struct setting s = {.vm = vm_make_for(kind)};
    s.has_pre_fault = has_pre_fault(&s.vm);
    for (unsigned id = 0; id < MOST_VCPUS; id++)
        s.vcpus[id] = vcpu_make(&s.vm, id);
    s.memory = memory_make(&s.vm, kind, size);
    s.slot = slot_of(MEMORY_SLOT, MEMORY_GPA, &s.memory);
    CHECK_EQ(slot_set(&s.vm, &s.slot), 0);

    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    config.vm_fd = s.vm.fd;
    CHECK_OK(kvmprep_vm_new(&config, &s.handle, &s.err), s.err);
    CHECK_OK(kvmprep_memslot_note(s.handle, &s.slot, &s.err), s.err);
    return s;
}

struct setting setting_make_with_stage2(enum kind kind, size_t size) {
    struct setting s = setting_make(kind, size);
    if (!s.has_pre_fault)
        check_skipped("no KVM_PRE_FAULT_MEMORY: needs Linux 6.11 with nested paging");
    return s;
}

void setting_end(struct setting *s) {
    CHECK_EQ(kvmprep_vm_free(s->handle), 0);
    memory_end(&s->memory);
    for (unsigned id = 0; id < MOST_VCPUS; id++)
        vcpu_end(&s->vm, &s->vcpus[id]);
    vm_end(&s->vm);
}

uint64_t faults_beyond_code(struct setting *s) {
    uint64_t faults = faults_of_touch(&s->vcpus[0], TOUCH_WRITE, MEMORY_GPA, s->memory.size);
    CHECK(faults > 0);
    return faults - 1;
}

void check_all_is_done(struct setting *s, const struct kvmprep_populate_result *result) {
    CHECK_EQ(result->bytes, s->memory.size);
    CHECK_EQ(result->remaining, 0);
    CHECK_EQ(result->n_remaining, 0);
    CHECK_EQ(result->stage2_state, s->has_pre_fault ? KVMPREP_STAGE2_DONE : KVMPREP_STAGE2_UNAVAILABLE);
    check_writes_do_not_fault(s, MEMORY_GPA, s->memory.size);
}

void check_writes_do_not_fault(struct setting *s, uint64_t gpa, uint64_t size) {
    /* Where stage 2 cannot be filled the guest faults on each page, and there is nothing to compare with. */
    if (!s->has_pre_fault)
        return;
    uint64_t faults = faults_of_touch(&s->vcpus[0], TOUCH_WRITE, gpa, size);
    if (faults > 1)
        check_failed(__FILE__, __LINE__, "the guest took %llu faults in [%#llx, %#llx)",
                     (unsigned long long)faults, (unsigned long long)gpa, (unsigned long long)(gpa + size));
}
