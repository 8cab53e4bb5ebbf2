// The softmax of a warpgroup's rows: of the 64, a thread has two, and of their scores every fourth pair.
#pragma once

#include "attention_tile.cuh"
#include "row_statistics.h"

namespace diffusion_runtime {

// What is known of some keys, relative to the largest score among them: their weights' sum, and beside it the sums of
// values.
struct AttentionPart {
  float largest[2];  // times unit; -inf: none of the keys is seen
  float sum[2];

  // Takes in another part; both sums of values are to be multiplied by these.
  __device__ __forceinline__ void merge(const AttentionPart& other, float (&keep)[2], float (&take)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float most = fmaxf(largest[r], other.largest[r]), base = most == -INFINITY ? 0 : most;
      keep[r] = fast_exp2(largest[r] - base), take[r] = fast_exp2(other.largest[r] - base);
      largest[r] = most, sum[r] = fmaf(sum[r], keep[r], other.sum[r] * take[r]);
    }
  }
};

// softcap tanh(factor score), within some 2^-22 of the softcap: two of the fast operations, and no branch as in tanhf.
__device__ __forceinline__ float capped(float score, float factor, float softcap) {
  const float e = fast_exp2(fabsf(score) * (factor * (-2 * kLog2e)));
  return copysignf(__fdividef(fmaf(-softcap, e, softcap), 1 + e), score);
}

struct NoMask {
  template <class Scores, class Rows>
  __device__ __forceinline__ void operator()(Scores&, const Rows&, const KeyBlock&) const {}
};

struct AttentionRows {
  int row[2];          // of the sequence, ordered as the tile's are; may be past the last
  KeyRange seen[2];    // by each
  KeyRange all;        // by all 16 rows of the warp
  AttentionPart part;  // of this chunk so far; of a row's sum, what this thread has of it
  float rescale[2];    // of what stands for the blocks before, at the last one

  __device__ __forceinline__ void begin(const AttentionLaunch& p, const QueryTile& t, int warpgroup) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int first = t.first + warpgroup * kWarpgroupRows + warp * 16;
    all = rows_range(p, t.s, min(first, t.rows - 1), min(first + 15, t.rows - 1)).all;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row[r] = first + lane / 4 + r * 8;
      seen[r] = attention_range(p.a, t.s, min(row[r], t.rows - 1) / p.group);
    }
    part = no_part();
  }

  // Scores of keys that are not seen become -inf.
  template <int kScores>
  __device__ __forceinline__ void hide(float (&scores)[kScores], const KeyBlock& b) const {
    const int end = b.position + b.count;
    if (all.low <= b.position && end <= all.high && b.count == 2 * kScores) return;
    const int first = b.position + threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int low = seen[r].low - first, high = min(seen[r].high, end) - first;
#pragma unroll
      for (int i = 2 * r; i < kScores; i += 4)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = i / 4 * 8 + j;
          if (column < low || column >= high) scores[i + j] = -INFINITY;
        }
    }
  }

  // Scores become weights, relative to the largest score so far: as all of a row's are relative to one number, it
  // does not matter that this number is rounded. A mask tensor is applied before.
  template <int kScores, class Mask = NoMask>
  __device__ __forceinline__ void weigh(float (&scores)[kScores], const AttentionLaunch& p, const KeyBlock& b,
                                        const Mask& mask = {}) {
    if (p.a.softcap > 0) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) scores[i] = capped(scores[i], p.factor, p.a.softcap);
    }
    mask(scores, *this, b);
    hide(scores, b);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = scores[2 * r];
#pragma unroll
      for (int i = 2 * r; i < kScores; i += 4) most = fmaxf(fmaxf(most, scores[i]), scores[i + 1]);
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      most = fmaxf(part.largest[r], most * p.unit);
      const float base = most == -INFINITY ? 0 : most;
      rescale[r] = fast_exp2(part.largest[r] - base);
      part.largest[r] = most;
      part.sum[r] *= rescale[r];
#pragma unroll
      for (int i = 2 * r; i < kScores; i += 4) {
        scores[i] = fast_exp2(fmaf(scores[i], p.unit, -base));
        scores[i + 1] = fast_exp2(fmaf(scores[i + 1], p.unit, -base));
        part.sum[r] += scores[i] + scores[i + 1];
      }
    }
  }

  template <int kSums>
  __device__ __forceinline__ void rescale_sums(float (&sums)[kSums]) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] *= rescale[i / 2 % 2];
  }

  // Behind a chunk's last block: the part with the sums of whole rows; the next chunk begins with none.
  __device__ __forceinline__ AttentionPart end_chunk() {
    AttentionPart whole = part;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      whole.sum[r] += __shfl_xor_sync(~0u, whole.sum[r], 1);
      whole.sum[r] += __shfl_xor_sync(~0u, whole.sum[r], 2);
    }
    part = no_part();
    return whole;
  }

  static __device__ __forceinline__ AttentionPart no_part() { return {{-INFINITY, -INFINITY}, {0, 0}}; }
};

}  // namespace diffusion_runtime
