# Makes kvmprep.o: all of the library in one relocatable object, in which the interface's functions are the only
# global symbols. Both libraries are made of it.
#
# Cargo leaves an archive with the whole Rust runtime in it, all global: linked beside another Rust library, runtime
# would clash with runtime. So the archive is linked into one object, and what is no interface is made local. The
# unwinder's tables are part of the object and panics are caught as before.

# --- cargo ---

if(NOT KVMPREP_CARGO AND DEFINED ENV{CARGO})
    set(KVMPREP_CARGO "$ENV{CARGO}" CACHE FILEPATH "cargo, 1.85 or newer")
endif()
find_program(KVMPREP_CARGO cargo HINTS "$ENV{CARGO_HOME}/bin" "$ENV{HOME}/.cargo/bin"
    DOC "cargo, 1.85 or newer")
if(NOT KVMPREP_CARGO)
    message(FATAL_ERROR "cargo was not found: install Rust 1.85 or newer, or name it with -DKVMPREP_CARGO=")
endif()
set(KVMPREP_CARGO_FLAGS "" CACHE STRING
    "Further options for cargo, such as --offline, as a shell takes them or as a list")
string(REPLACE ";" " " cargo_flags "${KVMPREP_CARGO_FLAGS}")
separate_arguments(cargo_flags UNIX_COMMAND "${cargo_flags}")
# It is always given, and cargo takes it once.
list(REMOVE_ITEM cargo_flags --locked)

execute_process(COMMAND ${KVMPREP_CARGO} -vV OUTPUT_VARIABLE cargo_says RESULT_VARIABLE cargo_failed)
if(cargo_failed OR NOT cargo_says MATCHES "host: ([^\n]+)")
    message(FATAL_ERROR "${KVMPREP_CARGO} -vV does not say what it builds for: ${cargo_failed} ${cargo_says}")
endif()
set(cargo_host "${CMAKE_MATCH_1}")

# Rust's name for what the C compiler builds for. It is guessed only where it cannot be guessed wrong.
set(KVMPREP_RUST_TARGET "" CACHE STRING "Rust's target triple; empty: this machine")
if(KVMPREP_RUST_TARGET)
    set(rust_target "${KVMPREP_RUST_TARGET}")
elseif(CMAKE_CROSSCOMPILING)
    message(FATAL_ERROR "Cross-compiling: name the target as Rust does, such as "
        "-DKVMPREP_RUST_TARGET=${CMAKE_SYSTEM_PROCESSOR}-unknown-linux-gnu")
else()
    set(rust_target "${cargo_host}")
endif()

# A list of configurations is known only when a build starts: there the library is always the release.
if(CMAKE_BUILD_TYPE STREQUAL "Debug")
    set(cargo_profile dev)
    set(cargo_directory debug)
else()
    set(cargo_profile release)
    set(cargo_directory release)
endif()

set(cargo_target_dir "${CMAKE_CURRENT_BINARY_DIR}/cargo")
set(cargo_archive "${cargo_target_dir}/${rust_target}/${cargo_directory}/libkvmprep.a")

# Cargo is asked each time: it alone knows what has changed, and leaves the archive alone when nothing has.
add_custom_target(kvmprep_cargo
    COMMAND ${KVMPREP_CARGO} rustc --package kvmprep --lib --crate-type staticlib --locked
        --profile ${cargo_profile} --target ${rust_target} --target-dir ${cargo_target_dir} ${cargo_flags}
    WORKING_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}
    BYPRODUCTS ${cargo_archive}
    COMMENT "Building kvmprep with cargo"
    USES_TERMINAL VERBATIM)

# --- the object ---

# The interface is what the version script lists.
file(STRINGS abi/kvmprep.map interface REGEX "^ +kvmprep_[a-z0-9_]+;$")
list(TRANSFORM interface REPLACE "^ +([a-z0-9_]+);$" "\\1")
if(NOT interface)
    message(FATAL_ERROR "abi/kvmprep.map lists no function")
endif()
string(REPLACE ";" "\n" interface_lines "${interface}")
file(CONFIGURE OUTPUT interface.txt CONTENT "${interface_lines}\n" @ONLY)
list(TRANSFORM interface PREPEND "-Wl,--require-defined=" OUTPUT_VARIABLE required)

if(CMAKE_C_COMPILER_TARGET)
    set(compiler_target "--target=${CMAKE_C_COMPILER_TARGET}")
endif()

set(KVMPREP_OBJECT "${CMAKE_CURRENT_BINARY_DIR}/kvmprep.o")
set(merged "${CMAKE_CURRENT_BINARY_DIR}/merged.o")
# GNU ld whatever the others are linked with, since its -r dissolves COMDAT groups: their names would still meet those of
# another Rust library. Nothing unused is dropped yet: GNU ld then leaves the names that it referred to, and the weak
# ones among them no longer weak. The sections that go are LLVM's bitcode, which makes no sense once it is merged.
add_custom_command(OUTPUT ${KVMPREP_OBJECT}
    COMMAND ${CMAKE_C_COMPILER} ${compiler_target} -fuse-ld=bfd -r -nostdlib -Wl,--force-group-allocation
        ${required} -o ${merged} ${cargo_archive}
    COMMAND ${CMAKE_OBJCOPY} --remove-section=.llvmbc --remove-section=.llvmcmd
        --keep-global-symbols=${CMAKE_CURRENT_BINARY_DIR}/interface.txt ${merged} ${KVMPREP_OBJECT}
    COMMAND ${CMAKE_COMMAND} -E rm ${merged}
    DEPENDS kvmprep_cargo ${cargo_archive} ${CMAKE_CURRENT_BINARY_DIR}/interface.txt
    COMMENT "Making all but the interface local"
    VERBATIM)
# One rule for two libraries: made once, before either.
add_custom_target(kvmprep_object DEPENDS ${KVMPREP_OBJECT})
set_source_files_properties(${KVMPREP_OBJECT} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
