// Rows of every length around the sizes of vectors, rounds and blocks, of every stride and alignment.
#define RMS_NORM_BLOCK 64  // so that a row has more than its rounds at 2048 elements

#include "norm_problem.h"
#include "rms_norm.cu"

struct Shape {
  int outer, middle, inner, size;
  int gap = 0, offset = 0;  // behind each row and before the first, in elements
  NormSettings norm = {};
  int weight_offset = 0;  // of its address
};

template <class T, class W>
void check(const char* what, const Shape& s) {
  const int rows = s.outer * s.middle * s.inner, stride = s.size + s.gap;
  // heads beside each other, then rows: the strides of no dimension follow from those of another
  const int inner_stride = s.middle * stride, middle_stride = stride, outer_stride = s.inner * s.middle * stride + 24;
  Buffer<T> x(s.offset + (s.outer - 1) * outer_stride + s.inner * s.middle * stride - s.gap);
  Buffer<W> weight(s.weight_offset + s.size);
  std::mt19937 random(s.size);
  const auto row_at = [&](int r) {
    return x.data + s.offset + r / s.inner / s.middle * outer_stride + r / s.inner % s.middle * middle_stride +
           r % s.inner * inner_stride;
  };
  for (int r = 0; r < rows; r++) fill(row_at(r), s.size, random, r % 3 ? 2 : 30);
  fill(weight.data + s.weight_offset, s.size, random, 1);
  under_schedules(1, what, [&](const std::string& schedule) {
    Buffer<T> out(rows * s.size);
    ops::RmsNorm op{};
    op.x = x.data + s.offset, op.type = type_of<T>::value;
    op.middle = s.middle, op.inner = s.inner, op.rows = rows, op.size = s.size;
    op.outer_stride = outer_stride, op.middle_stride = middle_stride, op.inner_stride = inner_stride;
    op.weight = s.norm.weighted ? weight.data + s.weight_offset : nullptr, op.weight_type = type_of<W>::value;
    op.eps = s.norm.eps, op.weight_offset = s.norm.weight_offset;
    op.round_before_weight = s.norm.round_before_weight, op.out = out.data;
    ops::rms_norm(op, nullptr);
    int other_bits = 0;
    for (int r = 0; r < rows; r++) {
      const std::vector<double> wanted = normed(s.norm, row_at(r), weight.data + s.weight_offset, s.size);
      for (int i = 0; i < s.size; i++) {
        const float got = to_float(out[r * s.size + i]);
        other_bits += sizeof(T) == 2 && got != rounded<T>(wanted[i]);
        expect(std::fabs(got - wanted[i]) <= slack<T>(s.norm, wanted[i]), what, [&] {
          return schedule + ", row " + std::to_string(r) + " element " + std::to_string(i) + ": " +
                 compare(got, wanted[i]);
        });
      }
    }
    // of all 16-bit results, those whose rounding a last bit in between decides
    expect(other_bits <= 1 + rows * s.size / 100, what,
           [&] { return schedule + ", other bits: " + std::to_string(other_bits); });
  });
}

// The bits of a row, wherever it begins and whatever lies beside it.
template <class T>
void check_invariance(const char* what, int size) {
  std::mt19937 random(size);
  std::vector<T> row(size);
  fill(row.data(), size, random);
  std::vector<T> first;
  under_schedules(1, what, [&](const std::string& schedule) {
    for (int offset : {0, 1, 8})
      for (int rows : {1, 3, 20}) {
        const int stride = size + 3;
        Buffer<T> x(offset + rows * stride), out(rows * size);
        const int at = rows - 1;
        std::memcpy(x.data + offset + at * stride, row.data(), size * sizeof(T));
        ops::RmsNorm op{};
        op.x = x.data + offset, op.type = type_of<T>::value, op.middle = 1, op.inner = rows, op.rows = rows;
        op.size = size, op.inner_stride = stride, op.weight_type = ops::LogitType::Float32, op.eps = 1e-6f;
        op.out = out.data;
        ops::rms_norm(op, nullptr);
        std::vector<T> got(out.data + at * size, out.data + rows * size);
        if (first.empty()) first = got;
        expect(!std::memcmp(got.data(), first.data(), size * sizeof(T)), what,
               [&] { return schedule + ", offset " + std::to_string(offset) + ", rows " + std::to_string(rows); });
      }
  });
}

int main() {
  check<BFloat16, BFloat16>("bf16 [2, 3, 5, 64], rounded before", {2, 3, 5, 64, 8, 0, {true, true, true}});
  check<Float16, float>("fp16 [1, 1, 3, 500], unaligned, offset 1",
                        {1, 1, 3, 500, 3, 1, {true, true, false, 1e-3f, 1}});
  check<float, float>("fp32 [1, 2, 2, 2100], a block and more", {1, 2, 2, 2100, 0, 0});
  check_invariance<BFloat16>("bf16 bits of a row of 300", 300);
#ifndef QUICK
  for (int size : {1, 7, 8, 9, 63, 128, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049, 5000}) {
    const std::string of = " [2, 1, 3, " + std::to_string(size) + "]";
    const int pad = (8 - size % 8) % 8;
    check<float, float>(("fp32" + of).c_str(), {2, 1, 3, size, pad, 0, {true, false}});
    check<BFloat16, float>(("bf16, fp32 weight" + of).c_str(), {2, 1, 3, size, pad, 0, {true, true, false, 1, 1}, 1});
    check<BFloat16, BFloat16>(("bf16" + of).c_str(), {2, 1, 3, size, 3, 5, {true, true, true}, 8});
    check<Float16, Float16>(("fp16" + of).c_str(), {2, 1, 3, size, pad, 0, {}, 0});
    check<Float16, float>(("fp16, fp32 weight" + of).c_str(), {2, 1, 3, size, 0, 0, {true, true, true}, 4});
  }
  check<BFloat16, BFloat16>("bf16 [1, 1, 300, 16], more rows than a block", {1, 1, 300, 16});
  for (int size : {50, 1000, 2500}) check_invariance<float>("fp32 bits of a row", size);
#endif
  ops::rms_norm({}, nullptr);  // no rows: no launch
  return finish("rms_norm");
}
