// Where top-k and top-p cut a row: the smallest logit that stays. A cut by value takes equal logits together.
//
// The tokens are counted, or weighed, in bins; the bin in which the sum from the largest on reaches its target is cut
// up again until it holds a single value. All sums are of integers, so the order of the threads does not matter.
#pragma once

#include "row_tiles.cuh"

namespace diffusion_runtime {
namespace {

#ifndef RESTRICTED_DRAW_THREADS
#define RESTRICTED_DRAW_THREADS 512  // at most 128 registers each
#endif
constexpr int kDrawThreads = RESTRICTED_DRAW_THREADS;
constexpr int kDrawWarps = kDrawThreads / 32;
constexpr int kBinsOfThread = 4, kBins = kBinsOfThread * kDrawThreads;
constexpr float kBinsPerUnit = 32;  // of z: the first bins reach to weights of 2^-64

struct CutShared {
  // 64-bit sums as halves: shared memory adds 32 bits at a time
  unsigned low[kBins], high[kBins];
  uint64_t warp_sum[kDrawWarps];
  uint64_t above;
  int bin;
};

__device__ __forceinline__ void clear_bins(CutShared& shared) {
  for (int i = threadIdx.x; i < kBins; i += kDrawThreads) shared.low[i] = shared.high[i] = 0;
  __syncthreads();
}

__device__ __forceinline__ void add_to_bin(CutShared& shared, int bin, uint64_t amount) {
  const unsigned low = unsigned(amount), before = atomicAdd(&shared.low[bin], low);
  const unsigned high = unsigned(amount >> 32) + (before + low < before);
  if (high != 0) atomicAdd(&shared.high[bin], high);
}

struct Found {
  int bin;          // kBins: none
  uint64_t above;   // the sum over the bins before it
  uint64_t target;  // what the sum has reached with it
};

// The first bin with which the sum over bins, beginning with `above`, reaches target_of(the whole sum).
template <class Target>
__device__ __forceinline__ Found find_bin(CutShared& shared, uint64_t above, const Target& target_of) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto sum_of_bin = [&](int bin) { return uint64_t{shared.high[bin]} << 32 | shared.low[bin]; };
  __syncthreads();
  uint64_t bins[kBinsOfThread], of_thread = 0;
#pragma unroll
  for (int i = 0; i < kBinsOfThread; ++i) of_thread += bins[i] = sum_of_bin(kBinsOfThread * threadIdx.x + i);
  uint64_t upto = of_thread;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, upto, distance);
    if (lane >= distance) upto += other;
  }
  if (lane == 31) shared.warp_sum[warp] = upto;
  if (threadIdx.x == 0) shared.bin = kBins;
  __syncthreads();
  uint64_t total = above, before = above;
  for (int w = 0; w < kDrawWarps; ++w) {
    if (w == warp) before = total;
    total += shared.warp_sum[w];
  }
  const uint64_t target = target_of(total);
  before += upto - of_thread;
#pragma unroll
  for (int i = 0; i < kBinsOfThread; ++i) {
    if (before < target && target <= before + bins[i]) {
      shared.bin = kBinsOfThread * threadIdx.x + i;
      shared.above = before;
    }
    before += bins[i];
  }
  __syncthreads();
  return {shared.bin, shared.above, target};
}

// The first bins: equal steps of the logit downwards from the largest, the last one without end.
struct LogitBins {
  float top, per_unit;

  __device__ __forceinline__ int of(float x) const {
    const float place = (top - x) * per_unit;
    return place < kBins - 1 ? int(place) : kBins - 1;
  }

  // The smallest key in bins 0 to `bin`; a warp looks at 32 keys at a time.
  __device__ __forceinline__ uint32_t smallest_key(int bin) const {
    uint32_t low = kNoKey + 1, high = key_of(top);
    while (low < high) {
      const uint32_t step = (high - low) / 32 + 1, key = min(low + (threadIdx.x % 32) * step, high);
      const unsigned inside = __ballot_sync(~0u, of(logit_of(key)) <= bin);
      const int lane = inside != 0 ? __ffs(int(inside)) - 1 : 32;
      const uint32_t first = low;
      if (lane < 32) high = min(first + lane * step, high);
      if (lane > 0) low = min(first + (lane - 1) * step + 1, high);
    }
    return low;
  }
};

// The key of the logit with which the amounts of the tokens, from the largest logit on, reach target_of(the amount of
// all); only keys from `lowest` on count. kNoKey if the target is never reached. Amounts below `negligible` may be so
// called only if the others reach the target: they are added up apart, without the bins' atomics.
template <class T, class Amount, class Target>
__device__ __forceinline__ uint32_t find_cutoff(const Row<T>& row, const uint32_t* tile_keys, uint32_t lowest,
                                                const LogitBins& bins, uint64_t negligible, CutShared& shared,
                                                const Amount& amount_of, const Target& target_of) {
  const auto add_tokens = [&](uint32_t low, uint32_t high, uint64_t least, const auto& bin_of) {
    clear_bins(shared);
    uint64_t rest = 0;
    for_each_span<kDrawWarps>(row, tile_keys, low, [&](int, const float (&logits)[Vector16<T>::kSize]) {
#pragma unroll
      for (const float x : logits) {
        const uint32_t key = key_of(x);
        if (key < low || key > high) continue;
        const uint64_t amount = amount_of(x);
        if (amount < least)
          rest += amount;
        else
          add_to_bin(shared, bin_of(x, key), amount);
      }
    });
    rest = sum_over_warp(rest);
    if (rest != 0 && threadIdx.x % 32 == 0) add_to_bin(shared, kBins - 1, rest);
  };
  uint32_t high = key_of(bins.top);
  add_tokens(lowest, high, max(negligible, uint64_t{1}), [&](float x, uint32_t) { return bins.of(x); });
  Found found = find_bin(shared, 0, target_of);
  if (found.bin == kBins) return kNoKey;
  uint32_t low = max(lowest, bins.smallest_key(found.bin));
  if (found.bin > 0) high = bins.smallest_key(found.bin - 1) - 1;
  while (low < high) {
    const uint32_t wide = (high - low) / kBins;
    const int shift = wide == 0 ? 0 : 32 - __clz(int(wide));
    add_tokens(low, high, 1, [&](float, uint32_t key) { return int((high - key) >> shift); });
    found = find_bin(shared, found.above, [&](uint64_t) { return found.target; });
    high -= uint32_t(found.bin) << shift;
    low = high - min(high - low, (1u << shift) - 1);
  }
  return low;
}

// No fewer than `count` tiles hold a logit from this key on, so it is a first guess at the cut of top_k.
template <class T>
__device__ __forceinline__ uint32_t key_of_large_tiles(const Row<T>& row, const uint32_t* tile_keys, int64_t count,
                                                       const LogitBins& bins, CutShared& shared) {
  const int num_tiles = tiles_of(row.vocab);
  if (count > num_tiles) return kNoKey + 1;
  clear_bins(shared);
  for (int tile = threadIdx.x; tile < num_tiles; tile += kDrawThreads)
    if (tile_keys[tile] > kNoKey) add_to_bin(shared, bins.of(logit_of(tile_keys[tile])), 1);
  const Found found = find_bin(shared, 0, [&](uint64_t) { return uint64_t(count); });
  return found.bin == kBins ? kNoKey + 1 : bins.smallest_key(found.bin);
}

}  // namespace
}  // namespace diffusion_runtime
