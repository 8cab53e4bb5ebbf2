// Tensors of rms_norm and qk_norm_rope, checked and made what kernels take: for the CPU and for CUDA alike.
#pragma once

#include <optional>

#include "norm_arguments.h"
#include "row_setting.h"

namespace diffusion_runtime {

inline void check_beside(const char* name, const TensorView& tensor, const TensorView& beside) {
  check(tensor.device_type() == beside.device_type() && tensor.device_id() == beside.device_id(), name,
        " must be on the device of the other tensors");
}

inline void check_norm_weight(const char* name, const std::optional<TensorView>& weight, const TensorView& x) {
  if (!weight) return;
  check_beside(name, *weight, x);
  check(weight->numel() == x.size(-1) && weight->is_contiguous(), name, " must be contiguous [", x.size(-1), "], got ",
        weight->shape());
  check(weight->dtype() == x.dtype() || weight->dtype() == DType::Float32, name, " must be float32 or ", x.dtype(),
        ", got ", weight->dtype());
}

// x [..., size] with at most three leading dimensions; out contiguous with as many elements, of the dtype of x
inline RmsNorm rms_norm_of(const TensorView& x, const std::optional<TensorView>& weight, float eps, float weight_offset,
                           bool round_before_weight, const TensorView& out) {
  check(x.ndim() >= 1 && x.ndim() <= 4 && (x.size(-1) <= 1 || x.stride(-1) == 1),
        "rms_norm: x must be [..., size] of at most 4 dimensions with stride 1 along size, got ", x.shape());
  // as [outer, middle, inner, size]: dimensions that x lacks have size 1
  const int missing = 4 - x.ndim();
  const auto size = [&](int dim) { return dim < missing ? 1 : x.size(dim - missing); };
  const auto stride = [&](int dim) { return dim < missing ? 0 : x.stride(dim - missing); };
  check_norm_weight("weight", weight, x);
  check_beside("out", out, x);
  check(out.dtype() == x.dtype() && out.numel() == x.numel() && out.is_contiguous(),
        "rms_norm: out must be contiguous with the elements and dtype of x, got ", out.shape());
  RmsNorm op{};
  op.x = x.raw_data(), op.type = logit_type(x.dtype());
  op.middle = size(1), op.inner = size(2), op.rows = size(0) * size(1) * size(2), op.size = size(3);
  op.outer_stride = stride(0), op.middle_stride = stride(1), op.inner_stride = stride(2);
  op.weight = weight ? weight->raw_data() : nullptr;
  op.weight_type = weight ? logit_type(weight->dtype()) : LogitType::Float32;
  op.eps = eps, op.weight_offset = weight_offset, op.round_before_weight = round_before_weight;
  op.out = out.raw_data();
  return op;
}

// A tensor [batch, heads, rows, head_dim] of the dtype and on the device of the query, or none.
inline HeadRows head_rows(const char* name, const std::optional<TensorView>& tensor, const TensorView& query,
                          std::int64_t heads, std::int64_t rows) {
  if (!tensor) return {};
  check_beside(name, *tensor, query);
  check(tensor->ndim() == 4 && tensor->size(0) == query.size(0) && tensor->size(1) == heads &&
            tensor->size(2) == rows && tensor->size(3) == query.size(3) && tensor->dtype() == query.dtype(),
        name, " must be [", query.size(0), ", ", heads, ", ", rows, ", ", query.size(3), "] ", query.dtype(), ", got ",
        tensor->shape(), " ", tensor->dtype());
  check(tensor->size(3) == 1 || tensor->stride(3) == 1, name, " must have stride 1 along head_dim");
  return {tensor->raw_data(), tensor->stride(0), tensor->stride(1), tensor->stride(2)};
}

inline Places places(const char* name, const std::optional<TensorView>& tensor, const TensorView& query) {
  if (!tensor) return {};
  check_beside(name, *tensor, query);
  check(tensor->ndim() == 2 && tensor->size(0) == query.size(0) && tensor->size(1) == query.size(2), name, " must be [",
        query.size(0), ", ", query.size(2), "], got ", tensor->shape());
  return {tensor->data<const std::int64_t>(), tensor->stride(0), tensor->stride(1)};
}

enum class RotaryStyle : int { Half, Interleaved, Proportional };

inline RotaryPairs rotary_pairs(int style, std::int64_t count, std::int64_t head_dim) {
  check(style >= 0 && style <= static_cast<int>(RotaryStyle::Proportional), "there is no rotary style ", style);
  check(2 * count <= head_dim && (style != static_cast<int>(RotaryStyle::Proportional) || head_dim % 2 == 0), count,
        " pairs are too many for ", head_dim, " elements");
  const bool far = style == static_cast<int>(RotaryStyle::Proportional);
  return {static_cast<int>(count), static_cast<int>(far ? head_dim / 2 : count),
          style == static_cast<int>(RotaryStyle::Interleaved)};
}

// The fields of ops/_qk_norm_rope_problem.py's QKNormRope, in its order, and the outputs.
inline QKNormRope qk_norm_rope_of(
    const TensorView& query, const TensorView& key, const std::optional<TensorView>& value, const TensorView& cos,
    const TensorView& sin, const std::optional<TensorView>& query_weight, const std::optional<TensorView>& key_weight,
    const std::optional<TensorView>& positions, const std::optional<TensorView>& cache_key,
    const std::optional<TensorView>& cache_value, const std::optional<TensorView>& cache_positions, bool normalized,
    float eps, float weight_offset, bool round_before_weight, int style, const TensorView& query_out,
    const std::optional<TensorView>& key_out) {
  check(query.ndim() == 4 && key.ndim() == 4, "qk_norm_rope: query and key must be [batch, heads, length, head_dim]");
  const std::int64_t batch = query.size(0), heads = query.size(1), length = query.size(2), kv_heads = key.size(1);
  constexpr std::int64_t kLimit = std::int64_t{1} << 31;
  check(batch * length * (heads + 2 * kv_heads) < kLimit, "qk_norm_rope: at most 2^31 rows, got ", query.shape());
  const bool cached = cache_key.has_value();
  check(cache_value.has_value() == cached && cache_positions.has_value() == cached && value.has_value() == cached &&
            key_out.has_value() != cached,
        "qk_norm_rope: value, cache_key, cache_value and cache_positions come together, instead of key_out");
  check_beside("cos", cos, query);
  check_beside("sin", sin, query);
  check(cos.ndim() == 3 && (cos.size(0) == batch || cos.size(0) == 1) && (positions || cos.size(1) == length),
        "qk_norm_rope: cos must be [batch, rows, pairs], got ", cos.shape());
  for (int d = 0; d < 3; ++d)
    check(sin.ndim() == 3 && sin.size(d) == cos.size(d) && (cos.size(d) <= 1 || sin.stride(d) == cos.stride(d)),
          "qk_norm_rope: sin must have the shape and the strides of cos, got ", sin.shape(), " and ", cos.shape());
  check(cos.size(2) <= 1 || cos.stride(2) == 1, "qk_norm_rope: cos must have stride 1 along the pairs");

  QKNormRope op{};
  op.query = head_rows("query", query, query, heads, length);
  op.key = head_rows("key", key, query, kv_heads, length);
  op.value = head_rows("value", value, query, kv_heads, length);
  op.query_out = head_rows("query_out", query_out, query, heads, length);
  op.key_out = head_rows("key_out", key_out, query, kv_heads, length);
  op.capacity = cached && cache_key->ndim() == 4 ? cache_key->size(2) : 0;
  op.key_cache = head_rows("cache_key", cache_key, query, kv_heads, op.capacity);
  op.value_cache = head_rows("cache_value", cache_value, query, kv_heads, op.capacity);
  op.type = logit_type(query.dtype());
  op.batch = batch, op.length = length;
  op.heads = static_cast<int>(heads), op.kv_heads = static_cast<int>(kv_heads);
  op.head_dim = static_cast<int>(query.size(3));
  op.cos = cos.data<const float>(), op.sin = sin.data<const float>();
  op.table_batch = cos.size(0) == 1 ? 0 : cos.stride(0), op.table_row = cos.stride(1), op.table_rows = cos.size(1);
  op.pairs = rotary_pairs(style, cos.size(2), query.size(3));
  op.positions = places("positions", positions, query);
  op.slots = places("cache_positions", cache_positions, query);
  check_norm_weight("query_weight", query_weight, query);
  check_norm_weight("key_weight", key_weight, query);
  op.query_weight = query_weight ? query_weight->raw_data() : nullptr;
  op.key_weight = key_weight ? key_weight->raw_data() : nullptr;
  op.query_weight_type = query_weight ? logit_type(query_weight->dtype()) : LogitType::Float32;
  op.key_weight_type = key_weight ? logit_type(key_weight->dtype()) : LogitType::Float32;
  op.normalized = normalized, op.eps = eps, op.weight_offset = weight_offset;
  op.round_before_weight = round_before_weight;
  return op;
}

}  // namespace diffusion_runtime
