// The operations kernels are written in, for sm_80 and later: what they are on a GPU and, beside it, what they mean on
// the CPU. A kernel includes this file and nothing else of CUDA, and so compiles with nvcc and with g++ alike.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__  // ------------------------------------------------------------------------------------- on the GPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// `name` is the block's shared memory, a struct at a multiple of 1024; the launch asks for sizeof(TYPE) bytes.
#define SHARED(TYPE, name)                                         \
  extern __shared__ __align__(1024) unsigned char shared_bytes_[]; \
  TYPE& name = *reinterpret_cast<TYPE*>(shared_bytes_)

namespace diffusion_runtime {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10)  // more only if the kernel's attributes say so
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error == cudaSuccess) {
    kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string("kernel launch: ") + cudaGetErrorString(error));
}

// Of the current device: as many blocks as can run at once, for a kernel whose blocks loop over the work.
inline int num_multiprocessors() {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("device: ") + cudaGetErrorString(error));
  return count;
}

// A vector at once, at a multiple of its alignment.
template <class V>
__device__ __forceinline__ V load_aligned(const void* from) {
  return *static_cast<const V*>(from);
}
template <class V>
__device__ __forceinline__ void store_aligned(void* to, const V& vector) {
  *static_cast<V*>(to) = vector;
}

// 2^x within 2 ulp; 0 where that would not be a normal number
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace diffusion_runtime

#else  // ---------------------------------------------------------------------------------------------- on the CPU
#include "cuda_on_cpu.h"  // of tests/cuda_on_cpu/emulation

#define SHARED(TYPE, name) TYPE& name = cuda_on_cpu::shared_memory<TYPE>(cuda_on_cpu::Place::current())

namespace diffusion_runtime {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  cuda_on_cpu::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

inline int num_multiprocessors() { return cuda_on_cpu::num_multiprocessors; }

template <class V>
V load_aligned(const void* from, CALLER) {
  cuda_on_cpu::check_aligned(from, alignof(V), here);
  V vector;
  return std::memcpy(&vector, from, sizeof vector), vector;
}
template <class V>
void store_aligned(void* to, const V& vector, CALLER) {
  cuda_on_cpu::check_aligned(to, alignof(V), here);
  std::memcpy(to, &vector, sizeof vector);
}

inline float fast_exp2(float x) { return x < -126.0f ? 0 : exp2f(x); }

}  // namespace diffusion_runtime
#endif

namespace diffusion_runtime {

using Float16 = __half;
using BFloat16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(x); }

// The nearest number of its type, ties to even.
template <class T>
__device__ __forceinline__ T narrowed(float x);
template <>
__device__ __forceinline__ float narrowed<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 narrowed<BFloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ Float16 narrowed<Float16>(float x) {
  return __float2half(x);
}

// The smallest of its type, which stands for a token that is not there.
template <class T>
__device__ __forceinline__ T minus_infinity() {
  return narrowed<T>(-INFINITY);
}

// 16 bytes as elements of T.
template <class T>
struct Vector16 {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

template <class T>
__device__ __forceinline__ Vector16<T> as_vector(const uint4& bytes) {
  Vector16<T> vector;
  memcpy(&vector, &bytes, 16);
  return vector;
}

// Element by element, the other one where one is NaN; 16-bit elements two at a time.
__device__ __forceinline__ void take_larger(Vector16<float>& into, const Vector16<float>& other) {
#pragma unroll
  for (int i = 0; i < 4; ++i) into.element[i] = fmaxf(into.element[i], other.element[i]);
}
template <class Pair, class T>
__device__ __forceinline__ void take_larger_pairs(Vector16<T>& into, const Vector16<T>& other) {
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const Pair larger =
        __hmax2(Pair{into.element[i], into.element[i + 1]}, Pair{other.element[i], other.element[i + 1]});
    into.element[i] = larger.x;
    into.element[i + 1] = larger.y;
  }
}
__device__ __forceinline__ void take_larger(Vector16<BFloat16>& into, const Vector16<BFloat16>& other) {
  take_larger_pairs<__nv_bfloat162>(into, other);
}
__device__ __forceinline__ void take_larger(Vector16<Float16>& into, const Vector16<Float16>& other) {
  take_larger_pairs<__half2>(into, other);
}

}  // namespace diffusion_runtime
