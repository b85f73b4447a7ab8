// Vectors of NEON (AArch64, where it is always there): see simd_scalar.h for what each operation means.
#pragma once
#include <arm_neon.h>
#include <stdint.h>

namespace {

#define DEJAVU_ISA_NAME "neon"

struct F {
  static constexpr int W = 8;
  struct T { float32x4_t a, b; };
  static T set(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static T zero() { return set(0.0f); }
  static T load(const float *p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static T load(const int8_t *p) {
    const int16x8_t wide = vmovl_s8(vld1_s8(p));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
  }
  static void store(float *p, T x) { vst1q_f32(p, x.a); vst1q_f32(p + 4, x.b); }
  static T add(T x, T y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
  static T sub(T x, T y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
  static T mul(T x, T y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
  static T div(T x, T y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
  static T fma(T x, T y, T z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
  static T max(T x, T y) { return {vmaxq_f32(x.a, y.a), vmaxq_f32(x.b, y.b)}; }
  static T min(T x, T y) { return {vminq_f32(x.a, y.a), vminq_f32(x.b, y.b)}; }
  static T abs(T x) { return {vabsq_f32(x.a), vabsq_f32(x.b)}; }
  static T round(T x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }
  static float32x4_t exp2i4(float32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23)); }
  static T exp2i(T n) { return {exp2i4(n.a), exp2i4(n.b)}; }
  static float sum(T x) { return vaddvq_f32(vaddq_f32(x.a, x.b)); }
  static float largest(T x) { return vmaxvq_f32(vmaxq_f32(x.a, x.b)); }
  static void sum4(T a, T b, T c, T d, float *out) { out[0] = sum(a); out[1] = sum(b); out[2] = sum(c); out[3] = sum(d); }
  static void store_i16(int16_t *p, T x) { vst1q_s16(p, vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.a)), vqmovn_s32(vcvtnq_s32_f32(x.b)))); }
};

struct I {
  static constexpr int W = 16;
  typedef int32x4_t T;
  static T zero() { return vdupq_n_s32(0); }
  static T step8(T acc, int16x8_t w, int16x8_t x) {
    return vmlal_s16(vmlal_s16(acc, vget_low_s16(w), vget_low_s16(x)), vget_high_s16(w), vget_high_s16(x));
  }
  static T step(T acc, const int8_t *w, const int16_t *x) {
    const int8x16_t row = vld1q_s8(w);
    return step8(step8(acc, vmovl_s8(vget_low_s8(row)), vld1q_s16(x)), vmovl_s8(vget_high_s8(row)), vld1q_s16(x + 8));
  }
  static void sum4(T a, T b, T c, T d, float scale, float *out) {
    vst1q_f32(out, vmulq_n_f32(vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d))), scale));
  }
};

inline void prefetch(const void *p) { asm volatile("prfm pldl1keep, [%0]" : : "r"(p)); }

}  // namespace
