# Makes kvmprep.o: all of the library in one relocatable object, in which the interface's functions are the only
# global symbols. Both libraries are made of it.
#
# Cargo leaves an archive with the whole Rust runtime in it, all global: linked beside another Rust library, runtime
# would clash with runtime. So the archive is linked into one object, and what is no interface is made local. The
# unwinder's tables are part of the object and panics are caught as before.

set(cargo_archive "${cargo_artifact_dir}/libkvmprep.a")
kvmprep_add_cargo(kvmprep_cargo kvmprep staticlib libkvmprep.a)

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
