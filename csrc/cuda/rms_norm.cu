// A row by 8 lanes, by a warp or by a block, whatever keeps all of it in registers; what does not fit is read again.
#include "norm.cuh"
#include "norm_row.cuh"

namespace diffusion_runtime {
namespace {

constexpr int kRounds = 4;  // vectors that a thread keeps

// Threads of a row, rows of a block. The tests set smaller blocks, so that short rows make many rounds.
#ifndef RMS_NORM_BLOCK
#define RMS_NORM_BLOCK 256
#endif
constexpr int kFew = 8, kWarp = 32, kBlock = RMS_NORM_BLOCK;

template <int kThreads>
constexpr int kRowsOfBlock = kThreads <= kWarp ? 128 / kThreads : 1;

struct Shared {
  float squares[kBlock / kWarp];
};

template <int kThreads>
__device__ __forceinline__ float sum_over_row(float x) {
  if constexpr (kThreads <= kWarp) {
    return sum_over_lanes<kThreads>(x);
  } else {
    SHARED(Shared, shared);
    x = sum_over_lanes<kWarp>(x);
    if (threadIdx.x % kWarp == 0) shared.squares[threadIdx.x / kWarp] = x;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kThreads / kWarp; ++i) sum += shared.squares[i];
    return sum;
  }
}

template <class T>
__device__ __forceinline__ const T* row_of(const RmsNorm& op, unsigned r) {
  const unsigned inner = unsigned(op.inner), middle = unsigned(op.middle), block = r / inner;
  return static_cast<const T*>(op.x) + int64_t{block / middle} * op.outer_stride +
         int64_t{block % middle} * op.middle_stride + int64_t{r % inner} * op.inner_stride;
}

template <class T, class W, int kThreads>
__global__ void __launch_bounds__(kThreads <= kWarp ? 128 : kThreads)
    rms_norm_kernel(const __grid_constant__ RmsNorm op) {
  constexpr int kSpan = kThreads * kAtOnce;  // elements of a round
  const unsigned r = blockIdx.x * kRowsOfBlock<kThreads> + threadIdx.x / kThreads;
  const bool exists = r < op.rows;
  const int64_t size = exists ? op.size : 0;  // of rows that are not there, nothing is read
  const T* const x = row_of<T>(op, exists ? r : 0);
  const W* const weight = static_cast<const W*>(op.weight);
  const int64_t first = threadIdx.x % kThreads * kAtOnce;

  Elements<T> kept[kRounds];
  float squares = 0;
#pragma unroll
  for (int round = 0; round < kRounds; ++round)
    kept[round] = load(x + first + round * kSpan, size - first - round * kSpan);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) squares = sum_of_squares(kept[round], squares);
  for (int64_t at = first + kRounds * kSpan; at < size; at += kSpan)
    squares = sum_of_squares(load(x + at, size - at), squares);
  squares = sum_over_row<kThreads>(squares);

  const Scaling<T> scaled{inverse_root(squares, op.size, op.eps), weight != nullptr, op.round_before_weight,
                          op.weight_offset};
  T* const out = static_cast<T*>(op.out) + r * op.size;
  const auto finish = [&](const Elements<T>& elements, int64_t at) {
    if (at >= size) return;
    Elements<W> weights = {};
    if (weight != nullptr) weights = load(weight + at, size - at);
    Elements<T> result;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      result.element[i] = narrowed<T>(scaled(to_float(elements.element[i]), to_float(weights.element[i])));
    save(out + at, result, size - at);
  };
#pragma unroll
  for (int round = 0; round < kRounds; ++round) finish(kept[round], first + round * kSpan);
  for (int64_t at = first + kRounds * kSpan; at < size; at += kSpan) finish(load(x + at, size - at), at);
}

template <int kThreads>
void launch_rows(const RmsNorm& op, cudaStream_t stream) {
  constexpr int kRows = kRowsOfBlock<kThreads>;
  const dim3 grid(unsigned((op.rows + kRows - 1) / kRows)), block(kRows * kThreads);
  const size_t bytes = kThreads > kWarp ? sizeof(Shared) : 0;
  for_types(op.type, op.weight_type, [&](auto element, auto weight) {
    launch(rms_norm_kernel<decltype(element), decltype(weight), kThreads>, grid, block, bytes, stream, op);
  });
}

}  // namespace

void rms_norm(const RmsNorm& arguments, cudaStream_t stream) {
  if (arguments.rows == 0 || arguments.size == 0) return;
  constexpr int kKept = kRounds * kAtOnce;  // elements of a thread
  if (arguments.size <= kFew * kKept) return launch_rows<kFew>(arguments, stream);
  if (arguments.size <= kWarp * kKept) return launch_rows<kWarp>(arguments, stream);
  launch_rows<kBlock>(arguments, stream);
}

}  // namespace diffusion_runtime
