#define ISA portable
#include "simd_portable.h"
#include "weigh_row.h"
// after the two above
#include "weigh_row.inc"
