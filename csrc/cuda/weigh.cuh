// Logits of some tokens to their probabilities, for soft_embedding on a GPU: the part of it that is no matrix product.
#pragma once

#include "sample_tokens.cuh"

namespace diffusion_runtime {

// All pointers are to memory of the device. Row r of the logits is at outer index r / inner, inner index r % inner.
struct Weigh {
  const void* logits;  // [outer, inner, count], stride 1 along the tokens
  LogitType logit_type;
  int64_t outer_stride, inner_stride;  // in elements
  int64_t rows, inner, count;          // rows = outer * inner; rows and count are below 2^31
  const bool* masked;                  // [rows], or null: every row
  PerRow<float> temperature;           // above 0
  float softcap;                       // 0: none
  const float* logsumexp;              // [rows], of softcap(logits) / temperature
  void* probabilities;                 // [rows, count], stride 1 along the tokens; 0 in rows that are not masked
  LogitType probability_type;
  int64_t probability_stride;  // of a row, in elements
};

// Enqueues one kernel; throws std::runtime_error if it cannot be launched.
void weigh(const Weigh& arguments, CUstream_st* stream);

}  // namespace diffusion_runtime
