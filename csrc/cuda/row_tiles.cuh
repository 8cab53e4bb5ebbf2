// Tiles of 128 tokens known by their largest allowed logit, so that who looks for large logits need not read the
// others. A warp reads a span at a time: 16 bytes in each lane, one tile of float32 or two of 16-bit logits.
#pragma once

#include "row.cuh"

namespace diffusion_runtime {
namespace {

// The order of floats as that of integers; 0 and -0 are one.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}
constexpr uint32_t kNoKey = 0x007FFFFF;  // of -inf: no token

template <class T>
constexpr int kSpan = 32 * Vector16<T>::kSize;
template <class T>
constexpr int kLanesOfTile = kTile / Vector16<T>::kSize;

template <class T>
__device__ __forceinline__ int spans_of(int tokens) {
  return (tokens + kSpan<T> - 1) / kSpan<T>;
}

// Over the lanes that share a tile.
template <class T, class X, class Combine>
__device__ __forceinline__ X over_tile(X x, const Combine& combine) {
#pragma unroll
  for (int bit = kLanesOfTile<T> / 2; bit > 0; bit /= 2) x = combine(x, __shfl_xor_sync(~0u, x, bit));
  return x;
}

// The lane's elements of a span. The address decides only how they are read.
template <class T>
__device__ __forceinline__ Vector16<T> read_vector(const Row<T>& row, int token) {
  constexpr int kSize = Vector16<T>::kSize;
  const T* const from = row.logits + token;
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0 && token <= row.vocab - kSize)
    return as_vector<T>(__ldg(reinterpret_cast<const uint4*>(from)));
  Vector16<T> vector;
#pragma unroll
  for (int i = 0; i < kSize; ++i) vector.element[i] = token + i < row.vocab ? __ldg(from + i) : minus_infinity<T>();
  return vector;
}

// Calls visit(first token of the lane, its logits) for the spans that hold a tile whose key is at least `lowest`, with
// whole warps; tokens that are not allowed are -inf. Each warp asks for several spans before it uses the first.
template <int kNumWarps, class T, class Visit>
__device__ __forceinline__ void for_each_span(const Row<T>& row, const uint32_t* tile_keys, uint32_t lowest,
                                              const Visit& visit) {
  constexpr int kSize = Vector16<T>::kSize, kInFlight = 4, kTilesOfSpan = kSpan<T> / kTile;
  const int lane = threadIdx.x % 32, num_spans = spans_of<T>(row.vocab), num_tiles = tiles_of(row.vocab);
  for (int first = threadIdx.x / 32; first < num_spans; first += kNumWarps * kInFlight) {
    Vector16<T> vectors[kInFlight];
    uint32_t bits[kInFlight];
    bool wanted[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int tile = (first + i * kNumWarps) * kTilesOfSpan;
      wanted[i] = (tile < num_tiles && tile_keys[tile] >= lowest) ||
                  (kTilesOfSpan == 2 && tile + 1 < num_tiles && tile_keys[tile + 1] >= lowest);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!wanted[i]) continue;
      const int token = (first + i * kNumWarps) * kSpan<T> + lane * kSize;
      vectors[i] = read_vector(row, token);
      bits[i] = token < row.vocab ? row.allowed_from(token) : 0;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!wanted[i]) continue;
      float x[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[j] = bits[i] >> j & 1 ? to_float(vectors[i].element[j]) : -INFINITY;
      visit((first + i * kNumWarps) * kSpan<T> + lane * kSize, x);
    }
  }
}

// The keys of a chunk's tiles, from shared memory. With `hide`, tokens that are not allowed become -inf there.
template <int kNumWarps, class T>
__device__ __forceinline__ void survey_tiles(const Row<T>& row, int chunk, bool hide, T* logits, uint32_t* tile_keys) {
  constexpr int kSize = Vector16<T>::kSize;
  const int length = row.length(chunk), lane = threadIdx.x % 32;
  for (int span = threadIdx.x / 32; span < spans_of<T>(length); span += kNumWarps) {
    const int place = span * kSpan<T> + lane * kSize, token = chunk * kChunk + place;
    uint32_t key = kNoKey;
    if (place < length) {
      uint4& bytes = reinterpret_cast<uint4*>(logits)[place / kSize];
      Vector16<T> vector = as_vector<T>(bytes);
      const uint32_t bits = row.allowed_from(token);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (bits >> i & 1)
          key = max(key, key_of(to_float(vector.element[i])));
        else
          vector.element[i] = minus_infinity<T>();
      }
      if (hide) memcpy(&bytes, &vector, 16);
    }
    key = over_tile<T>(key, [](uint32_t a, uint32_t b) { return max(a, b); });
    if (place < length && lane % kLanesOfTile<T> == 0) tile_keys[token / kTile] = key;
  }
}

}  // namespace
}  // namespace diffusion_runtime
