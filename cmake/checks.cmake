# Refuses what cannot be built, before anything is, and says what to do instead.

if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux" OR NOT CMAKE_SIZEOF_VOID_P EQUAL 8)
    message(FATAL_ERROR "kvmprep is for 64-bit Linux; this build is for ${CMAKE_SYSTEM_NAME} with pointers of "
        "${CMAKE_SIZEOF_VOID_P} bytes")
endif()

# The header carries the version as a number of its own: programs compare it with kvmprep_version().
math(EXPR version_number
    "(${PROJECT_VERSION_MAJOR} << 16) | (${PROJECT_VERSION_MINOR} << 8) | ${PROJECT_VERSION_PATCH}")
math(EXPR version_in_source "${version_number}" OUTPUT_FORMAT HEXADECIMAL)
file(STRINGS include/kvmprep.h header_version REGEX "^#define KVMPREP_VERSION [0-9]+$")
if(NOT header_version STREQUAL "#define KVMPREP_VERSION ${version_number}")
    message(FATAL_ERROR "Cargo.toml says ${PROJECT_VERSION}, which is ${version_number}, but include/kvmprep.h says: "
        "${header_version}. Set KVMPREP_VERSION in src/abi/error.rs to ${version_in_source}, then type: "
        "cargo xtask abi header")
endif()

if(PROJECT_IS_TOP_LEVEL AND NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "Release, RelWithDebInfo, MinSizeRel or Debug" FORCE)
endif()
