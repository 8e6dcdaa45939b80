# Benchmarks of the CUDA backend's kernels; with the backend emulated, rehearsals of them.
if(LORASERVE_CUDA STREQUAL "OFF")
  return()
endif()
add_library(bench_cuda STATIC bench/cpp/cuda_bench.cc bench/cpp/cuda_read.cu)
target_link_libraries(bench_cuda PUBLIC loraserve_engine benchmark::benchmark)
if(LORASERVE_CUDA STREQUAL "EMULATED")
  set_source_files_properties(bench/cpp/cuda_read.cu PROPERTIES
    LANGUAGE CXX COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas")
  target_compile_definitions(bench_cuda PUBLIC LORASERVE_CUDA_EMULATED)
else()
  set_target_properties(bench_cuda PROPERTIES
    CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}" CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
  target_compile_options(bench_cuda PRIVATE ${LORASERVE_CUDA_OPTIONS})
endif()
foreach(name lora attention step)
  add_executable(bench_cuda_${name} bench/cpp/cuda_${name}.cc)
  target_link_libraries(bench_cuda_${name} PRIVATE bench_cuda)
endforeach()
