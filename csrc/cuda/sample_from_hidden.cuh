// sample_from_hidden on a GPU, for whoever has pointers and a stream. diffusion_runtime/ops/_sample_from_hidden.py says
// what the op means. What is kept of the logits is one TilePart per row and tile of 128 tokens, in the workspace:
// head_parts or logit_parts make them, head_finish turns them into results.
#pragma once

#include "sample_tokens.cuh"

namespace diffusion_runtime {

// All pointers are to memory of the device; hidden and weight have stride 1 along dim.
struct SampleFromHidden {
  const void* hidden;                    // [rows, dim]
  const void* weight;                    // [vocab, dim]
  const void* bias;                      // [vocab], or null
  LogitType type;                        // of all three
  int64_t hidden_stride, weight_stride;  // of a row, in elements
  int64_t rows, vocab, dim;              // rows, vocab and dim are below 2^31
  const bool* masked;                    // [rows], or null: every row
  PerRow<float> temperature;             // 0: greedy
  PerRow<int64_t> seed;
  const int64_t* position;  // [rows], or null where nothing is drawn
  PerRow<int64_t> step;
  PerRow<float> statistics_temperature;
  float softcap;           // 0: none
  const int32_t* allowed;  // [rows, vocab / 32 rounded up], or null; logits of tokens whose bit is not set are -inf
  int64_t allowed_stride;  // of a row, in words; may be 0
  int64_t* ids;            // [2, rows], and
  float* statistics;       // [5, rows]: as of sample_tokens
  void* workspace;         // sample_from_hidden_workspace(rows, vocab) bytes, 16-byte aligned
};

// Logits of tokens [first, first + count): first is a multiple of 128, and so is count unless the vocabulary ends
// there.
struct LogitsOfTiles {
  const void* logits;  // [rows, count], stride 1 along the tokens, bias included
  LogitType type;
  int64_t stride;  // of a row, in elements
  int64_t first, count;
};

size_t sample_from_hidden_workspace(int64_t rows, int64_t vocab);

// Whether head_parts takes these arguments: 16-bit elements, rows that begin at multiples of 16 bytes.
bool head_parts_takes(const SampleFromHidden& op);

// Enqueues the head fused with the parts of all tiles; for few rows.
void head_parts(const SampleFromHidden& op, CUstream_st* stream);

// Enqueues the parts of these tiles, which the logits are there for.
void logit_parts(const SampleFromHidden& op, const LogitsOfTiles& tiles, CUstream_st* stream);

// Enqueues the rest, once the parts of all tiles have been enqueued.
void head_finish(const SampleFromHidden& op, CUstream_st* stream);

}  // namespace diffusion_runtime
