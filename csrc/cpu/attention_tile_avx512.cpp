#define ISA avx512
#include "attention_tile.h"
#include "simd_avx512.h"
// after the two above
#include "attention_tile.inc"
