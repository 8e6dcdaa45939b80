#define LS_ISA x86_64_v4
#define LS_ISA_NAME "x86-64-v4"
#include "backend/cpu/kernels.inc"
