/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The library loaded at run time, as a VMM does that can do without it: by soname, its functions by name and
 * by version. Loaded, used, closed, and all of that again.
 *
 * usage: loaded PATH, of the shared library
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <kvmprep.h>
#include "guest.h"

/* What the program uses of the library. */
struct functions {
    __typeof__(&kvmprep_version) version;
    __typeof__(&kvmprep_vm_new) vm_new;
    __typeof__(&kvmprep_vm_free) vm_free;
    __typeof__(&kvmprep_memslot_note) memslot_note;
    __typeof__(&kvmprep_populate) populate;
};

/* ISO C knows no way from an object pointer to a function's; POSIX says that their bits are the same. */
static void look_up(void *library, const char *name, void *function) {
    void *address = dlvsym(library, name, "KVMPREP_0.1");
    REQUIRE(address != NULL && address == dlsym(library, name));
    REQUIRE(dlvsym(library, name, "KVMPREP_0.0") == NULL);
    memcpy(function, &address, sizeof(address));
}

static struct functions functions_of(void *library) {
    struct functions found;
    look_up(library, "kvmprep_version", &found.version);
    look_up(library, "kvmprep_vm_new", &found.vm_new);
    look_up(library, "kvmprep_vm_free", &found.vm_free);
    look_up(library, "kvmprep_memslot_note", &found.memslot_note);
    look_up(library, "kvmprep_populate", &found.populate);
    return found;
}

static void use(const struct functions *prep, const struct guest *guest) {
    struct kvmprep_error err;
    struct kvmprep_vm *vm;
    struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
    struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
    struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;

    config.vm_fd = guest->vm;
    slot.hva = (uintptr_t)guest->ram;
    slot.size = RAM_SIZE;
    opts.host_threads = 1; /* a thread of the library's, which must not outlive its code */
    REQUIRE(prep->vm_new(&config, &vm, &err) == 0);
    REQUIRE(prep->memslot_note(vm, &slot, &err) == 0);
    REQUIRE(prep->populate(vm, NULL, 0, &opts, NULL, 0, &err) == 0);
    REQUIRE(prep->vm_free(vm) == 0);
    REQUIRE(guest_resident(guest) == RAM_SIZE);
}

static void load_use_and_close(const char *path) {
    struct guest guest;
    struct functions prep;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        fprintf(stderr, "%s\n", dlerror());
    REQUIRE(library != NULL);
    prep = functions_of(library);
    REQUIRE(prep.version() == KVMPREP_VERSION);
    guest = guest_make();
    use(&prep, &guest);
    REQUIRE(dlclose(library) == 0);
    /* It stays mapped, and known. */
    library = dlopen("libkvmprep.so.0", RTLD_NOW | RTLD_NOLOAD);
    REQUIRE(library != NULL && dlclose(library) == 0);
    REQUIRE(prep.version() == KVMPREP_VERSION);
}

int main(int argc, char **argv) {
    REQUIRE(argc == 2);
    load_use_and_close(argv[1]);
    load_use_and_close(argv[1]);
    return EXIT_SUCCESS;
}
