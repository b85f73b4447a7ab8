// What the vectors of AVX2 and AVX-512 share. Both instruction sets come with F16C: dispatch.cpp asks for it.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "kernels.h"

namespace {

// By hand: GCC takes a function that only prefetches for one without effect, and drops the calls.
inline void prefetch(const void *p) { asm volatile("prefetcht0 %0" : : "m"(*(const char *)p)); }

inline __m256 eight(const half *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

// All bits of the first `count` of eight halves.
inline __m128i first16(int64_t count) {
  static const int16_t keep[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  return _mm_loadu_si128((const __m128i *)(keep + 8 - count));
}

// Eight scales of weights times x's; zero from `count` on, whatever lies there.
inline __m256 scales8(const half *w, const float *x, int64_t count) {
  return _mm256_mul_ps(_mm256_cvtph_ps(_mm_and_si128(_mm_loadu_si128((const __m128i *)w), first16(count))), _mm256_loadu_ps(x));
}

inline __m256 scales8(const bf16 *w, const float *x, int64_t count) {
  const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_and_si128(_mm_loadu_si128((const __m128i *)w), first16(count))), 16);
  return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_loadu_ps(x));
}

inline __m256 one(half h) { return _mm256_set1_ps(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h.bits)))); }

// One scale times the sub-scales of eight groups, times x's.
inline __m256 scales8(half d, const uint8_t *sub, const float *x) {
  const __m256 eight = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)sub)));
  return _mm256_mul_ps(_mm256_mul_ps(one(d), eight), _mm256_loadu_ps(x));
}

// Of eight groups the sums of their halves, each times its sub-scale.
inline __m256 halves8(const int8_t *sub, const int16_t *halves) {
  const __m256i scales = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)sub));
  return _mm256_cvtepi32_ps(_mm256_madd_epi16(scales, _mm256_loadu_si256((const __m256i *)halves)));
}

// Of eight groups less their zero times the sum of x.
inline __m256 zeros8(const int8_t *zero, const float *sum) {
  const __m256 eight = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)zero)));
  return _mm256_mul_ps(_mm256_sub_ps(_mm256_setzero_ps(), eight), _mm256_loadu_ps(sum));
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
