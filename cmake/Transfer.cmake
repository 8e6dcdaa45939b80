# csrc/transfer: the sidecar's parts that know no UCX, and loraserve-transfer where UCX and ucxx are.
#
# They come as wheels (pip install 'loraserve[transfer]') or from a prefix that CMake is told of
# (CMAKE_PREFIX_PATH). LORASERVE_BUILD_TRANSFER: AUTO builds where they are found, ON fails without
# them.
set(LORASERVE_BUILD_TRANSFER "AUTO" CACHE STRING "Build loraserve-transfer: AUTO, ON or OFF")
set_property(CACHE LORASERVE_BUILD_TRANSFER PROPERTY STRINGS AUTO ON OFF)

add_library(loraserve_transfer STATIC
  csrc/transfer/envelope.cc
  csrc/transfer/host_identity.cc
  csrc/transfer/host_pool.cc
  csrc/transfer/messages.cc
  csrc/transfer/remote_read.cc
  csrc/transfer/ucx_settings.cc)
target_link_libraries(loraserve_transfer PUBLIC loraserve_base)

set(LORASERVE_UCX_MISSING "")
if(NOT LORASERVE_BUILD_TRANSFER)
  set(LORASERVE_UCX_MISSING "LORASERVE_BUILD_TRANSFER is off")
elseif(CMAKE_VERSION VERSION_LESS 4.0)
  set(LORASERVE_UCX_MISSING "ucxx wants CMake 4.0, this is ${CMAKE_VERSION}")
else()
  # Wheels keep their files in the Python packages libucx and libucxx.
  find_package(Python QUIET COMPONENTS Interpreter)
  set(wheels "")
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u
for name in ('libucx', 'libucxx'):
    spec = u.find_spec(name)
    print(spec.submodule_search_locations[0] if spec else '')"
      OUTPUT_VARIABLE wheels OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    string(REPLACE "\n" ";" wheels "${wheels}")
  endif()
  list(LENGTH wheels found)
  if(found EQUAL 2)
    list(GET wheels 0 ucx_root)
    list(GET wheels 1 ucxx_root)
    # Debian's CMake looks into lib only.
    list(APPEND CMAKE_PREFIX_PATH ${ucx_root} ${ucxx_root}/lib64/cmake)
  endif()
  find_package(ucx QUIET CONFIG)
  find_package(ucxx QUIET CONFIG)
  if(NOT ucx_FOUND OR NOT ucxx_FOUND)
    set(LORASERVE_UCX_MISSING "no UCX and ucxx: pip install 'libucxx-cu13>=0.52,<0.53'")
  endif()
endif()

if(LORASERVE_UCX_MISSING)
  if(LORASERVE_BUILD_TRANSFER STREQUAL "ON")
    message(FATAL_ERROR "loraserve-transfer: ${LORASERVE_UCX_MISSING}")
  endif()
  message(STATUS "loraserve-transfer is not built: ${LORASERVE_UCX_MISSING}. Adapters come over gRPC.")
else()
  add_library(loraserve_ucx STATIC
    csrc/transfer/slot_reader.cc
    csrc/transfer/ucx_endpoint.cc
    csrc/transfer/ucx_registration.cc
    csrc/transfer/ucx_resources.cc
    csrc/transfer/ucx_transport.cc)
  target_link_libraries(loraserve_ucx PUBLIC loraserve_transfer ucxx::ucxx ucx::ucp ucx::ucs)
  # Their headers are not held to our warnings.
  target_include_directories(loraserve_ucx SYSTEM PUBLIC
    $<TARGET_PROPERTY:ucxx::ucxx,INTERFACE_INCLUDE_DIRECTORIES>
    $<TARGET_PROPERTY:ucx::ucp,INTERFACE_INCLUDE_DIRECTORIES>)
  # libucxx needs libucp at run time and does not say where it is.
  target_link_options(loraserve_ucx PUBLIC -Wl,--no-as-needed)
  # What a process of its own needs besides.
  add_library(loraserve_sidecar STATIC csrc/transfer/program.cc csrc/transfer/sidecar.cc)
  target_link_libraries(loraserve_sidecar PUBLIC loraserve_ucx)
  set(programs loraserve-transfer)
  add_executable(loraserve-transfer csrc/transfer/main.cc)
  if(LORASERVE_BUILD_TESTS)
    add_executable(transfer_over_tcp tests/cpp/transfer_over_tcp.cc)
    list(APPEND programs transfer_over_tcp)
  endif()
  # The environment's wheels first, then those that it was linked to. A RUNPATH, so that
  # LD_LIBRARY_PATH (a site's own UCX) comes before both.
  set(site "$ORIGIN/../lib/python${Python_VERSION_MAJOR}.${Python_VERSION_MINOR}/site-packages")
  foreach(program ${programs})
    target_link_libraries(${program} PRIVATE loraserve_sidecar)
    target_link_options(${program} PRIVATE -Wl,--enable-new-dtags)
    set_target_properties(${program} PROPERTIES
      INSTALL_RPATH "${site}/libucxx/lib64;${site}/libucx/lib"
      INSTALL_RPATH_USE_LINK_PATH TRUE)
    if(SKBUILD_SCRIPTS_DIR)
      install(TARGETS ${program} DESTINATION ${SKBUILD_SCRIPTS_DIR})
    endif()
  endforeach()
  # The same reader for the node's own process, where GPUDirect is switched on.
  if(LORASERVE_BUILD_PYTHON)
    find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
    find_package(pybind11 CONFIG REQUIRED)
    pybind11_add_module(_transfer_reader csrc/bindings/transfer_reader.cc)
    target_link_libraries(_transfer_reader PRIVATE loraserve_ucx)
    target_link_options(_transfer_reader PRIVATE -Wl,--enable-new-dtags)
    set_target_properties(_transfer_reader PROPERTIES
      INSTALL_RPATH "$ORIGIN/../libucxx/lib64;$ORIGIN/../libucx/lib"
      INSTALL_RPATH_USE_LINK_PATH TRUE)
    install(TARGETS _transfer_reader DESTINATION loraserve)
  endif()
  message(STATUS "loraserve-transfer: UCX of ${ucx_DIR}")
endif()
