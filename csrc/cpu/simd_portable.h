// Vector in plain C++, for any CPU: 8 floats in loops that a compiler can turn into whatever vectors there are. What
// the functions mean, for all instruction sets, is said here.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "sample_row.h"

namespace diffusion_runtime::portable {
namespace {

struct Vector {
  static constexpr int kWidth = 8;
  float v[kWidth];
  static Vector all(float x) {
    Vector out;
    for (int i = 0; i < kWidth; ++i) out.v[i] = x;
    return out;
  }
};

// Applies f lane by lane.
template <class F, class... Vectors>
inline __attribute__((always_inline)) Vector lanes(F f, const Vectors&... in) {
  Vector out;
  for (int i = 0; i < Vector::kWidth; ++i) out.v[i] = f(in.v[i]...);
  return out;
}

template <class To, class From>
inline To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

inline Vector operator+(Vector a, Vector b) {
  return lanes([](float x, float y) { return x + y; }, a, b);
}
inline Vector operator-(Vector a, Vector b) {
  return lanes([](float x, float y) { return x - y; }, a, b);
}
inline Vector operator*(Vector a, Vector b) {
  return lanes([](float x, float y) { return x * y; }, a, b);
}
inline Vector operator/(Vector a, Vector b) {
  return lanes([](float x, float y) { return x / y; }, a, b);
}
// a * b + c, rounded once where there is an instruction for it, else twice
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
// The larger (smaller) one, b if either is NaN.
inline Vector max(Vector a, Vector b) {
  return lanes([](float x, float y) { return x > y ? x : y; }, a, b);
}
inline Vector min(Vector a, Vector b) {
  return lanes([](float x, float y) { return x < y ? x : y; }, a, b);
}
inline Vector abs(Vector a) {
  return lanes([](float x) { return fabsf(x); }, a);
}
inline Vector copy_sign(Vector size, Vector sign) {  // size >= 0
  return lanes([](float x, float y) { return copysignf(x, y); }, size, sign);
}
// a < b ? yes : no, so `no` if either is NaN
inline Vector select_less(Vector a, Vector b, Vector yes, Vector no) {
  return lanes([](float x, float y, float p, float q) { return x < y ? p : q; }, a, b, yes, no);
}
inline Vector round(Vector a) {  // to the nearest integer; |a| < 2^22
  return lanes([](float x) { return (x + 12582912.0f) - 12582912.0f; }, a);
}
inline Vector times_power(Vector a, Vector n) {  // a * 2^n, n an integer from -126 to 127; NaN stays
  return lanes(
      [](float x, float y) {
        // the biased exponent is in the low bits of the sum: no conversion, which NaN would make undefined
        return x * same_bits<float>(same_bits<uint32_t>(y + (12582912.0f + 127)) << 23);
      },
      a, n);
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return same_bits<float>(uint32_t{x.bits} << 16); }
inline float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, size = x.bits & 0x7FFFu;
  if (size >= 0x7C00) return same_bits<float>(sign | 0x7F800000u | (size & 0x3FFu) << 13);
  // the exponent moves from a bias of 15 to one of 127 by a product, which also serves subnormal numbers
  return same_bits<float>(sign | same_bits<uint32_t>(same_bits<float>(size << 13) * 0x1p112f));
}

template <class T>
inline Vector load(const T* p) {
  Vector out;
  for (int i = 0; i < Vector::kWidth; ++i) out.v[i] = to_float(p[i]);
  return out;
}
template <class T>
inline Vector load_first(const T* p, int count) {  // the other lanes are -inf, and not read
  Vector out = Vector::all(-INFINITY);
  for (int i = 0; i < count; ++i) out.v[i] = to_float(p[i]);
  return out;
}
inline void store(float* p, Vector a) { memcpy(p, a.v, sizeof(a.v)); }

inline float first_lane(Vector a) { return a.v[0]; }
inline float reduce_add(Vector a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
inline int first_equal(Vector a, Vector b) {  // the lowest lane, or -1
  for (int i = 0; i < Vector::kWidth; ++i)
    if (a.v[i] == b.v[i]) return i;
  return -1;
}

}  // namespace
}  // namespace diffusion_runtime::portable
