// What a decoder layer does before its attention and after it, on raw pointers.
#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace diffusion_runtime {

struct DecoderSizes {
  std::int64_t rows, hidden, heads, kv_heads, head_dim, ffn;
  std::int64_t width() const { return heads * head_dim; }
  std::int64_t kv_width() const { return kv_heads * head_dim; }
};

// Matrices [to][from], contiguous. Biases and norms of heads may be null.
struct DecoderLayer {
  const float* norm;                 // [hidden]
  const float *query, *key, *value;  // [width or kv_width][hidden]
  const float *query_bias, *key_bias, *value_bias;
  const float *query_norm, *key_norm;  // [head_dim]
  const float* output;                 // [hidden][width]
  const float* ffn_norm;               // [hidden]
  const float *gate, *up, *down;       // [ffn][hidden], [ffn][hidden], [hidden][ffn]
};

// Cosines and sines [rows][pairs]; row r of what is rotated takes row r % rows.
struct RotaryTable {
  const float *cos, *sin;
  std::int64_t rows, pairs;
};

// Rows of what attention takes: [rows][width], [rows][kv_width] twice.
struct Projected {
  float *query, *key, *value;
};

// Normalised, projected, heads of queries and keys normalised where there are weights, and rotated in halves.
//   normed  [rows][hidden], overwritten
void before_attention(const DecoderLayer& layer, const DecoderSizes& sizes, float eps, const RotaryTable& table,
                      const float* x, float* normed, const Projected& to, InstructionSet set);

// x += output(mixed), then x += down(silu(gate(norm(x))) * up(norm(x))).
//   mixed          [rows][width]
//   normed, gated  [rows][hidden] and [rows][ffn], overwritten
void after_attention(const DecoderLayer& layer, const DecoderSizes& sizes, float eps, const float* mixed, float* x,
                     float* normed, float* gated, InstructionSet set);

// x = norm(x), what follows the last layer.
void after_layers(const float* norm, const DecoderSizes& sizes, float eps, float* x, InstructionSet set);

}  // namespace diffusion_runtime
