// How attention on Hopper is cut: tiles of query rows, blocks of keys, and what a block of threads shares.
#pragma once

#include "attention_arguments.h"
#include "hopper_products.h"

#ifndef ATTENTION_HOPPER_KEYS
#define ATTENTION_HOPPER_KEYS(dim) ((dim) <= 128 ? 128 : 64)
#define ATTENTION_HOPPER_CHUNK 8
#endif

namespace diffusion_runtime {

constexpr int kWarpgroup = 128, kWarpgroupRows = 64, kPanel = 64;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kTileRows = kConsumers * kWarpgroupRows;
constexpr int kHopperThreads = (1 + kConsumers) * kWarpgroup;
// of a thread: 168 at the launch, 40 + 2 * 232 = 3 * 168
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

template <int kDim>
struct HopperSizes {
  static constexpr int kPanels = kDim / kPanel;
  static constexpr int kKeys = ATTENTION_HOPPER_KEYS(kDim);  // of a block
  // Blocks of a chunk: each is summed apart, from nothing, and then added to those before, whether one block of threads
  // does all of a tile or each does a chunk. 0: there is no room for a second sum, all is one chunk.
  static constexpr int kChunk = kDim <= 128 ? ATTENTION_HOPPER_CHUNK : 0;
  static constexpr int kSums = kDim / 2;              // of a thread
  static constexpr int kStages = kDim == 64 ? 4 : 2;  // of keys and of values, as many as fit
};

// One operand, its columns in panels of 64.
template <class T, int kDim, int kRows>
struct Panels {
  T at[kDim / kPanel][kRows * kPanel];
};

template <class T, int kDim>
struct alignas(1024) HopperShared {
  static constexpr int kKeys = HopperSizes<kDim>::kKeys, kStages = HopperSizes<kDim>::kStages;
  Panels<T, kDim, kWarpgroupRows> query[kConsumers];
  Panels<T, kDim, kKeys> key[kStages], value[kStages];
  uint64_t key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
  float total[HopperSizes<kDim>::kChunk > 0 ? kConsumers * HopperSizes<kDim>::kSums * kWarpgroup : 1];  // of chunks
  unsigned is_last[kConsumers];
  uint64_t landed;  // of a block of values whose end is overwritten before it is handed on
};

// Where keys or values come from. A dense source is as one page per sequence.
struct HopperSource {
  TensorMap map;
  int page_size;              // rows of a page
  int box_rows;               // of a copy; pages and blocks of keys are multiples of it
  int head_step, batch_step;  // 0 where all heads, all sequences, have the same rows
  const int32_t* page_table;  // null: dense
  int max_pages;              // of a sequence in the table
};

// Everything a launch is given.
struct HopperProblem {
  HopperSource key, value, prefix_key, prefix_value;
  AttentionArguments a;
  int group;   // heads that share one of keys and values
  int chunks;  // of a tile, each done by a block of threads; 0: all are done by one
  void* workspace;
  int tiles;           // of a sequence and one such head
  float factor;        // of the scores before what follows, if they are softcapped; 0 otherwise
  float unit;          // the factor behind: 2 to the scores times unit are weights
  bool negated, zero;  // the queries: the scale's sign, or a scale of 0
};

// Some blocks of a segment, from `first` to before `end`.
struct HopperSpan {
  int first, end;

  __device__ __forceinline__ int count() const { return end > first ? end - first : 0; }
  __device__ __forceinline__ void limit(int low, int high) { first = max(first, low), end = min(end, high); }
};

// The rows of one block of threads: of a sequence and a head of keys, ordered by query and then by head of the group.
struct HopperTile {
  AttentionSequence s;
  int sequence, kv_head;
  int first, rows;         // the first row of the tile; the sequence has this many
  HopperSpan prefix, key;  // blocks that some row sees

  __device__ __forceinline__ int blocks() const { return prefix.count() + key.count(); }
};

// Keys that stand beside each other: the block's row `row` of their segment is at `position`, and `count` are real.
struct HopperBlock {
  bool prefix;
  int row, position, count;
  int number;  // of all the sequence's blocks, seen or not
};

// What rows [first, last] of a sequence see: some of them, and all of them. Bounds do not fall from query to query.
struct RowsRange {
  KeyRange some, all;
};
__device__ __forceinline__ RowsRange rows_range(const HopperProblem& p, const AttentionSequence& s, int first,
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
template <int kKeys>
__device__ __forceinline__ HopperTile hopper_tile(const HopperProblem& p, unsigned index) {
  HopperTile t;
  t.first = (p.tiles - 1 - int(index % unsigned(p.tiles))) * kTileRows;
  const unsigned heads = index / unsigned(p.tiles);
  t.kv_head = int(heads % unsigned(p.a.kv_heads));
  t.sequence = int(heads / unsigned(p.a.kv_heads));
  t.s = attention_sequence(p.a, t.sequence);
  t.rows = t.s.num_queries * p.group;
  t.prefix = t.key = {0, 0};
  if (t.first >= t.rows) return t;
  const KeyRange seen = rows_range(p, t.s, t.first, min(t.first + kTileRows, t.rows) - 1).some;
  const int prefix_end = min(seen.high, t.s.prefix), key_low = max(seen.low - t.s.prefix, 0);
  const int key_end = seen.high - t.s.prefix;
  if (prefix_end > seen.low) t.prefix = {seen.low / kKeys, (prefix_end + kKeys - 1) / kKeys};
  if (key_end > key_low) t.key = {key_low / kKeys, (key_end + kKeys - 1) / kKeys};
  return t;
}

template <int kKeys>
__device__ __forceinline__ HopperBlock hopper_block(const HopperTile& t, int i) {
  HopperBlock b;
  const int before = t.prefix.count();
  b.prefix = i < before;
  const int block = b.prefix ? t.prefix.first + i : t.key.first + i - before;
  b.row = block * kKeys;
  b.number = b.prefix ? block : prefix_blocks<kKeys>(t.s) + block;
  b.position = b.prefix ? b.row : t.s.prefix + b.row;
  b.count = min(kKeys, (b.prefix ? t.s.prefix : t.s.num_keys) - b.row);
  return b;
}

}  // namespace diffusion_runtime
