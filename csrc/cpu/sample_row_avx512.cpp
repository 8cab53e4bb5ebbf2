#define ISA avx512
#include "sample_row.h"
#include "simd_avx512.h"
// after the two above
#include "sample_row.inc"
