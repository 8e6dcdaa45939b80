#define LS_ISA x86_64_v3
#define LS_ISA_NAME "x86-64-v3"
#include "backend/cpu/kernels.inc"
