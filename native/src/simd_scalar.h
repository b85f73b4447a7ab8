// Vectors without instruction sets: eight floats in an array. The definition that the other simd_*.h follow.
//
// F: W floats; loads from fp32, bf16, fp16 and int8, arithmetic, sums in a fixed order. I: products of int8 and int16 summed in
// int32. N: rows of few bits, laid out as grids.h says.
#pragma once
#include <math.h>
#include <stdint.h>

#include "kernels.h"

namespace {

#define DEJAVU_ISA_NAME "scalar"

inline float float_of(uint32_t bits) { union { uint32_t u; float f; } both; both.u = bits; return both.f; }
inline uint32_t bits_of(float value) { union { float f; uint32_t u; } both; both.f = value; return both.u; }

inline float value_of(half h) {
  const uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  const float size = rest >= 0x400 ? float_of((rest << 13) + (112u << 23)) : (float)rest * 5.9604645e-8f;  // 2^-24: subnormal
  return float_of(sign | bits_of(size));
}

// Rounded to the nearest, ties to even.
inline half half_of(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t size;
  if (rest > 0x7f800000u) size = 0x7e00;
  else if (rest >= 0x47800000u) size = 0x7c00;
  else if (rest >= 0x38800000u) size = (rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13;
  else size = (uint32_t)lrintf(float_of(rest) * 16777216.0f);
  return {(uint16_t)(sign | size)};
}

struct F {
  static constexpr int W = 8;
  struct T { float v[W]; };
  template <class Op> static T each(Op op) { T r; for (int i = 0; i < W; i++) r.v[i] = op(i); return r; }
  static T set(float x) { return each([&](int) { return x; }); }
  static T zero() { return set(0.0f); }
  static T load(const float *p) { return each([&](int i) { return p[i]; }); }
  static T load(const int8_t *p) { return each([&](int i) { return (float)p[i]; }); }
  static T load(const uint8_t *p) { return each([&](int i) { return (float)p[i]; }); }
  static T load(const bf16 *p) { return each([&](int i) { return float_of((uint32_t)p[i].bits << 16); }); }
  static T load(const half *p) { return each([&](int i) { return value_of(p[i]); }); }
  static void store(half *p, T a) { for (int i = 0; i < W; i++) p[i] = half_of(a.v[i]); }
  static void store(float *p, T a) { for (int i = 0; i < W; i++) p[i] = a.v[i]; }
  static T add(T a, T b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
  static T sub(T a, T b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
  static T mul(T a, T b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
  static T div(T a, T b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
  static T fma(T a, T b, T c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  static T max(T a, T b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  static T min(T a, T b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
  static T abs(T a) { return each([&](int i) { return fabsf(a.v[i]); }); }
  static T round(T a) { return each([&](int i) { return rintf(a.v[i]); }); }
  // 2^n of integers n in [-126, 127]
  static T exp2i(T n) { return each([&](int i) { union { int32_t b; float f; } u; u.b = ((int32_t)n.v[i] + 127) << 23; return u.f; }); }
  static float sum(T a) { return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7])); }
  static float largest(T a) { float m = a.v[0]; for (int i = 1; i < W; i++) m = m > a.v[i] ? m : a.v[i]; return m; }
  static void sum4(T a, T b, T c, T d, float *out) { out[0] = sum(a); out[1] = sum(b); out[2] = sum(c); out[3] = sum(d); }
  static void store_i16(int16_t *p, T a) { for (int i = 0; i < W; i++) p[i] = (int16_t)lrintf(a.v[i]); }
};

struct I {
  static constexpr int W = 16;
  typedef int32_t T;
  static T zero() { return 0; }
  static T step(T acc, const int8_t *w, const int16_t *x) {
    for (int i = 0; i < W; i++) acc += (int32_t)w[i] * (int32_t)x[i];
    return acc;
  }
  // The four sums as floats times a scale.
  static void sum4(T a, T b, T c, T d, float scale, float *out) {
    out[0] = (float)a * scale; out[1] = (float)b * scale; out[2] = (float)c * scale; out[3] = (float)d * scale;
  }
};

struct N {
  // Weights' scales times x's, of 8 groups in split order; zero from `count` on.
  struct Scales { float v[8]; };
  static Scales scales(const half *w, const float *x, int64_t count) {
    Scales s;
    for (int g = 0; g < 8; g++) s.v[split(g)] = g < count ? value_of(w[g]) * x[split(g)] : 0.0f;
    return s;
  }
  static Scales scales(const bf16 *w, const float *x, int64_t count) {
    Scales s;
    for (int g = 0; g < 8; g++) s.v[split(g)] = g < count ? float_of((uint32_t)w[g].bits << 16) * x[split(g)] : 0.0f;
    return s;
  }
  // One scale times the sub-scales of 8 groups, or alone, times x's.
  static Scales scales(half d, const uint8_t *sub, const float *x) {
    Scales s;
    for (int g = 0; g < 8; g++) s.v[split(g)] = value_of(d) * (float)sub[g] * x[split(g)];
    return s;
  }
  static Scales scales(half d, const float *x) {
    Scales s;
    for (int g = 0; g < 8; g++) s.v[g] = value_of(d) * x[g];
    return s;
  }
  // acc + factor * scale * sum of 8 groups, side by side
  static F::T bias(F::T acc, const Scales &s, const float *sum, float factor) {
    for (int g = 0; g < 8; g++) acc.v[g] += s.v[g] * (sum[g] * factor);
    return acc;
  }
  // The same of sums of halves of groups, each times its sub-scale.
  static F::T bias(F::T acc, const Scales &s, const int8_t *sub, const int16_t *halves, float factor) {
    for (int g = 0; g < 8; g++) {
      const int64_t at = split(g);
      acc.v[at] += s.v[at] * ((float)(sub[2 * g] * halves[2 * at] + sub[2 * g + 1] * halves[2 * at + 1]) * factor);
    }
    return acc;
  }
  // acc - zero * scale * sum of 8 groups
  static F::T bias(F::T acc, const Scales &s, const int8_t *zero, const float *sum) {
    for (int g = 0; g < 8; g++) acc.v[split(g)] -= s.v[split(g)] * (sum[split(g)] * (float)zero[g]);
    return acc;
  }
  // The vectors of a pair of groups, 0 .. 63: low, then high.
  struct Bytes { uint8_t v[PAD]; };
  static Bytes nibbles(const uint8_t *p) {
    Bytes w;
    for (int b = 0; b < 32; b++) w.v[b] = p[b] & 15, w.v[b + 32] = p[b] >> 4;
    return w;
  }
  // 16 more where the bit of a byte is set
  static Bytes add_bits(Bytes w, const uint8_t *plane) {
    for (int b = 0; b < 64; b++) w.v[b] = (uint8_t)(w.v[b] + (plane[b / 8] >> b % 8 & 1) * 16);
    return w;
  }
  // 16 times the two bits of a byte more
  static Bytes add_two_bits(Bytes w, const uint8_t *plane) {
    for (int b = 0; b < 64; b++) w.v[b] = (uint8_t)(w.v[b] + (plane[b % 16] >> b / 16 * 2 & 3) * 16);
    return w;
  }
  static void store(uint8_t *p, const Bytes &w) { for (int b = 0; b < 64; b++) p[b] = w.v[b]; }
  // acc + products of the PAD values of groups 2 pair and 2 pair + 1: of unsigned bytes, with sub-scales of halves, of signed bytes
  static F::T step(F::T acc, const Bytes &w, const int8_t *x, const Scales &s, int pair) {
    for (int lane = 0; lane < 8; lane++) {
      int32_t total = 0;
      for (int b = 4 * lane; b < 4 * lane + 4; b++) total += (int32_t)w.v[b] * x[b] + (int32_t)w.v[b + 32] * x[b + 32];
      acc.v[lane] += (float)total * s.v[pair + lane / 4 * 4];
    }
    return acc;
  }
  static F::T step(F::T acc, const Bytes &w, const int8_t *x, const Scales &s, int pair, const int8_t *sub) {
    for (int lane = 0; lane < 8; lane++) {
      int32_t total = 0;
      for (int b = 4 * lane; b < 4 * lane + 4; b++)
        total += ((int32_t)w.v[b] * x[b] + (int32_t)w.v[b + 32] * x[b + 32]) * sub[4 * pair + lane / 4 * 2 + b % 4 / 2];
      acc.v[lane] += (float)total * s.v[pair + lane / 4 * 4];
    }
    return acc;
  }
  static F::T step(F::T acc, const int8_t *w, const int8_t *x, const Scales &s, int pair) {
    for (int lane = 0; lane < 8; lane++) {
      int32_t total = 0;
      for (int b = 4 * lane; b < 4 * lane + 4; b++) total += (int32_t)w[b] * x[b] + (int32_t)w[b + 32] * x[b + 32];
      acc.v[lane] += (float)total * s.v[pair + lane / 4 * 4];
    }
    return acc;
  }
  // Bytes of two rows side by side, in the order of the vectors.
  struct Pairs { uint8_t v[2 * PAD]; };
  static Pairs pairs(const Bytes &a, const Bytes &b) {
    Pairs both;
    for (int i = 0; i < PAD; i++) both.v[2 * i] = a.v[i], both.v[2 * i + 1] = b.v[i];
    return both;
  }
  static void store(uint8_t *p, const Pairs &w) { for (int i = 0; i < 2 * PAD; i++) p[i] = w.v[i]; }
  static Pairs load_pairs(const uint8_t *p) {
    Pairs w;
    for (int i = 0; i < 2 * PAD; i++) w.v[i] = p[i];
    return w;
  }
  // Sums of PAD outputs within int16, and those that they are added to, within int32.
  struct Sums { int16_t v[PAD]; };
  struct Totals { int32_t v[PAD]; };
  static Sums no_sums() { return {}; }
  static Totals no_totals() { return {}; }
  // + products with the signed bytes of a word
  static void add(Sums &sums, const Pairs &w, int16_t two) { add(sums, w, two, two); }
  // The same of the lower half of the outputs and of the upper one.
  static void add(Sums &sums, const Pairs &w, int16_t low, int16_t high) {
    for (int i = 0; i < PAD; i++) {
      const int two = i < PAD / 2 ? low : high, first = (int8_t)(two & 255), second = two >> 8;
      sums.v[i] = (int16_t)(sums.v[i] + w.v[2 * i] * first + w.v[2 * i + 1] * second);
    }
  }
  static void widen(Totals &totals, const Sums &sums) { for (int i = 0; i < PAD; i++) totals.v[i] += sums.v[i]; }
  // Signed bytes of two rows side by side as int16, in an order that only this set knows, and products with the signed halves of a word.
  struct WidePairs { int16_t v[2 * PAD]; };
  static WidePairs wide_pairs(const int8_t *a, const int8_t *b) {
    WidePairs both;
    for (int i = 0; i < PAD; i++) both.v[2 * i] = a[i], both.v[2 * i + 1] = b[i];
    return both;
  }
  static void store(uint8_t *p, const WidePairs &w) { __builtin_memcpy(p, w.v, sizeof w.v); }
  static WidePairs load_wide_pairs(const uint8_t *p) {
    WidePairs w;
    __builtin_memcpy(w.v, p, sizeof w.v);
    return w;
  }
  static void add(Totals &totals, const WidePairs &w, int32_t two) {
    const int first = (int16_t)(two & 65535), second = two >> 16;
    for (int i = 0; i < PAD; i++) totals.v[i] += w.v[2 * i] * first + w.v[2 * i + 1] * second;
  }
  static F::T floats_of_wide(const Totals &totals, int part) { return floats(totals, part); }
  // The part-th W of them, in order.
  static F::T floats(const Totals &totals, int part) { return F::each([&](int i) { return (float)totals.v[part * F::W + i]; }); }
  // out = coef * scale of 8 groups; those past the last one of a row are what lies there
  static void times(const half *w, float coef, float *out) { for (int g = 0; g < 8; g++) out[g] = value_of(w[g]) * coef; }
  // low, high = GROUP values times `inverse`, rounded, in the order of the bytes of a group
  static void pack(const float *x, float inverse, int8_t *low, int8_t *high) {
    for (int b = 0; b < 16; b++) {
      low[b] = (int8_t)lrintf(x[b % 4 * 8 + b / 4] * inverse);
      high[b] = (int8_t)lrintf(x[b % 4 * 8 + b / 4 + 4] * inverse);
    }
  }
};

// Rows side by side: F::W outputs at a time, four bytes of each to a word.
struct D {
  static constexpr int TOKENS = 4;  // that share what is loaded of a tile
  static constexpr int OFFSET = 0;  // of signed bytes: what makes them unsigned where products take one of each
  static constexpr bool TRANSPOSES = false;  // whether it has a side_by_side of its own (tiles_impl.h)
  struct T { int32_t v[F::W]; };
  static int32_t value(const uint8_t *w, int plane) { return plane < 0 ? (int32_t)(int8_t)*w : (int32_t)*w; }
  // Products of a group's words with those of each token's from byte `at` on.
  template <int PLANE> static void words(const uint8_t *w, const Grouped *const *x, int64_t at, T *sums) {
    for (int t = 0; t < TOKENS; t++)
      for (int j = 0; j < F::W; j++) {
        sums[t].v[j] = 0;
        for (int i = 0; i < 8; i++)
          for (int b = 0; b < 4; b++) sums[t].v[j] += value(w + 4 * (i * F::W + j) + b, PLANE) * x[t]->q[at + place_of_word(i) + b];
      }
  }
  // The same of Q6_K, less its zero: bytes 0 and 1 of a word are of the first half of a group, and each half has its sub-scale.
  static void halves(const uint8_t *w, const int16_t *sub, const Grouped *const *x, int64_t at, int64_t group, T *sums) {
    for (int t = 0; t < TOKENS; t++)
      for (int j = 0; j < F::W; j++) {
        int32_t half[2] = {-32 * x[t]->halves[2 * group], -32 * x[t]->halves[2 * group + 1]};
        for (int i = 0; i < 8; i++)
          for (int b = 0; b < 4; b++) half[b / 2] += (int32_t)w[4 * (i * F::W + j) + b] * x[t]->q[at + place_of_word(i) + b];
        sums[t].v[j] = half[0] * sub[2 * j] + half[1] * sub[2 * j + 1];
      }
  }
  static F::T floats(T sums) { return F::each([&](int i) { return (float)sums.v[i]; }); }
};

inline void prefetch(const void *) {}

}  // namespace
