#define ISA portable
#include "norm_row.h"
#include "simd_portable.h"
// after the two above
#include "norm_row.inc"
