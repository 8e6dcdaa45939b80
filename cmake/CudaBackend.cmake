# The CUDA backend, by nvcc or, emulated, by the C++ compiler: one set of sources.
if(LORASERVE_CUDA STREQUAL "AUTO")
  if(LORASERVE_BUILD_TESTS)
    set(LORASERVE_CUDA "EMULATED")
  else()
    set(LORASERVE_CUDA "OFF")
  endif()
endif()

# Plain C++ without a device: always built, so that its tests run everywhere.
target_sources(loraserve_backend PRIVATE csrc/backend/cuda/work_list.cc)
set(LORASERVE_CUDA_KERNELS
  csrc/backend/cuda/adapter_installer.cu
  csrc/backend/cuda/attention_decode.cu
  csrc/backend/cuda/attention_prefill.cu
  csrc/backend/cuda/cuda_backend.cu
  csrc/backend/cuda/dense_kernels.cu
  csrc/backend/cuda/device_memory.cu
  csrc/backend/cuda/host_registry.cu
  csrc/backend/cuda/lora_kernels.cu
  csrc/backend/cuda/prepared_weight.cu
  csrc/backend/cuda/sampler.cu
  csrc/backend/cuda/step_graphs.cu)

if(LORASERVE_CUDA STREQUAL "ON")
  set(CMAKE_CUDA_ARCHITECTURES "80-real;90a-real" CACHE STRING "")
  enable_language(CUDA)
  # The target is older than the language: it has not taken these from variables.
  set_target_properties(loraserve_backend PROPERTIES
    CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}" CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
  find_package(CUDAToolkit REQUIRED)
  target_sources(loraserve_backend PRIVATE ${LORASERVE_CUDA_KERNELS}
    csrc/backend/cuda/cublas_lt.cc csrc/backend/cuda/gemm.cc)
  # The static runtime: the built library needs the driver alone.
  target_link_libraries(loraserve_backend PUBLIC CUDA::cudart_static ${CMAKE_DL_LIBS})
  set(LORASERVE_CUDA_OPTIONS
    "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xcompiler=-Wall,-Wextra,-Werror,-Wno-missing-field-initializers;--resource-usage>")
  target_compile_options(loraserve_backend PRIVATE ${LORASERVE_CUDA_OPTIONS})
  target_compile_definitions(loraserve_backend PRIVATE LORASERVE_HAS_CUDA)
elseif(LORASERVE_CUDA STREQUAL "EMULATED")
  target_sources(loraserve_backend PRIVATE ${LORASERVE_CUDA_KERNELS}
    csrc/backend/cuda/emulation/fibre.cc
    csrc/backend/cuda/emulation/gemm_emulated.cc
    csrc/backend/cuda/emulation/grid.cc
    csrc/backend/cuda/emulation/stream.cc)
  set_source_files_properties(${LORASERVE_CUDA_KERNELS} PROPERTIES
    LANGUAGE CXX COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas")
  target_compile_definitions(loraserve_backend PRIVATE LORASERVE_CUDA_EMULATED)
elseif(NOT LORASERVE_CUDA STREQUAL "OFF")
  message(FATAL_ERROR "LORASERVE_CUDA: '${LORASERVE_CUDA}' is not ON, OFF, EMULATED or AUTO")
endif()
