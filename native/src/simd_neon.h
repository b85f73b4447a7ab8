// Vectors of NEON (AArch64, where it is always there): see simd_scalar.h for what each operation means.
#pragma once
#include <arm_neon.h>
#include <stdint.h>

#include "kernels.h"

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
  static T load(const uint8_t *p) {
    const uint16x8_t wide = vmovl_u8(vld1_u8(p));
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(wide)))};
  }
  static T load(const bf16 *p) {
    const uint16x8_t bits = vld1q_u16((const uint16_t *)p);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)), vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(bits), 16))};
  }
  static T load(const half *p) {
    const float16x8_t eight = vreinterpretq_f16_u16(vld1q_u16((const uint16_t *)p));
    return {vcvt_f32_f16(vget_low_f16(eight)), vcvt_f32_f16(vget_high_f16(eight))};
  }
  static void store(half *p, T x) { vst1q_u16((uint16_t *)p, vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(x.a), vcvt_f16_f32(x.b)))); }
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

struct N {
  struct Scales { float v[8]; };
  static F::T in_split_order(F::T eight) { return {vuzp1q_f32(eight.a, eight.b), vuzp2q_f32(eight.a, eight.b)}; }
  template <class W> static Scales scales(const W *w, const float *x, int64_t count) {
    Scales s;
    F::store(s.v, F::mul(in_split_order(F::load(w)), F::load(x)));
    for (int64_t g = count; g < 8; g++) s.v[split(g)] = 0.0f;
    return s;
  }
  static float32x4_t one(half h) { return vdupq_n_f32(vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h.bits))), 0)); }
  static Scales scales(half d, const uint8_t *sub, const float *x) {
    Scales s;
    F::store(s.v, F::mul(F::mul({one(d), one(d)}, in_split_order(F::load(sub))), F::load(x)));
    return s;
  }
  static Scales scales(half d, const float *x) {
    Scales s;
    F::store(s.v, F::mul({one(d), one(d)}, F::load(x)));
    return s;
  }
  static F::T bias(F::T acc, const Scales &s, const float *sum, float factor) { return F::fma(F::load(s.v), F::mul(F::load(sum), F::set(factor)), acc); }
  static F::T bias(F::T acc, const Scales &s, const int8_t *zero, const float *sum) {
    return F::sub(acc, F::mul(F::load(s.v), F::mul(F::load(sum), in_split_order(F::load(zero)))));
  }
  static int32x4_t halves4(int8x8_t sub, const int16_t *halves) {
    const int16x8_t wide = vmovl_s8(sub), sums = vld1q_s16(halves);
    return vpaddq_s32(vmull_s16(vget_low_s16(wide), vget_low_s16(sums)), vmull_s16(vget_high_s16(wide), vget_high_s16(sums)));
  }
  static F::T bias(F::T acc, const Scales &s, const int8_t *sub, const int16_t *halves, float factor) {
    const int16x8_t two = vreinterpretq_s16_s8(vld1q_s8(sub));  // the halves of a group side by side
    const int8x16_t scales = vreinterpretq_s8_s16(vcombine_s16(vget_low_s16(vuzp1q_s16(two, two)), vget_low_s16(vuzp2q_s16(two, two))));
    const F::T sums = {vcvtq_f32_s32(halves4(vget_low_s8(scales), halves)), vcvtq_f32_s32(halves4(vget_high_s8(scales), halves + 8))};
    return F::fma(F::load(s.v), F::mul(sums, F::set(factor)), acc);
  }
  struct Bytes { uint8x16_t v[4]; };  // of the first group and the second, low; then high
  static Bytes nibbles(const uint8_t *p) {
    const uint8x16_t first = vld1q_u8(p), second = vld1q_u8(p + 16), nibble = vdupq_n_u8(15);
    return {{vandq_u8(first, nibble), vandq_u8(second, nibble), vshrq_n_u8(first, 4), vshrq_n_u8(second, 4)}};
  }
  static Bytes add_bits(Bytes w, const uint8_t *plane) {
    static const uint8_t bit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t bits = vcombine_u8(vld1_u8(bit), vld1_u8(bit));
    for (int i = 0; i < 4; i++) {
      const uint8x16_t spread = vcombine_u8(vdup_n_u8(plane[2 * i]), vdup_n_u8(plane[2 * i + 1]));
      w.v[i] = vorrq_u8(w.v[i], vandq_u8(vtstq_u8(spread, bits), vdupq_n_u8(16)));
    }
    return w;
  }
  static Bytes add_two_bits(Bytes w, const uint8_t *plane) {
    const uint8x16_t p = vld1q_u8(plane), bits = vdupq_n_u8(0x30);
    w.v[0] = vorrq_u8(w.v[0], vandq_u8(vshlq_n_u8(p, 4), bits));
    w.v[1] = vorrq_u8(w.v[1], vandq_u8(vshlq_n_u8(p, 2), bits));
    w.v[2] = vorrq_u8(w.v[2], vandq_u8(p, bits));
    w.v[3] = vorrq_u8(w.v[3], vandq_u8(vshrq_n_u8(p, 2), bits));
    return w;
  }
  static void store(uint8_t *p, const Bytes &w) { for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, w.v[i]); }
  // Products of one group, two by two, bytes 0 .. 7 and 8 .. 15: within int16, 2 * 128 * 127.
  static int16x8_t two(int8x8_t low, int8x8_t high, const int8_t *x) { return vmlal_s8(vmull_s8(low, vld1_s8(x)), high, vld1_s8(x + 32)); }
  static int32x4_t words(int8x16_t low, int8x16_t high, const int8_t *x) {
    const int16x8_t first = two(vget_low_s8(low), vget_low_s8(high), x), second = two(vget_high_s8(low), vget_high_s8(high), x + 8);
    return vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(second));
  }
  static float32x4_t scaled(float32x4_t acc, int32x4_t total, float scale) { return vfmaq_n_f32(acc, vcvtq_f32_s32(total), scale); }
  static int8x16_t as_signed(uint8x16_t v) { return vreinterpretq_s8_u8(v); }
  static F::T step(F::T acc, const Bytes &w, const int8_t *x, const Scales &s, int pair) {
    return {scaled(acc.a, words(as_signed(w.v[0]), as_signed(w.v[2]), x), s.v[pair]),
            scaled(acc.b, words(as_signed(w.v[1]), as_signed(w.v[3]), x + 16), s.v[pair + 4])};
  }
  static F::T step(F::T acc, const int8_t *w, const int8_t *x, const Scales &s, int pair) {
    return {scaled(acc.a, words(vld1q_s8(w), vld1q_s8(w + 32), x), s.v[pair]),
            scaled(acc.b, words(vld1q_s8(w + 16), vld1q_s8(w + 48), x + 16), s.v[pair + 4])};
  }
  // Of each four bytes the first two are of the first half of the group.
  static int32x4_t words_of_halves(int8x16_t low, int8x16_t high, const int8_t *x, const int8_t *sub) {
    const int16x8_t first = two(vget_low_s8(low), vget_low_s8(high), x), second = two(vget_high_s8(low), vget_high_s8(high), x + 8);
    const int16_t scales[4] = {sub[0], sub[0], sub[1], sub[1]};
    const int16x4_t scale = vld1_s16(scales);
    const int32x4_t total = vmlal_s16(vmull_s16(vget_low_s16(first), scale), vget_high_s16(first), scale);
    return vmlal_s16(vmlal_s16(total, vget_low_s16(second), scale), vget_high_s16(second), scale);
  }
  static F::T step(F::T acc, const Bytes &w, const int8_t *x, const Scales &s, int pair, const int8_t *sub) {
    return {scaled(acc.a, words_of_halves(as_signed(w.v[0]), as_signed(w.v[2]), x, sub + 4 * pair), s.v[pair]),
            scaled(acc.b, words_of_halves(as_signed(w.v[1]), as_signed(w.v[3]), x + 16, sub + 4 * pair + 2), s.v[pair + 4])};
  }
  struct Pairs { uint8x16_t a[4], b[4]; };  // two rows, as they are
  static Pairs pairs(const Bytes &a, const Bytes &b) { return {{a.v[0], a.v[1], a.v[2], a.v[3]}, {b.v[0], b.v[1], b.v[2], b.v[3]}}; }
  static void store(uint8_t *p, const Pairs &w) { for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, w.a[i]), vst1q_u8(p + PAD + 16 * i, w.b[i]); }
  static Pairs load_pairs(const uint8_t *p) {
    Pairs w;
    for (int i = 0; i < 4; i++) w.a[i] = vld1q_u8(p + 16 * i), w.b[i] = vld1q_u8(p + PAD + 16 * i);
    return w;
  }
  struct Sums { int16x8_t v[8]; };
  struct Totals { int32x4_t v[16]; };
  static Sums no_sums() {
    Sums none;
    for (int i = 0; i < 8; i++) none.v[i] = vdupq_n_s16(0);
    return none;
  }
  static Totals no_totals() {
    Totals none;
    for (int i = 0; i < 16; i++) none.v[i] = vdupq_n_s32(0);
    return none;
  }
  static void add(Sums &sums, const Pairs &w, int16_t two) { add(sums, w, two, two); }
  static void add(Sums &sums, const Pairs &w, int16_t low, int16_t high) {
    for (int i = 0; i < 4; i++) {
      const int16_t two = i < 2 ? low : high;
      const int8x8_t first = vdup_n_s8((int8_t)(two & 255)), second = vdup_n_s8((int8_t)(two >> 8));
      const int8x16_t a = as_signed(w.a[i]), b = as_signed(w.b[i]);
      sums.v[2 * i] = vmlal_s8(vmlal_s8(sums.v[2 * i], vget_low_s8(a), first), vget_low_s8(b), second);
      sums.v[2 * i + 1] = vmlal_s8(vmlal_s8(sums.v[2 * i + 1], vget_high_s8(a), first), vget_high_s8(b), second);
    }
  }
  static void widen(Totals &totals, const Sums &sums) {
    for (int i = 0; i < 8; i++) {
      totals.v[2 * i] = vaddw_s16(totals.v[2 * i], vget_low_s16(sums.v[i]));
      totals.v[2 * i + 1] = vaddw_s16(totals.v[2 * i + 1], vget_high_s16(sums.v[i]));
    }
  }
  struct WidePairs { int16x8_t a[8], b[8]; };  // two rows, as they are
  static WidePairs wide_pairs(const int8_t *a, const int8_t *b) {
    WidePairs w;
    for (int i = 0; i < 8; i++) w.a[i] = vmovl_s8(vld1_s8(a + 8 * i)), w.b[i] = vmovl_s8(vld1_s8(b + 8 * i));
    return w;
  }
  static void store(uint8_t *p, const WidePairs &w) {
    for (int i = 0; i < 8; i++) vst1q_s16((int16_t *)p + 8 * i, w.a[i]), vst1q_s16((int16_t *)p + PAD + 8 * i, w.b[i]);
  }
  static WidePairs load_wide_pairs(const uint8_t *p) {
    WidePairs w;
    for (int i = 0; i < 8; i++) w.a[i] = vld1q_s16((const int16_t *)p + 8 * i), w.b[i] = vld1q_s16((const int16_t *)p + PAD + 8 * i);
    return w;
  }
  static int32x4_t two(int32x4_t acc, int16x4_t a, int16x4_t b, int32_t words) {
    return vmlal_n_s16(vmlal_n_s16(acc, a, (int16_t)(words & 65535)), b, (int16_t)(words >> 16));
  }
  static void add(Totals &totals, const WidePairs &w, int32_t words) {
    for (int i = 0; i < 8; i++) {
      totals.v[2 * i] = two(totals.v[2 * i], vget_low_s16(w.a[i]), vget_low_s16(w.b[i]), words);
      totals.v[2 * i + 1] = two(totals.v[2 * i + 1], vget_high_s16(w.a[i]), vget_high_s16(w.b[i]), words);
    }
  }
  static F::T floats_of_wide(const Totals &totals, int part) { return floats(totals, part); }
  static F::T floats(const Totals &totals, int part) { return {vcvtq_f32_s32(totals.v[2 * part]), vcvtq_f32_s32(totals.v[2 * part + 1])}; }
  static void times(const half *w, float coef, float *out) { F::store(out, F::mul(F::load(w), F::set(coef))); }
  // Byte b of word j is value 8 b + j (high: + 4): bytes are inserted above those below them.
  static int8x16_t rounded(const float *x, float inverse) {
    uint32x4_t value[4];
    for (int b = 0; b < 4; b++) value[b] = vreinterpretq_u32_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 8 * b), inverse)));
    return vreinterpretq_s8_u32(vsliq_n_u32(vsliq_n_u32(vsliq_n_u32(value[0], value[1], 8), value[2], 16), value[3], 24));
  }
  static void pack(const float *x, float inverse, int8_t *low, int8_t *high) {
    vst1q_s8(low, rounded(x, inverse));
    vst1q_s8(high, rounded(x + 4, inverse));
  }
};

struct D {
  static constexpr int TOKENS = 4, OFFSET = 0;
  static constexpr bool TRANSPOSES = false;
  struct T { int32x4_t a, b; };
  static int8x8_t word(const int8_t *x) {
    int32_t four;
    __builtin_memcpy(&four, x, sizeof four);
    return vreinterpret_s8_s32(vdup_n_s32(four));
  }
  // Of two rows each, bytes 0 and 1 of their words, then 2 and 3. A pair of words stays within int16: 2 * 128 * 127.
  struct Rows { int32x4_t v[4]; };
  static Rows rows_of(const uint8_t *w, const int8_t *x) {
    Rows sums;
    for (int k = 0; k < 4; k++) sums.v[k] = vdupq_n_s32(0);
    for (int i = 0; i < 8; i += 2) {
      const int8x8_t first = word(x + place_of_word(i)), second = word(x + place_of_word(i + 1));
      for (int k = 0; k < 4; k++) {
        const int8_t *from = (const int8_t *)w + 4 * i * F::W + 8 * k;
        sums.v[k] = vpadalq_s16(sums.v[k], vmlal_s8(vmull_s8(vld1_s8(from), first), vld1_s8(from + 4 * F::W), second));
      }
    }
    return sums;
  }
  template <int PLANE> static void words(const uint8_t *w, const Grouped *const *x, int64_t at, T *sums) {
    for (int t = 0; t < TOKENS; t++) {
      const Rows rows = rows_of(w, x[t]->q + at);
      sums[t] = {vpaddq_s32(rows.v[0], rows.v[1]), vpaddq_s32(rows.v[2], rows.v[3])};
    }
  }
  static void halves(const uint8_t *w, const int16_t *sub, const Grouped *const *x, int64_t at, int64_t group, T *sums) {
    for (int t = 0; t < TOKENS; t++) {
      Rows rows = rows_of(w, x[t]->q + at);
      const int32_t zero[4] = {32 * x[t]->halves[2 * group], 32 * x[t]->halves[2 * group + 1], 32 * x[t]->halves[2 * group], 32 * x[t]->halves[2 * group + 1]};
      for (int k = 0; k < 4; k++) rows.v[k] = vmulq_s32(vsubq_s32(rows.v[k], vld1q_s32(zero)), vmovl_s16(vld1_s16(sub + 4 * k)));
      sums[t] = {vpaddq_s32(rows.v[0], rows.v[1]), vpaddq_s32(rows.v[2], rows.v[3])};
    }
  }
  static F::T floats(T sums) { return {vcvtq_f32_s32(sums.a), vcvtq_f32_s32(sums.b)}; }
};

inline void prefetch(const void *p) { asm volatile("prfm pldl1keep, [%0]" : : "r"(p)); }

}  // namespace
