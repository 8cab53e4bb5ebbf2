// How attention on a GPU is cut: tiles of query rows, and blocks of keys, which begin at fixed places.
#pragma once

#include "attention_arguments.h"
#include "gpu_ops.h"

namespace diffusion_runtime {

constexpr int kWarpgroup = 128, kWarpgroupRows = 64;  // threads, and the rows of queries that they take together

// What every kernel of attention is given.
struct AttentionLaunch {
  AttentionArguments a;
  int group;   // heads that share one of keys and values
  int chunks;  // of a tile, each done by a block of threads; 0: all are done by one
  void* workspace;
  int tiles;           // of a sequence and one such head
  float size;          // of the scale, 1 if that is 0
  float factor;        // of the scores before what follows, if they are softcapped; 0 otherwise
  float unit;          // the factor behind: 2 to the scores times unit are weights
  bool negated, zero;  // the queries: the scale's sign, or a scale of 0
};

// Some blocks of a segment, from `first` to before `end`.
struct BlockSpan {
  int first, end;

  __device__ __forceinline__ int count() const { return end > first ? end - first : 0; }
  __device__ __forceinline__ void limit(int low, int high) { first = max(first, low), end = min(end, high); }
};

// The rows of one block of threads: of a sequence and a head of keys, ordered by query and then by head of the group.
struct QueryTile {
  AttentionSequence s;
  int sequence, kv_head;
  int first, rows;        // the first row of the tile; the sequence has this many
  KeyRange seen;          // by some row
  BlockSpan prefix, key;  // blocks that some row sees

  __device__ __forceinline__ int blocks() const { return prefix.count() + key.count(); }
};

// Keys that stand beside each other: the block's row `row` of their segment is at `position`, and `count` are real.
struct KeyBlock {
  bool prefix;
  int row, position, count;
  int number;  // of all the sequence's blocks, seen or not
};

// What rows [first, last] of a sequence see: some of them, and all of them. Bounds do not fall from query to query.
struct RowsRange {
  KeyRange some, all;
};
__device__ __forceinline__ RowsRange rows_range(const AttentionLaunch& p, const AttentionSequence& s, int first,
                                                int last) {
  const KeyRange a = attention_range(p.a, s, first / p.group), b = attention_range(p.a, s, last / p.group);
  return {{a.low, b.high}, {b.low, a.high}};
}

// The keys behind the prefix begin a block of their own.
template <int kKeys>
__device__ __forceinline__ int prefix_blocks(const AttentionSequence& s) {
  return (s.prefix + kKeys - 1) / kKeys;
}

// Tiles of one head stand beside each other, those that see the most keys first.
template <int kRows, int kKeys>
__device__ __forceinline__ QueryTile query_tile(const AttentionLaunch& p, unsigned index) {
  QueryTile t;
  t.first = (p.tiles - 1 - int(index % unsigned(p.tiles))) * kRows;
  const unsigned heads = index / unsigned(p.tiles);
  t.kv_head = int(heads % unsigned(p.a.kv_heads));
  t.sequence = int(heads / unsigned(p.a.kv_heads));
  t.s = attention_sequence(p.a, t.sequence);
  t.rows = t.s.num_queries * p.group;
  t.prefix = t.key = {0, 0}, t.seen = {0, 0};
  if (t.first >= t.rows) return t;
  const KeyRange seen = t.seen = rows_range(p, t.s, t.first, min(t.first + kRows, t.rows) - 1).some;
  const int prefix_end = min(seen.high, t.s.prefix), key_low = max(seen.low - t.s.prefix, 0);
  const int key_end = seen.high - t.s.prefix;
  if (prefix_end > seen.low) t.prefix = {seen.low / kKeys, (prefix_end + kKeys - 1) / kKeys};
  if (key_end > key_low) t.key = {key_low / kKeys, (key_end + kKeys - 1) / kKeys};
  return t;
}

template <int kKeys>
__device__ __forceinline__ KeyBlock key_block(const QueryTile& t, int i) {
  KeyBlock b;
  const int before = t.prefix.count();
  b.prefix = i < before;
  const int block = b.prefix ? t.prefix.first + i : t.key.first + i - before;
  b.row = block * kKeys;
  b.number = b.prefix ? block : prefix_blocks<kKeys>(t.s) + block;
  b.position = b.prefix ? b.row : t.s.prefix + b.row;
  b.count = min(kKeys, (b.prefix ? t.s.prefix : t.s.num_keys) - b.row);
  return b;
}

// Where a row is in a tensor with such strides.
__device__ __forceinline__ int64_t element_of(const QueryTile& t, const AttentionLaunch& p, int64_t batch, int64_t head,
                                              int64_t row_stride, int row) {
  const int query = row / p.group, member = row - query * p.group;
  return t.s.batch * batch + (t.kv_head * p.group + member) * head + (t.s.first_query + query) * row_stride;
}

}  // namespace diffusion_runtime
