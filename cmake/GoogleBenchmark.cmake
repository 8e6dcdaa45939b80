# benchmark::benchmark: the installed one (Debian: libbenchmark-dev) or, built along, that of sources
# which lie here already. Nothing is downloaded.
set(LORASERVE_BENCHMARK_SOURCE "" CACHE PATH
  "Sources of Google Benchmark, a folder or an archive of one; empty: the installed library")
if(LORASERVE_BENCHMARK_SOURCE)
  include(FetchContent)
  set(BENCHMARK_ENABLE_TESTING OFF)
  set(BENCHMARK_ENABLE_INSTALL OFF)
  set(BENCHMARK_ENABLE_WERROR OFF)
  FetchContent_Declare(benchmark URL ${LORASERVE_BENCHMARK_SOURCE} DOWNLOAD_EXTRACT_TIMESTAMP ON)
  FetchContent_MakeAvailable(benchmark)
  # Its warnings are not ours to mend.
  target_compile_options(benchmark PRIVATE -w)
else()
  find_package(benchmark REQUIRED)
endif()
