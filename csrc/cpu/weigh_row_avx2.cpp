#define ISA avx2
#include "simd_avx2.h"
#include "weigh_row.h"
// after the two above
#include "weigh_row.inc"
