// Vector in plain C++, for any CPU: 4 floats in the vector extension of GCC and Clang, which makes of them whatever the
// CPU has. What the functions mean, for all instruction sets, is said here.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "sample_row.h"

namespace diffusion_runtime::portable {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Bits __attribute__((vector_size(16)));

struct Vector {
  static constexpr int kWidth = 4;
  Floats v;
  static Vector all(float x) { return {Floats{x, x, x, x}}; }
};

inline Bits bits(const Vector& a) { return reinterpret_cast<Bits>(a.v); }
inline Vector of_bits(Bits b) { return {reinterpret_cast<Floats>(b)}; }

inline Vector operator+(const Vector& a, const Vector& b) { return {a.v + b.v}; }
inline Vector operator-(const Vector& a, const Vector& b) { return {a.v - b.v}; }
inline Vector operator*(const Vector& a, const Vector& b) { return {a.v * b.v}; }
inline Vector operator/(const Vector& a, const Vector& b) { return {a.v / b.v}; }
// a * b + c, rounded once where there is an instruction for it, else twice
inline Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) { return a * b + c; }
// The larger (smaller) one, b if either is NaN.
inline Vector max(const Vector& a, const Vector& b) { return {a.v > b.v ? a.v : b.v}; }
inline Vector min(const Vector& a, const Vector& b) { return {a.v < b.v ? a.v : b.v}; }
inline Vector abs(const Vector& a) { return of_bits(bits(a) & INT32_MAX); }
inline Vector copy_sign(const Vector& size, const Vector& sign) {  // size >= 0
  return of_bits(bits(size) | (bits(sign) & INT32_MIN));
}
// a < b ? yes : no, so `no` if either is NaN
inline Vector select_less(const Vector& a, const Vector& b, const Vector& yes, const Vector& no) {
  return {a.v < b.v ? yes.v : no.v};
}
// lane by lane: `yes` where bit i is set, else `no`
inline Vector select_bits(uint32_t bits, const Vector& yes, const Vector& no) {
  const int32_t b = static_cast<int32_t>(bits);
  return {(Bits{b, b, b, b} & Bits{1, 2, 4, 8}) != 0 ? yes.v : no.v};
}
inline Vector round(const Vector& a) {  // to the nearest integer; |a| < 2^22
  return {(a.v + 12582912.0f) - 12582912.0f};
}
inline Vector times_power(const Vector& a, const Vector& n) {  // a * 2^n, n an integer from -126 to 127; NaN stays
  // the biased exponent is in the low bits of the sum: no conversion, which NaN would make undefined
  return a * of_bits(bits({n.v + (12582912.0f + 127)}) << 23);
}

inline float to_float(float x) { return x; }
inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float to_float(BFloat16 x) { return float_of_bits(uint32_t{x.bits} << 16); }
inline float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, size = x.bits & 0x7FFFu;
  if (size >= 0x7C00) return float_of_bits(sign | 0x7F800000u | (size & 0x3FFu) << 13);
  // the exponent moves from a bias of 15 to one of 127 by a product, which also serves subnormal numbers
  const float value = float_of_bits(size << 13) * 0x1p112f;
  return sign ? -value : value;
}

template <class T>
inline Vector load(const T* p) {
  Vector out;
  for (int i = 0; i < Vector::kWidth; ++i) out.v[i] = to_float(p[i]);
  return out;
}
inline Vector load(const float* p) {
  Vector out;
  memcpy(&out.v, p, sizeof(out.v));
  return out;
}
template <class T>
inline Vector load_first(const T* p, int count) {  // the other lanes are -inf, and not read
  Vector out = Vector::all(-INFINITY);
  for (int i = 0; i < count; ++i) out.v[i] = to_float(p[i]);
  return out;
}
inline uint16_t round_to_bits(float x, BFloat16) {  // to the nearest, ties to even; NaN stays
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>(x == x ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FC0);
}
inline uint16_t round_to_bits(float x, Float16) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  if (x != x) return static_cast<uint16_t>(sign | 0x7E00);
  if (size >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // 65520 and above
  // below 2^-14, the smallest normal number, an addition of 1/2 rounds to multiples of 2^-24
  if (size < 0x38800000) {
    const float sum = float_of_bits(size) + 0.5f;
    memcpy(&bits, &sum, sizeof(bits));
    return static_cast<uint16_t>(sign | (bits - 0x3F000000));
  }
  return static_cast<uint16_t>(sign | (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13);
}

inline void store(float* p, const Vector& a) { memcpy(p, &a.v, sizeof(a.v)); }
template <class Half>
inline void store(Half* p, const Vector& a) {  // rounded to the nearest, ties to even
  for (int i = 0; i < Vector::kWidth; ++i) p[i].bits = round_to_bits(a.v[i], Half{});
}

// Stores the lanes from `low` to `high` one after the other and says how many they are; all kWidth may be written.
inline int store_between(float* p, const Vector& a, const Vector& low, const Vector& high) {
  int count = 0;
  for (int i = 0; i < Vector::kWidth; ++i) {
    p[count] = a.v[i];
    count += (a.v[i] >= low.v[i]) & (a.v[i] <= high.v[i]);
  }
  return count;
}

// rows[i] lane j becomes rows[j] lane i; kWidth rows
inline void transpose(Vector* rows) {
  for (int i = 0; i < Vector::kWidth; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = x;
    }
}

inline float first_lane(const Vector& a) { return a.v[0]; }
inline float reduce_add(const Vector& a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
// sums of the lanes of four vectors; the order is not that of reduce_add
inline void reduce_add_four(const Vector* vectors, float* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = reduce_add(vectors[i]);
}
inline float reduce_max(const Vector& a) {  // of numbers
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}
inline int first_equal(const Vector& a, const Vector& b) {  // the lowest lane, or -1
  for (int i = 0; i < Vector::kWidth; ++i)
    if (a.v[i] == b.v[i]) return i;
  return -1;
}

}  // namespace
}  // namespace diffusion_runtime::portable
