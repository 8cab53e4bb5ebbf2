#define ISA avx2
#include "norm_row.h"
#include "simd_avx2.h"
// after the two above
#include "norm_row.inc"
