#define ISA avx512
#include "simd_avx512.h"
#include "weigh_row.h"
// after the two above
#include "weigh_row.inc"
