#define ISA portable
#include "attention_tile.h"
#include "simd_portable.h"
// after the two above
#include "attention_tile.inc"
