# The two libraries as ordinary CMake targets: kvmprep::kvmprep, shared, and kvmprep::static.

add_library(kvmprep SHARED ${KVMPREP_OBJECT})
add_library(kvmprep_static STATIC ${KVMPREP_OBJECT})
add_library(kvmprep::kvmprep ALIAS kvmprep)
add_library(kvmprep::static ALIAS kvmprep_static)

foreach(library kvmprep kvmprep_static)
    add_dependencies(${library} kvmprep_object)
    set_target_properties(${library} PROPERTIES OUTPUT_NAME kvmprep LINKER_LANGUAGE C)
    target_include_directories(${library} INTERFACE
        $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/include>)
endforeach()

set(version_script "${CMAKE_CURRENT_SOURCE_DIR}/abi/kvmprep.map")
set_target_properties(kvmprep PROPERTIES
    VERSION ${PROJECT_VERSION} SOVERSION ${KVMPREP_SOVERSION} LINK_DEPENDS ${version_script})
set_target_properties(kvmprep_static PROPERTIES EXPORT_NAME static)

# nodelete: a thread's exit may still run code of the Rust runtime's, so dlclose() must not unmap the library.
target_link_options(kvmprep PRIVATE
    "LINKER:--version-script=${version_script}" LINKER:--no-undefined-version
    LINKER:-z,nodelete LINKER:-z,relro LINKER:-z,now LINKER:-z,defs
    LINKER:--gc-sections LINKER:--as-needed)

# Parts of libc before glibc 2.34, empty since. The unwinder comes with every C compiler's own libraries.
set(KVMPREP_LINK_LIBRARIES pthread dl)
target_link_libraries(kvmprep PRIVATE ${KVMPREP_LINK_LIBRARIES})
target_link_libraries(kvmprep_static INTERFACE ${KVMPREP_LINK_LIBRARIES})
