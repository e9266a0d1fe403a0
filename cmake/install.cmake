# What is installed and where, by the GNU directories. Everything that names a place names it relative to itself, so
# that the installed tree can be moved as a whole, unless the directories were given as absolute paths. Only kvmprep.pc
# names /usr itself.

include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

# In one of a distribution's packages goes what runs programs, in another what builds them, in a third the archive; and
# what belongs to the model in one that no other needs.
set(runtime kvmprep_runtime)
set(development kvmprep_development)
set(static kvmprep_static)
set(model kvmprep_model)

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
    INSTALL_DESTINATION ${package_dir} PATH_VARS CMAKE_INSTALL_LIBDIR CMAKE_INSTALL_INCLUDEDIR
    NO_SET_AND_CHECK_MACRO)
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
function(install_pkgconfig name component)
    configure_file(cmake/${name}.pc.in ${name}.pc @ONLY)
    install(FILES ${CMAKE_CURRENT_BINARY_DIR}/${name}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig
        COMPONENT ${component})
endfunction()
install_pkgconfig(kvmprep ${development})

# --- for people ---

set(model_page man/kvmprep_model.7)
foreach(section 3 7)
    file(GLOB pages RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} CONFIGURE_DEPENDS man/*.${section})
    list(REMOVE_ITEM pages ${model_page})
    install(FILES ${pages} DESTINATION ${CMAKE_INSTALL_MANDIR}/man${section} COMPONENT ${development})
endforeach()
# CMAKE_INSTALL_DOCDIR is the surrounding project's where there is one.
if(PROJECT_IS_TOP_LEVEL)
    set(docdir ${CMAKE_INSTALL_DOCDIR})
else()
    set(docdir ${CMAKE_INSTALL_DATAROOTDIR}/doc/kvmprep)
endif()
install(FILES LICENSE-MIT LICENSE-APACHE DESTINATION ${docdir} COMPONENT ${runtime})

# --- the model ---

if(KVMPREP_MODEL)
    # Where the loader looks: it is preloaded by its name.
    install(FILES ${KVMPREP_MODEL_LIBRARY} DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT ${model})
    # What `cmake --install --strip` does with targets. To CMake this is a file like any other.
    cmake_path(GET KVMPREP_MODEL_LIBRARY FILENAME model_name)
    install(CODE "
        if(CMAKE_INSTALL_DO_STRIP)
            get_filename_component(directory [[${CMAKE_INSTALL_LIBDIR}]] ABSOLUTE BASE_DIR \"\${CMAKE_INSTALL_PREFIX}\")
            execute_process(COMMAND [[${CMAKE_STRIP}]] \"\$ENV{DESTDIR}\${directory}/${model_name}\"
                COMMAND_ERROR_IS_FATAL ANY)
        endif()" COMPONENT ${model})
    install(FILES ${KVMPREP_MODEL_HEADER} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT ${model})
    install(FILES ${model_page} DESTINATION ${CMAKE_INSTALL_MANDIR}/man7 COMPONENT ${model})
    install_pkgconfig(kvmprep-model ${model})
endif()
