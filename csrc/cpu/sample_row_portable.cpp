#define ISA portable
#include "sample_row.h"
#include "simd_portable.h"
// after the two above
#include "sample_row.inc"
