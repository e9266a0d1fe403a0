// SPDX-License-Identifier: MIT OR Apache-2.0
// kvmprep from C++: handles that free themselves, errors that are exceptions. To be copied and grown.
#pragma once
#include <kvmprep.h>
#include <memory>
#include <string>
#include <system_error>

namespace kvmprep {

struct error : std::system_error {
    explicit error(const kvmprep_error &e)
        : system_error(-e.code, std::generic_category(), std::string(e.message) + "; " + e.hint), details(e) {
    }
    kvmprep_error details;
};

// Calls a function of the library, with all arguments but the last.
template <class Function, class... Arguments> int call(Function function, Arguments... arguments) {
    kvmprep_error err;
    int result = function(arguments..., &err);
    return result < 0 ? throw error(err) : result;
}

struct deleter {
    void operator()(kvmprep_vm *vm) const noexcept {
        kvmprep_vm_free(vm);
    }
    void operator()(kvmprep_job *job) const noexcept {
        kvmprep_job_free(job);
    }
};
using vm = std::unique_ptr<kvmprep_vm, deleter>;
using job = std::unique_ptr<kvmprep_job, deleter>; // to be gone before its vm

// What `make`, such as kvmprep_vm_new, returns in its last parameter but one.
template <class Handle, class Make, class... Arguments> Handle made(Make make, Arguments... arguments) {
    typename Handle::pointer handle = nullptr;
    call(make, arguments..., &handle);
    return Handle(handle);
}

} // namespace kvmprep
