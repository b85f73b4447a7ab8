// Vectors without instruction sets: eight floats in an array. The definition that the other simd_*.h follow.
//
// F: W floats; loads from fp32 and int8, arithmetic, sums in a fixed order. I: products of int8 and int16 summed in int32.
#pragma once
#include <math.h>
#include <stdint.h>

namespace {

#define DEJAVU_ISA_NAME "scalar"

struct F {
  static constexpr int W = 8;
  struct T { float v[W]; };
  template <class Op> static T each(Op op) { T r; for (int i = 0; i < W; i++) r.v[i] = op(i); return r; }
  static T set(float x) { return each([&](int) { return x; }); }
  static T zero() { return set(0.0f); }
  static T load(const float *p) { return each([&](int i) { return p[i]; }); }
  static T load(const int8_t *p) { return each([&](int i) { return (float)p[i]; }); }
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

inline void prefetch(const void *) {}

}  // namespace
