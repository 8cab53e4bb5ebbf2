// What the tests of rms_norm and qk_norm_rope share: types, and a row's norm in double.
#pragma once
#include <random>
#include <vector>

#include "norm.cuh"
#include "test_support.h"

namespace ops = diffusion_runtime;

template <class T>
struct type_of;
template <>
struct type_of<float> {
  static constexpr ops::LogitType value = ops::LogitType::Float32;
  static constexpr double rounding = 1e-6;
};
template <>
struct type_of<Float16> {
  static constexpr ops::LogitType value = ops::LogitType::Float16;
  static constexpr double rounding = 5e-4;
};
template <>
struct type_of<BFloat16> {
  static constexpr ops::LogitType value = ops::LogitType::BFloat16;
  static constexpr double rounding = 4e-3;
};

template <class T>
double rounded(double x) {
  return to_float(from_float<T>(float(x)));
}

struct NormSettings {
  bool normalized = true, weighted = true, round_before_weight = false;
  float eps = 1e-3f, weight_offset = 0;
};

// `x` [size] normalised, in double but for the roundings that are asked for.
template <class T, class W>
std::vector<double> normed(const NormSettings& s, const T* x, const W* weight, int size) {
  double squares = 0;
  for (int i = 0; i < size; i++) squares += double(to_float(x[i])) * to_float(x[i]);
  const double inverse = s.normalized ? 1 / std::sqrt(squares / size + s.eps) : 1;
  std::vector<double> y(size);
  for (int i = 0; i < size; i++) {
    y[i] = to_float(x[i]) * inverse;
    if (!s.weighted) continue;
    if (s.round_before_weight) y[i] = rounded<T>(y[i]);
    y[i] *= s.weight_offset + double(to_float(weight[i]));
    if (s.round_before_weight) y[i] = rounded<T>(y[i]);
  }
  return y;
}

// How far a result may be from `wanted`: every rounding may go the other way.
template <class T>
double slack(const NormSettings& s, double largest) {
  return (s.round_before_weight && s.weighted ? 4 : 1.01) * type_of<T>::rounding * std::fabs(largest) + 1e-7;
}

template <class T>
void fill(T* data, int count, std::mt19937& random, float scale = 2) {
  std::normal_distribution<float> normal(0, scale);
  for (int i = 0; i < count; i++) data[i] = from_float<T>(normal(random));
}
