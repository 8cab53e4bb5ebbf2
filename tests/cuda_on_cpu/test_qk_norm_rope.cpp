// Every style, size and type; with a norm and without, with a cache and without, in memory of any layout.
#include "norm_problem.h"
#include "qk_norm_rope.cu"

struct Shape {
  int batch, heads, kv_heads, length, head_dim;
  enum Style { half, interleaved, proportional } style = half;
  int pairs = 0;
  NormSettings norm = {};
  bool cached = false, positions = false;
  int gap = 0, offset = 0;  // behind each row of a head, and before the first, in elements
};

// [batch, heads, rows, head_dim] in memory as [batch, rows, heads, head_dim + gap], NaN between.
template <class T>
struct HeadBuffer {
  Buffer<T> buffer;
  int head_dim, gap, heads, rows;
  ops::HeadRows view;
  HeadBuffer(int batch, int heads, int rows, int head_dim, int gap, int offset)
      : buffer(offset + batch * heads * rows * (head_dim + gap)),
        head_dim(head_dim),
        gap(gap),
        heads(heads),
        rows(rows) {
    const int stride = head_dim + gap;
    view = {buffer.data + offset, rows * heads * stride, stride, heads * stride};
  }
  T* at(int b, int h, int l) const {
    return static_cast<T*>(view.data) + b * view.batch + h * view.head + l * view.row;
  }
};

template <class T, class W>
void check(const char* what, const Shape& s) {
  constexpr int kTable = 11, kCapacity = 9;
  const int D = s.head_dim, distance = s.style == Shape::proportional ? D / 2 : s.pairs;
  std::mt19937 random(D + s.pairs);
  HeadBuffer<T> query(s.batch, s.heads, s.length, D, s.gap, s.offset);
  HeadBuffer<T> key(s.batch, s.kv_heads, s.length, D, s.gap, s.offset);
  HeadBuffer<T> value(s.batch, s.kv_heads, s.length, D, s.gap, s.offset);
  const int rows = s.positions ? kTable : s.length, table_row = s.pairs + s.gap;
  Buffer<float> cos(s.batch * rows * table_row), sin(s.batch * rows * table_row);
  Buffer<W> query_weight(D), key_weight(D);
  Buffer<int64_t> positions(s.batch * s.length), slots(s.batch * s.length);
  for (int b = 0; b < s.batch; b++)
    for (int l = 0; l < s.length; l++) {
      for (int h = 0; h < s.heads; h++) fill(query.at(b, h, l), D, random);
      for (int h = 0; h < s.kv_heads; h++) fill(key.at(b, h, l), D, random), fill(value.at(b, h, l), D, random);
      // the last of each sequence is nowhere, if there is more than one
      const bool none = l + 1 == s.length && l > 0;
      positions[b * s.length + l] = none ? (b % 2 ? -1 : kTable) : (5 * l + b) % kTable;
      slots[b * s.length + l] = none ? (b % 2 ? kCapacity : -1) : (2 * l + b) % kCapacity;
    }
  for (int r = 0; r < s.batch * rows; r++) {
    fill(cos.data + r * table_row, s.pairs, random, 1), fill(sin.data + r * table_row, s.pairs, random, 1);
  }
  fill(query_weight.data, D, random, 1), fill(key_weight.data, D, random, 1);

  const auto wanted = [&](const HeadBuffer<T>& from, const W* weight, int b, int h, int l) {
    std::vector<double> y = normed(s.norm, from.at(b, h, l), weight, D);
    const int64_t position = s.positions ? positions[b * s.length + l] : l;
    if (position < 0 || position >= rows) return std::vector<double>(D, NAN);
    for (int i = 0; i < s.pairs; i++) {
      const double c = cos[(b * rows + position) * table_row + i], n = sin[(b * rows + position) * table_row + i];
      double& first = y[s.style == Shape::interleaved ? 2 * i : i];
      double& second = y[s.style == Shape::interleaved ? 2 * i + 1 : i + distance];
      const double a = first, z = second;
      first = a * c - z * n, second = z * c + a * n;
    }
    return y;
  };
  under_schedules(1, what, [&](const std::string& schedule) {
    HeadBuffer<T> query_out(s.batch, s.heads, s.length, D, 0, s.offset);
    HeadBuffer<T> key_out(s.batch, s.kv_heads, s.cached ? kCapacity : s.length, D, s.gap, s.offset);
    HeadBuffer<T> value_out(s.batch, s.kv_heads, kCapacity, D, s.gap, s.offset);
    ops::QKNormRope op{};
    op.query = query.view, op.key = key.view, op.query_out = query_out.view;
    if (s.cached)
      op.value = value.view, op.key_cache = key_out.view, op.value_cache = value_out.view;
    else
      op.key_out = key_out.view;
    op.type = type_of<T>::value, op.batch = s.batch, op.length = s.length, op.capacity = kCapacity;
    op.heads = s.heads, op.kv_heads = s.kv_heads, op.head_dim = D;
    op.cos = cos.data, op.sin = sin.data;
    op.table_batch = rows * table_row, op.table_row = table_row, op.table_rows = rows;
    op.pairs = {s.pairs, distance, s.style == Shape::interleaved};
    if (s.positions) op.positions = {positions.data, s.length, 1};
    if (s.cached) op.slots = {slots.data, s.length, 1};
    if (s.norm.weighted) op.query_weight = query_weight.data, op.key_weight = key_weight.data;
    op.query_weight_type = op.key_weight_type = s.norm.weighted ? type_of<W>::value : ops::LogitType::Float32;
    op.normalized = s.norm.normalized, op.eps = s.norm.eps, op.weight_offset = s.norm.weight_offset;
    op.round_before_weight = s.norm.round_before_weight;
    ops::qk_norm_rope(op, nullptr);

    const auto compare_row = [&](const char* of, const T* got, const std::vector<double>& right, int b, int h, int l) {
      double largest = 0;
      for (double x : right) largest = std::max(largest, std::fabs(x));
      for (int i = 0; i < D; i++) {
        const float x = to_float(got[i]);
        const bool good = right[i] != right[i] ? x != x : std::fabs(x - right[i]) <= slack<T>(s.norm, largest);
        expect(good, what, [&] {
          return schedule + ", " + of + " " + std::to_string(b) + " " + std::to_string(h) + " " + std::to_string(l) +
                 " element " + std::to_string(i) + ": " + compare(x, right[i]);
        });
      }
    };
    for (int b = 0; b < s.batch; b++)
      for (int l = 0; l < s.length; l++) {
        for (int h = 0; h < s.heads; h++)
          compare_row("query", query_out.at(b, h, l), wanted(query, query_weight.data, b, h, l), b, h, l);
        for (int h = 0; h < s.kv_heads; h++) {
          const int64_t slot = s.cached ? slots[b * s.length + l] : l;
          if (slot < 0 || slot >= kCapacity) continue;
          compare_row("key", key_out.at(b, h, int(slot)), wanted(key, key_weight.data, b, h, l), b, h, l);
          if (s.cached)
            expect(!std::memcmp(value_out.at(b, h, int(slot)), value.at(b, h, l), D * sizeof(T)), what,
                   [&] { return schedule + ", value " + std::to_string(b) + " " + std::to_string(l); });
        }
      }
    for (const HeadBuffer<T>* cache : {&key_out, &value_out}) {  // what no slot names, and what lies between rows
      size_t written = 0;
      for (size_t i = 0; i < cache->buffer.size; i++)
        written += to_float(cache->buffer.data[i]) == to_float(cache->buffer.data[i]);
      const int stored = s.cached && s.length > 1 ? s.length - 1 : cache == &value_out && !s.cached ? 0 : s.length;
      expect(written <= size_t(s.batch * stored * s.kv_heads * D), what,
             [&] { return schedule + ", more is written"; });
    }
  });
}

int main() {
  using S = Shape;
  check<BFloat16, BFloat16>("bf16 128 half, rounded before, cache",
                            {2, 3, 1, 4, 128, S::half, 64, {true, true, true}, true, true});
  check<Float16, float>("fp16 48 half of 20, unaligned", {2, 2, 2, 3, 48, S::half, 10, {}, false, false, 3, 1});
  check<float, float>("fp32 512 proportional", {1, 2, 1, 2, 512, S::proportional, 64, {}, true, false, 8});
  check<BFloat16, float>("bf16 40 interleaved of 16, no norm",
                         {1, 2, 1, 3, 40, S::interleaved, 8, {false, false}, false, true});
#ifndef QUICK
  for (int dim : {2, 7, 8, 32, 64, 72, 96, 128, 256, 264, 520}) {
    const std::string of = " " + std::to_string(dim);
    const int even = dim / 2;
    check<float, float>(("fp32 half" + of).c_str(), {1, 3, 2, 3, dim, S::half, even, {}, true, true});
    check<BFloat16, BFloat16>(("bf16 interleaved" + of).c_str(),
                              {2, 1, 1, 3, dim, S::interleaved, even, {true, true, true}, false, false, 5, 3});
    check<Float16, Float16>(("fp16 half of a part" + of).c_str(),
                            {1, 2, 1, 3, dim, S::half, dim / 4, {true, true, false, 1, 1}, true, false, 8, 8});
    check<Float16, float>(("fp16 interleaved part" + of).c_str(), {1, 1, 1, 3, dim, S::interleaved, dim / 4, {}, true});
    if (dim % 2 == 0)
      check<BFloat16, float>(("bf16 proportional" + of).c_str(),
                             {1, 2, 1, 3, dim, S::proportional, dim / 8, {true, false}, false, true});
  }
  check<float, float>("fp32 72 proportional of 16", {1, 1, 1, 3, 72, S::proportional, 8});
  check<BFloat16, BFloat16>("bf16 64, more rows than a block", {3, 5, 2, 9, 64, S::half, 32, {}, false, false});
#endif
  ops::qk_norm_rope({}, nullptr);  // no rows: no launch
  return finish("qk_norm_rope");
}
