#include "decoder_layers.h"

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>

#include "decoder_halves.h"

namespace diffusion_runtime {
namespace {

using Layer = std::vector<MaybeTensor>;

enum Weight {
  kNorm,
  kQuery,
  kKey,
  kValue,
  kQueryBias,
  kKeyBias,
  kValueBias,
  kQueryNorm,
  kKeyNorm,
  kOutput,
  kFfnNorm,
  kGate,
  kUp,
  kDown,
  kWeights
};  // of LayerWeights
constexpr int kOptional[] = {kQueryBias, kKeyBias, kValueBias, kQueryNorm, kKeyNorm};

void check_tensor(const char* name, const TensorView& tensor, std::initializer_list<std::int64_t> shape) {
  bool fits = tensor.is_cpu() && tensor.is_contiguous() && tensor.ndim() == static_cast<int>(shape.size());
  int d = 0;
  for (const std::int64_t size : shape) fits = fits && tensor.size(d++) == size;
  check(fits, "decoder_layers: ", name, " does not fit or is not contiguous on the CPU, got ", tensor.shape());
}

const float* read(const char* name, const MaybeTensor& tensor, std::initializer_list<std::int64_t> shape) {
  if (!tensor) return nullptr;
  check_tensor(name, *tensor, shape);
  return tensor->data<const float>();
}

std::int64_t rows_of(const Layer& layer, Weight weight) {
  return layer[weight].has_value() && layer[weight]->ndim() > 0 ? layer[weight]->size(0) : 0;
}

DecoderSizes sizes_of(const TensorView& x, const Layer& layer, std::int64_t head_dim) {
  check(x.ndim() == 3, "decoder_layers: x must be [batch, length, hidden], got ", x.shape());
  check(layer.size() == kWeights, "decoder_layers: a layer has ", int(kWeights), " tensors, got ", layer.size());
  const std::int64_t width = rows_of(layer, kQuery), kv_width = rows_of(layer, kKey);
  check(head_dim > 0 && width > 0 && kv_width > 0 && width % head_dim == 0 && kv_width % head_dim == 0,
        "decoder_layers: heads of ", head_dim, " do not fit projections to ", width, " and ", kv_width);
  return {x.size(0) * x.size(1), x.size(2), width / head_dim, kv_width / head_dim, head_dim, rows_of(layer, kGate)};
}

DecoderLayer layer_of(const Layer& layer, const DecoderSizes& s) {
  check(layer.size() == kWeights, "decoder_layers: a layer has ", int(kWeights), " tensors, got ", layer.size());
  for (int i = 0; i < kWeights; ++i) {
    bool optional = false;
    for (const int other : kOptional) optional = optional || i == other;
    check(optional || layer[i].has_value(), "decoder_layers: weight ", i, " of a layer is missing");
  }
  check(layer[kQueryNorm].has_value() == layer[kKeyNorm].has_value(), "decoder_layers: one norm of heads alone");
  return {read("norm", layer[kNorm], {s.hidden}),
          read("query", layer[kQuery], {s.width(), s.hidden}),
          read("key", layer[kKey], {s.kv_width(), s.hidden}),
          read("value", layer[kValue], {s.kv_width(), s.hidden}),
          read("query_bias", layer[kQueryBias], {s.width()}),
          read("key_bias", layer[kKeyBias], {s.kv_width()}),
          read("value_bias", layer[kValueBias], {s.kv_width()}),
          read("query_norm", layer[kQueryNorm], {s.head_dim}),
          read("key_norm", layer[kKeyNorm], {s.head_dim}),
          read("output", layer[kOutput], {s.hidden, s.width()}),
          read("ffn_norm", layer[kFfnNorm], {s.hidden}),
          read("gate", layer[kGate], {s.ffn, s.hidden}),
          read("up", layer[kUp], {s.ffn, s.hidden}),
          read("down", layer[kDown], {s.hidden, s.ffn})};
}

// [batch, heads, rows, head_dim] of what lies as [batch, rows, heads, head_dim]
TensorView heads_first(float* data, std::int64_t batch, std::int64_t heads, std::int64_t rows, std::int64_t dim) {
  std::int64_t shape[] = {batch, heads, rows, dim}, strides[] = {rows * heads * dim, dim, heads * dim, 1};
  return TensorView(DLTensor{data, {kCPU, 0}, 4, {2, 32, 1}, shape, strides, 0});
}

TensorView dense(float* data, std::int64_t batch, std::int64_t heads, std::int64_t rows) {
  std::int64_t shape[] = {batch, heads, rows};
  return TensorView(DLTensor{data, {kCPU, 0}, 3, {2, 32, 1}, shape, nullptr, 0});
}

// What is kept of the layers: one part for each, of keys and of values, rows() rows long.
struct Pool {
  float* data = nullptr;  // null: there is none
  std::int64_t pages = 0, page_size = 0, kv_heads = 0, head_dim = 0;
  const std::int64_t* places = nullptr;

  std::int64_t rows() const { return pages * page_size; }
  float* part(std::int64_t layer, int values) const {
    return data + (2 * layer + values) * rows() * kv_heads * head_dim;
  }
  TensorView view(std::int64_t layer, int values) const {
    return heads_first(part(layer, values), pages, kv_heads, page_size, head_dim);
  }
  void write(std::int64_t layer, const Projected& from, std::int64_t count) const {
    if (places == nullptr) return;
    const std::int64_t width = kv_heads * head_dim;
    for (int values = 0; values < 2; ++values) {
      for (std::int64_t r = 0; r < count; ++r)
        std::memcpy(part(layer, values) + places[r] * width, (values ? from.value : from.key) + r * width,
                    sizeof(float) * static_cast<std::size_t>(width));
    }
  }
};

Pool pool_of(const MaybeTensor& pool, const MaybeTensor& places, const MaybeTensor& prefix_lengths,
             const MaybeTensor& page_table, std::int64_t layers, const DecoderSizes& sizes, std::int64_t batch) {
  check(prefix_lengths.has_value() == page_table.has_value() && (pool || (!places && !prefix_lengths)),
        "decoder_layers: prefix_lengths and page_table come together, and with them or places a pool");
  Pool found;
  if (!pool) return found;
  check(pool->ndim() == 6, "decoder_layers: pool must have 6 dimensions, got ", pool->shape());
  found.pages = pool->size(2), found.page_size = pool->size(3);
  found.kv_heads = sizes.kv_heads, found.head_dim = sizes.head_dim;
  check_tensor("pool", *pool, {layers, 2, found.pages, found.page_size, sizes.kv_heads, sizes.head_dim});
  found.data = pool->data<float>();
  if (places) {
    check_tensor("places", *places, {sizes.rows});
    found.places = places->data<const std::int64_t>();
    for (std::int64_t r = 0; r < sizes.rows; ++r)
      check(found.places[r] >= 0 && found.places[r] < found.rows(), "decoder_layers: places must be from 0 to ",
            found.rows() - 1, ", got ", found.places[r]);
  }
  if (page_table) {
    check(page_table->ndim() == 2, "decoder_layers: page_table must be [batch, max_pages], got ", page_table->shape());
    check_tensor("page_table", *page_table, {batch, page_table->size(1)});
    check_tensor("prefix_lengths", *prefix_lengths, {batch});
    const std::int32_t* const kept = prefix_lengths->data<const std::int32_t>();
    for (std::int64_t b = 0; b < batch; ++b) {
      const std::int64_t used = (kept[b] + found.page_size - 1) / found.page_size;
      check(kept[b] >= 0 && used <= page_table->size(1), "decoder_layers: prefix_lengths must be from 0 to ",
            page_table->size(1) * found.page_size, ", got ", kept[b]);
      for (std::int64_t i = 0; i < used; ++i) {
        const std::int32_t page = page_table->data<const std::int32_t>()[b * page_table->size(1) + i];
        check(page >= 0 && page < found.pages, "decoder_layers: page_table must hold pages from 0 to ", found.pages - 1,
              ", got ", page);
      }
    }
  }
  return found;
}

}  // namespace

void decoder_layers_cpu(const TensorView& x, const std::vector<std::vector<MaybeTensor>>& layers,
                        const TensorView& norm, float eps, std::int64_t head_dim, const TensorView& cos,
                        const TensorView& sin, const MaybeTensor& pool, const MaybeTensor& places,
                        const MaybeTensor& prefix_lengths, const MaybeTensor& page_table, bool own_keys,
                        const MaybeTensor& key_ends, const MaybeTensor& chosen, int left, int right, int block,
                        int prefix_window, int offset, const std::string& instruction_set) {
  const InstructionSet set = find_instruction_set(instruction_set);
  check(!layers.empty(), "decoder_layers: there are no layers");
  const DecoderSizes sizes = sizes_of(x, layers.front(), head_dim);
  const std::int64_t batch = x.size(0), length = x.size(1), rows = sizes.rows;
  const std::int64_t heads = sizes.heads, kv_heads = sizes.kv_heads;
  check_tensor("x", x, {batch, length, sizes.hidden});
  check(cos.ndim() == 2, "decoder_layers: cos must be [table_rows, pairs], got ", cos.shape());
  const std::int64_t table_rows = cos.size(0), pairs = cos.size(1);
  const RotaryTable table{read("cos", cos, {table_rows, pairs}), read("sin", sin, {table_rows, pairs}), table_rows,
                          pairs};
  check(2 * pairs <= head_dim && (rows == 0 || (table_rows > 0 && rows % table_rows == 0)), "decoder_layers: cos of ",
        cos.shape(), " does not fit ", rows, " rows of heads of ", head_dim);
  check(own_keys || prefix_lengths, "decoder_layers: without own_keys there must be a prefix");
  const auto count = static_cast<std::int64_t>(layers.size());
  const Pool kept = pool_of(pool, places, prefix_lengths, page_table, count, sizes, batch);
  std::vector<DecoderLayer> read_layers;
  for (const Layer& layer : layers) read_layers.push_back(layer_of(layer, sizes));
  const float* const last_norm = read("the last norm", norm, {sizes.hidden});
  if (rows == 0) return;

  const std::int64_t each = 2 * (sizes.width() + sizes.kv_width()) + sizes.hidden + sizes.ffn + heads;
  const std::unique_ptr<float[]> memory(new float[static_cast<std::size_t>(rows * each)]);
  float* free = memory.get();
  const auto take = [&](std::int64_t width) { return (free += rows * width) - rows * width; };
  float *const normed = take(sizes.hidden), *const gated = take(sizes.ffn), *const mixed = take(sizes.width());
  const Projected projected{take(sizes.width()), take(sizes.kv_width()), take(sizes.kv_width())};
  const TensorView query = heads_first(projected.query, batch, heads, length, head_dim);
  const std::int64_t own = own_keys ? length : 0;
  const TensorView key = heads_first(projected.key, batch, kv_heads, own, head_dim);
  const TensorView value = heads_first(projected.value, batch, kv_heads, own, head_dim);
  const TensorView out = heads_first(mixed, batch, heads, length, head_dim);
  const TensorView logsumexp = dense(take(heads), batch, heads, length);
  const MaybeTensor none;
  float* const states = x.data<float>();
  for (std::int64_t i = 0; i < count; ++i) {
    const DecoderLayer& layer = read_layers[static_cast<std::size_t>(i)];
    before_attention(layer, sizes, eps, table, states, normed, projected, set);
    kept.write(i, projected, rows);
    const MaybeTensor prefix_key = page_table ? MaybeTensor(kept.view(i, 0)) : none;
    const MaybeTensor prefix_value = page_table ? MaybeTensor(kept.view(i, 1)) : none;
    attention_cpu(query, key, value, prefix_key, prefix_value, prefix_lengths, page_table, none, none,
                  own_keys ? key_ends : none, none, none, chosen, left, right, block, prefix_window, offset,
                  static_cast<int>(length), 1 / std::sqrt(static_cast<double>(head_dim)), 0, out, logsumexp,
                  instruction_set);
    after_attention(layer, sizes, eps, mixed, states, normed, gated, set);
  }
  after_layers(last_norm, sizes, eps, states, set);
}

}  // namespace diffusion_runtime
