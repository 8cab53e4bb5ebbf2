// One pass over the logits in one launch. A row is cut into chunks of kChunk tokens, one block each; the block that
// ends last merges what the others found, draws the token and stores the results. The cuts, and the tokens each thread
// sums, follow from token ids alone: a row gives the same bits in any batch, at any row number and at any address.
#include "row_chunk.cuh"
#include "sample_tokens.cuh"

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
template <class T>
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
    const float y = place < length ? row.softcapped(to_float(shared.logits[place])) : -INFINITY;
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

struct RowSample {
  int64_t token, argmax;
  RowResult statistics;
};

__device__ __forceinline__ void store(const SampleTokens& op, int64_t r, const RowSample& sample) {
  op.ids[r] = sample.token;
  op.ids[op.rows + r] = sample.argmax;
  const RowResult& s = sample.statistics;
  const float values[] = {s.logprob, s.confidence, s.margin, s.entropy, s.logsumexp};
#pragma unroll
  for (int i = 0; i < 5; ++i) op.statistics[i * op.rows + r] = values[i];
}

template <class X>
__device__ __forceinline__ X at(const PerRow<X>& setting, int64_t r) {
  return setting.values != nullptr ? setting.values[r] : setting.value;
}

template <class T>
__device__ __forceinline__ Row<T> row_of(const SampleTokens& op, unsigned outer_index, unsigned inner_index,
                                         int64_t r) {
  const float temperature = at(op.temperature, r);
  Row<T> row;
  row.logits = static_cast<const T*>(op.logits) + outer_index * op.outer_stride + inner_index * op.inner_stride;
  row.vocab = int(op.vocab);
  row.scales.statistics = scale_of_temperature(at(op.statistics_temperature, r));
  row.scales.draw = temperature > 0 ? scale_of_temperature(temperature) : 0;
  row.scales.softcap = op.softcap;
  row.inverse_softcap = fminf(1 / op.softcap, 3.0e38f);  // finite, so that a logit of 0 stays 0
  row.two_masses = row.scales.draw > 0 && row.scales.draw != row.scales.statistics;
  return row;
}

// The results of a row whose parts are all there. Called by a whole block.
template <class T>
__device__ __forceinline__ RowSample finish_row(const SampleTokens& op, const Row<T>& row, int64_t r, int64_t position,
                                                const ChunkPart* parts, int num_chunks, Shared<T>& shared) {
  const ChunkPart best = largest_of_row(parts, num_chunks);
  const float top = best.part.top;
  const RowTotals totals = totals_of_row(parts, num_chunks, top, row.scales, shared);
  if (!has_distribution(best.part.max, totals.mass)) return {-1, -1, {NAN, NAN, NAN, NAN, NAN}};

  int token = best.argmax;
  if (row.scales.draw > 0) {
    const Uniforms uniforms = philox_uniforms(static_cast<uint64_t>(at(op.seed, r)), static_cast<uint32_t>(position),
                                              static_cast<uint32_t>(at(op.step, r)), kDrawToken);
    token = draw_token(row, uniforms, parts, num_chunks, top, totals.draw_mass, shared);
  }
  const float second = row.softcapped(best.part.second);
  return {token, best.argmax, row_result(top, second, row.softcapped(to_float(row.logits[token])), totals, row.scales)};
}

// The workspace: a ticket for each row, then the parts [rows, chunks].
__host__ __device__ __forceinline__ int64_t ticket_bytes(int64_t rows) { return (rows * 4 + 15) / 16 * 16; }
__host__ __device__ __forceinline__ int chunks_of(int64_t vocab) { return int((vocab + kChunk - 1) / kChunk); }

// Grid (rows, blocks of a row): block b takes chunks b, b + gridDim.y and so on.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sample_tokens_kernel(const __grid_constant__ SampleTokens op) {
  SHARED(Shared<T>, shared);
  const int64_t r = blockIdx.x;
  if (op.masked != nullptr && !op.masked[r]) {  // so for the whole block: no barrier is missed
    if (blockIdx.y == 0 && threadIdx.x == 0) store(op, r, {-1, -1, {0, 0, 0, 0, 0}});
    return;
  }
  const unsigned inner = unsigned(op.inner), outer_index = blockIdx.x / inner, inner_index = blockIdx.x % inner;
  const Row<T> row = row_of<T>(op, outer_index, inner_index, r);
  const int num_chunks = chunks_of(op.vocab);
  unsigned* const tickets = static_cast<unsigned*>(op.workspace);
  char* const after_tickets = static_cast<char*>(op.workspace) + ticket_bytes(op.rows);
  ChunkPart* const parts = reinterpret_cast<ChunkPart*>(after_tickets) + r * num_chunks;

  for (int chunk = blockIdx.y; chunk < num_chunks; chunk += gridDim.y) read_chunk(row, chunk, shared, parts + chunk);
  if (!is_last_block(tickets + r, shared)) return;
  const int64_t position = op.position != nullptr ? op.position[r] : inner_index;
  const RowSample sample = finish_row(op, row, r, position, parts, num_chunks, shared);
  if (threadIdx.x == 0) store(op, r, sample);
}

}  // namespace

size_t sample_tokens_workspace(int64_t rows, int64_t vocab) {
  return size_t(ticket_bytes(rows)) + size_t(rows) * chunks_of(vocab) * sizeof(ChunkPart);
}

void sample_tokens(const SampleTokens& arguments, cudaStream_t stream) {
  if (arguments.rows == 0) return;
  const dim3 grid(unsigned(arguments.rows), unsigned(min(chunks_of(arguments.vocab), kMaxRowBlocks)));
  const auto launch_for = [&](auto logit) {
    using T = decltype(logit);
    static_assert(sizeof(Shared<T>) <= 48 << 10, "a block gets more only if the kernel's attributes say so");
    launch(sample_tokens_kernel<T>, grid, dim3(kThreads), sizeof(Shared<T>), stream, arguments);
  };
  switch (arguments.type) {
    case LogitType::Float32: return launch_for(float{});
    case LogitType::Float16: return launch_for(Float16{});
    case LogitType::BFloat16: return launch_for(BFloat16{});
  }
}

}  // namespace diffusion_runtime
