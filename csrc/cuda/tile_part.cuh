// What is kept of one row in one tile of 128 tokens, found by eight lanes of a warp, and where it is kept.
#pragma once

#include "row_ops.cuh"
#include "sample_from_hidden.cuh"

namespace diffusion_runtime {
namespace {

// A warp reduces four tiles at once, which takes a quarter of the shuffles that one after the other would.
constexpr int kPartLanes = 8, kPartsOfWarp = 32 / kPartLanes;
constexpr int kFour = 4;                            // consecutive tokens
constexpr int kFours = kTile / kPartLanes / kFour;  // of a lane
constexpr int kFourStride = kPartLanes * kFour;     // from one of them to the next
static_assert(kFourStride == 32, "one word of `allowed` for each four of a lane");

using TilePart = FoundPart;

// The workspace: the parts [rows, tiles]; then, where rows are chosen by `masked`, their number and their indices.
__host__ __device__ __forceinline__ TilePart* parts_of(const SampleFromHidden& op) {
  return static_cast<TilePart*>(op.workspace);
}
__host__ __device__ __forceinline__ int* chosen_of(const SampleFromHidden& op) {
  return reinterpret_cast<int*>(parts_of(op) + op.rows * tiles_of(op.vocab));
}

// The first of a lane's tokens in a tile. The others follow at f * kFourStride + i.
__device__ __forceinline__ int first_of_lane() { return threadIdx.x % kPartLanes * kFour; }

// One bit for each of the lane's tokens: whether its logit counts. The others are not there, or not allowed.
__device__ __forceinline__ unsigned counting_tokens(const SampleFromHidden& op, int64_t r, int tile) {
  unsigned counting = 0;
#pragma unroll
  for (int f = 0; f < kFours; ++f) {
    const int token = tile * kTile + f * kFourStride + first_of_lane(), there = int(op.vocab) - token;
    if (there <= 0) break;
    unsigned four = there < kFour ? (1u << there) - 1 : (1u << kFour) - 1;
    if (op.allowed != nullptr)
      four &= static_cast<unsigned>(__ldg(op.allowed + r * op.allowed_stride + token / 32)) >> token % 32;
    counting |= four << f * kFour;
  }
  return counting;
}

template <class X, class Combine>
__device__ __forceinline__ X over_part(X x, const Combine& combine) {
#pragma unroll
  for (int bit = kPartLanes / 2; bit > 0; bit /= 2) x = combine(x, __shfl_xor_sync(~0u, x, bit));
  return x;
}

// Of the logits x of a tile, as they are spread over eight lanes. Called by whole warps: four tiles at once.
__device__ __forceinline__ TilePart part_of_tile(const Reading& row, const float (&x)[kFours * kFour], int tile) {
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  const auto sum = [](float a, float b) { return a + b; };
  float max = -INFINITY, second = -INFINITY;
#pragma unroll
  for (int i = 0; i < kFours * kFour; ++i) max = fmaxf(max, x[i]);
  max = over_part(max, larger);
  int place = kNone;
#pragma unroll
  for (int i = kFours * kFour - 1; i >= 0; --i)
    place = x[i] == max ? i / kFour * kFourStride + first_of_lane() + i % kFour : place;
  place = over_part(place, [](int a, int b) { return min(a, b); });
#pragma unroll
  for (int i = 0; i < kFours * kFour; ++i)
    second = i / kFour * kFourStride + first_of_lane() + i % kFour == place ? second : fmaxf(second, x[i]);

  TilePart found;
  found.part.max = max;
  found.part.second = over_part(second, larger);
  found.part.top = max == -INFINITY ? 0 : row.softcapped(max);
  found.argmax = place == kNone ? kNone : tile * kTile + place;
  float mass = 0, moment = 0, draw_mass = 0;
#pragma unroll
  for (int i = 0; i < kFours * kFour; ++i) {
    const float y = row.softcapped(x[i]), z = exponent(y, found.part.top, row.scales.statistics), w = fast_exp2(z);
    mass += w;
    moment += fmaxf(z, kLowestExponent) * w;  // a z of -inf has weight 0
    if (row.two_masses) draw_mass += fast_exp2(exponent(y, found.part.top, row.scales.draw));
  }
  found.part.mass = over_part(mass, sum);
  found.part.moment = over_part(moment, sum);
  found.part.draw_mass = over_part(row.two_masses ? draw_mass : mass, sum);
  return found;
}

}  // namespace
}  // namespace diffusion_runtime
