// What the kernels of rms_norm and qk_norm_rope are given, as pointers and sizes. Strides are in elements.
#pragma once

#include <stdint.h>

#include "logit_type.h"

namespace diffusion_runtime {

// Rows [outer, middle, inner, size] to [rows, size]: x / sqrt(mean(x^2) + eps) * (weight_offset + weight).
struct RmsNorm {
  const void* x;  // stride 1 along size
  LogitType type;
  int64_t middle, inner, rows, size;  // rows = outer * middle * inner
  int64_t outer_stride, middle_stride, inner_stride;
  const void* weight;  // [size], or null: 1
  LogitType weight_type;
  float eps, weight_offset;
  bool round_before_weight;  // and again after
  void* out;                 // contiguous
};

// [batch, heads, rows, head_dim], stride 1 along head_dim; data null: there is none.
struct HeadRows {
  void* data;
  int64_t batch, head, row;
};

// [batch, length], or data null: the place along the length.
struct Places {
  const int64_t* data;
  int64_t batch, row;
};

// Pair i rotates by an angle of its own: elements i and i + distance, or 2 i and 2 i + 1 where they are interleaved.
struct RotaryPairs {
  int count, distance;
  bool interleaved;
};

struct QKNormRope {
  HeadRows query, key, value;       // value: only with a cache
  HeadRows query_out, key_out;      // key_out: only without
  HeadRows key_cache, value_cache;  // [batch, kv_heads, capacity, head_dim]
  LogitType type;                   // of all of them
  int64_t batch, length, capacity;
  int heads, kv_heads, head_dim;
  const float *cos, *sin;                      // [batch, table_rows, pairs.count], stride 1 along the pairs
  int64_t table_batch, table_row, table_rows;  // two strides, and how many rows there are
  RotaryPairs pairs;
  Places positions;                       // rows of the tables
  Places slots;                           // rows of the caches
  const void *query_weight, *key_weight;  // [head_dim], or null: 1
  LogitType query_weight_type, key_weight_type;
  bool normalized;  // false: query and key are only rotated
  float eps, weight_offset;
  bool round_before_weight;
};

}  // namespace diffusion_runtime
