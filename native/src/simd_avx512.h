// Vectors of AVX-512 (F, BW, DQ, VL): see simd_scalar.h for what each operation means. With DEJAVU_VNNI integer products are
// added up by its instructions.
#pragma once
#include "simd_x86.h"

namespace {

#ifdef DEJAVU_VNNI
#define DEJAVU_ISA_NAME "avx512vnni"
#else
#define DEJAVU_ISA_NAME "avx512"
#endif

struct F {
  static constexpr int W = 16;
  typedef __m512 T;
  static T set(float x) { return _mm512_set1_ps(x); }
  static T zero() { return _mm512_setzero_ps(); }
  static T load(const float *p) { return _mm512_loadu_ps(p); }
  static T load(const int8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
  static T load(const uint8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))); }
  static T load(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
  }
  static T load(const half *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
  static void store(half *p, T a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
  static void store(float *p, T a) { _mm512_storeu_ps(p, a); }
  static T add(T a, T b) { return _mm512_add_ps(a, b); }
  static T sub(T a, T b) { return _mm512_sub_ps(a, b); }
  static T mul(T a, T b) { return _mm512_mul_ps(a, b); }
  static T div(T a, T b) { return _mm512_div_ps(a, b); }
  static T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  static T max(T a, T b) { return _mm512_max_ps(a, b); }
  static T min(T a, T b) { return _mm512_min_ps(a, b); }
  static T abs(T a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
  static T round(T a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static T exp2i(T n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
  }
  static __m256 halves(T a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
  static float sum(T a) { return _mm512_reduce_add_ps(a); }
  static float largest(T a) { return _mm512_reduce_max_ps(a); }
  static void sum4(T a, T b, T c, T d, float *out) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(halves(a), halves(b)), _mm256_hadd_ps(halves(c), halves(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
  static void store_i16(int16_t *p, T a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a))); }
};

struct I {
  static constexpr int W = 32;
  typedef __m512i T;
  static T zero() { return _mm512_setzero_si512(); }
  static T step(T acc, const int8_t *w, const int16_t *x) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)w));
#ifdef DEJAVU_VNNI
    return _mm512_dpwssd_epi32(acc, wide, _mm512_loadu_si512(x));
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(wide, _mm512_loadu_si512(x)));
#endif
  }
  static __m256i halves(T a) { return _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1)); }
  static void sum4(T a, T b, T c, T d, float scale, float *out) {
    const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(halves(a), halves(b)), _mm256_hadd_epi32(halves(c), halves(d)));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    _mm_storeu_ps(out, _mm_mul_ps(_mm_cvtepi32_ps(sums), _mm_set1_ps(scale)));
  }
};

struct N {
  typedef __m512 Scales;
  static Scales scales(const half *w, const float *x, int64_t count) { return _mm512_zextps256_ps512(scales8(w, x, count)); }
  static Scales scales(const bf16 *w, const float *x, int64_t count) { return _mm512_zextps256_ps512(scales8(w, x, count)); }
  static Scales scales(half d, const uint8_t *sub, const float *x) { return _mm512_zextps256_ps512(scales8(d, sub, x)); }
  static Scales scales(half d, const float *x) { return _mm512_zextps256_ps512(_mm256_mul_ps(one(d), _mm256_loadu_ps(x))); }
  static F::T bias(F::T acc, Scales s, const float *sum, float factor) {
    return F::fma(s, _mm512_zextps256_ps512(_mm256_mul_ps(_mm256_loadu_ps(sum), _mm256_set1_ps(factor))), acc);
  }
  static F::T bias(F::T acc, Scales s, const int8_t *sub, const int16_t *halves, float factor) {
    return F::fma(s, _mm512_zextps256_ps512(_mm256_mul_ps(halves8(sub, halves), _mm256_set1_ps(factor))), acc);
  }
  static F::T bias(F::T acc, Scales s, const int8_t *zero, const float *sum) {
    return F::fma(s, _mm512_zextps256_ps512(zeros8(zero, sum)), acc);
  }
  // The low vector in the lower half, the high one in the upper half.
  typedef __m512i Bytes;
  static Bytes nibbles(const uint8_t *p) {
    const __m256i packed = _mm256_loadu_si256((const __m256i *)p);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(packed), _mm256_srli_epi16(packed, 4), 1);
    return _mm512_and_si512(both, _mm512_set1_epi8(15));
  }
  static Bytes add_bits(Bytes w, const uint8_t *plane) {
    __mmask64 bits;
    __builtin_memcpy(&bits, plane, sizeof bits);
    return _mm512_mask_add_epi8(w, bits, w, _mm512_set1_epi8(16));
  }
  static Bytes add_two_bits(Bytes w, const uint8_t *plane) {
    const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)plane));
    const __m512i turns = _mm512_setr_epi32(4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0, 30, 30, 30, 30);
    return _mm512_or_si512(w, _mm512_and_si512(_mm512_rolv_epi32(four, turns), _mm512_set1_epi8(0x30)));
  }
  static void store(uint8_t *p, Bytes w) { _mm512_storeu_si512(p, w); }
  // Of the groups of a pair, in split order, four words each, twice.
  static __m512i lanes(int pair) {
    const int a = pair, b = pair + 4;
    return _mm512_setr_epi32(a, a, a, a, b, b, b, b, a, a, a, a, b, b, b, b);
  }
  static F::T scaled(F::T acc, __m512i total, Scales s, int pair) {
    return F::fma(_mm512_cvtepi32_ps(total), _mm512_permutexvar_ps(lanes(pair), s), acc);
  }
  static __m512i products(__m512i w, __m512i x) {
#ifdef DEJAVU_VNNI
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, x);
#else
    return _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1));
#endif
  }
  static F::T step(F::T acc, Bytes w, const int8_t *x, Scales s, int pair) { return scaled(acc, products(w, _mm512_loadu_si512(x)), s, pair); }
  // A pair of products is of one half of its group: even ones of the first.
  static F::T step(F::T acc, Bytes w, const int8_t *x, Scales s, int pair, const int8_t *sub) {
    const __m512i halves = _mm512_zextsi256_si512(_mm256_cvtepi8_epi16(split16(sub, 8)));
    const __m512i pairs = _mm512_maddubs_epi16(w, _mm512_loadu_si512(x));
    return scaled(acc, _mm512_madd_epi16(pairs, _mm512_permutexvar_epi32(lanes(pair), halves)), s, pair);
  }
  // |w| times x with the sign of w.
  static F::T step(F::T acc, const int8_t *w, const int8_t *x, Scales s, int pair) {
    const __m512i row = _mm512_loadu_si512(w), values = _mm512_loadu_si512(x);
    const __m512i signs = _mm512_mask_sub_epi8(values, _mm512_movepi8_mask(row), _mm512_setzero_si512(), values);
    return scaled(acc, products(_mm512_abs_epi8(row), signs), s, pair);
  }
  // The lower halves of all four lanes, then the upper ones.
  struct Pairs { __m512i v[2]; };
  static Pairs pairs(Bytes a, Bytes b) { return {{_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b)}}; }
  static void store(uint8_t *p, const Pairs &w) { _mm512_storeu_si512(p, w.v[0]), _mm512_storeu_si512(p + 64, w.v[1]); }
  static Pairs load_pairs(const uint8_t *p) { return {{_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)}}; }
  typedef Pairs Sums;
  struct Totals { __m512i v[4]; };
  static Sums no_sums() { return {{_mm512_setzero_si512(), _mm512_setzero_si512()}}; }
  static Totals no_totals() { return {{_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()}}; }
  static void add(Sums &sums, const Pairs &w, __m512i x) {
    for (int i = 0; i < 2; i++) sums.v[i] = _mm512_add_epi16(sums.v[i], _mm512_maddubs_epi16(w.v[i], x));
  }
  static void add(Sums &sums, const Pairs &w, int16_t two) { add(sums, w, _mm512_set1_epi16(two)); }
  static void add(Sums &sums, const Pairs &w, int16_t low, int16_t high) {
    add(sums, w, _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1));
  }
  // Sixteen outputs in order are a lane of the one vector and that of the other.
  template <int LANE> static void widen_lane(Totals &totals, const Sums &sums) {
    const __m256i both = _mm256_set_m128i(_mm512_extracti32x4_epi32(sums.v[1], LANE), _mm512_extracti32x4_epi32(sums.v[0], LANE));
    totals.v[LANE] = _mm512_add_epi32(totals.v[LANE], _mm512_cvtepi16_epi32(both));
  }
  static void widen(Totals &totals, const Sums &sums) {
    widen_lane<0>(totals, sums), widen_lane<1>(totals, sums), widen_lane<2>(totals, sums), widen_lane<3>(totals, sums);
  }
  static F::T floats(const Totals &totals, int part) { return _mm512_cvtepi32_ps(totals.v[part]); }
  // Of 32 outputs the first four of every eight, then the others.
  struct WidePairs { __m512i v[4]; };
  static WidePairs wide_pairs(const int8_t *a, const int8_t *b) {
    WidePairs w;
    for (int i = 0; i < 2; i++) {
      const __m512i first = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)a + i)), second = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)b + i));
      w.v[2 * i] = _mm512_unpacklo_epi16(first, second), w.v[2 * i + 1] = _mm512_unpackhi_epi16(first, second);
    }
    return w;
  }
  static void store(uint8_t *p, const WidePairs &w) { for (int i = 0; i < 4; i++) _mm512_storeu_si512(p + 64 * i, w.v[i]); }
  static WidePairs load_wide_pairs(const uint8_t *p) {
    return {{_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64), _mm512_loadu_si512(p + 128), _mm512_loadu_si512(p + 192)}};
  }
  static void add(Totals &totals, const WidePairs &w, int32_t two) {
    const __m512i x = _mm512_set1_epi32(two);
#ifdef DEJAVU_VNNI
    for (int i = 0; i < 4; i++) totals.v[i] = _mm512_dpwssd_epi32(totals.v[i], w.v[i], x);
#else
    for (int i = 0; i < 4; i++) totals.v[i] = _mm512_add_epi32(totals.v[i], _mm512_madd_epi16(w.v[i], x));
#endif
  }
  static F::T floats_of_wide(const Totals &totals, int part) {
    const int a = part % 2 * 8, b = a + 16;
    const __m512i order = _mm512_setr_epi32(a, a + 1, a + 2, a + 3, b, b + 1, b + 2, b + 3, a + 4, a + 5, a + 6, a + 7, b + 4, b + 5, b + 6, b + 7);
    return _mm512_cvtepi32_ps(_mm512_permutex2var_epi32(totals.v[part / 2 * 2], order, totals.v[part / 2 * 2 + 1]));
  }
  static void times(const half *w, float coef, float *out) { times8(w, coef, out); }
  static void pack(const float *x, float inverse, int8_t *low, int8_t *high) { pack_group(x, inverse, low, high); }
};

struct D {
  static constexpr int TOKENS = 8;
  static constexpr bool TRANSPOSES = true;
#ifdef DEJAVU_VNNI
  static constexpr int OFFSET = 128;
#else
  static constexpr int OFFSET = 0;
#endif
  typedef __m512i T;
  // Sixteen words of sixteen rows, each a vector of its row, become sixteen vectors of all rows.
  static void transpose(const uint8_t (*rows)[PAD], __m512i *words) {
    __m512i a[16], b[16];
    for (int j = 0; j < 16; j++) a[j] = _mm512_loadu_si512(rows[j]);
    for (int j = 0; j < 16; j += 2) b[j] = _mm512_unpacklo_epi32(a[j], a[j + 1]), b[j + 1] = _mm512_unpackhi_epi32(a[j], a[j + 1]);
    for (int j = 0; j < 16; j += 4)
      for (int h = 0; h < 2; h++) {
        a[j + 2 * h] = _mm512_unpacklo_epi64(b[j + h], b[j + h + 2]);
        a[j + 2 * h + 1] = _mm512_unpackhi_epi64(b[j + h], b[j + h + 2]);
      }
    for (int i = 0; i < 4; i++) {  // a[j + i]: words i, 4 + i, 8 + i, 12 + i of rows j .. j + 3
      const __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x44), high = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xee);
      const __m512i later_low = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x44), later_high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xee);
      words[i] = _mm512_shuffle_i32x4(low, later_low, 0x88), words[4 + i] = _mm512_shuffle_i32x4(low, later_low, 0xdd);
      words[8 + i] = _mm512_shuffle_i32x4(high, later_high, 0x88), words[12 + i] = _mm512_shuffle_i32x4(high, later_high, 0xdd);
    }
  }
  static void side_by_side(const uint8_t (*rows)[PAD], uint8_t *first, uint8_t *second) {
    __m512i words[16];
    transpose(rows, words);
    for (int i = 0; i < 8; i++) {
      const int at = i < 4 ? i : i + 4;
      _mm512_storeu_si512(first + 64 * i, words[at]), _mm512_storeu_si512(second + 64 * i, words[at + 4]);
    }
  }
  static __m512i four(const int8_t *x, int i) { return _mm512_set1_epi32(word_at(x + place_of_word(i))); }
  static __m512i widened(__m512i sums, __m512i pairs, __m512i with) {
#ifdef DEJAVU_VNNI
    return _mm512_dpwssd_epi32(sums, pairs, with);
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, with));
#endif
  }
  // Words within int16 are added up as pairs, which are then widened: times 1, or times what `with` has for each pair.
  template <int PLANE> static void add(const uint8_t *w, __m512i with, const Grouped *const *x, int64_t at, T *sums) {
    constexpr int WITHIN = words_within_int16(PLANE);
    for (int first = 0; first < 8; first += WITHIN) {
      __m512i pairs[TOKENS];
      for (int i = first; i < first + WITHIN; i++) {
        const __m512i row = _mm512_loadu_si512(w + 64 * i);
        for (int t = 0; t < TOKENS; t++) {
          const __m512i two = _mm512_maddubs_epi16(row, four(x[t]->q + at, i));
          pairs[t] = i == first ? two : _mm512_add_epi16(pairs[t], two);
        }
      }
      for (int t = 0; t < TOKENS; t++) sums[t] = widened(sums[t], pairs[t], with);
    }
  }
  template <int PLANE> static void words(const uint8_t *w, const Grouped *const *x, int64_t at, T *sums) {
    for (int t = 0; t < TOKENS; t++) sums[t] = _mm512_setzero_si512();
#ifdef DEJAVU_VNNI
    for (int i = 0; i < 8; i++) {
      const __m512i row = _mm512_loadu_si512(w + 64 * i);
      for (int t = 0; t < TOKENS; t++) sums[t] = _mm512_dpbusd_epi32(sums[t], row, four(x[t]->q + at, i));
    }
#else
    const __m512i ones = _mm512_set1_epi16(1);
    if constexpr (PLANE >= 0) {
      add<PLANE>(w, ones, x, at, sums);
    } else {
      for (int i = 0; i < 8; i++) {  // |w| times x with the sign of w
        const __m512i row = _mm512_loadu_si512(w + 64 * i), size = _mm512_abs_epi8(row);
        const __mmask64 negative = _mm512_movepi8_mask(row);
        for (int t = 0; t < TOKENS; t++) {
          const __m512i values = four(x[t]->q + at, i), signs = _mm512_mask_sub_epi8(values, negative, _mm512_setzero_si512(), values);
          sums[t] = widened(sums[t], _mm512_maddubs_epi16(size, signs), ones);
        }
      }
    }
#endif
  }
  static void halves(const uint8_t *w, const int16_t *sub, const Grouped *const *x, int64_t at, int64_t group, T *sums) {
    const __m512i scales = _mm512_loadu_si512(sub);
    for (int t = 0; t < TOKENS; t++) {
      const __m512i both = _mm512_madd_epi16(scales, _mm512_set1_epi32(word_at(x[t]->halves + 2 * group)));
      sums[t] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(both, 5));
    }
    add<2>(w, scales, x, at, sums);
  }
  static F::T floats(T sums) { return _mm512_cvtepi32_ps(sums); }
};

}  // namespace
