// What marks a function that kernels on a GPU and code on the CPU share.
// Inline everywhere, never one shared copy: the linker could keep the copy that was compiled for AVX-512.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define HOST_DEVICE_MEMBER __host__ __device__ __forceinline__
#else
#define HOST_DEVICE static inline __attribute__((always_inline, unused))
#define HOST_DEVICE_MEMBER inline __attribute__((always_inline))
#endif
