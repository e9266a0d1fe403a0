/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The README's example. It is compiled by `cargo xtask test`, which also sees to it that the README shows it.
 */
#include <kvmprep.h>
#include <stdio.h>

/* Called with all slots set and all vCPUs made, before they run. vcpu_fd is this thread's. */
int prepare_guest(int vm_fd, int vcpu_fd, void *ram, uint64_t ram_size) {
    struct kvmprep_error err;
    struct kvmprep_vm *vm;
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    struct kvmprep_populate_result result;

    config.vm_fd = vm_fd;
    if (kvmprep_vm_new(&config, &vm, &err) < 0)
        goto failed;
    slot.hva = (uintptr_t)ram; /* slot 0 at guest address 0 */
    slot.size = ram_size;
    if (kvmprep_memslot_note(vm, &slot, &err) < 0)
        goto failed_with_vm;
    opts.vcpu_fd = vcpu_fd;
    if (kvmprep_populate(vm, NULL, 0, &opts, &result, sizeof(result), &err) < 0)
        goto failed_with_vm;
    printf("%llu MiB ready, stage 2 %s\n", (unsigned long long)result.host >> 20,
           result.stage2_state == KVMPREP_STAGE2_DONE ? "too" : "not");
    return kvmprep_vm_free(vm);

failed_with_vm:
    kvmprep_vm_free(vm);
failed:
    fprintf(stderr, "%s%s%s\n", err.message, err.hint[0] ? "; " : "", err.hint);
    return err.code;
}
