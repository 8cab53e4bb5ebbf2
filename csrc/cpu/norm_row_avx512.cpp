#define ISA avx512
#include "norm_row.h"
#include "simd_avx512.h"
// after the two above
#include "norm_row.inc"
