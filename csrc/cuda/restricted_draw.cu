// Draws among some of a row's tokens, one block for each row: finds where the row is cut, weighs the tiles of what is
// left, picks a tile and a token in it. Which thread sums which tokens follows from token ids alone.
#include "restricted_draw.cuh"
#include "row_cut.cuh"

namespace diffusion_runtime {
namespace {

struct DrawShared {
  CutShared cut;
  uint64_t warp_best[kDrawWarps];
  double run_mass[kDrawThreads], warp_mass[kDrawWarps];
  double warp_statistics_mass[kDrawWarps], warp_moment[kDrawWarps];
  float warp_second[kDrawWarps];
  float weight[kTile];
};

// The tile with the largest logit, the lowest at a tie.
struct BestTile {
  uint32_t key;
  int tile;
};

__device__ __forceinline__ BestTile best_tile(const uint32_t* tile_keys, int num_tiles, DrawShared& shared) {
  uint64_t best = 0;
  for (int tile = threadIdx.x; tile < num_tiles; tile += kDrawThreads)
    best = max(best, uint64_t{tile_keys[tile]} << 32 | uint32_t(~tile));
  best = max_over_warp(best);
  if (threadIdx.x % 32 == 0) shared.warp_best[threadIdx.x / 32] = best;
  __syncthreads();
  for (int w = 0; w < kDrawWarps; ++w) best = max(best, shared.warp_best[w]);
  return {uint32_t(best >> 32), int(~uint32_t(best))};
}

// The first allowed token of the tile with this logit. Every warp finds it for itself.
template <class T>
__device__ __forceinline__ int first_of_tile(const Row<T>& row, const BestTile& best) {
  const float x = logit_of(best.key);
  int token = kNone;
#pragma unroll
  for (int i = kTile - 32; i >= 0; i -= 32) {
    const int t = best.tile * kTile + i + threadIdx.x % 32;
    if (row.allowed_logit(t) == x) token = t;
  }
  return __reduce_min_sync(~0u, token);
}

// Which tokens of the row are left, and what each weighs.
template <class T>
struct Kept {
  const Row<T>& row;
  float top;       // y of the best allowed token
  uint32_t key;    // of the smallest logit that stays
  float smallest;  // the same as a logit
  float min_p;

  __device__ __forceinline__ float weight_of(float y) const { return fast_exp2(exponent(y, top, row.scales.draw)); }

  // 0 for a token that is cut; y = softcap(x).
  __device__ __forceinline__ float kept_weight(float x, float y) const {
    const float weight = weight_of(y);
    return x >= smallest && weight >= min_p ? weight : 0;
  }
  __device__ __forceinline__ bool keeps(float x, float y) const { return x >= smallest && weight_of(y) >= min_p; }
};

// The key of the smallest logit that top_k and top_p leave.
template <class T>
__device__ __forceinline__ uint32_t cutoff_of(const SampleTokens& op, const Row<T>& row, int64_t r, float top,
                                              uint32_t top_key, const uint32_t* tile_keys, DrawShared& shared) {
  const float per_unit = fminf(row.scales.draw * kBinsPerUnit, 3.0e38f);
  const LogitBins bins = {logit_of(top_key), per_unit};
  const int64_t top_k = at(op.top_k, r);
  uint32_t lowest = kNoKey + 1;
  if (top_k > 0 && top_k < row.vocab) {
    const uint32_t guess = key_of_large_tiles(row, tile_keys, top_k, bins, shared.cut);
    const uint32_t cutoff = find_cutoff(
        row, tile_keys, guess, bins, 0, shared.cut, [](float) { return uint64_t{1}; },
        [&](uint64_t) { return uint64_t(top_k); });
    lowest = max(lowest, cutoff);
  }
  const float top_p = at(op.top_p, r);
  if (top_p >= 1) return lowest;
  // masses as integers, so scaled that the sum over the row fits in 62 bits
  const float unit = __uint_as_float(unsigned(127 + 62 - (32 - __clz(row.vocab))) << 23);
  const auto mass_of = [&](float x) {
    return uint64_t(fast_exp2(exponent(row.softcapped(x), top, row.scales.draw)) * unit);
  };
  const auto share = [&](uint64_t total) { return max(uint64_t(ceil(double(top_p) * double(total))), uint64_t{1}); };
  // all tokens below this together are less than what top_p leaves out
  const uint64_t negligible = uint64_t((1 - top_p) * unit / 2) / unsigned(row.vocab);
  return max(lowest, find_cutoff(row, tile_keys, lowest, bins, negligible, shared.cut, mass_of, share));
}

// The sums over what a thread has seen of the kept tokens, at the temperature of the statistics.
struct KeptStatistics {
  double mass, moment;
  float second;  // the largest logit but that of the argmax
};

// Weighs every tile that may hold a kept token.
template <class T>
__device__ __forceinline__ KeptStatistics weigh_tiles(const Kept<T>& kept, bool restricted, int64_t argmax,
                                                      uint32_t lowest, const uint32_t* tile_keys, float* tile_masses) {
  constexpr int kSize = Vector16<T>::kSize;
  const Row<T>& row = kept.row;
  KeptStatistics all = {0, 0, -INFINITY};
  for_each_span<kDrawWarps>(row, tile_keys, lowest, [&](int token, const float (&x)[kSize]) {
    float draw_mass = 0, mass = 0, moment = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float y = row.softcapped(x[i]);
      draw_mass += kept.kept_weight(x[i], y);
      if (restricted && kept.keeps(x[i], y)) {
        const float z = exponent(y, kept.top, row.scales.statistics), weight = fast_exp2(z);
        mass += weight;
        moment += fmaxf(z, kLowestExponent) * weight;  // a z of -inf has weight 0
        if (token + i != argmax) all.second = fmaxf(all.second, x[i]);
      }
    }
    all.mass += mass;
    all.moment += moment;
    draw_mass = over_tile<T>(draw_mass, [](float a, float b) { return a + b; });
    if (threadIdx.x % kLanesOfTile<T> == 0 && token < row.vocab) tile_masses[token / kTile] = draw_mass;
  });
  return all;
}

// The token that the uniforms point at. Every thread picks for itself, from the same numbers in the same order: a warp
// of runs of tiles, a run, a tile, a token.
template <class T>
__device__ __forceinline__ int draw_kept(const Kept<T>& kept, const Uniforms& uniforms, uint32_t lowest,
                                         const uint32_t* tile_keys, const float* tile_masses, DrawShared& shared) {
  const Row<T>& row = kept.row;
  const int num_tiles = tiles_of(row.vocab), run = (num_tiles + kDrawThreads - 1) / kDrawThreads;
  const auto mass_of_tile = [&](int64_t tile) {
    return tile < num_tiles && tile_keys[tile] >= lowest ? double(tile_masses[tile]) : 0;
  };
  __syncthreads();  // the tiles have been weighed
  double mass = 0;
  for (int i = 0; i < run; ++i) mass += mass_of_tile(int64_t{threadIdx.x} * run + i);
  shared.run_mass[threadIdx.x] = mass;
  mass = sum_over_warp(mass);
  if (threadIdx.x % 32 == 0) shared.warp_mass[threadIdx.x / 32] = mass;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kDrawWarps; ++w) total += shared.warp_mass[w];
  double target = uniforms.first * total;
  const int warp = pick_by_mass(kDrawWarps, target, [&](int w) { return shared.warp_mass[w]; });
  const int in_warp = pick_by_mass(32, target, [&](int i) { return shared.run_mass[warp * 32 + i]; });
  const int64_t first = int64_t{warp * 32 + in_warp} * run;
  const int tile = int(first) + pick_by_mass(run, target, [&](int i) { return mass_of_tile(first + i); });

  for (int i = threadIdx.x; i < kTile; i += kDrawThreads) {
    const float x = row.allowed_logit(tile * kTile + i);
    shared.weight[i] = kept.kept_weight(x, row.softcapped(x));
  }
  __syncthreads();
  total = 0;
#pragma unroll 8
  for (int i = 0; i < kTile; ++i) total += shared.weight[i];
  target = uniforms.second * total;
  return tile * kTile + pick_by_mass(kTile, target, [&](int i) { return double(shared.weight[i]); });
}

// The statistics of the kept tokens, right in thread 0.
template <class T>
__device__ __forceinline__ RowResult kept_result(const Kept<T>& kept, const KeptStatistics& of_thread, int token,
                                                 DrawShared& shared) {
  const double warp_mass = sum_over_warp(of_thread.mass), warp_moment = sum_over_warp(of_thread.moment);
  const float warp_second = max_over_warp(of_thread.second);
  if (threadIdx.x % 32 == 0) {
    shared.warp_statistics_mass[threadIdx.x / 32] = warp_mass;
    shared.warp_moment[threadIdx.x / 32] = warp_moment;
    shared.warp_second[threadIdx.x / 32] = warp_second;
  }
  __syncthreads();
  RowTotals totals = {0, 0, 0};
  float second = -INFINITY;
  for (int w = 0; w < kDrawWarps; ++w) {
    totals.mass += shared.warp_statistics_mass[w];
    totals.moment += shared.warp_moment[w];
    second = fmaxf(second, shared.warp_second[w]);
  }
  const float y = kept.row.softcapped(to_float(kept.row.logits[token]));
  return row_result(kept.top, kept.row.softcapped(second), y, totals, kept.row.scales);
}

// min_p counts from the largest logit, so it skips tiles as well: under a softcap no logit is too small for that.
template <class T>
__device__ __forceinline__ uint32_t lowest_of_min_p(const Row<T>& row, float min_p, float top) {
  if (!(min_p > 0) || row.scales.softcap > 0) return kNoKey + 1;
  return max(key_of(top + (log2f(min_p) - 0.01f) / row.scales.draw), kNoKey + 1);  // a little too low, for the rounding
}

// Stores the candidate of a row that has statistics of all its tokens.
template <class T>
__device__ __forceinline__ void store_candidate(const SampleTokens& op, const Row<T>& row, int64_t r, int64_t argmax,
                                                double mass, int token) {
  const float top = row.softcapped(to_float(row.logits[argmax])), y = row.softcapped(to_float(row.logits[token]));
  op.ids[r] = token;
  op.statistics[r] = row_result(top, top, y, {mass, 0, 0}, row.scales).logprob;
}

template <class T>
__global__ void __launch_bounds__(kDrawThreads, 1) restricted_draw_kernel(const __grid_constant__ SampleTokens op) {
  SHARED(DrawShared, shared);
  const int64_t r = blockIdx.x;
  const int64_t argmax = op.ids[op.rows + r];
  if (argmax < 0 || !draws_later(op, r)) return;  // -1: not masked, or no distribution; so for the whole block
  const Row<T> row = row_of<T>(op, r);
  const Workspace workspace = workspace_of(op);
  const int64_t first_tile = r * tiles_of(op.vocab);
  const uint32_t* const tile_keys = workspace.tile_keys + first_tile;

  const BestTile best = best_tile(tile_keys, tiles_of(op.vocab), shared);
  if (best.key <= kNoKey) {
    if (threadIdx.x == 0) store(op, r, no_distribution());
    return;
  }
  if (row.scales.draw == 0) {
    const int token = first_of_tile(row, best);
    if (threadIdx.x == 0) store_candidate(op, row, r, argmax, workspace.mass[r], token);
    return;
  }
  const float top = row.softcapped(logit_of(best.key)), min_p = at(op.min_p, r);
  const uint32_t cutoff = cutoff_of(op, row, r, top, best.key, tile_keys, shared);
  const uint32_t lowest = max(cutoff, lowest_of_min_p(row, min_p, top));
  const Kept<T> kept = {row, top, cutoff, logit_of(cutoff), min_p};
  float* const tile_masses = workspace.tile_masses + first_tile;
  const KeptStatistics statistics = weigh_tiles(kept, op.restricted, argmax, lowest, tile_keys, tile_masses);
  const int token = draw_kept(kept, uniforms_of(op, r), lowest, tile_keys, tile_masses, shared);
  if (!op.restricted) {
    if (threadIdx.x == 0) store_candidate(op, row, r, argmax, workspace.mass[r], token);
    return;
  }
  const RowResult result = kept_result(kept, statistics, token, shared);
  if (threadIdx.x == 0) store(op, r, {token, argmax, result});
}

}  // namespace

void restricted_draw(const SampleTokens& arguments, cudaStream_t stream) {
  const auto launch_for = [&](auto logit) {
    static_assert(sizeof(DrawShared) <= 48 << 10, "a block gets more only if the kernel's attributes say so");
    launch(restricted_draw_kernel<decltype(logit)>, dim3(unsigned(arguments.rows)), dim3(kDrawThreads),
           sizeof(DrawShared), stream, arguments);
  };
  switch (arguments.type) {
    case LogitType::Float32: return launch_for(float{});
    case LogitType::Float16: return launch_for(Float16{});
    case LogitType::BFloat16: return launch_for(BFloat16{});
  }
}

}  // namespace diffusion_runtime
