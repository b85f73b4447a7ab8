// Vectors of AVX2, FMA and F16C: see simd_scalar.h for what each operation means.
#pragma once
#include "simd_x86.h"

namespace {

#define DEJAVU_ISA_NAME "avx2"

struct F {
  static constexpr int W = 8;
  typedef __m256 T;
  static T set(float x) { return _mm256_set1_ps(x); }
  static T zero() { return _mm256_setzero_ps(); }
  static T load(const float *p) { return _mm256_loadu_ps(p); }
  static T load(const int8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
  static T load(const bf16 *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
  }
  static T load(const half *p) { return eight(p); }
  static void store(half *p, T a) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
  static void store(float *p, T a) { _mm256_storeu_ps(p, a); }
  static T add(T a, T b) { return _mm256_add_ps(a, b); }
  static T sub(T a, T b) { return _mm256_sub_ps(a, b); }
  static T mul(T a, T b) { return _mm256_mul_ps(a, b); }
  static T div(T a, T b) { return _mm256_div_ps(a, b); }
  static T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  static T max(T a, T b) { return _mm256_max_ps(a, b); }
  static T min(T a, T b) { return _mm256_min_ps(a, b); }
  static T abs(T a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static T round(T a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static T exp2i(T n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static __m128 halves(T a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
  static float sum(T a) {
    __m128 s = halves(a);
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static float largest(T a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static void sum4(T a, T b, T c, T d, float *out) {
    _mm_storeu_ps(out, halves(_mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d))));
  }
  static void store_i16(int16_t *p, T a) {
    const __m256i i = _mm256_cvtps_epi32(a);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1)));
  }
};

struct I {
  static constexpr int W = 16;
  typedef __m256i T;
  static T zero() { return _mm256_setzero_si256(); }
  static T step(T acc, const int8_t *w, const int16_t *x) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(wide, _mm256_loadu_si256((const __m256i *)x)));
  }
  static void sum4(T a, T b, T c, T d, float scale, float *out) {
    const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    _mm_storeu_ps(out, _mm_mul_ps(_mm_cvtepi32_ps(sums), _mm_set1_ps(scale)));
  }
};

struct N {
  typedef __m256 Scales;
  static Scales scales(const half *w, const float *x, int64_t count) { return scales8(w, x, count); }
  static F::T bias(F::T acc, Scales s, const float *sum) { return F::fma(s, F::load(sum), acc); }
  // Pairs of products stay within int16: 4 * 15 * 127.
  static F::T step(F::T acc, const uint8_t *w, const int8_t *x, Scales s, int pair) {
    const __m256i packed = _mm256_loadu_si256((const __m256i *)w), nibble = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(packed, nibble), high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
    const __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(low, _mm256_loadu_si256((const __m256i *)x)),
                                          _mm256_maddubs_epi16(high, _mm256_loadu_si256((const __m256i *)(x + 32))));
    const __m256i lanes = _mm256_setr_epi32(2 * pair, 2 * pair, 2 * pair, 2 * pair, 2 * pair + 1, 2 * pair + 1, 2 * pair + 1, 2 * pair + 1);
    const __m256 total = _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
    return F::fma(total, _mm256_permutevar8x32_ps(s, lanes), acc);
  }
  static void times(const half *w, float coef, float *out) { times8(w, coef, out); }
  // Every word of the group twice, as it is and 16 bits down.
  struct Group { __m256i words[2]; };
  static Group group(const uint8_t *p) {
    const __m256i words = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return {{words, _mm256_srli_epi32(words, 16)}};
  }
  // A nibble at bit b of the mantissa of 2^(23 - b) adds its value: no shift, no conversion.
  static F::T values(Group g, int part) {
    const int b = part % 2 * 8, low = (150 - b) << 23, high = (146 - b) << 23;
    const __m256i mask = _mm256_setr_epi32(15 << b, 15 << b, 15 << b, 15 << b, 240 << b, 240 << b, 240 << b, 240 << b);
    const __m256i base = _mm256_setr_epi32(low, low, low, low, high, high, high, high);
    const __m256 zero = _mm256_add_ps(_mm256_castsi256_ps(base), _mm256_set1_ps(8.0f));
    return _mm256_sub_ps(_mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(g.words[part / 2], mask), base)), zero);
  }
  static void pack(const float *x, float inverse, int8_t *low, int8_t *high) { pack_group(x, inverse, low, high); }
};

}  // namespace
