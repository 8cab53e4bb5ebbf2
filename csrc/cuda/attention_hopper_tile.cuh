// What attention on Hopper is given, and what a block of threads shares.
#pragma once

#include "attention_tile.cuh"
#include "hopper_products.h"

#ifndef ATTENTION_HOPPER_KEYS
#define ATTENTION_HOPPER_KEYS(dim) ((dim) <= 128 ? 128 : 64)
#define ATTENTION_HOPPER_CHUNK 8
#endif

namespace diffusion_runtime {

constexpr int kPanel = 64;
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
struct HopperProblem : AttentionLaunch {
  HopperSource key, value, prefix_key, prefix_value;
};

}  // namespace diffusion_runtime
