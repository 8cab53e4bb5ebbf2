// One row of rms_norm and of qk_norm_rope, as each instruction set implements it (norm_row.inc).
#pragma once

#include "norm_arguments.h"
#include "sample_row.h"

namespace diffusion_runtime {

// x / sqrt(mean(x^2) + eps) * (weight_offset + weight)
struct NormRow {
  const void* x;  // [size]
  LogitType type;
  int64_t size;
  const void* weight;  // [size], or null: 1
  LogitType weight_type;
  bool normalized;  // false: x as it is
  float eps, weight_offset;
  bool round_before_weight;  // and again after
};

struct Rotation {
  const float *cos, *sin;  // [num_pairs]
  RotaryPairs pairs;
};

#define NORM_ROW_FUNCTIONS(instruction_set)                                                           \
  namespace instruction_set {                                                                         \
  void norm_row(const NormRow& row, void* out);                                                       \
  /* scratch: 2 size floats; out or cache may be null */                                              \
  void rope_row(const NormRow& row, const Rotation& by, float* scratch, void* out, void* cache_slot); \
  }
NORM_ROW_FUNCTIONS(avx512)
NORM_ROW_FUNCTIONS(avx2)
NORM_ROW_FUNCTIONS(portable)
#undef NORM_ROW_FUNCTIONS

}  // namespace diffusion_runtime
