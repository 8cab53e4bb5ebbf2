// The parts of tiles whose logits have been computed: a warp for each row and group of tiles.
#include "tile_part.cuh"

namespace diffusion_runtime {
namespace {

constexpr int kLogitThreads = 256;
constexpr int kTilesOfWarp = 2;  // asked for before the first is used
constexpr int kTilesOfBlock = kLogitThreads / 32 * kTilesOfWarp;

template <class T>
struct alignas(kLaneTokens * sizeof(T)) LaneLogits {
  T element[kLaneTokens];
};

// The lane's tokens of a tile whose first logit is at `logits`, of which `count` are there; the others are anything.
template <class T>
__device__ __forceinline__ LaneLogits<T> load_lane(const T* logits, int64_t count) {
  const int first = threadIdx.x % 32 * kLaneTokens;
  const T* const mine = logits + first;
  LaneLogits<T> loaded;
  if (reinterpret_cast<uintptr_t>(mine) % sizeof(loaded) == 0 && first + kLaneTokens <= count)
    return *reinterpret_cast<const LaneLogits<T>*>(mine);
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) loaded.element[i] = first + i < count ? mine[i] : minus_infinity<T>();
  return loaded;
}

// Grid (rows, blocks of tiles).
template <class T>
__global__ void __launch_bounds__(kLogitThreads)
    logit_parts_kernel(const __grid_constant__ SampleFromHidden op, const __grid_constant__ LogitsOfTiles tiles) {
  const int64_t r = blockIdx.x;
  if (op.masked != nullptr && !op.masked[r]) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = (int64_t{blockIdx.y} * kTilesOfBlock + warp * kTilesOfWarp) * kTile;  // of the tokens here
  const T* const logits = static_cast<const T*>(tiles.logits) + r * tiles.stride + first;
  LaneLogits<T> loaded[kTilesOfWarp];
#pragma unroll
  for (int i = 0; i < kTilesOfWarp; ++i) loaded[i] = load_lane(logits + i * kTile, tiles.count - first - i * kTile);

  const Reading row = reading_of(op, r);
#pragma unroll
  for (int i = 0; i < kTilesOfWarp; ++i) {
    if (first + i * kTile >= tiles.count) break;
    const int tile = int((tiles.first + first) / kTile) + i;
    const unsigned counting = counting_tokens(op, r, tile);
    float x[kLaneTokens];
#pragma unroll
    for (int j = 0; j < kLaneTokens; ++j) x[j] = counting >> j & 1 ? to_float(loaded[i].element[j]) : -INFINITY;
    const TilePart part = part_of_tile(row, x, tile);
    if (lane == 0) parts_of(op)[r * tiles_of(op.vocab) + tile] = part;
  }
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
