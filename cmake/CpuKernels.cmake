# The CPU kernels, one source per instruction set; the backend picks one table at start.
set(LORASERVE_CPU_KERNELS csrc/backend/cpu/kernels.cc)
# Sanitized builds are for finding errors, and the unrolled tiles take minutes to instrument at -O3.
if(LORASERVE_SANITIZE)
  set(kernel_level -O1)
else()
  set(kernel_level -O3)
endif()
list(APPEND LORASERVE_CPU_KERNELS csrc/backend/cpu/kernels_generic.cc)
set_source_files_properties(csrc/backend/cpu/kernels_generic.cc PROPERTIES
  COMPILE_OPTIONS "-ffp-contract=fast;${kernel_level}")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  foreach(level v2 v3 v4)
    set(source csrc/backend/cpu/kernels_x86_64_${level}.cc)
    list(APPEND LORASERVE_CPU_KERNELS ${source})
    set_source_files_properties(${source} PROPERTIES
      COMPILE_OPTIONS "-march=x86-64-${level};-ffp-contract=fast;${kernel_level}")
  endforeach()
  set(source csrc/backend/cpu/kernels_avx512_bf16.cc)
  list(APPEND LORASERVE_CPU_KERNELS ${source})
  set_source_files_properties(${source} PROPERTIES
    COMPILE_OPTIONS "-march=x86-64-v4;-mavx512bf16;-ffp-contract=fast;${kernel_level}")
endif()
