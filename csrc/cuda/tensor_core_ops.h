// Asynchronous copies into shared memory and products of matrices by a warp, for sm_80 and later: what they are on a
// GPU and, beside it, what they mean on the CPU.
#pragma once

#include "gpu_ops.h"

namespace diffusion_runtime {

#ifdef __CUDACC__  // ------------------------------------------------------------------------------------- on the GPU

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, or 16 zero bytes where `from` is not valid, which is then not read; they
// arrive by the wait for their group.
__device__ __forceinline__ void async_copy_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void async_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All groups but the last kPending have arrived, for the calling thread.
template <int kPending>
__device__ __forceinline__ void async_copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 m + r gives the address of row r of matrix m, to[m] receives from m.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix turned: of matrix m, lane 4 g + t receives rows 2 t and 2 t + 1 of column g.
__device__ __forceinline__ void load_matrices_turned(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// `threads` threads of the block wait for each other, or only arrive and go on; numbers are 1 to 15.
__device__ __forceinline__ void numbered_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void numbered_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Two floats as the halves of a word, each the nearest number of its type.
template <class T>
__device__ __forceinline__ uint32_t narrowed_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t narrowed_pair<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t narrowed_pair<Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// c[16 x 8] += a[16 x 16] * b[16 x 8] with the sum in float32; T says what the 16 bits of an element are.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else  // ---------------------------------------------------------------------------------------------- on the CPU

inline uint32_t shared_address(const void* p, CALLER) {
  const auto offset = static_cast<const char*>(p) - cuda_on_cpu::current->block->shared;
  if (offset < 0 || size_t(offset) >= cuda_on_cpu::launch_state->shared_bytes)
    cuda_on_cpu::fail(here, "the address is not in the block's shared memory");
  return uint32_t(offset);
}

// Loads and stores of 16 bytes that the sanitizers see (an inlined memset they do not).
struct __attribute__((may_alias)) Bytes16 {
  uint64_t low, high;
};

// The copy is made as late as allowed, at the wait; until then the destination holds NaN.
inline void async_copy_16(void* to, const void* from, bool valid, CALLER) {
  cuda_on_cpu::check_aligned(to, 16, here), shared_address(to, here);
  if (valid) cuda_on_cpu::check_aligned(from, 16, here);
  *static_cast<Bytes16*>(to) = {~uint64_t{0}, ~uint64_t{0}};
  cuda_on_cpu::Quiet quiet;
  cuda_on_cpu::current->copies.push_back({to, valid ? from : nullptr});
  cuda_on_cpu::counters.async_copies += valid;
}
inline void async_copy_commit() {
  cuda_on_cpu::Quiet quiet;
  cuda_on_cpu::Fiber& me = *cuda_on_cpu::current;
  me.groups.push_back(me.copies.size());
}
template <int kPending>
void async_copy_wait() {
  cuda_on_cpu::Fiber& me = *cuda_on_cpu::current;
  if (me.groups.size() <= kPending) return;
  const size_t groups = me.groups.size() - kPending, copies = me.groups[groups - 1];
  for (size_t i = 0; i < copies; i++) {
    const cuda_on_cpu::AsyncCopy c = me.copies[i];
    *static_cast<Bytes16*>(c.to) = c.from ? *static_cast<const Bytes16*>(c.from) : Bytes16{0, 0};
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + copies);
  me.groups.erase(me.groups.begin(), me.groups.begin() + groups);
  for (size_t& end : me.groups) end -= copies;
}

template <bool kTurned>
void load_four_matrices(uint32_t (&to)[4], const void* row, CALLER) {
  struct In {
    uint16_t element[8];
    uint32_t address;
  } mine;
  struct Out {
    uint32_t to[4];
  };
  cuda_on_cpu::check_aligned(row, 16, here);
  mine.address = shared_address(row, here);
  const Bytes16 bytes = *static_cast<const Bytes16*>(row);
  std::memcpy(mine.element, &bytes, 16);
  const auto all = cuda_on_cpu::collective<Out>("load_matrices", ~0u, mine, here, [](const In* const* in, Out** out) {
    for (int m = 0; m < 4; m++) {
      unsigned banks = 0;
      for (int r = 0; r < 8; r++) banks |= 1u << in[8 * m + r]->address / 16 % 8;
      cuda_on_cpu::counters.matrix_load_conflicts += 8 - __builtin_popcount(banks);
      for (int l = 0; l < 32; l++) {
        uint32_t pair[2];
        for (int i = 0; i < 2; i++)
          pair[i] = kTurned ? in[8 * m + l % 4 * 2 + i]->element[l / 4] : in[8 * m + l / 4]->element[l % 4 * 2 + i];
        out[l]->to[m] = pair[0] | pair[1] << 16;
      }
    }
    cuda_on_cpu::counters.matrix_loads++;
  });
  std::memcpy(to, all.to, 16);
}
inline void load_matrices(uint32_t (&to)[4], const void* row, CALLER) { load_four_matrices<false>(to, row, here); }
inline void load_matrices_turned(uint32_t (&to)[4], const void* row, CALLER) {
  load_four_matrices<true>(to, row, here);
}

inline void numbered_barrier(int number, int threads, CALLER) {
  cuda_on_cpu::meet(cuda_on_cpu::current->block->numbered[number], "numbered_barrier", size_t(threads), true, here);
}
inline void numbered_arrive(int number, int threads, CALLER) {
  cuda_on_cpu::meet(cuda_on_cpu::current->block->numbered[number], "numbered_arrive", size_t(threads), false, here);
}

template <class T>
uint32_t narrowed_pair(float low, float high) {
  return narrowed<T>(low).bits | uint32_t(narrowed<T>(high).bits) << 16;
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CALLER) {
  struct In {
    uint32_t a[4], b[2];
    float c[4];
  } const mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  struct Out {
    float c[4];
  };
  const auto all = cuda_on_cpu::collective<Out>("multiply_add", ~0u, mine, here, [](const In* const* in, Out** out) {
    const auto element = [](uint32_t pair, int i) { return to_float(T{uint16_t(pair >> 16 * i)}); };
    // Lane 4 g + t holds a(g + 8 [r odd], 2 t + i + 8 [r >= 2]), b(2 t + i + 8 r, g), c(g + 8 [r >= 2], 2 t + r % 2).
    float left[16][16], right[8][16];
    for (int l = 0; l < 32; l++)
      for (int g = l / 4, t = l % 4 * 2, i = 0; i < 2; i++) {
        for (int r = 0; r < 4; r++) left[g + r % 2 * 8][t + i + r / 2 * 8] = element(in[l]->a[r], i);
        for (int r = 0; r < 2; r++) right[g][t + i + r * 8] = element(in[l]->b[r], i);
      }
    for (int l = 0; l < 32; l++)
      for (int r = 0; r < 4; r++) {
        const float *row = left[l / 4 + r / 2 * 8], *column = right[l % 4 * 2 + r % 2];
        float sum = in[l]->c[r];
        for (int k = 0; k < 16; k++) sum += row[k] * column[k];
        out[l]->c[r] = sum;
      }
    cuda_on_cpu::counters.matrix_products++;
  });
  std::memcpy(c, all.c, sizeof c);
}
#endif

}  // namespace diffusion_runtime
