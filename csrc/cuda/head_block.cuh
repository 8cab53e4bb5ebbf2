// One block of the fused head: the logits of kTokens tokens by kRows rows of hidden states, by tensor cores. Weights
// and hidden states pass through stages in shared memory, kDepth of dim at a time.
#pragma once

#include "tensor_core_ops.h"
#include "tile_part.cuh"

namespace diffusion_runtime {
namespace {

constexpr int kHeadThreads = 256, kHeadWarps = kHeadThreads / 32;
constexpr int kDepth = 64;                             // of dim in a stage: rows of 128 bytes
constexpr int kChunks = kDepth / 8;                    // of 16 bytes in such a row
constexpr int kLines = kHeadThreads / kChunks;         // such rows that the block copies at once
constexpr int kWarpTokens = 64, kWarpRows = 32;        // what one warp multiplies
constexpr int kSliceRows = 64;                         // rows by one tile of tokens whose logits are in shared memory
constexpr int kLogitStride = kTile + 4;                // so that the lanes of a warp store to 32 banks
constexpr size_t kSharedOfMultiprocessor = 163 << 10;  // that one block may have on sm_80

// Hidden states come from the second-level cache once for every kTokens tokens, so a block that takes few rows takes
// many tokens: otherwise that traffic, and not the weights from memory, would be what the kernel waits for. All stages
// but one are in flight: 80 KB with 64 rows, 96 KB with 128.
template <class T, int kRows_>
struct HeadBlock {
  static constexpr int kRows = kRows_;
  static constexpr int kTokens = kRows == 64 ? 256 : 128;
  static constexpr int kStages = kRows == 64 ? 3 : 4;
  static constexpr int kTokenWarps = kTokens / kWarpTokens;  // side by side; warps of one id % kTokenWarps share tokens
  static constexpr int kTilesOfBlock = kTokens / kTile;
  static constexpr int kSlices = kTilesOfBlock * (kRows / kSliceRows);
  static_assert(kTokenWarps * (kRows / kWarpRows) == kHeadWarps, "a warp for every part of the block");

  struct Shared {
    alignas(128) T weight[kStages][kTokens * kDepth];
    T hidden[kStages][kRows * kDepth];
    alignas(16) float logits[kSliceRows * kLogitStride];
  };
  static_assert(sizeof(Shared) <= kSharedOfMultiprocessor, "fits sm_80");
};

// The rows that are to be sampled: all, or those that were chosen.
struct Rows {
  const int* chosen;  // null: every row
  int count;
  __device__ __forceinline__ int operator[](int i) const { return chosen != nullptr ? chosen[i] : i; }
};

// Rows of 128 bytes; a chunk's place is turned by its row, so that eight rows of one column lie in different banks.
__device__ __forceinline__ int place(int row, int chunk) { return (row * kChunks + (chunk ^ row % 8)) * 8; }

// Where the copies are: at steps of dim of blocks of rows of blocks of tokens, in this order, ahead of the products.
template <class T, int kRows>
struct Copies {
  using Block = HeadBlock<T, kRows>;
  const SampleFromHidden& op;
  const Rows& rows;
  int steps, row_blocks, token_blocks;
  int step = 0, row_block = 0, token_block = blockIdx.x, stage = 0;
  int row[kRows / kLines] = {};  // of the hidden states that this thread copies; -1: none

  // The next step's weights and hidden states to the next stage. What is not there is zeros, and nothing is read:
  // behind the vocabulary, behind the rows, behind dim.
  __device__ __forceinline__ void copy_next(typename Block::Shared& shared) {
    if (token_block < token_blocks) {
      const int line = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
      if (step == 0) {
#pragma unroll
        for (int i = 0; i < kRows / kLines; ++i) {
          const int slot = row_block * kRows + line + i * kLines;
          row[i] = slot < rows.count ? rows[slot] : -1;
        }
      }
      const int column = step * kDepth + chunk * 8, token = token_block * Block::kTokens + line;
      const bool inside = column < op.dim;
      const T* weight = static_cast<const T*>(op.weight) + token * op.weight_stride + column;
#pragma unroll
      for (int i = 0; i < Block::kTokens / kLines; ++i) {
        async_copy_16(shared.weight[stage] + place(line + i * kLines, chunk), weight,
                      inside && token + i * kLines < op.vocab);
        weight += kLines * op.weight_stride;
      }
      const T* const hidden = static_cast<const T*>(op.hidden) + column;
#pragma unroll
      for (int i = 0; i < kRows / kLines; ++i)
        async_copy_16(shared.hidden[stage] + place(line + i * kLines, chunk), hidden + row[i] * op.hidden_stride,
                      inside && row[i] >= 0);
      advance();
    }
    async_copy_commit();  // an empty group when there is nothing left
  }

  __device__ __forceinline__ void advance() {
    stage = stage + 1 == Block::kStages ? 0 : stage + 1;
    if (++step < steps) return;
    step = 0;
    if (++row_block < row_blocks) return;
    row_block = 0;
    token_block += gridDim.x;
  }
};

// What one warp multiplies: fragments of 16 tokens by 8 rows.
struct WarpSums {
  float sum[kWarpTokens / 16][kWarpRows / 8][4];
};

// Adds the products of one stage, for the first kPairs pairs of fragments along the rows.
template <int kPairs, class T>
__device__ __forceinline__ void multiply_stage(WarpSums& sums, const T* weight, const T* hidden) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t a[kWarpTokens / 16][4];
#pragma unroll
    for (int m = 0; m < kWarpTokens / 16; ++m)
      load_matrices(a[m], weight + place(m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      uint32_t b[4];
      load_matrices(b, hidden + place(pair * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < kWarpTokens / 16; ++m) {
        multiply_add<T>(sums.sum[m][pair * 2], a[m], b[0], b[1]);
        multiply_add<T>(sums.sum[m][pair * 2 + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// The warp's sums to their places [row][token] in the slice of logits that holds them.
__device__ __forceinline__ void store_logits(const WarpSums& sums, float* logits) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kWarpTokens / 16; ++m) {
#pragma unroll
    for (int n = 0; n < kWarpRows / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = m * 16 + lane / 4 + i / 2 * 8, row = n * 8 + lane % 4 * 2 + i % 2;
        logits[row * kLogitStride + token] = sums.sum[m][n][i];
      }
    }
  }
}

}  // namespace
}  // namespace diffusion_runtime
