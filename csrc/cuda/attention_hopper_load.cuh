// The warp that asks the copy engine for keys and values, block after block, as stages become free.
#pragma once

#include "attention_hopper_tile.cuh"

namespace diffusion_runtime {

// Barriers of one kind of operand: a stage's contents are there, and have been read.
struct HopperRing {
  uint64_t *full, *empty;
};

// Asks for the block's rows; they arrive at `barrier`. All lanes take part.
template <class T, int kDim, int kKeys>
__device__ __forceinline__ void ask_for(const QueryTile& t, const KeyBlock& b, const HopperSource& from,
                                        Panels<T, kDim, kKeys>& to, uint64_t* barrier) {
  constexpr int kPanels = kDim / kPanel;
  const int lane = threadIdx.x % 32, boxes = (b.count + from.box_rows - 1) / from.box_rows;
  if (lane == 0) barrier_arrive_expect(barrier, unsigned(boxes * from.box_rows * kDim * int(sizeof(T))));
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < boxes * kPanels; i += 32) {
    const int panel = i % kPanels, box = i / kPanels * from.box_rows;
    int row = b.row + box, batch = b.prefix ? t.sequence : t.s.batch;
    if (from.page_table != nullptr && b.prefix) {
      const int page = row / from.page_size;
      batch = from.page_table[int64_t{t.sequence} * from.max_pages + page], row -= page * from.page_size;
    } else if (!b.prefix) {
      row += t.s.first_key;
    }
    load_tile(to.at[panel] + box * kPanel, from.map, barrier, panel * kPanel, row, t.kv_head * from.head_step,
              batch * from.batch_step);
  }
}

// Rows from `count` on are not the sequence's: as values they must be 0, because even a weight of 0 would let NaN pass.
template <class T, int kDim, int kKeys>
__device__ __forceinline__ void clear_end(Panels<T, kDim, kKeys>& values, int count) {
  constexpr int kChunks = 8;  // of 16 bytes in a row of a panel
  for (int panel = 0; panel < kDim / kPanel; ++panel)
#pragma unroll 1
    for (int i = count * kChunks + int(threadIdx.x % 32); i < kKeys * kChunks; i += 32)
      store_operand(values.at[panel] + i * (kPanel / kChunks), uint4{0, 0, 0, 0});
  async_proxy_fence();
}

template <class T, int kDim>
__device__ __forceinline__ void load_blocks(const HopperProblem& p, const QueryTile& t, HopperShared<T, kDim>& shared) {
  constexpr int kKeys = HopperSizes<kDim>::kKeys, kStages = HopperSizes<kDim>::kStages;
  const int blocks = t.blocks();
  int cleared = 0;
  for (int i = 0; i <= blocks; ++i) {  // in the order in which they are needed
    if (i < blocks) {
      const KeyBlock b = key_block<kKeys>(t, i);
      const int stage = i % kStages;
      barrier_wait(&shared.key_empty[stage], i / kStages % 2 ^ 1);
      ask_for(t, b, b.prefix ? p.prefix_key : p.key, shared.key[stage], &shared.key_full[stage]);
    }
    if (i == 0) continue;
    const KeyBlock b = key_block<kKeys>(t, i - 1);
    const int stage = (i - 1) % kStages;
    barrier_wait(&shared.value_empty[stage], (i - 1) / kStages % 2 ^ 1);
    const bool whole = b.count == kKeys;
    ask_for(t, b, b.prefix ? p.prefix_value : p.value, shared.value[stage],
            whole ? &shared.value_full[stage] : &shared.landed);
    if (whole) continue;
    barrier_wait(&shared.landed, cleared++ % 2);
    clear_end(shared.value[stage], b.count);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.value_full[stage]);
  }
}

}  // namespace diffusion_runtime
