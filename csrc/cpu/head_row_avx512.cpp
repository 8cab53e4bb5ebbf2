#define ISA avx512
#include "head_row.h"
#include "simd_avx512.h"
// after the two above
#include "head_row.inc"
