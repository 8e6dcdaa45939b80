#define LS_ISA x86_64_v2
#define LS_ISA_NAME "x86-64-v2"
#include "backend/cpu/kernels.inc"
