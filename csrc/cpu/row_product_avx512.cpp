#define ISA avx512
#include "row_product.h"
#include "simd_avx512.h"
// after the two above
#include "row_product.inc"
