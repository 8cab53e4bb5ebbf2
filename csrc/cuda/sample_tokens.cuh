// sample_tokens on a GPU, for whoever has pointers and a stream. diffusion_runtime/ops/_sample_tokens.py says what the
// op means; csrc/cpu/sample_tokens.h has the same one for the CPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "logit_type.h"

struct CUstream_st;  // a cudaStream_t points at one: so this header needs nothing of CUDA

namespace diffusion_runtime {

// One value for every row, or a pointer to one for each.
template <class T>
struct PerRow {
  const T* values;  // [rows], or null: `value` for every row
  T value;
};

// All pointers are to memory of the device. Row r is at outer index r / inner, inner index r % inner.
struct SampleTokens {
  const void* logits;  // [outer, inner, vocab], stride 1 along vocab
  LogitType type;
  int64_t outer_stride, inner_stride;  // in elements
  int64_t rows, inner, vocab;          // rows = outer * inner; rows and vocab are below 2^31
  const bool* masked;                  // [rows], or null: every row
  PerRow<float> temperature;           // 0: greedy
  PerRow<int64_t> seed;
  const int64_t* position;  // [rows], or null: the inner index
  PerRow<int64_t> step;
  PerRow<float> statistics_temperature;
  float softcap;           // 0: none
  const int32_t* allowed;  // [rows, ceil(vocab / 32)], stride 1 along the words; null: every token
  int64_t allowed_stride;  // in words; 0: the same for every row
  PerRow<int64_t> top_k;   // 0: none
  PerRow<float> top_p;     // 1: none
  PerRow<float> min_p;     // 0: none
  bool restricted;         // the statistics are those of the tokens that may be drawn
  int64_t* ids;            // [2, rows]: token, argmax; -1 in a row that is not masked or has no distribution
  float* statistics;       // [5, rows]: logprob, confidence, margin, entropy, logsumexp; 0 in a row that is not masked
  void* workspace;         // sample_tokens_workspace() bytes, 16-byte aligned, zeroed before the first launch
};

// Whether a call limits what any of its rows may draw.
bool is_limited(const SampleTokens& arguments);

// A launch leaves the workspace such that the next one with as many rows can use it as it is.
size_t sample_tokens_workspace(int64_t rows, int64_t vocab, bool limited);

// Enqueues one kernel, or two if what may be drawn is limited; throws std::runtime_error if it cannot be launched.
void sample_tokens(const SampleTokens& arguments, CUstream_st* stream);

}  // namespace diffusion_runtime
