// One chunk of a row of logits, read once by one block. Which thread sums which tokens, and in which order, follows
// from token ids alone.
#pragma once

#include "row_tiles.cuh"

namespace diffusion_runtime {
namespace {

constexpr int kBlocksPerMultiprocessor = 6;  // so at most 80 registers a thread

constexpr int kWarps = kThreads / 32;
constexpr int kTiles = kChunk / kTile;
static_assert(kChunk % kTile == 0 && kThreads % 32 == 0, "whole tiles and warps");

template <class T>
struct Shared {
  alignas(16) T logits[kChunk];
  float warp_max[kWarps];
  ChunkPart warps[kWarps];
  RowTotals totals[kThreads];  // of chunks, relative to the largest of the row
  float tile_mass[kTiles];
  float weight[kTile];
  bool is_last;
};

// Copies with all threads of the block; each asks for several elements before it uses the first.
template <class Element>
__device__ __forceinline__ void copy_to_shared(Element* to, const Element* from, int count) {
  constexpr int kInFlight = 8;
  for (int first = threadIdx.x; first < count; first += kThreads * kInFlight) {
    Element elements[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) elements[i] = __ldg(from + min(first + i * kThreads, count - 1));
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kThreads < count) to[first + i * kThreads] = elements[i];
    }
  }
}

// Copies the chunk to shared memory, with -inf behind the end of the row up to a whole vector. The address decides only
// how: by 16 bytes or by elements.
template <class T>
__device__ __forceinline__ void load_chunk(const Row<T>& row, int chunk, Shared<T>& shared) {
  constexpr int kSize = Vector16<T>::kSize;
  const T* const logits = row.logits + int64_t{chunk} * kChunk;
  const int length = row.length(chunk);
  const int num_vectors = reinterpret_cast<uintptr_t>(logits) % 16 == 0 ? length / kSize : 0;
  copy_to_shared(reinterpret_cast<uint4*>(shared.logits), reinterpret_cast<const uint4*>(logits), num_vectors);
  copy_to_shared(shared.logits + num_vectors * kSize, logits + num_vectors * kSize, length - num_vectors * kSize);
  const int behind = length + threadIdx.x;
  if (behind < (length + kSize - 1) / kSize * kSize) shared.logits[behind] = minus_infinity<T>();
}

// Calls visit(place in the chunk, vector) for the thread's vectors; every thread has its own, whatever the address.
template <class T, class Visit>
__device__ __forceinline__ void for_each_vector(const Shared<T>& shared, int length, const Visit& visit) {
  constexpr int kSize = Vector16<T>::kSize;
#pragma unroll 4
  for (int place = threadIdx.x * kSize; place < length; place += kThreads * kSize)
    visit(place, as_vector<T>(reinterpret_cast<const uint4*>(shared.logits)[place / kSize]));
}

template <class T>
__device__ __forceinline__ float largest_of_thread(const Shared<T>& shared, int length) {
  Vector16<T> largest;
  for (T& element : largest.element) element = minus_infinity<T>();
  for_each_vector(shared, length, [&](int, const Vector16<T>& vector) { take_larger(largest, vector); });
  float max = -INFINITY;
  for (const T& element : largest.element) max = fmaxf(max, to_float(element));
  return max;
}

// Called by a warp that holds the largest logit of the chunk: where it is first, and the largest of the warp's others.
template <class T>
__device__ __forceinline__ void find_largest(const Shared<T>& shared, int chunk, int length, ChunkPart& found) {
  const float max = found.part.max;
  int first = kNone;
  float second = -INFINITY;
  for_each_vector(shared, length, [&](int place, const Vector16<T>& vector) {
#pragma unroll
    for (int i = 0; i < Vector16<T>::kSize; ++i) {
      const float x = to_float(vector.element[i]);
      if (x == max && first == kNone)
        first = place + i;
      else
        second = fmaxf(second, x);
    }
  });
  const bool tie = __popc(__ballot_sync(~0u, first != kNone)) > 1;
  second = max_over_warp(second);
  first = __reduce_min_sync(~0u, first);
  found.part.second = tie ? max : second;
  found.argmax = first == kNone ? kNone : chunk * kChunk + first;
}

// The sums over the chunk's tokens that one thread has, two at a time.
struct Sums {
  float mass[2], moment[2], draw_mass[2];
};

template <class T>
__device__ __forceinline__ Sums sums_of_thread(const Row<T>& row, float top, int length, const Shared<T>& shared) {
  constexpr int kSize = Vector16<T>::kSize;
  Sums sums = {{0, 0}, {0, 0}, {0, 0}};
  for_each_vector(shared, length, [&](int, const Vector16<T>& vector) {
    float y[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) y[i] = to_float(vector.element[i]);
    if (row.scales.softcap > 0) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) y[i] = row.softcapped(y[i]);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float z = exponent(y[i], top, row.scales.statistics), weight = fast_exp2(z);
      sums.mass[i % 2] += weight;
      sums.moment[i % 2] += fmaxf(z, kLowestExponent) * weight;  // a z of -inf has weight 0
    }
    if (row.two_masses) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums.draw_mass[i % 2] += fast_exp2(exponent(y[i], top, row.scales.draw));
    }
  });
  return sums;
}

// What is known of a chunk, stored by thread 0. With tile_keys, those of the chunk's tiles as well; with `hide`, tokens
// that are not allowed count as -inf.
template <bool kLimited, class T>
__device__ __forceinline__ void read_chunk(const Row<T>& row, int chunk, bool hide, uint32_t* tile_keys,
                                           Shared<T>& shared, ChunkPart* result) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, length = row.length(chunk);
  load_chunk(row, chunk, shared);
  __syncthreads();
  // no barrier behind it: the vectors that a thread changes are those that it alone reads
  if constexpr (kLimited) survey_tiles<kWarps>(row, chunk, hide, shared.logits, tile_keys);
  const float warp_max = max_over_warp(largest_of_thread(shared, length));
  if (lane == 0) shared.warp_max[warp] = warp_max;
  __syncthreads();
  float max = shared.warp_max[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) max = fmaxf(max, shared.warp_max[w]);

  ChunkPart found;
  found.part.max = warp_max;
  found.part.second = -INFINITY;
  found.part.top = max == -INFINITY ? 0 : row.softcapped(max);
  found.argmax = kNone;
  if (warp_max == max) find_largest(shared, chunk, length, found);
  const Sums sums = sums_of_thread(row, found.part.top, length, shared);
  found.part.mass = sum_over_warp(sums.mass[0] + sums.mass[1]);
  found.part.moment = sum_over_warp(sums.moment[0] + sums.moment[1]);
  found.part.draw_mass = row.two_masses ? sum_over_warp(sums.draw_mass[0] + sums.draw_mass[1]) : found.part.mass;
  if (lane == 0) shared.warps[warp] = found;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      const ChunkPart& other = shared.warps[w];
      merge_largest(found, other);
      found.part.mass += other.part.mass;
      found.part.moment += other.part.moment;
      found.part.draw_mass += other.part.draw_mass;
    }
    *result = found;
  }
}

}  // namespace
}  // namespace diffusion_runtime
