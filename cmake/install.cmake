# What is installed and where, by the GNU directories. Everything that names a place names it relative to itself, so
# that the installed tree can be moved as a whole, unless the directories were given as absolute paths. Only kvmprep.pc
# names /usr itself.

include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

# In one of a distribution's packages goes what runs programs, in another what builds them, in a third the archive.
set(runtime kvmprep_runtime)
set(development kvmprep_development)
set(static kvmprep_static)

install(TARGETS kvmprep EXPORT kvmprep
    LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT ${runtime} NAMELINK_COMPONENT ${development}
    INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS kvmprep_static EXPORT kvmprep_static
    ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT ${static}
    INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES include/kvmprep.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT ${development})

# --- for CMake: find_package(kvmprep) ---

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/kvmprep)
install(EXPORT kvmprep NAMESPACE kvmprep:: FILE kvmprepTargets.cmake DESTINATION ${package_dir}
    COMPONENT ${development})
# Apart: what is exported together must be there together.
install(EXPORT kvmprep_static NAMESPACE kvmprep:: FILE kvmprepStaticTargets.cmake DESTINATION ${package_dir}
    COMPONENT ${static})
configure_package_config_file(cmake/kvmprepConfig.cmake.in kvmprepConfig.cmake
    INSTALL_DESTINATION ${package_dir} PATH_VARS CMAKE_INSTALL_LIBDIR NO_SET_AND_CHECK_MACRO)
# As the soname has it: what was built with an earlier version of the same major number goes on working.
write_basic_package_version_file(kvmprepConfigVersion.cmake COMPATIBILITY SameMajorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvmprepConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/kvmprepConfigVersion.cmake
    DESTINATION ${package_dir} COMPONENT ${development})

# --- for everything else: pkg-config ---

# A directory as kvmprep.pc names it: by the prefix where it lies beneath, else as it is.
function(pkgconfig_path directory result)
    if(IS_ABSOLUTE "${directory}")
        set(${result} "${directory}" PARENT_SCOPE)
    else()
        set(${result} "\${prefix}/${directory}" PARENT_SCOPE)
    endif()
endfunction()

pkgconfig_path("${CMAKE_INSTALL_LIBDIR}" pkgconfig_libdir)
pkgconfig_path("${CMAKE_INSTALL_INCLUDEDIR}" pkgconfig_includedir)
if(CMAKE_INSTALL_PREFIX MATCHES "^/usr/?$")
    # pkg-config leaves out the system's directories only where they are named plainly.
    set(pkgconfig_prefix "/usr")
elseif(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}")
    set(pkgconfig_prefix "${CMAKE_INSTALL_PREFIX}")
else()
    file(RELATIVE_PATH up "/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/")
    string(REGEX REPLACE "/$" "" up "${up}")
    set(pkgconfig_prefix "\${pcfiledir}/${up}")
endif()
list(TRANSFORM KVMPREP_LINK_LIBRARIES PREPEND "-l" OUTPUT_VARIABLE pkgconfig_private)
list(JOIN pkgconfig_private " " pkgconfig_private)
configure_file(cmake/kvmprep.pc.in kvmprep.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kvmprep.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig
    COMPONENT ${development})

# --- for people ---

foreach(section 3 7)
    file(GLOB pages CONFIGURE_DEPENDS man/*.${section})
    install(FILES ${pages} DESTINATION ${CMAKE_INSTALL_MANDIR}/man${section} COMPONENT ${development})
endforeach()
# CMAKE_INSTALL_DOCDIR is the surrounding project's where there is one.
if(PROJECT_IS_TOP_LEVEL)
    set(docdir ${CMAKE_INSTALL_DOCDIR})
else()
    set(docdir ${CMAKE_INSTALL_DATAROOTDIR}/doc/kvmprep)
endif()
install(FILES LICENSE-MIT LICENSE-APACHE DESTINATION ${docdir} COMPONENT ${runtime})
