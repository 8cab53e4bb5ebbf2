// Which calls of attention the kernel for Hopper takes, and how they are launched.
#include "attention_grid.cuh"
#include "attention_hopper.cuh"
#include "attention_hopper_kernel.cuh"

namespace diffusion_runtime {
namespace {

int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

// No map where there is no row: nobody asks for one then.
HopperSource source(const AttentionArguments& a, const AttentionTensor& from, const AttentionExtent& sizes, bool paged,
                    int keys) {
  HopperSource s = {};
  if (sizes.batch * sizes.head * sizes.row == 0) return s;
  s.page_size = int(sizes.row);
  s.page_table = paged ? a.page_table : nullptr;
  s.max_pages = a.max_pages;
  s.box_rows = paged ? common_divisor(s.page_size, keys) : keys;
  TiledTensor t = {from.data,   a.type,       a.head_dim,    sizes.row,      sizes.head,
                   sizes.batch, from.row * 2, from.head * 2, from.batch * 2, s.box_rows};
  s.head_step = sizes.head > 1 && from.head > 0;
  s.batch_step = sizes.batch > 1 && from.batch > 0;
  // a map has no stride of 0, and none that does not matter
  if (!s.head_step) t.heads = 1, t.head = 16;
  if (!s.batch_step) t.batches = 1, t.batch = 16;
  if (sizes.row == 1) t.row = 16;
  s.map = tensor_map(t);
  return s;
}

template <int kDim>
AttentionGrid grid_of(const AttentionArguments& a) {
  using Sizes = HopperSizes<kDim>;
  return attention_grid(a, kTileRows, Sizes::kKeys, Sizes::kChunk, kConsumers * kPartFloats<Sizes::kSums>);
}

template <class T, int kDim>
void launch_for(const AttentionArguments& a, void* workspace, cudaStream_t stream) {
  constexpr int kKeys = HopperSizes<kDim>::kKeys;
  static_assert(sizeof(HopperShared<T, kDim>) <= 227 << 10, "more than a block can have");
  const AttentionGrid grid = grid_of<kDim>(a);
  if (grid.all == 0) return;
  HopperProblem p = {};
  set_launch(p, a, grid, workspace);
  p.key = source(a, a.key, key_sizes(a), false, kKeys);
  p.value = source(a, a.value, key_sizes(a), false, kKeys);
  p.prefix_key = source(a, a.prefix_key, prefix_sizes(a), a.page_size > 0, kKeys);
  p.prefix_value = source(a, a.prefix_value, prefix_sizes(a), a.page_size > 0, kKeys);
  launch(attention_hopper_kernel<T, kDim>, dim3(unsigned(grid.all), unsigned(max(grid.chunks, int64_t{1}))),
         dim3(kHopperThreads), sizeof(HopperShared<T, kDim>), stream, p);
}

template <class T>
void launch_for(const AttentionArguments& a, void* workspace, cudaStream_t stream) {
  switch (a.head_dim) {
    case 64: return launch_for<T, 64>(a, workspace, stream);
    case 128: return launch_for<T, 128>(a, workspace, stream);
    default: return launch_for<T, 256>(a, workspace, stream);
  }
}

}  // namespace

bool hopper_takes(const AttentionArguments& a) {
  const bool sizes = a.head_dim == 64 || a.head_dim == 128 || a.head_dim == 256;
  const int64_t length = a.length;
  return sizes && a.value_dim == a.head_dim && a.type != LogitType::Float32 && a.mask_type == MaskType::None &&
         in_16_bytes(a.query, {batches(a), a.heads, length}) && in_16_bytes(a.key, key_sizes(a)) &&
         in_16_bytes(a.value, key_sizes(a)) && in_16_bytes(a.prefix_key, prefix_sizes(a)) &&
         in_16_bytes(a.prefix_value, prefix_sizes(a)) &&
         in_16_bytes({a.out, a.out_batch, a.out_head, a.out_row}, {batches(a), a.heads, length}) && device_is_hopper();
}

size_t attention_hopper_workspace(const AttentionArguments& a) {
  return size_t(a.head_dim == 64    ? grid_of<64>(a).workspace
                : a.head_dim == 128 ? grid_of<128>(a).workspace
                                    : grid_of<256>(a).workspace);
}

void launch_attention_hopper(const AttentionArguments& a, void* workspace, cudaStream_t stream) {
  if (a.type == LogitType::BFloat16)
    launch_for<BFloat16>(a, workspace, stream);
  else
    launch_for<Float16>(a, workspace, stream);
}

}  // namespace diffusion_runtime
