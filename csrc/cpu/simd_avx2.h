// Vector for AVX2 with FMA and F16C: 8 floats. The functions are those of simd_portable.h, which says what each means.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "sample_row.h"

namespace diffusion_runtime::avx2 {
namespace {

struct Vector {
  static constexpr int kWidth = 8;
  __m256 v;
  static Vector all(float x) { return {_mm256_set1_ps(x)}; }
};

inline Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vector operator/(Vector a, Vector b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vector min(Vector a, Vector b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vector abs(Vector a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vector copy_sign(Vector size, Vector sign) {
  return {_mm256_or_ps(size.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}
inline Vector select_less(Vector a, Vector b, Vector yes, Vector no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline Vector select_bits(uint32_t bits, Vector yes, Vector no) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(set))};
}
inline Vector round(Vector a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vector times_power(Vector a, Vector n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

inline __m256 widen(__m128i x, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline __m256 widen(__m128i x, Float16) { return _mm256_cvtph_ps(x); }

inline Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
template <class Half>
inline Vector load(const Half* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Half{})};
}
inline void store(float* p, Vector a) { _mm256_storeu_ps(p, a.v); }
inline void store(Float16* p, Vector a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* p, Vector a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), is_nan), 16);
  // packing goes by halves of the register
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
template <class T>
inline Vector load_first(const T* p, int count) {
  alignas(32) T some[8] = {};
  memcpy(some, p, sizeof(T) * count);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);
  return {_mm256_blendv_ps(_mm256_set1_ps(-INFINITY), load(some).v, _mm256_castsi256_ps(wanted))};
}

inline int store_between(float* p, Vector a, Vector low, Vector high) {
  const __m256 enough = _mm256_cmp_ps(a.v, low.v, _CMP_GE_OQ), inside = _mm256_cmp_ps(a.v, high.v, _CMP_LE_OQ);
  const int wanted = _mm256_movemask_ps(_mm256_and_ps(enough, inside));
  if (wanted == 0) return 0;
  alignas(32) float x[8];
  _mm256_store_ps(x, a.v);
  int count = 0;
  for (int i = 0; i < 8; ++i) {
    p[count] = x[i];
    count += wanted >> i & 1;
  }
  return count;
}

inline void transpose(Vector* rows) {
  __m256 pairs[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  // fours[i] (and i + 4): columns i and i + 4 of rows 0 to 3 (4 to 7)
  __m256 fours[8];
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

inline float first_lane(Vector a) { return _mm256_cvtss_f32(a.v); }
inline float reduce_add(Vector a) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
inline void reduce_add_four(const Vector* vectors, float* sums) {
  const __m256 first = _mm256_hadd_ps(vectors[0].v, vectors[1].v), second = _mm256_hadd_ps(vectors[2].v, vectors[3].v);
  const __m256 both = _mm256_hadd_ps(first, second);
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}
inline float reduce_max(Vector a) {
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}
inline int first_equal(Vector a, Vector b) {
  const int equal = _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ));
  return equal ? __builtin_ctz(static_cast<unsigned>(equal)) : -1;
}

}  // namespace
}  // namespace diffusion_runtime::avx2
