# Makes libkvmprep-model.so, which test suites preload to have a /dev/kvm: by cargo whole, and here it only gets its
# name. kvmprep::model says where it is; nothing is ever linked with it.

if(NOT rust_target MATCHES "^x86_64-.*-linux-gnu$")
    message(FATAL_ERROR "KVMPREP_MODEL: the software model is of KVM on x86-64, and stands before the functions of the "
        "GNU C library; this build is for ${rust_target}. Leave the option off: the library itself does without")
endif()

set(KVMPREP_MODEL_LIBRARY "${CMAKE_CURRENT_BINARY_DIR}/libkvmprep-model.so")
set(KVMPREP_MODEL_HEADER "${CMAKE_CURRENT_SOURCE_DIR}/model/preload/include/kvmprep-model.h")

kvmprep_add_cargo(kvmprep_model_cargo kvmprep-model-preload cdylib libkvmprep_model_preload.so)
add_custom_command(OUTPUT ${KVMPREP_MODEL_LIBRARY}
    COMMAND ${CMAKE_COMMAND} -E copy ${cargo_artifact_dir}/libkvmprep_model_preload.so ${KVMPREP_MODEL_LIBRARY}
    DEPENDS kvmprep_model_cargo ${cargo_artifact_dir}/libkvmprep_model_preload.so
    VERBATIM)
add_custom_target(kvmprep_model ALL DEPENDS ${KVMPREP_MODEL_LIBRARY})

add_library(kvmprep::model MODULE IMPORTED GLOBAL)
add_dependencies(kvmprep::model kvmprep_model)
cmake_path(GET KVMPREP_MODEL_HEADER PARENT_PATH model_include_dir)
set_target_properties(kvmprep::model PROPERTIES
    IMPORTED_LOCATION ${KVMPREP_MODEL_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${model_include_dir})
