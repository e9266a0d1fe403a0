// SPDX-License-Identifier: MIT OR Apache-2.0
// A job in C++, with the wrapper of kvmprep.hpp: made, worked on by this thread and one of the library's,
// waited for.
#include "kvmprep.hpp"
#include "guest.h"

static void populate(const guest &guest) {
    kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    config.vm_fd = guest.vm;
    auto vm = kvmprep::made<kvmprep::vm>(kvmprep_vm_new, &config);

    kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    slot.hva = reinterpret_cast<uintptr_t>(guest.ram);
    slot.size = RAM_SIZE;
    kvmprep::call(kvmprep_memslot_set, vm.get(), &slot);

    kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
    auto job = kvmprep::made<kvmprep::job>(kvmprep_job_new, vm.get(), nullptr, 0, &opts);
    kvmprep::call(kvmprep_job_spawn, job.get(), nullptr, 0, 1);
    kvmprep::call(kvmprep_job_run, job.get(), guest.vcpu);
    kvmprep::call(kvmprep_job_wait, job.get(), -1, nullptr, 0);
    REQUIRE(guest_resident(&guest) == RAM_SIZE);
}

// An error of the library arrives with its errno and its reason.
static void refuse() {
    try {
        kvmprep::call(kvmprep_keep_mappings, -1);
    } catch (const kvmprep::error &error) {
        REQUIRE(error.code() == std::errc::bad_file_descriptor);
        REQUIRE(error.details.reason == KVMPREP_REASON_BAD_FD);
        return;
    }
    REQUIRE(!"an exception came");
}

int main() {
    refuse();
    populate(guest_make());
    return EXIT_SUCCESS;
}
