// Some queries of a sequence and of a head of keys, as each instruction set implements it (attention_tile.inc).
#pragma once

#include "attention_arguments.h"

namespace diffusion_runtime {

// Keys at a time. A row's bits depend on where blocks begin, so nothing but the sizes of heads may decide it.
constexpr int kMostKeys = 256;
HOST_DEVICE int keys_of_block(const AttentionArguments& a) {
  const int dim = a.head_dim > a.value_dim ? a.head_dim : a.value_dim;
  return dim <= 128 ? kMostKeys : dim <= 256 ? kMostKeys / 2 : kMostKeys / 4;  // their keys and values: 256 KiB
}

// Row r is query r / group of head kv_head * group + r % group, where group = heads / kv_heads: one head's keys serve
// all of them.
struct AttentionTile {
  int sequence, kv_head;
  int first_row, num_rows;
  float* scratch;  // attention_scratch(a, num_rows) floats at a multiple of 64 bytes
};

// What a tile keeps. All begin at multiples of 64 bytes.
struct AttentionScratch {
  float *query, *out;    // [rows][query_stride], [rows][out_stride]
  float *top, *sum;      // [rows], of the scores so far: the largest, and the sum of exponentials
  int *low, *high;       // [rows], positions that a row sees
  float *keys, *values;  // of a block, see attention_pack.inc
  int query_stride, out_stride;
  int64_t size;  // in floats
};

HOST_DEVICE int64_t padded_to_line(int64_t floats) { return (floats + 15) / 16 * 16; }

HOST_DEVICE AttentionScratch attention_scratch(const AttentionArguments& a, int num_rows, float* memory) {
  AttentionScratch s;
  s.query_stride = int(padded_to_line(a.head_dim)), s.out_stride = int(padded_to_line(a.value_dim));
  s.size = 0;
  const int64_t rows = padded_to_line(num_rows), block = keys_of_block(a);
  float** const parts[] = {&s.query, &s.out, &s.top, &s.sum, &s.keys, &s.values};
  const int64_t sizes[] = {rows * s.query_stride,  rows * s.out_stride, rows, rows,
                           block * s.query_stride, block * s.out_stride};
  for (int i = 0; i < 6; ++i) {
    *parts[i] = memory + s.size;
    s.size += sizes[i];
  }
  s.low = reinterpret_cast<int*>(memory + s.size), s.high = s.low + rows;
  s.size += 2 * rows;
  return s;
}

namespace avx512 {
void attend(const AttentionArguments& a, const AttentionTile& tile);
}
namespace avx2 {
void attend(const AttentionArguments& a, const AttentionTile& tile);
}
namespace portable {
void attend(const AttentionArguments& a, const AttentionTile& tile);
}

}  // namespace diffusion_runtime
