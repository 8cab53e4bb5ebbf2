// How many blocks of threads attention gets, and what all its kernels are told.
#pragma once

#include <stdexcept>

#include "attention_chunks.cuh"

namespace diffusion_runtime {

struct AttentionExtent {
  int64_t batch, head, row;
};

// What the copy engine and 16-byte loads ask for.
inline bool in_16_bytes(const AttentionTensor& t, const AttentionExtent& sizes) {
  if (sizes.batch * sizes.head * sizes.row == 0) return true;
  const auto fits = [](int64_t stride, int64_t size) { return size == 1 || (stride % 8 == 0 && stride >= 0); };
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && fits(t.batch, sizes.batch) && fits(t.head, sizes.head) &&
         (sizes.row == 1 || (t.row % 8 == 0 && t.row > 0));
}

inline int64_t batches(const AttentionArguments& a) { return a.cu_seqlens != nullptr ? 1 : a.sequences; }
inline AttentionExtent key_sizes(const AttentionArguments& a) { return {batches(a), a.kv_heads, a.num_keys}; }
inline AttentionExtent prefix_sizes(const AttentionArguments& a) {
  if (a.prefix_key.data == nullptr || a.capacity == 0) return {0, 0, 0};
  // how many pages there are, nobody has said: as many as fit in 2^40 bytes
  const int64_t most = (int64_t{1} << 39) / max(max(a.prefix_key.batch, a.prefix_value.batch), int64_t{1});
  return a.page_size > 0 ? AttentionExtent{min(most, int64_t{INT32_MAX}), a.kv_heads, a.page_size}
                         : AttentionExtent{a.sequences, a.kv_heads, a.capacity};
}

constexpr int64_t kMostPartBytes = int64_t{256} << 20;  // a call that needs more for its chunks is not split

struct AttentionGrid {
  int64_t tiles;   // of a sequence and a head of keys
  int64_t all;     // of the call
  int64_t chunks;  // that are split; 0: none
  int64_t workspace;
};

// Tiles are split where they would leave a part of the GPU idle: no result depends on it.
inline AttentionGrid attention_grid(const AttentionArguments& a, int64_t tile_rows, int64_t keys, int64_t chunk,
                                    int64_t part_floats) {
  const int64_t group = a.heads / max(a.kv_heads, 1), rows = a.max_length * group;
  AttentionGrid grid = {(rows + tile_rows - 1) / tile_rows, 0, 0, 0};
  grid.all = grid.tiles * a.kv_heads * a.sequences;
  if (grid.tiles > INT32_MAX / tile_rows || grid.all > INT32_MAX)
    throw std::runtime_error("attention: too many queries");
  // packed, most sequences may be shorter by far than the longest
  const int64_t packed = (a.length * group / tile_rows + a.sequences) * a.kv_heads;
  const int64_t busy = a.cu_seqlens != nullptr ? min(grid.all, packed) : grid.all;
  if (chunk == 0 || busy >= num_multiprocessors() || grid.all > kMostSplitTiles) return grid;
  const int64_t blocks = (a.capacity + keys - 1) / keys + (a.num_keys + keys - 1) / keys;
  const int64_t chunks = (blocks + chunk - 1) / chunk, bytes = grid.all * chunks * part_floats * 4;
  if (chunks > 1 && chunks < 65536 && bytes <= kMostPartBytes) {
    grid.chunks = chunks;
    grid.workspace = kTicketBytes + bytes;
  }
  return grid;
}

inline void set_launch(AttentionLaunch& p, const AttentionArguments& a, const AttentionGrid& grid, void* workspace) {
  p.a = a;
  p.group = a.heads / a.kv_heads;
  p.tiles = int(grid.tiles), p.chunks = int(grid.chunks);
  p.workspace = workspace;
  p.negated = a.scale < 0, p.zero = a.scale == 0;
  p.size = p.zero ? 1 : fabsf(a.scale);
  p.factor = a.softcap > 0 ? p.size / a.softcap : 0;
  p.unit = (a.softcap > 0 || a.mask_type != MaskType::None ? 1 : p.size) * kLog2e;
}

}  // namespace diffusion_runtime
