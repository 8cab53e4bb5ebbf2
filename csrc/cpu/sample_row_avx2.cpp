#define ISA avx2
#include "sample_row.h"
#include "simd_avx2.h"
// after the two above
#include "sample_row.inc"
