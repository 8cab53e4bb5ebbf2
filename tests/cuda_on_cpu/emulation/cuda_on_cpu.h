// CUDA's own names on the CPU, for g++ -std=c++17 or later without any CUDA header. What a kernel may use is what is
// here; anything else fails to compile. Deliberately absent: __shared__ (use SHARED of gpu_ops.h), __activemask.
#pragma once
#include <cmath>

#include "meeting.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using cudaStream_t = struct CUstream_st*;
using std::max;
using std::min;

// ------------------------------------------------------------------------------------------------- barriers, fences
inline void __syncthreads(CALLER) { cuda_on_cpu::block_barrier(here); }
inline void __syncwarp(unsigned mask = ~0u, CALLER) {
  auto& warp = *cuda_on_cpu::current->warp;
  auto& clock = warp.clocks[warp.phase & 1];
  clock.release();
  cuda_on_cpu::collective<char>("__syncwarp", mask, char(0), here, [](auto, auto) {});
  clock.acquire();
}
inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __threadfence_block() { __threadfence(); }

// ------------------------------------------------------------------------------------------------- warp collectives
namespace cuda_on_cpu {

template <class T>
T shuffle(const char* what, unsigned mask, T value, unsigned source, Place here) {
  struct In {
    T value;
    unsigned source;
  };
  return collective<T>(what, mask, In{value, source}, here, [&](const In* const* in, T** out) {
    for (int l = 0; l < 32; l++) {
      if (!out[l]) continue;
      if (!in[in[l]->source]) fail(here, what, ": reads a lane outside the mask");
      *out[l] = in[in[l]->source]->value;
    }
  });
}

template <class T, class F>
T reduce(const char* what, unsigned mask, T value, Place here, F combine) {
  return collective<T>(what, mask, value, here, [&](const T* const* in, T** out) {
    const T* first = nullptr;
    T all{};
    for (int l = 0; l < 32; l++)
      if (in[l]) all = first ? combine(all, *in[l]) : *in[l], first = in[l];
    for (int l = 0; l < 32; l++)
      if (out[l]) *out[l] = all;
  });
}

}  // namespace cuda_on_cpu

template <class T>
T __shfl_sync(unsigned mask, T v, int source, unsigned width = 32, CALLER) {
  unsigned lane = cuda_on_cpu::current->lane, first = lane / width * width;
  return cuda_on_cpu::shuffle("__shfl_sync", mask, v, first + source % width, here);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, unsigned width = 32, CALLER) {
  unsigned lane = cuda_on_cpu::current->lane, first = lane / width * width, source = lane ^ bits;
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, v, source < first + width ? source : lane, here);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, unsigned width = 32, CALLER) {
  unsigned lane = cuda_on_cpu::current->lane, first = lane / width * width, source = lane + delta;
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, v, source < first + width ? source : lane, here);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, unsigned width = 32, CALLER) {
  unsigned lane = cuda_on_cpu::current->lane, first = lane / width * width;
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, v, lane >= first + delta ? lane - delta : lane, here);
}
inline unsigned __ballot_sync(unsigned mask, int p, CALLER) {
  unsigned bit = p ? 1u << cuda_on_cpu::current->lane : 0;
  return cuda_on_cpu::reduce("__ballot_sync", mask, bit, here, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int p, CALLER) { return __ballot_sync(mask, p, here) != 0; }
inline int __all_sync(unsigned mask, int p, CALLER) { return __ballot_sync(mask, !p, here) == 0; }

#define REDUCE(NAME, EXPRESSION)                                                              \
  template <class T>                                                                          \
  T NAME(unsigned mask, T v, CALLER) {                                                        \
    return cuda_on_cpu::reduce(#NAME, mask, v, here, [](T a, T b) { return T(EXPRESSION); }); \
  }
REDUCE(__reduce_add_sync, a + b)
REDUCE(__reduce_min_sync, a < b ? a : b)
REDUCE(__reduce_max_sync, a > b ? a : b)
REDUCE(__reduce_and_sync, a& b)
REDUCE(__reduce_or_sync, a | b)
REDUCE(__reduce_xor_sync, a ^ b)
#undef REDUCE

// ---------------------------------------------------------------------------------------------------------- atomics
#define ATOMIC(NAME, EXPRESSION)                                         \
  template <class T>                                                     \
  T NAME(T* p, T v) {                                                    \
    return cuda_on_cpu::atomic(p, [v](T old) { return T(EXPRESSION); }); \
  }
ATOMIC(atomicAdd, old + v)
ATOMIC(atomicMin, old < v ? old : v)
ATOMIC(atomicMax, old > v ? old : v)
ATOMIC(atomicAnd, old& v)
ATOMIC(atomicOr, old | v)
ATOMIC(atomicInc, old >= v ? 0 : old + 1)
#undef ATOMIC
template <class T>
T atomicExch(T* p, T v) {
  return cuda_on_cpu::atomic(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  return cuda_on_cpu::atomic(p, [=](T old) { return old == expected ? v : old; });
}

// ------------------------------------------------------------------------------------------------- numbers, vectors
template <class To, class From>
To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To y;
  return std::memcpy(&y, &x, sizeof y), y;
}
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }

#define __expf expf  // glibc has declared these two names
#define __logf logf
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }

struct alignas(8) uint2 {
  unsigned x, y;
};
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half2 {
  __half x, y;
};

template <class T>
T __ldg(const T* p, CALLER) {
  cuda_on_cpu::check_aligned(p, sizeof(T), here);
  return *p;
}

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {  // to nearest, ties to even
  const unsigned u = __float_as_uint(x);
  return {uint16_t(x != x ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float v = exponent == 31 ? (fraction ? NAN : INFINITY)
                                 : std::ldexp(float(exponent ? fraction + 1024 : fraction), std::max(exponent, 1) - 25);
  return x.bits & 0x8000 ? -v : v;
}
inline __half __float2half(float x) {  // to nearest, ties to even
  const unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (x != x) return {0x7FFF};
  if (size >= 65520) return {uint16_t(sign | 0x7C00)};
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const int fraction = int(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 1024..2048, less when subnormal
  return {uint16_t(sign | (fraction + (exponent + 14) * 1024))};
}

// The larger of two numbers; the other one if one is NaN.
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  const auto larger = [](__nv_bfloat16 p, __nv_bfloat16 q) {
    return __float2bfloat16(std::fmax(__bfloat162float(p), __bfloat162float(q)));
  };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}
inline __half2 __hmax2(__half2 a, __half2 b) {
  const auto larger = [](__half p, __half q) { return __float2half(std::fmax(__half2float(p), __half2float(q))); };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}
