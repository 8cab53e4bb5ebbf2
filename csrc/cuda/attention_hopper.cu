// Which calls of attention the kernel for Hopper takes, and how they are launched.
#include "attention_hopper.cuh"
#include "attention_hopper_kernel.cuh"

namespace diffusion_runtime {
namespace {

constexpr int64_t kMostPartBytes = int64_t{256} << 20;  // a call that needs more for its chunks is not split

struct Sizes {
  int64_t batch, head, row;
};

// What the copy engine and 16-byte loads ask for.
bool in_16_bytes(const AttentionTensor& t, const Sizes& sizes) {
  if (sizes.batch * sizes.head * sizes.row == 0) return true;
  const auto fits = [](int64_t stride, int64_t size) { return size == 1 || (stride % 8 == 0 && stride >= 0); };
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && fits(t.batch, sizes.batch) && fits(t.head, sizes.head) &&
         (sizes.row == 1 || (t.row % 8 == 0 && t.row > 0));
}

int64_t batches(const AttentionArguments& a) { return a.cu_seqlens != nullptr ? 1 : a.sequences; }
Sizes key_sizes(const AttentionArguments& a) { return {batches(a), a.kv_heads, a.num_keys}; }
Sizes prefix_sizes(const AttentionArguments& a) {
  if (a.prefix_key.data == nullptr || a.capacity == 0) return {0, 0, 0};
  // how many pages there are, nobody has said: as many as fit in 2^40 bytes
  const int64_t most = (int64_t{1} << 39) / max(max(a.prefix_key.batch, a.prefix_value.batch), int64_t{1});
  return a.page_size > 0 ? Sizes{min(most, int64_t{INT32_MAX}), a.kv_heads, a.page_size}
                         : Sizes{a.sequences, a.kv_heads, a.capacity};
}

int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

// No map where there is no row: nobody asks for one then.
HopperSource source(const AttentionArguments& a, const AttentionTensor& from, const Sizes& sizes, bool paged,
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

struct HopperGrid {
  int64_t tiles;   // of a sequence and a head of keys
  int64_t all;     // of the call
  int64_t chunks;  // that are split; 0: none
  int64_t workspace;
};

// Tiles are split where they would leave a part of the GPU idle: no result depends on it.
template <int kDim>
HopperGrid grid_of(const AttentionArguments& a) {
  constexpr int64_t kKeys = HopperSizes<kDim>::kKeys, kChunk = HopperSizes<kDim>::kChunk;
  const int64_t group = a.heads / max(a.kv_heads, 1), rows = a.max_length * group;
  HopperGrid grid = {(rows + kTileRows - 1) / kTileRows, 0, 0, 0};
  grid.all = grid.tiles * a.kv_heads * a.sequences;
  // packed, most sequences may be shorter by far than the longest
  const int64_t packed = (a.length * group / kTileRows + a.sequences) * a.kv_heads;
  const int64_t busy = a.cu_seqlens != nullptr ? min(grid.all, packed) : grid.all;
  if (kChunk == 0 || busy >= num_multiprocessors() || grid.all > kMostSplitTiles) return grid;
  const int64_t blocks = (a.capacity + kKeys - 1) / kKeys + (a.num_keys + kKeys - 1) / kKeys;
  const int64_t chunks = (blocks + kChunk - 1) / max(kChunk, int64_t{1});
  const int64_t bytes = grid.all * chunks * kConsumers * kPartFloats<HopperSizes<kDim>::kSums> * 4;
  if (chunks > 1 && chunks < 65536 && bytes <= kMostPartBytes) {
    grid.chunks = chunks;
    grid.workspace = kTicketBytes + bytes;
  }
  return grid;
}

template <class T, int kDim>
void launch_for(const AttentionArguments& a, void* workspace, cudaStream_t stream) {
  constexpr int kKeys = HopperSizes<kDim>::kKeys;
  static_assert(sizeof(HopperShared<T, kDim>) <= 227 << 10, "more than a block can have");
  const HopperGrid grid = grid_of<kDim>(a);
  if (grid.all == 0) return;
  if (grid.tiles > INT32_MAX / kTileRows || grid.all > INT32_MAX)
    throw std::runtime_error("attention: too many queries");
  HopperProblem p = {};
  p.a = a;
  p.group = a.heads / a.kv_heads;
  p.tiles = int(grid.tiles), p.chunks = int(grid.chunks);
  p.workspace = workspace;
  p.negated = a.scale < 0, p.zero = a.scale == 0;
  const float size = p.zero ? 1 : fabsf(a.scale);
  p.factor = a.softcap > 0 ? size / a.softcap : 0;
  p.unit = (a.softcap > 0 ? 1 : size) * kLog2e;
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
