// The parts of tiles whose logits have been computed: a warp for four tiles of a row.
#include "tile_part.cuh"

namespace diffusion_runtime {
namespace {

constexpr int kLogitThreads = 256;
constexpr int kTilesOfBlock = kLogitThreads / kPartLanes;

template <class T>
struct alignas(kFour * sizeof(T)) Four {
  T element[kFour];
};

// Four logits, of which `count` are there; the others are anything.
template <class T>
__device__ __forceinline__ Four<T> load_four(const T* logits, int64_t count) {
  Four<T> loaded;
  if (reinterpret_cast<uintptr_t>(logits) % sizeof(loaded) == 0 && count >= kFour) return load_aligned<Four<T>>(logits);
#pragma unroll
  for (int i = 0; i < kFour; ++i) loaded.element[i] = i < count ? logits[i] : minus_infinity<T>();
  return loaded;
}

// Grid (rows, blocks of tiles).
template <class T>
__global__ void __launch_bounds__(kLogitThreads)
    logit_parts_kernel(const __grid_constant__ SampleFromHidden op, const __grid_constant__ LogitsOfTiles tiles) {
  const int64_t r = blockIdx.x;
  if (op.masked != nullptr && !op.masked[r]) return;
  const int64_t tile_here = int64_t{blockIdx.y} * kTilesOfBlock + threadIdx.x / kPartLanes;
  const int64_t first = tile_here * kTile + first_of_lane();  // of the lane's tokens, among those here
  const T* const logits = static_cast<const T*>(tiles.logits) + r * tiles.stride + first;
  Four<T> loaded[kFours];
#pragma unroll
  for (int f = 0; f < kFours; ++f)
    loaded[f] = load_four(logits + f * kFourStride, tiles.count - first - f * kFourStride);

  const int64_t tile = tiles.first / kTile + tile_here;
  const bool is_there = tile_here * kTile < tiles.count;
  const unsigned counting = is_there ? counting_tokens(op, r, int(tile)) : 0;
  float x[kFours * kFour];
#pragma unroll
  for (int i = 0; i < kFours * kFour; ++i)
    x[i] = counting >> i & 1 ? to_float(loaded[i / kFour].element[i % kFour]) : -INFINITY;
  const TilePart part = part_of_tile(reading_of(op, r), x, int(tile));
  if (is_there && threadIdx.x % kPartLanes == 0) parts_of(op)[r * tiles_of(op.vocab) + tile] = part;
}

}  // namespace

void logit_parts(const SampleFromHidden& op, const LogitsOfTiles& tiles, cudaStream_t stream) {
  if (op.rows == 0 || tiles.count == 0) return;
  constexpr int64_t kTokens = kTilesOfBlock * kTile;
  const dim3 grid(unsigned(op.rows), unsigned((tiles.count + kTokens - 1) / kTokens));
  const auto launch_for = [&](auto logit) {
    launch(logit_parts_kernel<decltype(logit)>, grid, dim3(kLogitThreads), 0, stream, op, tiles);
  };
  switch (tiles.type) {
    case LogitType::Float32: return launch_for(float{});
    case LogitType::Float16: return launch_for(Float16{});
    case LogitType::BFloat16: return launch_for(BFloat16{});
  }
}

}  // namespace diffusion_runtime
