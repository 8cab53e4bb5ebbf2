// exp(softcap(logits) / temperature - logsumexp), of every type into every type, around the sizes of vectors and
// blocks.
#include <random>

#include "test_support.h"
#include "weigh.cu"

namespace ops = diffusion_runtime;

struct Shape {
  int outer, inner, count;
  int gap = 0, offset = 0;          // of the logits, in elements
  int out_gap = 0, out_offset = 0;  // of the probabilities
  float softcap = 0;
  bool masked = false;  // every third row is not
  bool per_row = true;
};

template <class T>
struct type_of;
template <>
struct type_of<float> {
  static constexpr ops::LogitType value = ops::LogitType::Float32;
  static constexpr double rounding = 6e-8, smallest = 1.2e-38;
};
template <>
struct type_of<Float16> {
  static constexpr ops::LogitType value = ops::LogitType::Float16;
  static constexpr double rounding = 5e-4, smallest = 6e-8;
};
template <>
struct type_of<BFloat16> {
  static constexpr ops::LogitType value = ops::LogitType::BFloat16;
  static constexpr double rounding = 4e-3, smallest = 1.2e-38;
};

double softcapped(double x, double softcap) {
  return softcap > 0 && x != -INFINITY ? softcap * std::tanh(x / softcap) : x;
}

template <class L, class P>
void check(const char* what, const Shape& s) {
  const int rows = s.outer * s.inner, stride = s.count + s.gap, outer_stride = s.inner * stride + 16;
  const int out_stride = s.count + s.out_gap;
  Buffer<L> logits(s.offset + s.outer * outer_stride);
  Buffer<float> temperature(rows), logsumexp(rows);
  Buffer<bool> masked(rows);
  std::mt19937 random(s.count);
  std::normal_distribution<float> normal(0, 3);
  const auto row_at = [&](int r) { return logits.data + s.offset + r / s.inner * outer_stride + r % s.inner * stride; };
  for (int r = 0; r < rows; r++) {
    masked[r] = !s.masked || r % 3 != 1;
    temperature[r] = s.per_row ? 0.5f + float(r % 4) / 3 : 0.7f;
    for (int i = 0; i < s.count && masked[r]; i++)
      row_at(r)[i] = from_float<L>(i % 11 == 5 ? -INFINITY : normal(random));
    double mass = 0;
    for (int i = 0; i < s.count && masked[r]; i++)
      mass += std::exp(softcapped(to_float(row_at(r)[i]), s.softcap) / temperature[r]);
    if (masked[r]) logsumexp[r] = float(mass > 0 ? std::log(mass) : 0);
    if (!masked[r]) forbid(row_at(r), s.count);
  }
  under_schedules(1, what, [&](const std::string& schedule) {
    Buffer<P> out(s.out_offset + rows * out_stride - s.out_gap);
    ops::Weigh op{};
    op.logits = logits.data + s.offset, op.logit_type = type_of<L>::value;
    op.outer_stride = outer_stride, op.inner_stride = stride;
    op.rows = rows, op.inner = s.inner, op.count = s.count, op.masked = s.masked ? masked.data : nullptr;
    op.temperature = s.per_row ? ops::PerRow<float>{temperature.data, 0} : ops::PerRow<float>{nullptr, 0.7f};
    op.softcap = s.softcap, op.logsumexp = logsumexp.data;
    op.probabilities = out.data + s.out_offset, op.probability_type = type_of<P>::value;
    op.probability_stride = out_stride;
    ops::weigh(op, nullptr);
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < s.count; i++) {
        const double x = masked[r] ? to_float(row_at(r)[i]) : -INFINITY;
        const double z = softcapped(x, s.softcap) / temperature[r] - logsumexp[r];
        const double wanted = masked[r] ? std::exp(z) : 0;
        const float got = to_float(out[s.out_offset + r * out_stride + i]);
        const double relative = 1e-6 + (wanted > 0 ? 3e-7 * std::fabs(z) : 0) + type_of<P>::rounding;
        const double slack = wanted * relative + type_of<P>::smallest;
        expect(std::fabs(got - wanted) <= slack, what, [&] {
          return schedule + ", row " + std::to_string(r) + " token " + std::to_string(i) + ": " + compare(got, wanted);
        });
      }
    for (int r = 0; r + 1 < rows; r++)  // what lies between the rows stays as it was
      for (int i = s.count; i < out_stride; i++) {
        const float got = to_float(out[s.out_offset + r * out_stride + i]);
        expect(got != got, what, [&] { return schedule + ", behind row " + std::to_string(r); });
      }
  });
}

int main() {
  check<BFloat16, BFloat16>("bf16 to bf16 [2, 3, 100], masked", {2, 3, 100, 4, 0, 4, 0, 0, true});
  check<float, Float16>("fp32 to fp16 [1, 4, 77], unaligned, softcap", {1, 4, 77, 0, 1, 1, 3, 4});
#ifndef QUICK
  for (int count : {1, 7, 8, 9, 2047, 2048, 2049, 8192, 8193}) {
    const std::string of = " [2, 2, " + std::to_string(count) + "]";
    const int pad = (8 - count % 8) % 8;
    check<float, float>(("fp32 to fp32" + of).c_str(), {2, 2, count, pad, 0, pad});
    check<float, BFloat16>(("fp32 to bf16" + of).c_str(), {2, 2, count, pad, 8, 1, 0, 2, true});
    check<BFloat16, float>(("bf16 to fp32" + of).c_str(), {2, 2, count, 3, 0, pad, 0});
    check<BFloat16, Float16>(("bf16 to fp16" + of).c_str(), {2, 2, count, pad, 0, 0, 5});
    check<Float16, Float16>(("fp16 to fp16" + of).c_str(), {2, 2, count, pad, 8, pad, 8, 0, false, false});
    check<Float16, BFloat16>(("fp16 to bf16" + of).c_str(), {2, 2, count, 2, 0, 0, 0});
    check<Float16, float>(("fp16 to fp32" + of).c_str(), {2, 2, count});
  }
  check<BFloat16, BFloat16>("bf16 to bf16 [1, 1, 20000], blocks of a row", {1, 1, 20000});
#endif
  ops::weigh({}, nullptr);  // no rows: no launch
  return finish("weigh");
}
