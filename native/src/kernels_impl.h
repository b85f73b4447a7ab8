// The functions of kernels.h over the vectors F, I and N of one simd_*.h. Included once in each kernels_<set>.cpp.
//
// Everything is static to its translation unit, and no C++ library template is used: code for one instruction set must
// never be merged with that of another by the linker.
#include <math.h>

#include "../dejavu_native.h"
#include "kernels.h"

namespace {

bool finite(const float *x, int64_t n);

template <class W> inline const W *row_of(const RowList &rows, int64_t k) {
  const int64_t number = rows.idx == nullptr ? k : (int64_t)rows.idx[k];
  return (const W *)((const char *)rows.base + number * rows.stride);
}

void fetch(const RowList &rows) {
  for (int64_t k = 0; k < rows.count; k++) {
    const char *row = row_of<char>(rows, k);
    for (int64_t b = 0; b < rows.fetch; b += 64) prefetch(row + b);
    prefetch(row + rows.fetch - 1);  // a row need not start a cache line
  }
}

// What is prefetched while the rows of a list are computed, four rows of `lines` cache lines each at a time.
class Ahead {
 public:
  Ahead(const RowList &list, int64_t lines) : rows(list) {
    if (rows.fetch == 0) return;
    if (rows.idx == nullptr) {
      at = (const char *)rows.next, end = at + rows.fetch;
      const int64_t steps = (rows.count + 3) / 4 * lines;
      each = ((rows.fetch + 63) / 64 + steps - 1) / steps;
    } else {
      each = (4 * ((rows.fetch + 127) / 64) + lines - 1) / lines;
      for (int64_t k = 0; k < rows.ahead; k += 4) start(k - rows.ahead), finish();
    }
  }
  // Before rows k to k + 3 are computed.
  void start(int64_t k) {
    if (rows.idx == nullptr || rows.fetch == 0) return;
    row = k + rows.ahead;
    stop = row + 4 < rows.count ? row + 4 : rows.count;
    next_row();
  }
  // For each cache line of the rows that are computed.
  void step() {
    for (int64_t i = 0; i < each; i++) line();
  }
  // After them.
  void finish() {
    if (rows.idx == nullptr) return;
    while (at < end) line();
  }

 private:
  void next_row() {
    if (row >= stop) return;
    at = row_of<char>(rows, row++), end = at + rows.fetch;
  }
  void line() {
    if (at >= end) return;
    prefetch(at);
    at += 64;
    if (at < end || rows.idx == nullptr) return;
    prefetch(end - 1);  // a row need not start a cache line
    next_row();
  }
  const RowList &rows;
  const char *at = nullptr, *end = nullptr;
  int64_t each = 0, row = 0, stop = 0;
};

template <class W> inline void rows4(const RowList &rows, int64_t k, const W *out[4]) {
  for (int64_t j = 0; j < 4; j++) out[j] = row_of<W>(rows, k + j < rows.count ? k + j : rows.count - 1);
}

inline void put4(const float *four, int64_t k, int64_t count, float *out) {
  for (int64_t j = 0; j < 4 && k + j < count; j++) out[k + j] = four[j];
}

template <class W> void dots(const RowList &rows, const float *x, int64_t n, float *out) {
  constexpr int64_t LINE = 64 / (int64_t)sizeof(W);
  Ahead ahead(rows, (n + LINE - 1) / LINE);
  for (int64_t k = 0; k < rows.count; k += 4) {
    ahead.start(k);
    const W *r[4];
    rows4(rows, k, r);
    F::T a[4], b[4];
    for (int j = 0; j < 4; j++) a[j] = b[j] = F::zero();
    int64_t i = 0;
    for (; i + 2 * F::W <= n; i += 2 * F::W) {
      if (i % LINE == 0) ahead.step();
      const F::T x0 = F::load(x + i), x1 = F::load(x + i + F::W);
      for (int j = 0; j < 4; j++) {
        a[j] = F::fma(F::load(r[j] + i), x0, a[j]);
        b[j] = F::fma(F::load(r[j] + i + F::W), x1, b[j]);
      }
    }
    for (; i < n; i += F::W) {
      const F::T x0 = F::load(x + i);
      for (int j = 0; j < 4; j++) a[j] = F::fma(F::load(r[j] + i), x0, a[j]);
    }
    ahead.finish();
    float four[4];
    const bool whole = k + 4 <= rows.count;
    F::sum4(F::add(a[0], b[0]), F::add(a[1], b[1]), F::add(a[2], b[2]), F::add(a[3], b[3]), whole ? out + k : four);
    if (!whole) put4(four, k, rows.count, out);
  }
}

void dots_i8_i16(const RowList &rows, const int16_t *xq, float scale, int64_t n, float *out) {
  Ahead ahead(rows, n / PAD);
  for (int64_t k = 0; k < rows.count; k += 4) {
    ahead.start(k);
    const int8_t *r[4];
    rows4(rows, k, r);
    I::T a[4];
    for (int j = 0; j < 4; j++) a[j] = I::zero();
    for (int64_t block = 0; block < n; block += PAD) {
      ahead.step();
      for (int64_t i = block; i < block + PAD; i += I::W)
        for (int j = 0; j < 4; j++) a[j] = I::step(a[j], r[j] + i, xq + i);
    }
    ahead.finish();
    float four[4];
    const bool whole = k + 4 <= rows.count;
    I::sum4(a[0], a[1], a[2], a[3], scale, whole ? out + k : four);
    if (!whole) put4(four, k, rows.count, out);
  }
}

template <class W> void axpys(const RowList &rows, const float *coef, int64_t n, float *y) {
  constexpr int64_t LINE = 64 / (int64_t)sizeof(W);
  Ahead ahead(rows, (n + LINE - 1) / LINE);
  int64_t k = 0;
  for (; k + 4 <= rows.count; k += 4) {
    ahead.start(k);
    const W *r[4];
    rows4(rows, k, r);
    const F::T c0 = F::set(coef[k]), c1 = F::set(coef[k + 1]), c2 = F::set(coef[k + 2]), c3 = F::set(coef[k + 3]);
    for (int64_t i = 0; i < n; i += F::W) {
      if (i % LINE == 0) ahead.step();
      F::T v = F::fma(F::load(r[0] + i), c0, F::load(y + i));
      v = F::fma(F::load(r[1] + i), c1, v);
      v = F::fma(F::load(r[2] + i), c2, v);
      F::store(y + i, F::fma(F::load(r[3] + i), c3, v));
    }
    ahead.finish();
  }
  for (; k < rows.count; k++) {
    const W *r = row_of<W>(rows, k);
    const F::T c = F::set(coef[k]);
    for (int64_t i = 0; i < n; i += F::W) F::store(y + i, F::fma(F::load(r + i), c, F::load(y + i)));
  }
}

// Groups are taken 8 at a time: their scales are one vector.
void dots_i4(const RowList &rows, const Grouped &x, int64_t n, float *out) {
  const int64_t groups = n / GROUP;
  Ahead ahead(rows, groups / 2);
  for (int64_t k = 0; k < rows.count; k += 4) {
    ahead.start(k);
    const uint8_t *r[4];
    rows4(rows, k, r);
    F::T a[4];
    for (int j = 0; j < 4; j++) a[j] = F::zero();
    for (int64_t g = 0; g < groups; g += 8) {
      const int64_t count = groups - g < 8 ? groups - g : 8;
      N::Scales s[4];
      for (int j = 0; j < 4; j++) {
        s[j] = N::scales((const half *)(r[j] + n / 2) + g, x.scale + g, count);
        a[j] = N::bias(a[j], s[j], x.sum + g);
      }
      const int8_t *q = x.q + g * GROUP;
      if (count == 8)
        for (int pair = 0; pair < 4; pair++) {
          ahead.step();
          for (int j = 0; j < 4; j++) a[j] = N::step(a[j], r[j] + (g + 2 * pair) * (GROUP / 2), q + pair * PAD, s[j], pair);
        }
      else
        for (int pair = 0; pair < count / 2; pair++) {
          ahead.step();
          for (int j = 0; j < 4; j++) a[j] = N::step(a[j], r[j] + (g + 2 * pair) * (GROUP / 2), q + pair * PAD, s[j], pair);
        }
    }
    ahead.finish();
    float four[4];
    const bool whole = k + 4 <= rows.count;
    F::sum4(a[0], a[1], a[2], a[3], whole ? out + k : four);
    if (!whole) put4(four, k, rows.count, out);
  }
}

// R rows added to y, each coef * scale of the group first.
template <int R> inline void axpy_i4(const uint8_t *const *r, const float *coef, int64_t n, float *y, Ahead &ahead) {
  const int64_t groups = n / GROUP;
  for (int64_t first = 0; first < groups; first += 8) {
    const int64_t count = groups - first < 8 ? groups - first : 8;
    float c[R][8];
    for (int j = 0; j < R; j++) N::times((const half *)(r[j] + n / 2) + first, coef[j], c[j]);
    for (int64_t g = 0; g < count; g++) {
      if (R == 4 && g % 2 == 0) ahead.step();
      float *to = y + (first + g) * GROUP;
      N::Group group[R];
      for (int j = 0; j < R; j++) group[j] = N::group(r[j] + (first + g) * (GROUP / 2));
      for (int part = 0; part < GROUP / F::W; part++) {
        F::T v = F::load(to + part * F::W);
        for (int j = 0; j < R; j++) v = F::fma(N::values(group[j], part), F::set(c[j][g]), v);
        F::store(to + part * F::W, v);
      }
    }
  }
}

void axpys_i4(const RowList &rows, const float *coef, int64_t n, float *y) {
  Ahead ahead(rows, n / GROUP / 2);
  int64_t k = 0;
  for (; k + 4 <= rows.count; k += 4) {
    ahead.start(k);
    const uint8_t *r[4];
    rows4(rows, k, r);
    axpy_i4<4>(r, coef + k, n, y, ahead);
    ahead.finish();
  }
  for (; k < rows.count; k++) {
    const uint8_t *r = row_of<uint8_t>(rows, k);
    axpy_i4<1>(&r, coef + k, n, y, ahead);
  }
}

void group(const float *x, int64_t n, const Grouped &out) {
  const int64_t groups = n / GROUP, padded = (groups + 7) / 8 * 8;
  const bool whole = finite(x, n);
  for (int64_t i = 0; !whole && i < n; i++) out.q[i] = 0;
  for (int64_t g = 0; !whole && g < groups; g++) out.scale[g] = NAN, out.sum[g] = 0.0f;
  for (int64_t g = 0; whole && g < groups; g++) {
    const float *from = x + g * GROUP;
    int8_t *low = out.q + g / 2 * PAD + g % 2 * 16, *high = low + PAD / 2;
    F::T m = F::zero();
    for (int64_t i = 0; i < GROUP; i += F::W) m = F::max(m, F::abs(F::load(from + i)));
    const float scale = fmaxf(F::largest(m) / 127.0f, 1e-30f);
    N::pack(from, 1.0f / scale, low, high);
    int32_t total = 0;
    for (int i = 0; i < 16; i++) total += (int32_t)low[i] + (int32_t)high[i];
    out.scale[g] = scale;
    out.sum[g] = (float)(-8 * total);
  }
  for (int64_t g = groups; g < padded; g++) out.scale[g] = out.sum[g] = 0.0f;
}

void narrow(const float *x, int64_t n, half *y) {
  for (int64_t i = 0; i < n; i += F::W) F::store(y + i, F::load(x + i));
}

void add(float *y, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i += F::W) F::store(y + i, F::add(F::load(y + i), F::load(x + i)));
}

// e^x by 2^round(x / ln 2) and a polynomial of the rest (Cephes expf), relative error below 2e-7; clamped to [-87, 88].
inline F::T exp_of(F::T x) {
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
  p = F::add(F::fma(p, F::mul(r, r), r), F::set(1.0f));
  return F::mul(p, F::exp2i(n));
}

bool finite(const float *x, int64_t n) {
  F::T zeros = F::zero();
  int64_t i = 0;
  for (; i + F::W <= n; i += F::W) zeros = F::fma(F::load(x + i), F::zero(), zeros);
  float rest = F::sum(zeros);
  for (; i < n; i++) rest += x[i] * 0.0f;
  return rest == 0.0f;
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
  for (int64_t i = 0; i < n; i++) {
    const float v = x[i];
    switch (activation) {
      case DEJAVU_RELU: x[i] = v < 0.0f ? 0.0f : v; break;  // NaN stays NaN, as in torch
      case DEJAVU_RELU2: x[i] = v < 0.0f ? 0.0f : v * v; break;
      case DEJAVU_FATRELU: x[i] = v > threshold ? v : 0.0f; break;
      case DEJAVU_GELU: x[i] = 0.5f * v * (1.0f + erff(v * 0.70710678f)); break;
      default: x[i] = 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    }
  }
}

const Kernels TABLE = {
    DEJAVU_ISA_NAME, fetch,       dots<float>, dots<bf16>,    dots<half>,    dots<int8_t>, dots_i8_i16, dots_i4,
    axpys<float>,    axpys<bf16>, axpys<half>, axpys<int8_t>, axpys_i4,      add,          softmax,     layer_norm,
    rms_norm,        quantize,    group,       narrow,        activate,      finite,       sum};

}  // namespace
