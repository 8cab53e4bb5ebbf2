// Operations of sm_90a: barriers in shared memory, tiles that the copy engine brings (TMA), registers that change
// hands. What they are on a GPU and, beside it, what they mean on the CPU. Products by a warpgroup are in
// hopper_products.h.
#pragma once

#include "logit_type.h"
#include "tensor_core_ops.h"

// What is made of these operations is for sm_90a alone: other passes of the compiler skip it.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_CODE
#elif __CUDA_ARCH__ == 900
#error "build for 90a, not for 90: the kernels for Hopper use what 90 alone does not have"
#endif

namespace diffusion_runtime {

// 16-bit elements [batches, heads, rows, dim], stride 1 along dim; loaded in boxes of [box_rows, 64]. Strides in bytes,
// multiples of 16, as the address is.
struct TiledTensor {
  const void* data;
  LogitType type;
  int64_t dim, rows, heads, batches;
  int64_t row, head, batch;
  int box_rows;  // at most 256
};

#ifdef __CUDACC__  // ------------------------------------------------------------------------------------- on the GPU
}  // namespace diffusion_runtime
#include <cuda.h>
namespace diffusion_runtime {

using TensorMap = CUtensorMap;

inline bool device_is_hopper() {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("device: ") + cudaGetErrorString(error));
  return major == 9;
}

// The driver's function is looked up when it is first needed, so that the module loads where there is no driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* encoder = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encoder, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || encoder == nullptr)
    throw std::runtime_error("cuTensorMapEncodeTiled: not in this driver");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encoder);
}

inline TensorMap tensor_map(const TiledTensor& t) {
  static const auto encode = tensor_map_encoder();
  TensorMap map;
  const cuuint64_t sizes[] = {cuuint64_t(t.dim), cuuint64_t(t.rows), cuuint64_t(t.heads), cuuint64_t(t.batches)};
  const cuuint64_t strides[] = {cuuint64_t(t.row), cuuint64_t(t.head), cuuint64_t(t.batch)};
  const cuuint32_t box[] = {64, cuuint32_t(t.box_rows), 1, 1}, steps[] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, t.type == LogitType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             4, const_cast<void*>(t.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(result)));
  return map;
}

// A phase ends when `arrivals` threads have arrived and all bytes expected have come.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended; phases count 0, 1, 0, 1; before the first one, parity 1 has "ended".
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, unsigned parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}

// What the calling thread has stored in shared memory comes before what the copy engine and warpgroup products do there
// after a later barrier.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 16 bytes of shared memory that a warpgroup product will read: an async_proxy_fence must follow.
__device__ __forceinline__ void store_operand(void* to, const uint4& bytes) { store_aligned(to, bytes); }

// A box into shared memory, its row r at to + 128 r bytes, with the 16-byte chunks of each row turned by bits 7 to 9 of
// the address. What lies outside of the tensor comes as zeros.
__device__ __forceinline__ void load_tile(void* to, const TensorMap& map, uint64_t* barrier, int column, int row,
                                          int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// The registers of every thread of the warpgroup, from what the launch gave: fewer for one that copies, more for one
// that multiplies.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#else  // ---------------------------------------------------------------------------------------------- on the CPU

using TensorMap = TiledTensor;

inline bool device_is_hopper() { return true; }

inline TensorMap tensor_map(const TiledTensor& t) {
  const auto refused = [](int64_t stride) { return stride % 16 != 0 || stride <= 0 || stride >> 40 != 0; };
  if (reinterpret_cast<uintptr_t>(t.data) % 16 != 0 || refused(t.row) || refused(t.head) || refused(t.batch) ||
      t.dim < 1 || t.rows < 1 || t.heads < 1 || t.batches < 1 || t.box_rows < 1 || t.box_rows > 256)
    throw cuda_on_cpu::Error("the driver refuses this tensor map");
  return t;
}
}  // namespace diffusion_runtime

namespace cuda_on_cpu {

struct ArrivalBarrier {
  unsigned expected = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
  std::vector<Fiber*> waiting;
  Clock clocks[2];

  void settle() {
    if (pending > 0 || bytes != 0) return;
    phase++, pending = expected, counters.barriers++;
    for (Fiber* f : waiting) wake(*f);
    waiting.clear();
  }
};

// The word in shared memory is only read, so that the thread sanitizer sees a use that is not ordered after the init.
inline ArrivalBarrier& barrier_at(const uint64_t* barrier, Place here) {
  diffusion_runtime::shared_address(barrier, here), check_aligned(barrier, 8, here);
  (void)*const_cast<volatile const uint64_t*>(barrier);
  Quiet quiet;
  const auto found = current->block->objects.find(barrier);
  if (found == current->block->objects.end()) fail(here, "the barrier has no init");
  return *static_cast<ArrivalBarrier*>(found->second.get());
}

// By 16 bytes of shared memory: the thread that has stored there and has not fenced since.
using Unfenced = std::map<uint32_t, const Fiber*>;
inline Unfenced& unfenced() {
  std::shared_ptr<void>& object = current->block->objects[current->block->shared];
  if (!object) object = std::make_shared<Unfenced>();
  return *static_cast<Unfenced*>(object.get());
}

}  // namespace cuda_on_cpu

namespace diffusion_runtime {

inline void barrier_init(uint64_t* barrier, unsigned arrivals, CALLER) {
  shared_address(barrier, here), cuda_on_cpu::check_aligned(barrier, 8, here);
  *barrier = arrivals;
  cuda_on_cpu::Quiet quiet;
  auto state = std::make_shared<cuda_on_cpu::ArrivalBarrier>();
  state->expected = state->pending = arrivals;
  cuda_on_cpu::current->block->objects[barrier] = state;
}
inline void barrier_arrive_expect(uint64_t* barrier, unsigned bytes, CALLER) {
  auto& state = cuda_on_cpu::barrier_at(barrier, here);
  cuda_on_cpu::Quiet quiet;
  state.clocks[state.phase & 1].release();
  if (!state.pending) cuda_on_cpu::fail(here, "more arrivals than the barrier expects");
  state.pending--, state.bytes += bytes;
  state.settle();
  cuda_on_cpu::maybe_give_way();
}
inline void barrier_arrive(uint64_t* barrier, CALLER) { barrier_arrive_expect(barrier, 0, here); }
inline void barrier_wait(uint64_t* barrier, unsigned parity, CALLER) {
  auto& state = cuda_on_cpu::barrier_at(barrier, here);
  cuda_on_cpu::Quiet quiet;
  while ((state.phase & 1) == parity) {
    state.waiting.push_back(cuda_on_cpu::current);
    cuda_on_cpu::wait(parity ? "barrier_wait parity 1" : "barrier_wait parity 0", here);
  }
  state.clocks[parity].acquire();
}

inline void async_proxy_fence() {
  cuda_on_cpu::Quiet quiet;
  cuda_on_cpu::Unfenced& all = cuda_on_cpu::unfenced();
  for (auto at = all.begin(); at != all.end();) at = at->second == cuda_on_cpu::current ? all.erase(at) : std::next(at);
}
inline void store_operand(void* to, const uint4& bytes, CALLER) {
  cuda_on_cpu::check_aligned(to, 16, here);
  const uint32_t address = shared_address(to, here);
  Bytes16 stored;
  std::memcpy(&stored, &bytes, 16);
  *static_cast<Bytes16*>(to) = stored;
  cuda_on_cpu::Quiet quiet;
  cuda_on_cpu::unfenced()[address / 16] = cuda_on_cpu::current;
}

// The box arrives at some later moment, the last one allowed unless the schedule is random; NaN until then.
inline void load_tile(void* to, const TensorMap& map, uint64_t* barrier, int column, int row, int head, int batch,
                      CALLER) {
  auto& state = cuda_on_cpu::barrier_at(barrier, here);
  const uint32_t address = shared_address(to, here), rows = uint32_t(map.box_rows);
  if (address % 128) cuda_on_cpu::fail(here, "a box begins at a multiple of 128 bytes");
  shared_address(static_cast<char*>(to) + rows * 128 - 1, here);
  for (uint32_t i = 0; i < rows * 8; i++) static_cast<Bytes16*>(to)[i] = {~uint64_t{0}, ~uint64_t{0}};
  cuda_on_cpu::Quiet quiet;
  for (const auto& [chunk, thread] : cuda_on_cpu::unfenced())
    if (chunk >= address / 16 && chunk < address / 16 + rows * 8)
      cuda_on_cpu::fail(here, "no async_proxy_fence since a store where this box goes");
  cuda_on_cpu::counters.tile_copies++;
  state.clocks[state.phase & 1].release();
  cuda_on_cpu::launch_state->tile_copies.push_back(
      {cuda_on_cpu::current->block, here, [=, &state] {
         const bool there = head >= 0 && head < map.heads && batch >= 0 && batch < map.batches;
         const char* const from = static_cast<const char*>(map.data) + batch * map.batch + head * map.head;
         for (int r = 0; r < map.box_rows; r++)
           for (int c = 0; c < 64; c++) {
             const bool inside = there && row + r >= 0 && row + r < map.rows && column + c >= 0 && column + c < map.dim;
             const int turned = c ^ int((address >> 7) + r) % 8 * 8;
             uint16_t element = 0;
             if (inside) std::memcpy(&element, from + (row + r) * map.row + (column + c) * 2, 2);
             std::memcpy(static_cast<char*>(to) + r * 128 + turned * 2, &element, 2);
           }
         state.bytes -= map.box_rows * 128;  // below zero where more comes than was expected: the phase never ends
         state.settle();
       }});
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}
#endif

}  // namespace diffusion_runtime
