// What the vectors of AVX2 and AVX-512 share. Both instruction sets come with F16C: dispatch.cpp asks for it.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "kernels.h"

namespace {

// Into the second-level cache: more requests may be under way than the first level has buffers for (docs/log.md). By hand: GCC takes a function
// that only prefetches for one without effect, and drops the calls.
inline void prefetch(const void *p) { asm volatile("prefetcht1 %0" : : "m"(*(const char *)p)); }

inline __m256 eight(const half *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

// The first `count` of eight halves in split order (Grouped), the others zero.
inline __m128i split16(const void *eight, int64_t count) {
  static const int8_t order[5][16] = {{-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1},
                                      {0, 1, -1, -1, -1, -1, -1, -1, 2, 3, -1, -1, -1, -1, -1, -1},
                                      {0, 1, 4, 5, -1, -1, -1, -1, 2, 3, 6, 7, -1, -1, -1, -1},
                                      {0, 1, 4, 5, 8, 9, -1, -1, 2, 3, 6, 7, 10, 11, -1, -1},
                                      {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15}};
  return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)eight), _mm_loadu_si128((const __m128i *)order[count / 2]));
}

// Eight bytes in split order.
inline __m128i split8(const void *eight) {
  return _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)eight), _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1));
}

// Eight scales of weights times x's; zero from `count` on, whatever lies there.
inline __m256 scales8(const half *w, const float *x, int64_t count) {
  return _mm256_mul_ps(_mm256_cvtph_ps(split16(w, count)), _mm256_loadu_ps(x));
}

inline __m256 scales8(const bf16 *w, const float *x, int64_t count) {
  const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(split16(w, count)), 16);
  return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_loadu_ps(x));
}

inline __m256 one(half h) { return _mm256_set1_ps(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h.bits)))); }

// One scale times the sub-scales of eight groups, times x's.
inline __m256 scales8(half d, const uint8_t *sub, const float *x) {
  const __m256 eight = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(split8(sub)));
  return _mm256_mul_ps(_mm256_mul_ps(one(d), eight), _mm256_loadu_ps(x));
}

// Of eight groups the sums of their halves, each times its sub-scale.
inline __m256 halves8(const int8_t *sub, const int16_t *halves) {
  const __m256i scales = _mm256_cvtepi8_epi16(split16(sub, 8));
  return _mm256_cvtepi32_ps(_mm256_madd_epi16(scales, _mm256_loadu_si256((const __m256i *)halves)));
}

// Of eight groups less their zero times the sum of x.
inline __m256 zeros8(const int8_t *zero, const float *sum) {
  const __m256 eight = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(split8(zero)));
  return _mm256_mul_ps(_mm256_sub_ps(_mm256_setzero_ps(), eight), _mm256_loadu_ps(sum));
}

// How many words of quants times int8 stay within int16, pairs of products being added up: 2 * 127 * (15, 31 or 63) each.
constexpr int words_within_int16(int plane) { return plane == 0 ? 8 : plane == 1 ? 4 : 2; }

inline int32_t word_at(const void *p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}

inline void times8(const half *w, float coef, float *out) { _mm256_storeu_ps(out, _mm256_mul_ps(eight(w), _mm256_set1_ps(coef))); }

// Byte b of word j is value 8 b + j: four vectors of eight values, low byte each, shifted into place.
inline void pack_group(const float *x, float inverse, int8_t *low, int8_t *high) {
  const __m256 scale = _mm256_set1_ps(inverse);
  const __m256i byte = _mm256_set1_epi32(255);
  __m256i words = _mm256_setzero_si256();
  for (int b = 3; b >= 0; b--) {
    const __m256i value = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * b), scale));
    words = _mm256_or_si256(_mm256_slli_epi32(words, 8), _mm256_and_si256(value, byte));
  }
  _mm_storeu_si128((__m128i *)low, _mm256_castsi256_si128(words));
  _mm_storeu_si128((__m128i *)high, _mm256_extracti128_si256(words, 1));
}

}  // namespace
