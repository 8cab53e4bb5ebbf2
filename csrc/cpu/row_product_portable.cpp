#define ISA portable
#include "row_product.h"
#include "simd_portable.h"
// after the two above
#include "row_product.inc"
