// One pass over the logits in one launch. A row is cut into chunks of kChunk tokens, one block each; the block that
// ends last merges what the others found, draws the token and stores the results. The cuts, and the tokens each thread
// sums, follow from token ids alone: a row gives the same bits in any batch, at any row number and at any address.
#include "restricted_draw.cuh"
#include "row_chunk.cuh"

namespace diffusion_runtime {
namespace {

// True in the block that comes last to the ticket of its row: it sees the parts of all the others.
template <class T>
__device__ __forceinline__ bool is_last_block(unsigned* ticket, Shared<T>& shared) {
  if (threadIdx.x == 0) {
    __threadfence();
    shared.is_last = atomicAdd(ticket, 1u) == gridDim.y - 1;
    __threadfence();
    if (shared.is_last) *ticket = 0;
  }
  __syncthreads();
  return shared.is_last;
}

// The largest logits of the row. Every warp finds them for itself, which saves a barrier.
__device__ __forceinline__ ChunkPart largest_of_row(const ChunkPart* parts, int num_chunks) {
  ChunkPart best = {{-INFINITY, -INFINITY, 0, 0, 0, 0}, kNone};
  for (int c = threadIdx.x % 32; c < num_chunks; c += 32) {
    const ChunkPart part = parts[c];
    merge_largest(best, part);
  }
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    ChunkPart other = best;
    other.part.max = __shfl_xor_sync(~0u, best.part.max, bit);
    other.part.second = __shfl_xor_sync(~0u, best.part.second, bit);
    other.part.top = __shfl_xor_sync(~0u, best.part.top, bit);
    other.argmax = __shfl_xor_sync(~0u, best.argmax, bit);
    merge_largest(best, other);
  }
  return best;
}

// The sums over the row, in the order of its tokens; the totals of chunks stay in shared.totals, if they fit.
template <class T>
__device__ __forceinline__ RowTotals totals_of_row(const ChunkPart* parts, int num_chunks, float top,
                                                   const RowScales& scales, Shared<T>& shared) {
  RowTotals totals = {0, 0, 0};
  for (int first = 0; first < num_chunks; first += kThreads) {
    const int count = min(kThreads, num_chunks - first), c = threadIdx.x;
    if (first > 0) __syncthreads();  // the chunks before have been added
    if (c < count) shared.totals[c] = rescaled(parts[first + c].part, top, scales);
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      totals.mass += shared.totals[i].mass;
      totals.moment += shared.totals[i].moment;
      totals.draw_mass += shared.totals[i].draw_mass;
    }
  }
  return totals;
}

// The token that the uniforms point at: the chunk, the tile in it, the token in the tile. Every thread picks for itself
// from shared memory: the same numbers in the same order.
template <bool kLimited, class T>
__device__ __forceinline__ int draw_token(const Row<T>& row, const Uniforms& uniforms, const ChunkPart* parts,
                                          int num_chunks, float top_of_row, double draw_mass, Shared<T>& shared) {
  const auto chunk_mass = [&](int c) {  // beyond kThreads chunks (2^20 tokens) slowly
    return num_chunks <= kThreads ? shared.totals[c].draw_mass
                                  : rescaled(parts[c].part, top_of_row, row.scales).draw_mass;
  };
  double target = uniforms.first * draw_mass;
  const int chunk = pick_by_mass(num_chunks, target, chunk_mass);
  const RowPart part = parts[chunk].part;
  target *= part.draw_mass / chunk_mass(chunk);

  const int length = row.length(chunk), num_tiles = (length + kTile - 1) / kTile;
  load_chunk(row, chunk, shared);
  __syncthreads();
  const auto weight = [&](int place) {
    bool may = place < length;
    if constexpr (kLimited) may = may && (row.allowed_from(chunk * kChunk + place) & 1);
    const float y = may ? row.softcapped(to_float(shared.logits[place])) : -INFINITY;
    return fast_exp2(exponent(y, part.top, row.scales.draw));
  };
  for (int tile = threadIdx.x / 32; tile < num_tiles; tile += kWarps) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kTile; i += 32) sum += weight(tile * kTile + i + threadIdx.x % 32);
    sum = sum_over_warp(sum);
    if (threadIdx.x % 32 == 0) shared.tile_mass[tile] = sum;
  }
  __syncthreads();
  const int tile = pick_by_mass(num_tiles, target, [&](int i) { return double(shared.tile_mass[i]); });

  for (int i = threadIdx.x; i < kTile; i += kThreads) shared.weight[i] = weight(tile * kTile + i);
  __syncthreads();
  double total = 0;
#pragma unroll 8
  for (int i = 0; i < kTile; ++i) total += shared.weight[i];
  target = uniforms.second * total;
  const int in_tile = pick_by_mass(kTile, target, [&](int i) { return double(shared.weight[i]); });
  return chunk * kChunk + tile * kTile + in_tile;
}

// The results of a row whose parts are all there. Called by a whole block.
template <bool kLimited, class T>
__device__ __forceinline__ RowSample finish_row(const SampleTokens& op, const Row<T>& row, int64_t r,
                                                const Workspace& workspace, const ChunkPart* parts, int num_chunks,
                                                Shared<T>& shared) {
  const ChunkPart best = largest_of_row(parts, num_chunks);
  const float top = best.part.top;
  const RowTotals totals = totals_of_row(parts, num_chunks, top, row.scales, shared);
  if (!has_distribution(best.part.max, totals.mass)) return no_distribution();

  int token = best.argmax;
  if (kLimited && draws_later(op, r)) {
    if (threadIdx.x == 0) workspace.mass[r] = totals.mass;
  } else if (row.scales.draw > 0) {
    token = draw_token<kLimited>(row, uniforms_of(op, r), parts, num_chunks, top, totals.draw_mass, shared);
  }
  const float second = row.softcapped(best.part.second);
  return {token, best.argmax, row_result(top, second, row.softcapped(to_float(row.logits[token])), totals, row.scales)};
}

// Grid (rows, blocks of a row): block b takes chunks b, b + gridDim.y and so on. Where the draw is limited, restricted
// statistics see only the allowed tokens, and some candidates are left to restricted_draw.
template <class T, bool kLimited>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sample_tokens_kernel(const __grid_constant__ SampleTokens op) {
  SHARED(Shared<T>, shared);
  const int64_t r = blockIdx.x;
  if (op.masked != nullptr && !op.masked[r]) {  // so for the whole block: no barrier is missed
    if (blockIdx.y == 0 && threadIdx.x == 0) store(op, r, {-1, -1, {0, 0, 0, 0, 0}});
    return;
  }
  Row<T> row = row_of<T>(op, r);
  if (kLimited && draws_later(op, r)) row.two_masses = false;
  const int num_chunks = chunks_of(op.vocab);
  const Workspace workspace = workspace_of(op);
  ChunkPart* const parts = workspace.parts + r * num_chunks;
  uint32_t* const tile_keys = workspace.tile_keys + r * tiles_of(op.vocab);

  for (int chunk = blockIdx.y; chunk < num_chunks; chunk += gridDim.y)
    read_chunk<kLimited>(row, chunk, op.restricted, tile_keys, shared, parts + chunk);
  if (!is_last_block(workspace.tickets + r, shared)) return;
  const RowSample sample = finish_row<kLimited>(op, row, r, workspace, parts, num_chunks, shared);
  if (threadIdx.x == 0) store(op, r, sample);
}

}  // namespace

bool is_limited(const SampleTokens& arguments) { return arguments.allowed != nullptr || has_cuts(arguments); }

size_t sample_tokens_workspace(int64_t rows, int64_t vocab, bool limited) {
  const size_t parts = size_t(ticket_bytes(rows)) + size_t(rows) * chunks_of(vocab) * sizeof(ChunkPart);
  return parts + (limited ? size_t(rows) * (sizeof(double) + tiles_of(vocab) * (sizeof(uint32_t) + sizeof(float))) : 0);
}

void sample_tokens(const SampleTokens& arguments, cudaStream_t stream) {
  if (arguments.rows == 0) return;
  const dim3 grid(unsigned(arguments.rows), unsigned(min(chunks_of(arguments.vocab), kMaxRowBlocks)));
  const auto launch_for = [&](auto logit) {
    using T = decltype(logit);
    static_assert(sizeof(Shared<T>) <= 48 << 10, "a block gets more only if the kernel's attributes say so");
    const auto kernel = is_limited(arguments) ? sample_tokens_kernel<T, true> : sample_tokens_kernel<T, false>;
    launch(kernel, grid, dim3(kThreads), sizeof(Shared<T>), stream, arguments);
    const bool later = has_cuts(arguments) || (arguments.allowed != nullptr && !arguments.restricted);
    if (later) restricted_draw(arguments, stream);
  };
  switch (arguments.type) {
    case LogitType::Float32: return launch_for(float{});
    case LogitType::Float16: return launch_for(Float16{});
    case LogitType::BFloat16: return launch_for(BFloat16{});
  }
}

}  // namespace diffusion_runtime
