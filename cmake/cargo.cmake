# Finds cargo, and says how everything here is built with it: for which target, in which profile, with which options.
#
# Cargo is asked each time that something is built: it alone knows what has changed, and leaves alone what has not.

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

# A list of configurations is known only when a build starts: there what cargo makes is always the release.
if(CMAKE_BUILD_TYPE STREQUAL "Debug")
    set(cargo_profile dev)
    set(cargo_profile_dir debug)
else()
    set(cargo_profile release)
    set(cargo_profile_dir release)
endif()

set(cargo_target_dir "${CMAKE_CURRENT_BINARY_DIR}/cargo")
set(cargo_artifact_dir "${cargo_target_dir}/${rust_target}/${cargo_profile_dir}")

# A target that has cargo build the library of a package as a crate type, which makes that file of cargo_artifact_dir.
function(kvmprep_add_cargo target package crate_type file)
    add_custom_target(${target}
        COMMAND ${KVMPREP_CARGO} rustc --package ${package} --lib --crate-type ${crate_type} --locked
            --profile ${cargo_profile} --target ${rust_target} --target-dir ${cargo_target_dir} ${cargo_flags}
        WORKING_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}
        BYPRODUCTS ${cargo_artifact_dir}/${file}
        COMMENT "Building ${package} with cargo"
        USES_TERMINAL VERBATIM)
endfunction()
