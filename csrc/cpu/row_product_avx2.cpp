#define ISA avx2
#include "row_product.h"
#include "simd_avx2.h"
// after the two above
#include "row_product.inc"
