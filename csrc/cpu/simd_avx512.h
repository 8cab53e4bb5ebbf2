// Vector for AVX-512 (F, BW, DQ, VL): 16 floats. The functions are those of simd_portable.h, which says what each
// means.
#pragma once

// GCC 12 warns of its own header's placeholders for lanes that no instruction reads.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#include <math.h>

#include "sample_row.h"

namespace diffusion_runtime::avx512 {
namespace {

struct Vector {
  static constexpr int kWidth = 16;
  __m512 v;
  static Vector all(float x) { return {_mm512_set1_ps(x)}; }
};

inline Vector operator+(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vector operator/(Vector a, Vector b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vector max(Vector a, Vector b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vector min(Vector a, Vector b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vector abs(Vector a) { return {_mm512_abs_ps(a.v)}; }
inline Vector copy_sign(Vector size, Vector sign) {
  return {_mm512_or_ps(size.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}
inline Vector select_less(Vector a, Vector b, Vector yes, Vector no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline Vector select_bits(uint32_t bits, Vector yes, Vector no) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), no.v, yes.v)};
}
inline Vector round(Vector a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vector times_power(Vector a, Vector n) { return {_mm512_scalef_ps(a.v, n.v)}; }

inline __m512 widen(__m256i x, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline __m512 widen(__m256i x, Float16) { return _mm512_cvtph_ps(x); }

inline Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
template <class Half>
inline Vector load(const Half* p) {
  return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Half{})};
}
inline __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Vector load_first(const float* p, int count) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), first_lanes(count), p)};
}
template <class Half>
inline Vector load_first(const Half* p, int count) {
  const __mmask16 lanes = first_lanes(count);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), lanes, widen(_mm256_maskz_loadu_epi16(lanes, p), Half{}))};
}
inline void store(float* p, Vector a) { _mm512_storeu_ps(p, a.v); }
inline void store(Float16* p, Vector a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* p, Vector a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC00000)), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}

inline int store_between(float* p, Vector a, Vector low, Vector high) {
  const __mmask16 enough = _mm512_cmp_ps_mask(a.v, low.v, _CMP_GE_OQ);
  const __mmask16 wanted = _mm512_mask_cmp_ps_mask(enough, a.v, high.v, _CMP_LE_OQ);
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(wanted, a.v));  // compressing into memory is slow on some CPUs
  return __builtin_popcount(wanted);
}

inline void transpose(Vector* rows) {
  __m512 pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  // fours[i + j]: columns j, j + 4, j + 8 and j + 12 of rows i to i + 3
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    fours[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 even_low = _mm512_shuffle_f32x4(fours[j], fours[j + 4], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(fours[j], fours[j + 4], 0xDD);
    const __m512 even_high = _mm512_shuffle_f32x4(fours[j + 8], fours[j + 12], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(fours[j + 8], fours[j + 12], 0xDD);
    rows[j].v = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    rows[j + 8].v = _mm512_shuffle_f32x4(even_low, even_high, 0xDD);
    rows[j + 4].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    rows[j + 12].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0xDD);
  }
}

inline float first_lane(Vector a) { return _mm512_cvtss_f32(a.v); }
inline float reduce_add(Vector a) { return _mm512_reduce_add_ps(a.v); }
inline void reduce_add_four(const Vector* vectors, float* sums) {
  __m256 halves[4];
  for (int i = 0; i < 4; ++i)
    halves[i] = _mm256_add_ps(_mm512_castps512_ps256(vectors[i].v), _mm512_extractf32x8_ps(vectors[i].v, 1));
  const __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(halves[0], halves[1]), _mm256_hadd_ps(halves[2], halves[3]));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}
inline float reduce_max(Vector a) { return _mm512_reduce_max_ps(a.v); }
inline int first_equal(Vector a, Vector b) {
  const __mmask16 equal = _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ);
  return equal ? __builtin_ctz(equal) : -1;
}

}  // namespace
}  // namespace diffusion_runtime::avx512
