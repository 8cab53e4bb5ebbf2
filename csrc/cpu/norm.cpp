#include "norm.h"

#include <cstring>
#include <vector>

#include "instruction_set.h"
#include "norm_row.h"

namespace diffusion_runtime {
namespace {

constexpr std::int64_t kManyElements = 1 << 15;  // from which on threads pay

std::int64_t bytes_of(LogitType type) { return type == LogitType::Float32 ? 4 : 2; }

std::int64_t place_of(const Places& places, std::int64_t batch, std::int64_t row) {
  return places.data != nullptr ? places.data[batch * places.batch + row * places.row] : row;
}

void check_places(const char* name, const Places& places, const QKNormRope& op, std::int64_t end) {
  if (places.data == nullptr) return;
  for (std::int64_t b = 0; b < op.batch; ++b) {
    for (std::int64_t l = 0; l < op.length; ++l) {
      const std::int64_t place = place_of(places, b, l);
      check(place >= 0 && place < end, name, " must be from 0 to ", end - 1, ", got ", place);
    }
  }
}

char* row_at(const HeadRows& rows, LogitType type, std::int64_t batch, std::int64_t head, std::int64_t row) {
  if (rows.data == nullptr) return nullptr;
  return static_cast<char*>(rows.data) + (batch * rows.batch + head * rows.head + row * rows.row) * bytes_of(type);
}

}  // namespace

void rms_norm_cpu(const TensorView& x, const std::optional<TensorView>& weight, float eps, float weight_offset,
                  bool round_before_weight, const TensorView& out, const std::string& instruction_set) {
  const auto norm_row = OF_INSTRUCTION_SET(find_instruction_set(instruction_set), norm_row);
  check(x.is_cpu(), "rms_norm: x must be on the CPU");
  const RmsNorm op = rms_norm_of(x, weight, eps, weight_offset, round_before_weight, out);
  const std::int64_t bytes = bytes_of(op.type);
#pragma omp parallel for if (op.rows * op.size > kManyElements)
  for (std::int64_t r = 0; r < op.rows; ++r) {
    const std::int64_t at = r / op.inner / op.middle * op.outer_stride + r / op.inner % op.middle * op.middle_stride +
                            r % op.inner * op.inner_stride;
    norm_row({static_cast<const char*>(op.x) + at * bytes, op.type, op.size, op.weight, op.weight_type, true, op.eps,
              op.weight_offset, op.round_before_weight},
             static_cast<char*>(op.out) + r * op.size * bytes);
  }
}

void qk_norm_rope_cpu(const TensorView& query, const TensorView& key, const std::optional<TensorView>& value,
                      const TensorView& cos, const TensorView& sin, const std::optional<TensorView>& query_weight,
                      const std::optional<TensorView>& key_weight, const std::optional<TensorView>& positions,
                      const std::optional<TensorView>& cache_key, const std::optional<TensorView>& cache_value,
                      const std::optional<TensorView>& cache_positions, bool normalized, float eps, float weight_offset,
                      bool round_before_weight, int style, const TensorView& query_out,
                      const std::optional<TensorView>& key_out, const std::string& instruction_set) {
  const auto rope_row = OF_INSTRUCTION_SET(find_instruction_set(instruction_set), rope_row);
  check(query.is_cpu(), "qk_norm_rope: query must be on the CPU");
  const QKNormRope op =
      qk_norm_rope_of(query, key, value, cos, sin, query_weight, key_weight, positions, cache_key, cache_value,
                      cache_positions, normalized, eps, weight_offset, round_before_weight, style, query_out, key_out);
  check_places("positions", op.positions, op, op.table_rows);
  check_places("cache_positions", op.slots, op, op.capacity);

  const bool cached = op.key_cache.data != nullptr;
  const std::int64_t heads = op.heads + op.kv_heads;
  const std::size_t row_bytes = static_cast<std::size_t>(op.head_dim * bytes_of(op.type));
#pragma omp parallel if (op.batch * op.length * heads * op.head_dim > kManyElements)
  {
    std::vector<float> scratch(2 * static_cast<std::size_t>(op.head_dim));
#pragma omp for collapse(2)
    for (std::int64_t b = 0; b < op.batch; ++b) {
      for (std::int64_t l = 0; l < op.length; ++l) {
        const std::int64_t table = b * op.table_batch + place_of(op.positions, b, l) * op.table_row;
        const std::int64_t slot = cached ? place_of(op.slots, b, l) : 0;
        const Rotation rotation{op.cos + table, op.sin + table, op.pairs};
        for (std::int64_t head = 0; head < heads; ++head) {
          const bool is_key = head >= op.heads;
          const std::int64_t h = is_key ? head - op.heads : head;
          const NormRow row{row_at(is_key ? op.key : op.query, op.type, b, h, l),
                            op.type,
                            op.head_dim,
                            is_key ? op.key_weight : op.query_weight,
                            is_key ? op.key_weight_type : op.query_weight_type,
                            op.normalized,
                            op.eps,
                            op.weight_offset,
                            op.round_before_weight};
          rope_row(row, rotation, scratch.data(), row_at(is_key ? op.key_out : op.query_out, op.type, b, h, l),
                   is_key ? row_at(op.key_cache, op.type, b, h, slot) : nullptr);
          if (is_key && cached)
            std::memcpy(row_at(op.value_cache, op.type, b, h, slot), row_at(op.value, op.type, b, h, l), row_bytes);
        }
      }
    }
  }
}

}  // namespace diffusion_runtime
