// What is kept of one row in one tile of 128 tokens, found by one warp, and where it is kept.
#pragma once

#include "row_ops.cuh"
#include "sample_from_hidden.cuh"

namespace diffusion_runtime {
namespace {

constexpr int kLaneTokens = kTile / 32;  // consecutive ones

struct alignas(16) TilePart {
  RowPart part;
  int argmax;  // lowest token with part.max; kNone if no token compares equal to it
};
static_assert(sizeof(TilePart) == 32, "one sector of memory");

// The workspace: the parts [rows, tiles]; then, where rows are chosen by `masked`, their number and their indices.
__host__ __device__ __forceinline__ int tiles_of(int64_t vocab) { return int((vocab + kTile - 1) / kTile); }
__host__ __device__ __forceinline__ TilePart* parts_of(const SampleFromHidden& op) {
  return static_cast<TilePart*>(op.workspace);
}
__host__ __device__ __forceinline__ int* chosen_of(const SampleFromHidden& op) {
  return reinterpret_cast<int*>(parts_of(op) + op.rows * tiles_of(op.vocab));
}

// One bit for each of the lane's tokens: whether its logit counts. The others are not there, or not allowed.
__device__ __forceinline__ unsigned counting_tokens(const SampleFromHidden& op, int64_t r, int tile) {
  const int token = tile * kTile + int(threadIdx.x % 32) * kLaneTokens, there = int(op.vocab) - token;
  if (there <= 0) return 0;
  const unsigned all = there < kLaneTokens ? (1u << there) - 1 : (1u << kLaneTokens) - 1;
  if (op.allowed == nullptr) return all;
  return all & static_cast<unsigned>(__ldg(op.allowed + r * op.allowed_stride + token / 32)) >> token % 32;
}

// Of the logits x of a tile, of which lane l has those from 4 l on.
__device__ __forceinline__ TilePart part_of_tile(const Reading& row, const float (&x)[kLaneTokens], int tile) {
  const int first_of_lane = threadIdx.x % 32 * kLaneTokens;
  float max = -INFINITY, second = -INFINITY;
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) max = fmaxf(max, x[i]);
  max = max_over_warp(max);
  int place = kNone;
#pragma unroll
  for (int i = kLaneTokens - 1; i >= 0; --i) place = x[i] == max ? first_of_lane + i : place;
  place = __reduce_min_sync(~0u, place);
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) second = first_of_lane + i == place ? second : fmaxf(second, x[i]);

  TilePart found;
  found.part.max = max;
  found.part.second = max_over_warp(second);
  found.part.top = max == -INFINITY ? 0 : row.softcapped(max);
  found.argmax = place == kNone ? kNone : tile * kTile + place;
  float mass = 0, moment = 0, draw_mass = 0;
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    const float y = row.softcapped(x[i]), z = exponent(y, found.part.top, row.scales.statistics), w = fast_exp2(z);
    mass += w;
    moment += fmaxf(z, kLowestExponent) * w;  // a z of -inf has weight 0
    if (row.two_masses) draw_mass += fast_exp2(exponent(y, found.part.top, row.scales.draw));
  }
  found.part.mass = sum_over_warp(mass);
  found.part.moment = sum_over_warp(moment);
  found.part.draw_mass = row.two_masses ? sum_over_warp(draw_mass) : found.part.mass;
  return found;
}

// Takes in the largest logits of other tokens; the sums are left as they are.
__device__ __forceinline__ void merge_largest(TilePart& into, const TilePart& other) {
  RowPart& a = into.part;
  const RowPart& b = other.part;
  a.second = fmaxf(fminf(a.max, b.max), fmaxf(a.second, b.second));
  if (b.max > a.max || (b.max == a.max && other.argmax < into.argmax)) {
    a.max = b.max;
    a.top = b.top;
    into.argmax = other.argmax;
  }
}

}  // namespace
}  // namespace diffusion_runtime
