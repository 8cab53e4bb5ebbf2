#include "attention.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <memory>

#include "attention_tile.h"
#include "instruction_set.h"

namespace diffusion_runtime {
namespace {

int threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Grows to what a tile needs, which is less than 2 MiB unless heads are huge, and stays with its thread.
float* scratch(std::int64_t floats) {
  constexpr std::int64_t kLine = 16;
  static thread_local std::unique_ptr<float[]> memory;
  static thread_local std::int64_t size = 0;
  if (size < floats) {
    memory.reset();
    memory.reset(new float[static_cast<std::size_t>(floats + kLine)]);
    size = floats;
  }
  const auto address = reinterpret_cast<std::uintptr_t>(memory.get());
  return memory.get() + (64 - address % 64) % 64 / sizeof(float);
}

// How many rows a tile has at most. What a row gets does not depend on it: it may follow the number of threads.
int rows_of_tile(const AttentionArguments& a, std::int64_t all_rows) {
  constexpr std::int64_t kFloats = 4 << 15;  // of queries and results: they stay in the second-level cache with a block
  constexpr std::int64_t kFewest = 24;       // fewer are not worth the packing of keys
  constexpr std::int64_t kMost = 1024;
  std::int64_t rows = std::clamp<std::int64_t>(kFloats / (a.head_dim + a.value_dim), kFewest, kMost);
  if (threads() > 1) rows = std::min(rows, all_rows / (4 * threads()));
  return static_cast<int>(std::max(rows, kFewest));
}

}  // namespace

void attention_cpu(const TensorView& query, const TensorView& key, const TensorView& value,
                   const MaybeTensor& prefix_key, const MaybeTensor& prefix_value, const MaybeTensor& prefix_lengths,
                   const MaybeTensor& page_table, const MaybeTensor& mask, const MaybeTensor& key_starts,
                   const MaybeTensor& key_ends, const MaybeTensor& cu_seqlens, const MaybeTensor& cu_seqlens_k,
                   const MaybeTensor& chosen, int left, int right, int block, int prefix_window, int offset,
                   int max_length, double scale, double softcap, const TensorView& out, const TensorView& logsumexp,
                   const std::string& instruction_set) {
  const auto attend = OF_INSTRUCTION_SET(find_instruction_set(instruction_set), attend);
  check(query.is_cpu(), "attention: the tensors must be on the CPU");
  const AttentionArguments a = attention_arguments(
      query, key, value, prefix_key, prefix_value, prefix_lengths, page_table, mask, key_starts, key_ends, cu_seqlens,
      cu_seqlens_k, chosen, left, right, block, prefix_window, offset, max_length, scale, softcap, out, logsumexp);
  const int group = a.heads / a.kv_heads;
  std::int64_t most_rows = 0, all_rows = 0;
  for (int s = 0; s < a.sequences; ++s) {
    const std::int64_t rows = std::int64_t{attention_sequence(a, s).num_queries} * group;
    most_rows = std::max(most_rows, rows), all_rows += rows * a.kv_heads;
  }
  check(most_rows <= INT32_MAX, "attention: at most 2^31 - 1 queries of the heads that share keys, got ", most_rows);
  if (all_rows == 0) return;

  const int limit = rows_of_tile(a, all_rows);
  const std::int64_t tiles = (most_rows + limit - 1) / limit, heads = std::int64_t{a.sequences} * a.kv_heads;
  const std::int64_t products = all_rows * (std::int64_t{a.capacity} + a.num_keys) * (a.head_dim + a.value_dim);
  // the last queries see most under a causal mask, so they come first
#pragma omp parallel for schedule(dynamic) if (tiles * heads > 1 && products > (1 << 18))
  for (std::int64_t i = 0; i < tiles * heads; ++i) {
    const int sequence = static_cast<int>(i % heads / a.kv_heads), kv_head = static_cast<int>(i % a.kv_heads);
    const std::int64_t rows = std::int64_t{attention_sequence(a, sequence).num_queries} * group;
    const std::int64_t own_tiles = (rows + limit - 1) / limit, tile = tiles - 1 - i / heads;
    if (tile >= own_tiles) continue;
    const std::int64_t first = rows * tile / own_tiles, last = rows * (tile + 1) / own_tiles;
    const int count = static_cast<int>(last - first);
    attend(a, {sequence, kv_head, static_cast<int>(first), count, scratch(attention_scratch(a, count, nullptr).size)});
  }
}

}  // namespace diffusion_runtime
