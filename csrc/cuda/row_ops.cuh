// What the kernels that sample rows have in common.
#pragma once

#include "gpu_ops.h"
#include "row_statistics.h"
#include "sample_tokens.cuh"

namespace diffusion_runtime {
namespace {

constexpr int kNone = 0x7FFFFFFF;  // comes after every token
constexpr float kLowestExponent = -126.0f;

// What is known of some tokens of a row, and which of them is the best.
struct alignas(16) FoundPart {
  RowPart part;
  int argmax;  // lowest token with part.max; kNone if no token compares equal to it
};
static_assert(sizeof(FoundPart) == 32, "one sector of memory");

__host__ __device__ __forceinline__ int tiles_of(int64_t vocab) { return int((vocab + kTile - 1) / kTile); }

template <class X>
__device__ __forceinline__ X at(const PerRow<X>& setting, int64_t r) {
  return setting.values != nullptr ? setting.values[r] : setting.value;
}

template <class X, class Combine>
__device__ __forceinline__ X over_warp(X x, const Combine& combine) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) x = combine(x, __shfl_xor_sync(~0u, x, bit));
  return x;
}
template <class X>
__device__ __forceinline__ X max_over_warp(X x) {
  return over_warp(x, [](X a, X b) { return max(a, b); });
}
template <class X>
__device__ __forceinline__ X sum_over_warp(X x) {
  return over_warp(x, [](X a, X b) { return a + b; });
}

// (y - top) * scale: the difference first, because a product of two large numbers would round away what they differ by.
__device__ __forceinline__ float exponent(float y, float top, float scale) { return (y - top) * scale; }

// Finite, so that a logit of 0 stays 0.
__device__ __forceinline__ float finite_inverse(float x) { return fminf(1 / x, 3.0e38f); }

__device__ __forceinline__ float softcapped(float x, float softcap, float inverse_softcap) {
  return softcap > 0 && x != -INFINITY ? softcap * tanhf(x * inverse_softcap) : x;
}

// How one row is to be read.
struct Reading {
  RowScales scales;
  float inverse_softcap;
  bool two_masses;  // the draw has a temperature of its own

  __device__ __forceinline__ float softcapped(float x) const {
    return diffusion_runtime::softcapped(x, scales.softcap, inverse_softcap);
  }
};

template <class Op>
__device__ __forceinline__ Reading reading_of(const Op& op, int64_t r) {
  const float temperature = at(op.temperature, r);
  Reading row;
  row.scales.statistics = scale_of_temperature(at(op.statistics_temperature, r));
  row.scales.draw = temperature > 0 ? scale_of_temperature(temperature) : 0;
  row.scales.softcap = op.softcap;
  row.inverse_softcap = finite_inverse(op.softcap);
  row.two_masses = row.scales.draw > 0 && row.scales.draw != row.scales.statistics;
  return row;
}

struct RowSample {
  int64_t token, argmax;
  RowResult statistics;
};

__device__ __forceinline__ RowSample no_distribution() { return {-1, -1, {NAN, NAN, NAN, NAN, NAN}}; }

template <class Op>
__device__ __forceinline__ void store(const Op& op, int64_t r, const RowSample& sample) {
  op.ids[r] = sample.token;
  op.ids[op.rows + r] = sample.argmax;
  const RowResult& s = sample.statistics;
  const float values[] = {s.logprob, s.confidence, s.margin, s.entropy, s.logsumexp};
#pragma unroll
  for (int i = 0; i < 5; ++i) op.statistics[i * op.rows + r] = values[i];
}

// Takes in the largest logits of other tokens; the sums are left as they are.
__device__ __forceinline__ void merge_largest(FoundPart& into, const FoundPart& other) {
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
