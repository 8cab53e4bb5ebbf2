// From the parts of a row's tiles to its results, one block for a row. A draw computes the 128 logits of its tile anew.
// Sums over tiles are in double; which are added in which order follows from the size of the vocabulary alone.
#include "tile_part.cuh"

namespace diffusion_runtime {
namespace {

#ifndef HEAD_FINISH_THREADS  // the tests set fewer
#define HEAD_FINISH_THREADS 512
#endif
constexpr int kFinishThreads = HEAD_FINISH_THREADS, kFinishWarps = kFinishThreads / 32;
constexpr int kTokensAtOnce = 8;  // of a warp that computes logits: its loads in flight
static_assert(kTile % (kFinishWarps * kTokensAtOnce) == 0, "whole rounds of tokens");

struct FinishShared {
  TilePart largest[kFinishWarps];
  RowTotals threads[kFinishThreads];  // each of a few tiles in a row
  RowTotals warps[kFinishWarps];
  float y[kTile], weight[kTile];  // of the tile that is drawn from
};

// The tiles that one thread sums, for a row of the parts.
struct ThreadTiles {
  const TilePart* parts;
  int num_tiles, of_thread;
  __device__ __forceinline__ int first(int thread) const { return min(thread * of_thread, num_tiles); }
};

// The largest logits of the row, known to every thread. Holds a barrier.
__device__ __forceinline__ TilePart largest_of_row(const ThreadTiles& tiles, FinishShared& shared) {
  TilePart best = {{-INFINITY, -INFINITY, 0, 0, 0, 0}, kNone};
  for (int t = threadIdx.x; t < tiles.num_tiles; t += kFinishThreads) {
    const TilePart part = tiles.parts[t];
    merge_largest(best, part);
  }
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    TilePart other = best;
    other.part.max = __shfl_xor_sync(~0u, best.part.max, bit);
    other.part.second = __shfl_xor_sync(~0u, best.part.second, bit);
    other.part.top = __shfl_xor_sync(~0u, best.part.top, bit);
    other.argmax = __shfl_xor_sync(~0u, best.argmax, bit);
    merge_largest(best, other);
  }
  if (threadIdx.x % 32 == 0) shared.largest[threadIdx.x / 32] = best;
  __syncthreads();
  best = shared.largest[0];
#pragma unroll
  for (int w = 1; w < kFinishWarps; ++w) {
    const TilePart other = shared.largest[w];
    merge_largest(best, other);
  }
  return best;
}

__device__ __forceinline__ void add(RowTotals& into, const RowTotals& other) {
  into.mass += other.mass;
  into.moment += other.moment;
  into.draw_mass += other.draw_mass;
}

// The sums over the row, known to every thread; those of threads and warps stay in shared memory. Holds a barrier.
__device__ __forceinline__ RowTotals totals_of_row(const ThreadTiles& tiles, float top, const RowScales& scales,
                                                   FinishShared& shared) {
  RowTotals sums = {0, 0, 0};
  const int last = tiles.first(threadIdx.x + 1);
  for (int t = tiles.first(threadIdx.x); t < last; ++t) add(sums, rescaled(tiles.parts[t].part, top, scales));
  shared.threads[threadIdx.x] = sums;
  sums = {sum_over_warp(sums.mass), sum_over_warp(sums.moment), sum_over_warp(sums.draw_mass)};
  if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = sums;
  __syncthreads();
  RowTotals totals = {0, 0, 0};
  for (int w = 0; w < kFinishWarps; ++w) add(totals, shared.warps[w]);
  return totals;
}

// The tile that the uniform points at: the warp that summed it, the thread, the tile. Every thread picks for itself.
__device__ __forceinline__ int pick_tile(const ThreadTiles& tiles, double uniform, float top, double draw_mass,
                                         const RowScales& scales, const FinishShared& shared) {
  double target = uniform * draw_mass;
  const int warp = pick_by_mass(kFinishWarps, target, [&](int w) { return shared.warps[w].draw_mass; });
  const RowTotals* const threads = shared.threads + warp * 32;
  const int thread = warp * 32 + pick_by_mass(32, target, [&](int i) { return threads[i].draw_mass; });
  const int first = tiles.first(thread);
  return first + pick_by_mass(tiles.first(thread + 1) - first, target,
                              [&](int i) { return rescaled(tiles.parts[first + i].part, top, scales).draw_mass; });
}

// 16 bytes of a row of dim elements, zeros behind its end. kVectors decides only how they are read.
template <bool kVectors, class T>
__device__ __forceinline__ Vector16<T> load_chunk(const T* row, int chunk, int dim) {
  constexpr int kSize = Vector16<T>::kSize;
  if constexpr (kVectors) {
    return as_vector<T>(__ldg(reinterpret_cast<const uint4*>(row) + chunk));
  } else {
    Vector16<T> vector;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int k = chunk * kSize + i;
      vector.element[i] = k < dim ? row[k] : narrowed<T>(0);
    }
    return vector;
  }
}

// The products of the row's hidden state with kTokensAtOnce rows of weights from `first` on, by one warp: lane i gets
// that of token first + i. Behind the vocabulary they are those of the last token.
template <bool kVectors, class T>
__device__ __forceinline__ float products_of_warp(const SampleFromHidden& op, const T* hidden, int first) {
  constexpr int kSize = Vector16<T>::kSize;
  const int lane = threadIdx.x % 32, dim = int(op.dim), last = int(op.vocab) - 1;
  float sums[kTokensAtOnce] = {};
  for (int chunk = lane; chunk * kSize < dim; chunk += 32) {
    const Vector16<T> h = load_chunk<kVectors>(hidden, chunk, dim);
    Vector16<T> w[kTokensAtOnce];
#pragma unroll
    for (int i = 0; i < kTokensAtOnce; ++i) {
      const T* const weight = static_cast<const T*>(op.weight) + min(first + i, last) * op.weight_stride;
      w[i] = load_chunk<kVectors>(weight, chunk, dim);
    }
#pragma unroll
    for (int i = 0; i < kTokensAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) sums[i] += to_float(h.element[j]) * to_float(w[i].element[j]);
    }
  }
  float mine = 0;
#pragma unroll
  for (int i = 0; i < kTokensAtOnce; ++i) {
    const float sum = sum_over_warp(sums[i]);
    mine = lane == i ? sum : mine;
  }
  return mine;
}

// y of the tokens of one tile to shared.y, and their weights in a draw to shared.weight. Holds a barrier.
template <class T>
__device__ __forceinline__ void compute_tile(const SampleFromHidden& op, const Reading& row, int64_t r, int tile,
                                             float top, FinishShared& shared) {
  constexpr int kSize = Vector16<T>::kSize;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const T* const hidden = static_cast<const T*>(op.hidden) + r * op.hidden_stride;
  const bool vectors = aligned(hidden) && aligned(op.weight) && op.weight_stride % kSize == 0 && op.dim % kSize == 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int first = warp * kTokensAtOnce; first < kTile; first += kFinishWarps * kTokensAtOnce) {
    const int token = tile * kTile + first + lane;
    const float sum = vectors ? products_of_warp<true>(op, hidden, tile * kTile + first)
                              : products_of_warp<false>(op, hidden, tile * kTile + first);
    if (lane < kTokensAtOnce) {
      float x = -INFINITY;
      if (token < op.vocab) {
        const int word = op.allowed != nullptr ? op.allowed[r * op.allowed_stride + token / 32] : ~0;
        const float bias = op.bias != nullptr ? to_float(static_cast<const T*>(op.bias)[token]) : 0;
        if (static_cast<unsigned>(word) >> token % 32 & 1) x = sum + bias;
      }
      const float y = row.softcapped(x);
      shared.y[first + lane] = y;
      shared.weight[first + lane] = fast_exp2(exponent(y, top, row.scales.draw));
    }
  }
  __syncthreads();
}

// The token that the uniform points at in the tile that has been computed.
__device__ __forceinline__ int pick_in_tile(double uniform, const FinishShared& shared) {
  double total = 0;
#pragma unroll 8
  for (int i = 0; i < kTile; ++i) total += shared.weight[i];
  double target = uniform * total;
  return pick_by_mass(kTile, target, [&](int i) { return double(shared.weight[i]); });
}

template <class T>
__device__ __forceinline__ RowSample finish_row(const SampleFromHidden& op, int64_t r, FinishShared& shared) {
  const Reading row = reading_of(op, r);
  const int num_tiles = tiles_of(op.vocab);
  const ThreadTiles tiles = {parts_of(op) + r * num_tiles, num_tiles,
                             (num_tiles + kFinishThreads - 1) / kFinishThreads};
  const TilePart best = largest_of_row(tiles, shared);
  const float top = best.part.top;
  const RowTotals totals = totals_of_row(tiles, top, row.scales, shared);
  if (!has_distribution(best.part.max, totals.mass)) return no_distribution();

  int token = best.argmax;
  float candidate = top;
  if (row.scales.draw > 0) {
    const Uniforms uniforms =
        philox_uniforms(static_cast<uint64_t>(at(op.seed, r)), static_cast<uint32_t>(op.position[r]),
                        static_cast<uint32_t>(at(op.step, r)), kDrawToken);
    const int tile = pick_tile(tiles, uniforms.first, top, totals.draw_mass, row.scales, shared);
    compute_tile<T>(op, row, r, tile, tiles.parts[tile].part.top, shared);
    const int in_tile = pick_in_tile(uniforms.second, shared);
    token = tile * kTile + in_tile;
    // a logit that is computed anew may round otherwise: no token is more probable than the argmax
    if (token != best.argmax) candidate = fminf(shared.y[in_tile], top);
  }
  return {token, best.argmax, row_result(top, row.softcapped(best.part.second), candidate, totals, row.scales)};
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads) head_finish_kernel(const __grid_constant__ SampleFromHidden op) {
  SHARED(FinishShared, shared);
  const int64_t r = blockIdx.x;
  RowSample sample = {-1, -1, {0, 0, 0, 0, 0}};
  if (op.masked == nullptr || op.masked[r]) sample = finish_row<T>(op, r, shared);
  if (threadIdx.x == 0) store(op, r, sample);
}

}  // namespace

void head_finish(const SampleFromHidden& op, cudaStream_t stream) {
  if (op.rows == 0) return;
  const auto launch_for = [&](auto element) {
    launch(head_finish_kernel<decltype(element)>, dim3(unsigned(op.rows)), dim3(kFinishThreads), sizeof(FinishShared),
           stream, op);
  };
  switch (op.type) {
    case LogitType::Float32: return launch_for(float{});
    case LogitType::Float16: return launch_for(Float16{});
    case LogitType::BFloat16: return launch_for(BFloat16{});
  }
}

}  // namespace diffusion_runtime
