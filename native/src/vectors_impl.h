// Those functions of kernels.h that take a vector and no matrix: norms, activations, softmax, and vectors as integers. Over the vectors F and N
// of one simd_*.h, see kernels_impl.h.
#pragma once
#include <math.h>

#include "../dejavu_native.h"
#include "kernels.h"

namespace {

bool finite(const float *x, int64_t n);

void group(const float *x, int64_t n, const Grouped &out) {
  const int64_t groups = n / GROUP, padded = (groups + 7) / 8 * 8;
  const bool whole = finite(x, n);
  for (int64_t i = 0; !whole && i < n; i++) out.q[i] = 0;
  for (int64_t g = 0; !whole && g < groups; g++) out.scale[split(g)] = NAN, out.sum[split(g)] = 0.0f, out.halves[2 * split(g)] = out.halves[2 * split(g) + 1] = 0;
  for (int64_t g = 0; whole && g < groups; g++) {
    const float *from = x + g * GROUP;
    int8_t *low = out.q + g / 2 * PAD + g % 2 * 16, *high = low + PAD / 2;
    F::T m = F::zero();
    for (int64_t i = 0; i < GROUP; i += F::W) m = F::max(m, F::abs(F::load(from + i)));
    const float scale = fmaxf(F::largest(m) / 127.0f, 1e-30f);
    N::pack(from, 1.0f / scale, low, high);
    int32_t first = 0, second = 0;  // bytes 0 and 1 of each four are of the first half
    for (int i = 0; i < 16; i += 4) {
      first += (int32_t)low[i] + (int32_t)low[i + 1] + (int32_t)high[i] + (int32_t)high[i + 1];
      second += (int32_t)low[i + 2] + (int32_t)low[i + 3] + (int32_t)high[i + 2] + (int32_t)high[i + 3];
    }
    const int64_t at = split(g);
    out.scale[at] = scale;
    out.sum[at] = (float)(first + second);
    out.halves[2 * at] = (int16_t)first, out.halves[2 * at + 1] = (int16_t)second;
  }
  for (int64_t g = groups; g < padded; g++) out.scale[split(g)] = out.sum[split(g)] = 0.0f;
}

void narrow(const float *x, int64_t n, half *y) {
  for (int64_t i = 0; i < n; i += F::W) F::store(y + i, F::load(x + i));
}

void add(float *y, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i += F::W) F::store(y + i, F::add(F::load(y + i), F::load(x + i)));
}

// e^x = power (1 + rest): 2^round(x / ln 2), and a polynomial of what is left (Cephes expf), relative error below 2e-7; clamped to [-87, 88].
struct Exp { F::T power, rest; };
inline Exp parts_of_exp(F::T x) {
  x = F::min(F::max(x, F::set(-87.0f)), F::set(88.0f));
  const F::T n = F::round(F::mul(x, F::set(1.44269504f)));
  F::T r = F::fma(n, F::set(-0.693359375f), x);
  r = F::fma(n, F::set(2.12194440e-4f), r);
  F::T p = F::set(1.9875691500e-4f);
  p = F::fma(p, r, F::set(1.3981999507e-3f));
  p = F::fma(p, r, F::set(8.3334519073e-3f));
  p = F::fma(p, r, F::set(4.1665795894e-2f));
  p = F::fma(p, r, F::set(1.6666665459e-1f));
  p = F::fma(p, r, F::set(5.0000001201e-1f));
  return {F::exp2i(n), F::fma(p, F::mul(r, r), r)};
}

inline F::T exp_of(F::T x) {
  const Exp e = parts_of_exp(x);
  return F::mul(F::add(e.rest, F::set(1.0f)), e.power);
}

// tanh x = (e^2x - 1) / (e^2x + 1): nothing cancels out near 0, where the power is 1.
inline F::T tanh_of(F::T x) {
  const Exp e = parts_of_exp(F::add(x, x));
  const F::T less = F::fma(e.rest, e.power, F::sub(e.power, F::set(1.0f)));
  return F::div(less, F::add(less, F::set(2.0f)));
}

inline F::T capped(F::T x, float cap) {
  return F::fma(F::set(cap), tanh_of(F::mul(x, F::set(1.0f / cap))), F::mul(x, F::zero()));  // x times 0 is NaN where it is not finite
}

void cap(float *x, int64_t n, float cap) {
  int64_t i = 0;
  for (; i + F::W <= n; i += F::W) F::store(x + i, capped(F::load(x + i), cap));
  float rest[F::W] = {0.0f};  // what lies behind x may be another thread's
  for (int64_t k = i; k < n; k++) rest[k - i] = x[k];
  if (i < n) F::store(rest, capped(F::load(rest), cap));
  for (int64_t k = i; k < n; k++) x[k] = rest[k - i];
}

bool finite(const float *x, int64_t n) {
  F::T zeros = F::zero();
  for (int64_t i = 0; i + F::W <= n; i += F::W) zeros = F::fma(F::load(x + i), F::zero(), zeros);
  float total = F::sum(zeros);
  for (int64_t left = n % F::W; left > 0; left--) total += x[n - left] * 0.0f;
  return total == 0.0f;
}

float sum(const float *x, int64_t n) {
  constexpr int64_t LANES = 8;  // sums side by side hide the latency of an addition
  F::T sums[LANES];
  for (int64_t j = 0; j < LANES; j++) sums[j] = F::zero();
  int64_t i = 0;
  for (; i + LANES * F::W <= n; i += LANES * F::W)
    for (int64_t j = 0; j < LANES; j++) sums[j] = F::add(sums[j], F::load(x + i + j * F::W));
  for (int64_t j = 1; j < LANES; j++) sums[0] = F::add(sums[0], sums[j]);
  float total = F::sum(sums[0]);
  for (; i < n; i++) total += x[i];
  return total;
}

void softmax(float *p, int64_t n) {
  const int64_t padded = (n + F::W - 1) / F::W * F::W;
  const bool whole = finite(p, n);
  for (int64_t i = n; i < padded; i++) p[i] = -INFINITY;
  F::T m = F::load(p);
  for (int64_t i = F::W; i < padded; i += F::W) m = F::max(m, F::load(p + i));
  const F::T top = F::set(whole ? F::largest(m) : NAN);
  F::T total = F::zero();
  for (int64_t i = 0; i < padded; i += F::W) {
    const F::T e = exp_of(F::sub(F::load(p + i), top));
    F::store(p + i, e);
  }
  for (int64_t i = n; i < padded; i++) p[i] = 0.0f;
  for (int64_t i = 0; i < padded; i += F::W) total = F::add(total, F::load(p + i));
  const F::T scale = F::set(whole ? 1.0f / F::sum(total) : NAN);
  for (int64_t i = 0; i < padded; i += F::W) F::store(p + i, F::mul(F::load(p + i), scale));
}

void layer_norm(const float *x, const float *weight, const float *bias, float eps, int64_t size, int64_t n, float *y) {
  F::T sums = F::zero();
  for (int64_t i = 0; i < n; i += F::W) sums = F::add(sums, F::load(x + i));
  const float mean = F::sum(sums) / (float)size;
  const F::T middle = F::set(mean);
  F::T squares = F::zero();
  for (int64_t i = 0; i < n; i += F::W) {
    const F::T d = F::sub(F::load(x + i), middle);
    squares = F::fma(d, d, squares);
  }
  const float padding = (float)(n - size) * mean * mean;  // the zeros past size each added mean^2
  const F::T scale = F::set(1.0f / sqrtf(fmaxf(F::sum(squares) - padding, 0.0f) / (float)size + eps));
  for (int64_t i = 0; i < n; i += F::W) {
    const F::T d = F::mul(F::sub(F::load(x + i), middle), scale);
    F::store(y + i, bias == nullptr ? F::mul(d, F::load(weight + i)) : F::fma(d, F::load(weight + i), F::load(bias + i)));
  }
}

void rms_norm(const float *x, const float *weight, float eps, int64_t size, int64_t n, float *y) {
  F::T squares = F::zero();
  for (int64_t i = 0; i < n; i += F::W) squares = F::fma(F::load(x + i), F::load(x + i), squares);
  const F::T scale = F::set(1.0f / sqrtf(F::sum(squares) / (float)size + eps));
  for (int64_t i = 0; i < n; i += F::W) F::store(y + i, F::mul(F::mul(F::load(x + i), scale), F::load(weight + i)));
}

float quantize(const float *x, int64_t n, float limit, int16_t *xq) {
  if (!finite(x, n)) {
    for (int64_t i = 0; i < n; i++) xq[i] = 0;
    return NAN;
  }
  F::T m = F::zero();
  for (int64_t i = 0; i < n; i += F::W) m = F::max(m, F::abs(F::load(x + i)));
  const float top = F::largest(m), scale = fmaxf(top / limit, 1e-30f);
  const F::T inverse = F::set(1.0f / scale), most = F::set(limit), least = F::set(-limit);
  for (int64_t i = 0; i < n; i += F::W) F::store_i16(xq + i, F::max(F::min(F::mul(F::load(x + i), inverse), most), least));
  return scale;
}

void activate(float *x, int64_t n, int activation, float threshold) {
  if (activation == DEJAVU_SILU) {
    for (int64_t i = 0; i < n; i += F::W) {
      const F::T v = F::load(x + i);
      F::store(x + i, F::div(v, F::add(F::set(1.0f), exp_of(F::sub(F::zero(), v)))));
    }
    return;
  }
  if (activation == DEJAVU_GELU_TANH) {  // (1 + tanh u) / 2 = 1 / (1 + e^-2u), u = sqrt(2 / pi) (v + 0.044715 v^3)
    for (int64_t i = 0; i < n; i += F::W) {
      const F::T v = F::load(x + i), u = F::fma(F::mul(v, F::set(0.044715f)), F::mul(v, v), v);
      F::store(x + i, F::div(v, F::add(F::set(1.0f), exp_of(F::mul(u, F::set(-1.59576912f))))));
    }
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    const float v = x[i];
    switch (activation) {
      case DEJAVU_RELU: x[i] = v < 0.0f ? 0.0f : v; break;  // NaN stays NaN, as in torch
      case DEJAVU_RELU2: x[i] = v < 0.0f ? 0.0f : v * v; break;
      case DEJAVU_FATRELU: x[i] = v <= threshold ? 0.0f : v; break;
      default: x[i] = 0.5f * v * (1.0f + erff(v * 0.70710678f));  // DEJAVU_GELU
    }
  }
}

}  // namespace
