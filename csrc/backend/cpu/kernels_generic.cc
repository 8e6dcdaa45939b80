#define LS_ISA generic
#define LS_ISA_NAME "generic"
#include "backend/cpu/kernels.inc"
