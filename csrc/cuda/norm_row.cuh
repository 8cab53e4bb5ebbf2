// What rms_norm and qk_norm_rope do with a row. Which thread has which elements, and so the order of every sum, depends
// on the row's size alone: addresses that are no multiples of 16 bytes are read otherwise, not summed otherwise.
#pragma once

#include "gpu_ops.h"
#include "norm_arguments.h"

namespace diffusion_runtime {
namespace {

constexpr int kAtOnce = 8;  // elements of a thread: 16 bytes of 16-bit ones

template <class T>
struct alignas(16) Elements {
  T element[kAtOnce];
};

__device__ __forceinline__ bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// 0 from `count` on, where nothing is read.
template <class T>
__device__ __forceinline__ Elements<T> load(const T* from, int64_t count) {
  if (count >= kAtOnce && is_aligned(from)) return load_aligned<Elements<T>>(from);
  Elements<T> elements;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) elements.element[i] = i < count ? from[i] : narrowed<T>(0);
  return elements;
}

template <class T>
__device__ __forceinline__ void save(T* to, const Elements<T>& elements, int64_t count) {
  if (count >= kAtOnce && is_aligned(to)) return store_aligned(to, elements);
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    if (i < count) to[i] = elements.element[i];
  }
}

template <class T>
__device__ __forceinline__ float sum_of_squares(const Elements<T>& x, float sum) {
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) sum += to_float(x.element[i]) * to_float(x.element[i]);
  return sum;
}

// Over the kLanes neighbouring lanes that share a row; all lanes of the warp call it.
template <int kLanes>
__device__ __forceinline__ float sum_over_lanes(float x) {
#pragma unroll
  for (int bit = kLanes / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(~0u, x, bit);
  return x;
}

__device__ __forceinline__ float inverse_root(float squares, int64_t size, float eps) {
  return 1 / sqrtf(squares / float(size) + eps);
}

// How an element of T is multiplied.
template <class T>
struct Scaling {
  float inverse;  // 1 / root mean square
  bool weighted, round_before_weight;
  float offset;

  __device__ __forceinline__ float operator()(float x, float weight) const {
    float y = x * inverse;
    if (!weighted) return y;
    if (round_before_weight) y = to_float(narrowed<T>(y));
    y *= offset + weight;
    return round_before_weight ? to_float(narrowed<T>(y)) : y;
  }
};

// Calls launch_for(an element, a weight) with the types of an op: a weight is of the type of the elements, or float.
template <class Launch>
void for_types(LogitType type, LogitType weight_type, const Launch& launch_for) {
  const bool wide = weight_type == LogitType::Float32;
  switch (type) {
    case LogitType::Float32: return launch_for(float{}, float{});
    case LogitType::Float16: return wide ? launch_for(Float16{}, float{}) : launch_for(Float16{}, Float16{});
    case LogitType::BFloat16: return wide ? launch_for(BFloat16{}, float{}) : launch_for(BFloat16{}, BFloat16{});
  }
}

}  // namespace
}  // namespace diffusion_runtime
