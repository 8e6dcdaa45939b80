// Bugs end the process with a place and a reason; expected failures are a Status instead.
#pragma once

#include <cstdio>
#include <cstdlib>

#define LS_CHECK(condition)                                                              \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)
