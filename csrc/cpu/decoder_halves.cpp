#include "decoder_halves.h"

#include <memory>

#include "norm_row.h"
#include "row_product.h"
#include "row_tasks.h"

namespace diffusion_runtime {
namespace {

NormRow norm_of(const float* x, std::int64_t size, const float* weight, bool normalized, float eps) {
  return {x, LogitType::Float32, size, weight, LogitType::Float32, normalized, eps, 0, true};
}

}  // namespace

void before_attention(const DecoderLayer& layer, const DecoderSizes& sizes, float eps, const RotaryTable& table,
                      const float* x, float* normed, const Projected& to, InstructionSet set) {
  const auto norm_row = OF_INSTRUCTION_SET(set, norm_row);
  const auto rope_row = OF_INSTRUCTION_SET(set, rope_row);
  const auto row_product = OF_INSTRUCTION_SET(set, row_product);
  const std::int64_t rows = sizes.rows, hidden = sizes.hidden, dim = sizes.head_dim;
  const std::int64_t heads = sizes.heads, kv_heads = sizes.kv_heads, all_heads = heads + 2 * kv_heads;
  const std::int64_t parts = parts_of(rows, kRowsOfTask);
  struct Heads {
    const float *weight, *bias, *norm;
    std::int64_t first, count;
    float* to;
  };
  const Heads queries{layer.query, layer.query_bias, layer.query_norm, 0, heads, to.query};
  const Heads keys{layer.key, layer.key_bias, layer.key_norm, heads, kv_heads, to.key};
  const Heads values{layer.value, layer.value_bias, nullptr, heads + kv_heads, kv_heads, to.value};
  const RotaryPairs pairs{static_cast<int>(table.pairs), static_cast<int>(table.pairs), false};

#pragma omp parallel if (rows * hidden * all_heads * dim > kManyProducts)
  {
    const std::unique_ptr<float[]> scratch(new float[static_cast<std::size_t>(2 * dim)]);
#pragma omp for
    for (std::int64_t r = 0; r < rows; ++r)
      norm_row(norm_of(x + r * hidden, hidden, layer.norm, true, eps), normed + r * hidden);
#pragma omp for collapse(2) schedule(dynamic)
    for (std::int64_t at = 0; at < all_heads; ++at) {
      for (std::int64_t part = 0; part < parts; ++part) {
        const Heads& kind = at < heads ? queries : at < heads + kv_heads ? keys : values;
        const Part some(rows, parts, part);
        const std::int64_t first = (at - kind.first) * dim, stride = kind.count * dim;
        float* const out = kind.to + some.first * stride + first;
        row_product({normed + some.first * hidden, hidden, some.count, kind.weight + first * hidden, dim, hidden,
                     kind.bias == nullptr ? nullptr : kind.bias + first, 0, out, stride});
        if (&kind == &values) continue;
        for (std::int64_t r = 0; r < some.count; ++r) {
          const std::int64_t place = (some.first + r) % table.rows * table.pairs;
          rope_row(norm_of(out + r * stride, dim, kind.norm, kind.norm != nullptr, eps),
                   {table.cos + place, table.sin + place, pairs}, scratch.get(), out + r * stride, nullptr);
        }
      }
    }
  }
}

void after_attention(const DecoderLayer& layer, const DecoderSizes& sizes, float eps, const float* mixed, float* x,
                     float* normed, float* gated, InstructionSet set) {
  const auto norm_row = OF_INSTRUCTION_SET(set, norm_row);
  const auto row_product = OF_INSTRUCTION_SET(set, row_product);
  const auto gated_row_product = OF_INSTRUCTION_SET(set, gated_row_product);
  const std::int64_t rows = sizes.rows, hidden = sizes.hidden, ffn = sizes.ffn;
  // x += from @ weight^T
  const auto add = [&](const float* from, std::int64_t depth, const float* weight) {
    for_tasks(rows, hidden, [&](const Part& some, const Part& columns) {
      float* const to = x + some.first * hidden + columns.first;
      row_product({from + some.first * depth, depth, some.count, weight + columns.first * depth, columns.count, depth,
                   to, hidden, to, hidden});
    });
  };
#pragma omp parallel if (rows * hidden * (sizes.width() + 3 * ffn) > kManyProducts)
  {
    add(mixed, sizes.width(), layer.output);
#pragma omp for
    for (std::int64_t r = 0; r < rows; ++r)
      norm_row(norm_of(x + r * hidden, hidden, layer.ffn_norm, true, eps), normed + r * hidden);
    for_tasks(rows, ffn, [&](const Part& some, const Part& columns) {
      const std::int64_t first = columns.first * hidden;
      gated_row_product({normed + some.first * hidden, hidden, some.count, layer.gate + first, columns.count, hidden,
                         nullptr, 0, gated + some.first * ffn + columns.first, ffn},
                        layer.up + first);
    });
    add(gated, ffn, layer.down);
  }
}

void after_layers(const float* norm, const DecoderSizes& sizes, float eps, float* x, InstructionSet set) {
  const auto norm_row = OF_INSTRUCTION_SET(set, norm_row);
#pragma omp parallel for if (sizes.rows * sizes.hidden > kManyProducts)
  for (std::int64_t r = 0; r < sizes.rows; ++r)
    norm_row(norm_of(x + r * sizes.hidden, sizes.hidden, norm, true, eps), x + r * sizes.hidden);
}

}  // namespace diffusion_runtime
