#define ISA avx2
#include "attention_tile.h"
#include "simd_avx2.h"
// after the two above
#include "attention_tile.inc"
