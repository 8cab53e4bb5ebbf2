#define ISA avx2
#include "head_row.h"
#include "simd_avx2.h"
// after the two above
#include "head_row.inc"
