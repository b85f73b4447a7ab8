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
  static T load(const uint8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
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
  static Scales scales(const bf16 *w, const float *x, int64_t count) { return scales8(w, x, count); }
  static Scales scales(half d, const uint8_t *sub, const float *x) { return scales8(d, sub, x); }
  static Scales scales(half d, const float *x) { return _mm256_mul_ps(one(d), _mm256_loadu_ps(x)); }
  static F::T bias(F::T acc, Scales s, const float *sum, float factor) { return F::fma(s, F::mul(F::load(sum), F::set(factor)), acc); }
  static F::T bias(F::T acc, Scales s, const int8_t *sub, const int16_t *halves, float factor) {
    return F::fma(s, F::mul(halves8(sub, halves), F::set(factor)), acc);
  }
  static F::T bias(F::T acc, Scales s, const int8_t *zero, const float *sum) { return F::fma(s, zeros8(zero, sum), acc); }
  struct Bytes { __m256i low, high; };
  static Bytes nibbles(const uint8_t *p) {
    const __m256i packed = _mm256_loadu_si256((const __m256i *)p), nibble = _mm256_set1_epi8(15);
    return {_mm256_and_si256(packed, nibble), _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble)};
  }
  // 16 where the bit of a byte is set: its byte of the word to every place, and there its bit.
  static __m256i sixteens(const uint8_t *word) {
    int32_t bits;
    __builtin_memcpy(&bits, word, sizeof bits);
    const __m256i place = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), place), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(16));
  }
  static Bytes add_bits(Bytes w, const uint8_t *plane) {
    return {_mm256_or_si256(w.low, sixteens(plane)), _mm256_or_si256(w.high, sixteens(plane + 4))};
  }
  static Bytes add_two_bits(Bytes w, const uint8_t *plane) {
    const __m128i p = _mm_loadu_si128((const __m128i *)plane);
    const __m256i bits = _mm256_set1_epi8(0x30);
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_slli_epi16(p, 4)), _mm_slli_epi16(p, 2), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(p), _mm_srli_epi16(p, 2), 1);
    return {_mm256_or_si256(w.low, _mm256_and_si256(low, bits)), _mm256_or_si256(w.high, _mm256_and_si256(high, bits))};
  }
  static void store(uint8_t *p, Bytes w) {
    _mm256_storeu_si256((__m256i *)p, w.low);
    _mm256_storeu_si256((__m256i *)(p + 32), w.high);
  }
  // The pair-th word of either half of a vector, which is in split order, four times.
  static __m256 of_pair(__m256 eight, int pair) {  // vpermps takes three times as long on Zen 3
    switch (pair) {
      case 0: return _mm256_permute_ps(eight, 0x00);
      case 1: return _mm256_permute_ps(eight, 0x55);
      case 2: return _mm256_permute_ps(eight, 0xaa);
      default: return _mm256_permute_ps(eight, 0xff);
    }
  }
  static F::T scaled(F::T acc, __m256i total, Scales s, int pair) { return F::fma(_mm256_cvtepi32_ps(total), of_pair(s, pair), acc); }
  // Pairs of products stay within int16: 4 * 63 * 127.
  static __m256i pairs(Bytes w, const int8_t *x) {
    return _mm256_add_epi16(_mm256_maddubs_epi16(w.low, _mm256_loadu_si256((const __m256i *)x)),
                            _mm256_maddubs_epi16(w.high, _mm256_loadu_si256((const __m256i *)(x + 32))));
  }
  static F::T step(F::T acc, Bytes w, const int8_t *x, Scales s, int pair) {
    return scaled(acc, _mm256_madd_epi16(pairs(w, x), _mm256_set1_epi16(1)), s, pair);
  }
  // A pair of products is of one half of its group: even ones of the first.
  static F::T step(F::T acc, Bytes w, const int8_t *x, Scales s, int pair, const int8_t *sub) {
    const __m256i halves = _mm256_castps_si256(of_pair(_mm256_castsi256_ps(_mm256_cvtepi8_epi16(split16(sub, 8))), pair));
    return scaled(acc, _mm256_madd_epi16(pairs(w, x), halves), s, pair);
  }
  // |w| times x with the sign of w: pairs of products stay within int16, 2 * 128 * 127, but not two of them.
  static __m256i signed_words(const int8_t *w, const int8_t *x) {
    const __m256i row = _mm256_loadu_si256((const __m256i *)w), signs = _mm256_sign_epi8(_mm256_loadu_si256((const __m256i *)x), row);
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(row), signs), _mm256_set1_epi16(1));
  }
  static F::T step(F::T acc, const int8_t *w, const int8_t *x, Scales s, int pair) {
    return scaled(acc, _mm256_add_epi32(signed_words(w, x), signed_words(w + 32, x + 32)), s, pair);
  }
  // Of the low vector the lower halves of its lanes, the upper ones, then of the high one.
  struct Pairs { __m256i v[4]; };
  static Pairs pairs(Bytes a, Bytes b) {
    return {{_mm256_unpacklo_epi8(a.low, b.low), _mm256_unpackhi_epi8(a.low, b.low), _mm256_unpacklo_epi8(a.high, b.high),
             _mm256_unpackhi_epi8(a.high, b.high)}};
  }
  static void store(uint8_t *p, const Pairs &w) { for (int i = 0; i < 4; i++) _mm256_storeu_si256((__m256i *)p + i, w.v[i]); }
  static Pairs load_pairs(const uint8_t *p) {
    const __m256i *at = (const __m256i *)p;
    return {{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1), _mm256_loadu_si256(at + 2), _mm256_loadu_si256(at + 3)}};
  }
  typedef Pairs Sums;
  struct Totals { __m256i v[8]; };
  static Sums no_sums() { return {{_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  static Totals no_totals() {
    Totals none;
    for (int i = 0; i < 8; i++) none.v[i] = _mm256_setzero_si256();
    return none;
  }
  static void add(Sums &sums, const Pairs &w, int16_t low, int16_t high) {
    const __m256i x[2] = {_mm256_set1_epi16(low), _mm256_set1_epi16(high)};
    for (int i = 0; i < 4; i++) sums.v[i] = _mm256_add_epi16(sums.v[i], _mm256_maddubs_epi16(w.v[i], x[i / 2]));
  }
  static void add(Sums &sums, const Pairs &w, int16_t two) { add(sums, w, two, two); }
  static void widen(Totals &totals, const Sums &sums) {
    for (int half = 0; half < 2; half++)
      for (int i = 0; i < 2; i++) {
        const __m256i both = sums.v[2 * half + i];  // outputs 8 i .. and 16 + 8 i ..
        __m256i *to = totals.v + 4 * half + i;
        to[0] = _mm256_add_epi32(to[0], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(both)));
        to[2] = _mm256_add_epi32(to[2], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(both, 1)));
      }
  }
  static F::T floats(const Totals &totals, int part) { return _mm256_cvtepi32_ps(totals.v[part]); }
  // Of 16 outputs the first four of both halves, then the others.
  struct WidePairs { __m256i v[8]; };
  static WidePairs wide_pairs(const int8_t *a, const int8_t *b) {
    WidePairs w;
    for (int i = 0; i < 4; i++) {
      const __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)a + i)), second = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)b + i));
      w.v[2 * i] = _mm256_unpacklo_epi16(first, second), w.v[2 * i + 1] = _mm256_unpackhi_epi16(first, second);
    }
    return w;
  }
  static void store(uint8_t *p, const WidePairs &w) { for (int i = 0; i < 8; i++) _mm256_storeu_si256((__m256i *)p + i, w.v[i]); }
  static WidePairs load_wide_pairs(const uint8_t *p) {
    WidePairs w;
    for (int i = 0; i < 8; i++) w.v[i] = _mm256_loadu_si256((const __m256i *)p + i);
    return w;
  }
  static void add(Totals &totals, const WidePairs &w, int32_t two) {
    const __m256i x = _mm256_set1_epi32(two);
    for (int i = 0; i < 8; i++) totals.v[i] = _mm256_add_epi32(totals.v[i], _mm256_madd_epi16(w.v[i], x));
  }
  static F::T floats_of_wide(const Totals &totals, int part) {
    const __m256i first = totals.v[part / 2 * 2], second = totals.v[part / 2 * 2 + 1];
    return _mm256_cvtepi32_ps(part % 2 ? _mm256_permute2x128_si256(first, second, 0x31) : _mm256_permute2x128_si256(first, second, 0x20));
  }
  static void times(const half *w, float coef, float *out) { times8(w, coef, out); }
  static void pack(const float *x, float inverse, int8_t *low, int8_t *high) { pack_group(x, inverse, low, high); }
};

struct D {
  static constexpr int TOKENS = 4, OFFSET = 0;
  static constexpr bool TRANSPOSES = true;
  typedef __m256i T;
  // Words 0 .. 7 of eight rows, each a vector of its row, become eight vectors of all rows.
  static void transpose(const uint8_t *rows, __m256i *words) {
    __m256i a[8], b[8];
    for (int j = 0; j < 8; j++) a[j] = _mm256_loadu_si256((const __m256i *)(rows + PAD * j));
    for (int j = 0; j < 8; j += 2) b[j] = _mm256_unpacklo_epi32(a[j], a[j + 1]), b[j + 1] = _mm256_unpackhi_epi32(a[j], a[j + 1]);
    for (int j = 0; j < 8; j += 4)
      for (int h = 0; h < 2; h++) {
        a[j + 2 * h] = _mm256_unpacklo_epi64(b[j + h], b[j + h + 2]);
        a[j + 2 * h + 1] = _mm256_unpackhi_epi64(b[j + h], b[j + h + 2]);
      }
    for (int i = 0; i < 4; i++) {
      words[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
      words[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
    }
  }
  static void side_by_side(const uint8_t (*rows)[PAD], uint8_t *first, uint8_t *second) {
    for (int high = 0; high < 2; high++) {
      __m256i words[8];
      transpose(rows[0] + 32 * high, words);
      for (int i = 0; i < 4; i++) {
        _mm256_storeu_si256((__m256i *)first + 4 * high + i, words[i]);
        _mm256_storeu_si256((__m256i *)second + 4 * high + i, words[i + 4]);
      }
    }
  }
  static __m256i four(const int8_t *x, int i) { return _mm256_set1_epi32(word_at(x + place_of_word(i))); }
  // Words within int16 are added up as pairs, which are then widened: times 1, or times what `with` has for each pair.
  template <int PLANE> static void add(const uint8_t *w, __m256i with, const Grouped *const *x, int64_t at, T *sums) {
    constexpr int WITHIN = words_within_int16(PLANE);
    for (int first = 0; first < 8; first += WITHIN) {
      __m256i pairs[TOKENS];
      for (int i = first; i < first + WITHIN; i++) {
        const __m256i row = _mm256_loadu_si256((const __m256i *)w + i);
        for (int t = 0; t < TOKENS; t++) {
          const __m256i two = _mm256_maddubs_epi16(row, four(x[t]->q + at, i));
          pairs[t] = i == first ? two : _mm256_add_epi16(pairs[t], two);
        }
      }
      for (int t = 0; t < TOKENS; t++) sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(pairs[t], with));
    }
  }
  template <int PLANE> static void words(const uint8_t *w, const Grouped *const *x, int64_t at, T *sums) {
    for (int t = 0; t < TOKENS; t++) sums[t] = _mm256_setzero_si256();
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (PLANE >= 0) {
      add<PLANE>(w, ones, x, at, sums);
    } else {
      for (int i = 0; i < 8; i++) {  // |w| times x with the sign of w
        const __m256i row = _mm256_loadu_si256((const __m256i *)w + i), size = _mm256_abs_epi8(row);
        for (int t = 0; t < TOKENS; t++) {
          const __m256i two = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four(x[t]->q + at, i), row));
          sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(two, ones));
        }
      }
    }
  }
  static void halves(const uint8_t *w, const int16_t *sub, const Grouped *const *x, int64_t at, int64_t group, T *sums) {
    const __m256i scales = _mm256_loadu_si256((const __m256i *)sub);
    for (int t = 0; t < TOKENS; t++) {
      const __m256i both = _mm256_madd_epi16(scales, _mm256_set1_epi32(word_at(x[t]->halves + 2 * group)));
      sums[t] = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(both, 5));
    }
    add<2>(w, scales, x, at, sums);
  }
  static F::T floats(T sums) { return _mm256_cvtepi32_ps(sums); }
};

}  // namespace
