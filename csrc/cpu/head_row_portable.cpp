#define ISA portable
#include "head_row.h"
#include "simd_portable.h"
// after the two above
#include "head_row.inc"
