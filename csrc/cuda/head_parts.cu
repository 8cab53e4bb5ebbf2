// The LM head for few rows, fused with the parts of its logits: the weights are read once, by blocks that loop over the
// vocabulary; logits exist in shared memory only. A row's logits are sums over dim in its order, whatever the block,
// the batch and the place of the row in it. While a block turns logits into parts, its next weights are on their way.
#include "head_block.cuh"

namespace diffusion_runtime {
namespace {

constexpr int kChoosingThreads = 1024;

struct ChoosingShared {
  int count[kChoosingThreads / 32];
};

// The indices of the masked rows, in order, and before them their number. One block.
__global__ void __launch_bounds__(kChoosingThreads) choose_rows_kernel(const bool* masked, int rows, int* chosen) {
  SHARED(ChoosingShared, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int before = 0;
  for (int first = 0; first < rows; first += kChoosingThreads) {
    const int r = first + threadIdx.x;
    const bool is_chosen = r < rows && masked[r];
    const unsigned of_warp = __ballot_sync(~0u, is_chosen);
    if (lane == 0) shared.count[warp] = __popc(of_warp);
    __syncthreads();
    int place = before + __popc(of_warp & ((1u << lane) - 1));
    for (int w = 0; w < kChoosingThreads / 32; ++w) {
      if (w < warp) place += shared.count[w];
      before += shared.count[w];
    }
    if (is_chosen) chosen[1 + place] = r;
    __syncthreads();  // the counts have been read
  }
  if (threadIdx.x == 0) chosen[0] = before;
}

// The parts of one slice of logits: of rows [first_row, first_row + kSliceRows) in one tile.
template <class T>
__device__ __forceinline__ void parts_of_slice(const SampleFromHidden& op, const Rows& rows, int first_row, int tile,
                                               const float* logits) {
  const int group = threadIdx.x / kPartLanes, num_tiles = tiles_of(op.vocab);
  float bias[kFours * kFour];
#pragma unroll
  for (int i = 0; i < kFours * kFour; ++i) {
    const int token = tile * kTile + i / kFour * kFourStride + first_of_lane() + i % kFour;
    bias[i] = op.bias != nullptr && token < op.vocab ? to_float(static_cast<const T*>(op.bias)[token]) : 0;
  }
  const int count = min(kSliceRows, rows.count - first_row);
  for (int first = 0; first < count; first += kHeadThreads / kPartLanes) {
    const int of_slice = min(first + group, count - 1);  // lanes without a row of their own repeat the last
    const int r = rows[first_row + of_slice];
    const unsigned counting = counting_tokens(op, r, tile);
    const float* const mine = logits + of_slice * kLogitStride + first_of_lane();
    float x[kFours * kFour];
#pragma unroll
    for (int f = 0; f < kFours; ++f) {
      const float4 four = *reinterpret_cast<const float4*>(mine + f * kFourStride);
      const float sums[kFour] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        const int place = f * kFour + i;
        x[place] = counting >> place & 1 ? sums[i] + bias[place] : -INFINITY;
      }
    }
    const TilePart part = part_of_tile(reading_of(op, r), x, tile);
    if (threadIdx.x % kPartLanes == 0 && first + group < count) parts_of(op)[int64_t{r} * num_tiles + tile] = part;
  }
}

// The parts of a block's logits, one slice after the other through shared memory.
template <class T, int kRows>
__device__ __forceinline__ void parts_of_block(const SampleFromHidden& op, const Rows& rows, int row_block,
                                               int token_block, const WarpSums& sums, float* logits) {
  using Block = HeadBlock<T, kRows>;
  const int warp = threadIdx.x / 32;
  const int warp_token = warp % Block::kTokenWarps * kWarpTokens, warp_row = warp / Block::kTokenWarps * kWarpRows;
#pragma unroll
  for (int slice = 0; slice < Block::kSlices; ++slice) {
    const int slice_tile = slice % Block::kTilesOfBlock, slice_row = slice / Block::kTilesOfBlock * kSliceRows;
    const int tile = token_block * Block::kTilesOfBlock + slice_tile, first_row = row_block * kRows + slice_row;
    if (tile >= tiles_of(op.vocab) || first_row >= rows.count) continue;
    if (warp_token / kTile == slice_tile && warp_row / kSliceRows * kSliceRows == slice_row)
      store_logits(sums, logits + (warp_row - slice_row) * kLogitStride + warp_token % kTile);
    __syncthreads();
    parts_of_slice<T>(op, rows, first_row, tile, logits);
    __syncthreads();  // the slice has been read
  }
}

template <class T, int kRows>
__global__ void __launch_bounds__(kHeadThreads, 1)
    head_parts_kernel(const __grid_constant__ SampleFromHidden op, int token_blocks) {
  using Block = HeadBlock<T, kRows>;
  SHARED(typename Block::Shared, shared);
  const int* const chosen = chosen_of(op);
  const Rows rows = op.masked != nullptr ? Rows{chosen + 1, chosen[0]} : Rows{nullptr, int(op.rows)};
  const int row_blocks = (rows.count + kRows - 1) / kRows, steps = (int(op.dim) + kDepth - 1) / kDepth;
  if (row_blocks == 0) return;

  Copies<T, kRows> copies{op, rows, steps, row_blocks, token_blocks};
#pragma unroll
  for (int i = 0; i < Block::kStages - 1; ++i) copies.copy_next(shared);

  const int warp = threadIdx.x / 32;
  const int warp_token = warp % Block::kTokenWarps * kWarpTokens, warp_row = warp / Block::kTokenWarps * kWarpRows;
  int stage = 0;
  for (int token_block = blockIdx.x; token_block < token_blocks; token_block += gridDim.x) {
    for (int row_block = 0; row_block < row_blocks; ++row_block) {
      const int warp_count = rows.count - row_block * kRows - warp_row;  // rows left for this warp
      WarpSums sums = {};
      for (int step = 0; step < steps; ++step) {
        async_copy_wait<Block::kStages - 2>();
        __syncthreads();  // the stage has come, for all; and the one before has been read
        copies.copy_next(shared);
        const T* const weight = shared.weight[stage] + warp_token * kDepth;
        const T* const hidden = shared.hidden[stage] + warp_row * kDepth;
        if (warp_count > 16)
          multiply_stage<2>(sums, weight, hidden);
        else if (warp_count > 0)
          multiply_stage<1>(sums, weight, hidden);
        stage = stage + 1 == Block::kStages ? 0 : stage + 1;
      }
      parts_of_block<T, kRows>(op, rows, row_block, token_block, sums, shared.logits);
    }
  }
  async_copy_wait<0>();
}

template <class T, int kRows>
void launch_head_parts(const SampleFromHidden& op, cudaStream_t stream) {
  using Block = HeadBlock<T, kRows>;
  const int token_blocks = int((op.vocab + Block::kTokens - 1) / Block::kTokens);
  launch(head_parts_kernel<T, kRows>, dim3(unsigned(min(token_blocks, num_multiprocessors()))), dim3(kHeadThreads),
         sizeof(typename Block::Shared), stream, op, token_blocks);
}

}  // namespace

size_t sample_from_hidden_workspace(int64_t rows, int64_t vocab) {
  return size_t(rows) * tiles_of(vocab) * sizeof(TilePart) + size_t(rows + 1) * sizeof(int);
}

bool head_parts_takes(const SampleFromHidden& op) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return op.type != LogitType::Float32 && aligned(op.hidden) && aligned(op.weight) && op.dim % 8 == 0 &&
         op.hidden_stride % 8 == 0 && op.weight_stride % 8 == 0;
}

void head_parts(const SampleFromHidden& op, cudaStream_t stream) {
  if (op.rows == 0) return;
  if (op.masked != nullptr)
    launch(choose_rows_kernel, dim3(1), dim3(kChoosingThreads), sizeof(ChoosingShared), stream, op.masked, int(op.rows),
           chosen_of(op));
  const auto launch_for = [&](auto element) {
    using T = decltype(element);
    if (op.rows <= 64) return launch_head_parts<T, 64>(op, stream);
    launch_head_parts<T, 128>(op, stream);
  };
  if (op.type == LogitType::BFloat16) return launch_for(BFloat16{});
  launch_for(Float16{});
}

}  // namespace diffusion_runtime
