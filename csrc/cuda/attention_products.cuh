// Tiles of attention in shared memory, and what a warp makes of them: scores of its 16 rows, and sums of values.
#pragma once

#include <type_traits>

#include "attention_tile.cuh"
#include "tensor_core_ops.h"

#ifndef ATTENTION_KEYS
#define ATTENTION_KEYS(dim, bytes) ((dim) > 256 || (dim) * (bytes) > 512 ? 16 : (dim) * (bytes) > 128 ? 32 : 64)
#define ATTENTION_CHUNK 1024
#endif

namespace diffusion_runtime {

template <class T, int kDim>
struct AttentionSizes {
  // Warpgroups that share the rows; each sums some of the columns of values, and the scores are computed by each.
  static constexpr int kGroups = kDim * int(sizeof(T)) > 512 ? 2 : 1;
  static constexpr int kThreads = kGroups * kWarpgroup;
  static constexpr int kColumns = kDim / kGroups;
  static constexpr int kSums = kColumns / 2;  // of a thread
  static constexpr int kKeys = ATTENTION_KEYS(kDim, int(sizeof(T)));
  // Blocks of a chunk, as in HopperSizes. 0: there is no room for a second sum, all is one chunk.
  static constexpr int kChunk = kDim * int(sizeof(T)) <= 512 ? (ATTENTION_CHUNK + kKeys - 1) / kKeys : 0;
};

template <class T, int kDim>
struct AttentionShared {
  using Sizes = AttentionSizes<T, kDim>;
  static constexpr bool kExact = std::is_same<T, float>::value;
  T query[kWarpgroupRows * kDim];
  T key[2][Sizes::kKeys * kDim], value[2][Sizes::kKeys * kDim];
  float total[Sizes::kChunk > 0 ? Sizes::kSums * kWarpgroup : 1];                    // of chunks
  float weights[kExact ? Sizes::kGroups * kWarpgroupRows * (Sizes::kKeys + 4) : 1];  // of each warp's rows
  unsigned is_last;
};

// A row's 16 bytes number `chunk`; turned by the row, so that eight rows of one column lie in different banks.
template <class T, int kDim>
__device__ __forceinline__ int place(int row, int chunk) {
  constexpr int kSize = Vector16<T>::kSize, kChunks = kDim / kSize;
  return (row * kChunks + (chunk ^ row % 8)) * kSize;
}

// Row `first` and the 15 behind it, with every key: of a thread, rows lane / 4 and that + 8, and of each eight columns
// the pair lane % 4.
template <class T, int kDim, int kKeys>
__device__ __forceinline__ void multiply_keys(float (&scores)[kKeys / 2], const T* query, int first, const T* key) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) scores[i] = 0;
#pragma unroll 4
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[4];
    load_matrices(a, query + place<T, kDim>(first + lane % 16, k * 2 + lane / 16));
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      uint32_t b[4];
      load_matrices(b, key + place<T, kDim>(n * 8 + matrix / 2 * 8 + row, k * 2 + matrix % 2));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float (&c)[4] = *reinterpret_cast<float (*)[4]>(&scores[(n + m) * 4]);
        multiply_add<T>(c, a, b[2 * m], b[2 * m + 1]);
      }
    }
  }
}

// sums += weights values, in the columns from `column` on.
template <class T, int kDim, int kKeys, int kSums>
__device__ __forceinline__ void multiply_values(float (&sums)[kSums], const float (&weights)[kKeys / 2], const T* value,
                                                int column) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = narrowed_pair<T>(weights[k * 8 + 2 * i], weights[k * 8 + 2 * i + 1]);
#pragma unroll
    for (int n = 0; n < kSums / 4; n += 2) {
      uint32_t b[4];
      load_matrices_turned(b, value + place<T, kDim>(k * 16 + matrix % 2 * 8 + row, column / 8 + n + matrix / 2));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float (&c)[4] = *reinterpret_cast<float (*)[4]>(&sums[(n + m) * 4]);
        multiply_add<T>(c, a, b[2 * m], b[2 * m + 1]);
      }
    }
  }
}

// The same in float32, number by number: no tensor core keeps all its bits.
template <int kDim>
__device__ __forceinline__ Vector16<float> vector_at(const float* tile, int row, int chunk) {
  return as_vector<float>(load_aligned<uint4>(tile + place<float, kDim>(row, chunk)));
}

template <int kDim, int kKeys>
__device__ __forceinline__ void multiply_keys_exactly(float (&scores)[kKeys / 2], const float* query, int first,
                                                      const float* key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) scores[i] = 0;
#pragma unroll 1
  for (int k = 0; k < kDim / 4; ++k) {
    Vector16<float> q[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) q[r] = vector_at<kDim>(query, first + lane / 4 + 8 * r, k);
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 4)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Vector16<float> column = vector_at<kDim>(key, i / 4 * 8 + lane % 4 * 2 + j, k);
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            scores[i + 2 * r + j] = fmaf(q[r].element[e], column.element[e], scores[i + 2 * r + j]);
      }
  }
}

// Through `memory`, the warp's own, because a thread has only some of a row's weights; the block meets before the next.
template <int kDim, int kKeys, int kSums>
__device__ __forceinline__ void multiply_values_exactly(float (&sums)[kSums], const float (&weights)[kKeys / 2],
                                                        const float* value, int column, float* memory) {
  constexpr int kRow = kKeys + 4;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i)
    memory[(lane / 4 + i / 2 % 2 * 8) * kRow + i / 4 * 8 + lane % 4 * 2 + i % 2] = weights[i];
  __syncwarp();
#pragma unroll 1
  for (int k = 0; k < kKeys; ++k) {
    const float weight[2] = {memory[lane / 4 * kRow + k], memory[(lane / 4 + 8) * kRow + k]};
#pragma unroll
    for (int i = 0; i < kSums; i += 4) {
      const int at = column + i / 4 * 8 + lane % 4 * 2;
      const float* const pair = value + place<float, kDim>(k, at / 4) + at % 4;
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int j = 0; j < 2; ++j) sums[i + 2 * r + j] = fmaf(weight[r], pair[j], sums[i + 2 * r + j]);
    }
  }
}

}  // namespace diffusion_runtime
