// The functions of kernels.h that read rows of matrices for one token, over the vectors F, I and N of one simd_*.h: see kernels_impl.h.
#include "vectors_impl.h"

namespace {

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

// The PAD quants of a pair of groups, or of outputs, of a row of n quants that are nibbles.
template <int PLANE> inline N::Bytes quants(const uint8_t *row, int64_t n, int64_t pair) {
  const N::Bytes low = N::nibbles(row + pair * (PAD / 2));
  if constexpr (PLANE == 1) return N::add_bits(low, row + n / 2 + pair * (PAD / 8));
  if constexpr (PLANE == 2) return N::add_two_bits(low, row + n / 2 + pair * (PAD / 4));
  return low;
}

// acc + products of a pair of groups. sub: sub-scales of halves of groups, of Q6_K.
template <int GRID> inline F::T pair_step(F::T acc, const uint8_t *row, int64_t n, const int8_t *q, const N::Scales &s, int64_t g, int pair, const int8_t *sub) {
  constexpr Grid G = GRIDS[GRID];
  if constexpr (G.bytes())
    return N::step(acc, (const int8_t *)row + g * GROUP + pair * PAD, q + pair * PAD, s, pair);
  else if constexpr (G.shared < GROUP)
    return N::step(acc, quants<G.plane>(row, n, g / 2 + pair), q + pair * PAD, s, pair, sub);
  else
    return N::step(acc, quants<G.plane>(row, n, g / 2 + pair), q + pair * PAD, s, pair);
}

// Before the quants of 8 groups (`count` of them in the row) from group g on: acc + what zeros and minima add. Writes the groups' scales,
// those of x's included, and where the sub-scales of halves of groups lie.
template <int GRID>
inline F::T start8(F::T acc, const uint8_t *row, int64_t n, int64_t g, int64_t count, const Grouped &x, N::Scales &s, const int8_t *&sub) {
  constexpr Grid G = GRIDS[GRID];
  const int64_t groups = n / GROUP;
  const uint8_t *parts = row + G.quant_bytes(n), *at = parts + G.scale_bytes(g * GROUP);
  if constexpr (!G.levels) {
    const half *scales = (const half *)parts + g;
    if constexpr (G.bf16_scales) s = N::scales((const bf16 *)scales, x.scale + g, count);
    else s = N::scales(scales, x.scale + g, count);
    if constexpr (G.zero != 0) acc = N::bias(acc, s, x.sum + g, (float)-G.zero);
    if constexpr (G.minima) acc = N::bias(acc, N::scales(scales + groups, x.scale + g, count), x.sum + g, 1.0f);
    if constexpr (G.zeros) acc = N::bias(acc, s, (const int8_t *)(parts + groups * 2) + g, x.sum + g);
  } else if constexpr (G.minima) {
    s = N::scales(*(const half *)at, at + 4, x.scale + g);
    acc = N::bias(acc, N::scales(*(const half *)(at + 2), at + 12, x.scale + g), x.sum + g, -1.0f);
  } else {
    sub = (const int8_t *)at;
    s = N::scales(*(const half *)(at + 16), x.scale + g);
    acc = N::bias(acc, s, sub, x.halves + 2 * g, (float)-G.zero);
  }
  return acc;
}

// Groups are taken 8 at a time: their scales are one vector.
template <int GRID> void dots_grid(const RowList &rows, const Grouped &x, int64_t n, float *out) {
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
      const int8_t *sub[4] = {nullptr, nullptr, nullptr, nullptr};
      for (int j = 0; j < 4; j++) a[j] = start8<GRID>(a[j], r[j], n, g, count, x, s[j], sub[j]);
      const int8_t *q = x.q + g * GROUP;
      if (count == 8)
        for (int pair = 0; pair < 4; pair++) {
          ahead.step();
          for (int j = 0; j < 4; j++) a[j] = pair_step<GRID>(a[j], r[j], n, q, s[j], g, pair, sub[j]);
        }
      else
        for (int pair = 0; pair < count / 2; pair++) {
          ahead.step();
          for (int j = 0; j < 4; j++) a[j] = pair_step<GRID>(a[j], r[j], n, q, s[j], g, pair, sub[j]);
        }
    }
    ahead.finish();
    float four[4];
    const bool whole = k + 4 <= rows.count;
    F::sum4(a[0], a[1], a[2], a[3], whole ? out + k : four);
    if (!whole) put4(four, k, rows.count, out);
  }
}

inline float float_at(const uint8_t *p) {
  float eight[8];
  N::times((const half *)p, 1.0f, eight);  // reads 16 bytes, as much as lies behind every scale
  return eight[0];
}

inline float float_at_bf16(const uint8_t *p) {
  union { uint32_t bits; float value; } both;
  both.bits = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
  return both.value;
}

template <int GRID> void axpys_grid(const RowList &rows, const float *coef, int64_t n, float *y) {
  constexpr Grid G = GRIDS[GRID];
  for (int64_t k = 0; k < rows.count; k++) {
    const uint8_t *r = row_of<uint8_t>(rows, k), *scales = r + G.quant_bytes(n);
    for (int64_t first = 0; first < n; first += PAD) {
      int8_t q[PAD];
      if constexpr (G.bytes())
        for (int b = 0; b < PAD; b++) q[b] = (int8_t)r[first + b];
      else
        N::store((uint8_t *)q, quants<G.plane>(r, n, first / PAD));
      for (int b = 0; b < PAD; b++) {  // byte b of the low vector, then of the high one
        const int64_t i = first + b % 32 / 16 * GROUP + b % 4 * 8 + b % 16 / 4 + b / 32 * 4, g = i / GROUP;
        float scale, minimum = 0.0f;
        int zero = G.zero;
        if constexpr (!G.levels) {
          scale = G.bf16_scales ? float_at_bf16(scales + 2 * g) : float_at(scales + 2 * g);
          if constexpr (G.zeros) zero = (int8_t)scales[n / GROUP * 2 + g];
          if constexpr (G.minima) minimum = float_at(scales + n / GROUP * 2 + 2 * g);
        } else {
          const uint8_t *at = scales + G.scale_bytes(i / SUPER * SUPER);
          if constexpr (G.minima) {
            scale = float_at(at) * (float)at[4 + g % 8];
            minimum = -(float_at(at + 2) * (float)at[12 + g % 8]);
          } else {
            scale = float_at(at + 16) * (float)(int8_t)at[i % SUPER / G.shared];
          }
        }
        y[i] += coef[k] * (scale * (float)(q[b] - zero) + minimum);
      }
    }
  }
}

// Memory that is fetched in a number of steps, piece by piece.
class Pieces {
 public:
  void add(const void *p, int64_t bytes) {
    if (bytes > 0) at_[count_] = (const char *)p, end_[count_++] = (const char *)p + bytes, lines_ += (bytes + 127) / 64;
  }
  void start(int64_t steps) { each_ = (lines_ + steps - 1) / steps; }
  void step() {
    for (int64_t i = 0; i < each_ && now_ < count_; i++) {
      prefetch(at_[now_]);
      at_[now_] += 64;
      if (at_[now_] < end_[now_]) continue;
      prefetch(end_[now_] - 1);  // a row need not start a cache line
      now_++;
    }
  }

 private:
  const char *at_[SUMMED + 2], *end_[SUMMED + 2];
  int64_t lines_ = 0, each_ = 0;
  int count_ = 0, now_ = 0;
};

// The coefficients of rows that are summed together: integers times a scale (NaN where one is not finite), two to a word. For quants of few
// bits they are int8, for bytes int16.
template <int GRID> struct Part {
  static constexpr Grid G = grid_of_rows<GRID>();
  static constexpr int64_t MOST = summed(G);
  float scale = 0.0f, sum = 0.0f;  // sum: of the integers
  int32_t words[MOST / 2];

  Part() = default;
  Part(const float *coef, int64_t count) {
    constexpr bool bytes = G.bytes();
    float padded[MOST];
    int16_t q[MOST];
    for (int64_t j = 0; j < MOST; j++) padded[j] = j < count ? coef[j] : 0.0f;
    scale = quantize(padded, MOST, bytes ? 32767.0f : 127.0f, q);
    for (int64_t j = 0; j < MOST / 2; j++) {
      const int32_t first = q[2 * j], second = q[2 * j + 1];
      sum += (float)(first + second);
      words[j] = bytes ? (first & 65535) | second * 65536 : (first & 255) | second * 256;
    }
  }
};

// How many rows' products with int8 stay within int16: quants have 4, 5 or 6 bits.
template <int GRID> constexpr int64_t WITHIN_INT16 = grid_of_rows<GRID>().plane == 0 ? 16 : grid_of_rows<GRID>().plane == 1 ? 8 : 4;

// Scales of W outputs from o on, and their minima.
template <int GRID> inline F::T scales_of(const uint8_t *scales, const uint8_t *sub, int64_t o) {
  constexpr Grid G = grid_of_rows<GRID>();
  if constexpr (GRID == INT8_ROWS) return F::zero();
  const F::T s = G.bf16_scales ? F::load((const bf16 *)scales + o) : F::load((const half *)scales + o);
  if constexpr (G.levels && G.minima) return F::mul(s, F::load(sub + o));
  if constexpr (G.levels && !G.minima) return F::mul(s, F::load((const int8_t *)sub + o));
  return s;
}

template <int GRID> inline F::T minima_of(const uint8_t *scales, const uint8_t *sub, int64_t n, int64_t o) {
  const F::T m = F::load((const half *)scales + n + o);
  return grid_of_rows<GRID>().levels ? F::mul(m, F::load(sub + n + o)) : m;
}

// What W outputs of a panel become of v, a sum of quants times the integers of a part. y += s scale (v - zero sum) + m scale sum.
template <int GRID> inline F::T scaled(F::T y, F::T v, const Part<GRID> &part, F::T s, F::T m, const int8_t *zeros) {
  constexpr Grid G = grid_of_rows<GRID>();
  if constexpr (GRID == INT8_ROWS) return F::fma(F::set(part.scale), v, y);
  if constexpr (G.zero != 0) v = F::sub(v, F::set((float)G.zero * part.sum));
  if constexpr (G.zeros) v = F::fma(F::load(zeros), F::set(-part.sum), v);
  y = F::fma(s, F::mul(v, F::set(part.scale)), y);
  const float total = part.sum * part.scale;
  if constexpr (G.minima) y = F::fma(m, F::set(G.levels ? -total : total), y);
  return y;
}

// Sums of PAD outputs of `count` rows, rounded up to pairs: load(j), a pair of rows, times the integers of a part.
template <int GRID, class Load> inline N::Totals totals_of(const Part<GRID> &part, int64_t count, const Load &load) {
  N::Totals totals = N::no_totals();
  if constexpr (grid_of_rows<GRID>().bytes()) {
    for (int64_t j = 0; j < count; j += 2) N::add(totals, load(j), part.words[j / 2]);
  } else {
    for (int64_t j = 0; j < count;) {
      N::Sums sums = N::no_sums();
      for (const int64_t stop = j + WITHIN_INT16<GRID>; j < stop && j < count; j += 2) N::add(sums, load(j), (int16_t)part.words[j / 2]);
      N::widen(totals, sums);
    }
  }
  return totals;
}

// The part-th W outputs of them.
template <int GRID> inline F::T floats_of(const N::Totals &totals, int part) {
  if constexpr (grid_of_rows<GRID>().bytes()) return N::floats_of_wide(totals, part);
  else return N::floats(totals, part);
}

// PAD outputs from i on of two rows, side by side.
template <int GRID> inline auto pair_of(const uint8_t *a, const uint8_t *b, int64_t n, int64_t i) {
  constexpr Grid G = grid_of_rows<GRID>();
  if constexpr (G.bytes()) return N::wide_pairs((const int8_t *)a + i, (const int8_t *)b + i);
  else return N::pairs(quants<G.plane>(a, n, i / PAD), quants<G.plane>(b, n, i / PAD));
}

// Where the rows of a list lie. Those that lie by themselves have no scales of panels.
template <int GRID> struct Rows {
  static constexpr Grid G = grid_of_rows<GRID>();
  const PanelList &list;
  const Panel panel;

  Rows(const PanelList &rows, int64_t n) : list(rows), panel(G, n) {}
  int64_t number(int64_t k) const { return list.idx == nullptr ? list.first + k : (int64_t)list.idx[k]; }
  const uint8_t *row(int64_t input) const { return list.base + (GRID >= NUM_GRIDS ? input * list.stride : panel.row_at(input)); }
  const uint8_t *scales(int64_t input) const { return list.base + panel.scales_at(input); }
  const uint8_t *sub_scales(int64_t input) const { return list.base + panel.sub_scales_at(input); }
};

// The coefficients of up to SUMMED rows of int4 times the rows' scales of MOST groups of outputs: int8 times a scale for each group, two rows to a
// word. NaN where one is not finite.
struct GroupedPart {
  static constexpr int64_t MOST = 16;
  float scale[MOST], sum[MOST];
  int16_t words[SUMMED / 2][MOST];

  GroupedPart() = default;
  // Of groups first, first + 1, ... of `groups`.
  GroupedPart(const uint8_t *const *rows, const float *coef, int64_t count, int64_t n, int64_t first, int64_t groups) {
    float c[SUMMED][MOST];
    int16_t q[SUMMED][MOST];
    for (int64_t j = 0; j < SUMMED; j++) {
      for (int64_t g = 0; g < MOST; g++) c[j][g] = 0.0f;
      const half *scales = (const half *)(rows[j < count ? j : 0] + n / 2) + first;
      for (int64_t g = 0; j < count && g < MOST && first + g < groups; g += 8) N::times(scales + g, coef[j], c[j] + g);
    }
    for (int64_t g = 0; g < MOST; g += F::W) {
      F::T most = F::zero(), bad = F::zero();
      for (int64_t j = 0; j < SUMMED; j++) {
        const F::T v = F::load(c[j] + g);
        most = F::max(most, F::abs(v)), bad = F::fma(v, F::zero(), bad);
      }
      const F::T s = F::max(F::mul(most, F::set(1.0f / 127.0f)), F::set(1e-30f)), inverse = F::div(F::set(1.0f), s);
      for (int64_t j = 0; j < SUMMED; j++)
        F::store_i16(q[j] + g, F::max(F::min(F::mul(F::load(c[j] + g), inverse), F::set(127.0f)), F::set(-127.0f)));
      F::store(scale + g, F::add(s, bad));
    }
    for (int64_t j = 0; j < SUMMED; j += 2)
      for (int64_t g = 0; g < MOST; g++) words[j / 2][g] = (int16_t)((q[j][g] & 255) | q[j + 1][g] * 256);
    for (int64_t g = 0; g < MOST; g++) {
      int32_t total = 0;
      for (int64_t j = 0; j < SUMMED; j++) total += q[j][g];
      sum[g] = (float)total;
    }
  }
};

// y += the sums of two groups of PAD outputs, of groups g and g + 1 of the part: scale (v - 8 sum). load(j): a pair of rows.
template <class Load> inline void add_groups(const GroupedPart &part, int64_t g, int64_t count, const Load &load, float *y) {
  constexpr int PARTS = PAD / F::W;
  N::Totals totals = N::no_totals();
  for (int64_t j = 0; j < count;) {
    N::Sums sums = N::no_sums();
    for (const int64_t stop = j + WITHIN_INT16<INT4_ROWS>; j < stop && j < count; j += 2)
      N::add(sums, load(j), part.words[j / 2][g], part.words[j / 2][g + 1]);
    N::widen(totals, sums);
  }
  for (int p = 0; p < PARTS; p++) {
    const int64_t own = g + p / (PARTS / 2);
    const F::T v = F::sub(N::floats(totals, p), F::set(8.0f * part.sum[own]));
    F::store(y + p * F::W, F::fma(F::set(part.scale[own]), v, F::load(y + p * F::W)));
  }
}

// PAD outputs of rows that are summed together are summed up in registers.
template <int GRID> void panels(const PanelList &list, const float *coef, int64_t n, float *y) {
  constexpr Grid G = grid_of_rows<GRID>();
  constexpr int PARTS = PAD / F::W;
  constexpr int64_t MOST = summed(G);
  const Rows<GRID> rows(list, n);
  const auto end_of = [&](int64_t k) {  // of the rows that are summed with row k
    const int64_t part = rows.number(k) / MOST;
    while (k < list.count && rows.number(k) / MOST == part) k++;
    return k;
  };
  const auto fetch_listed = [&](int64_t k, Pieces &next) {
    if (list.idx == nullptr || list.fetch == 0 || k >= list.count) return;
    const int64_t input = rows.number(k), end = end_of(k);
    if constexpr (GRID < NUM_GRIDS) {
      if constexpr (G.levels) next.add(rows.sub_scales(input), rows.panel.sub_scales);
      else next.add(rows.scales(input), rows.panel.scales);
    }
    for (; k < end; k++) next.add(rows.row(rows.number(k)), GRID < NUM_GRIDS ? rows.panel.row : list.fetch);
  };
  const int64_t steps = n / PAD;
  Pieces next;
  if (list.idx == nullptr) {
    next.add(list.next, list.fetch);
    next.start(steps * (rows.number(list.count - 1) / MOST - list.first / MOST + 1));
  } else {
    fetch_listed(0, next);
    next.start(1), next.step();
  }
  for (int64_t k = 0; k < list.count;) {
    const int64_t input = rows.number(k), end = end_of(k), count = end - k;
    const float *c = coef + k;
    const uint8_t *r[MOST] = {nullptr};
    for (int64_t j = 0; j < count; j++, k++) r[j] = rows.row(rows.number(k));
    if (count % 2 != 0) r[count] = r[count - 1];  // its coefficient is 0
    if (list.idx != nullptr) next = Pieces(), fetch_listed(k, next), next.start(steps);
    if constexpr (GRID == INT4_ROWS) {
      for (int64_t first = 0; first < n / GROUP; first += GroupedPart::MOST) {
        const GroupedPart part(r, c, count, n, first, n / GROUP);
        for (int64_t g = 0; g < GroupedPart::MOST && first + g < n / GROUP; g += 2) {
          const int64_t i = (first + g) * GROUP;
          next.step();
          add_groups(part, g, count, [&](int64_t j) { return pair_of<GRID>(r[j], r[j + 1], n, i); }, y + i);
        }
      }
      continue;
    }
    const Part<GRID> part(c, count);
    const uint8_t *scales = rows.scales(input), *sub = rows.sub_scales(input);
    const int8_t *zeros = (const int8_t *)scales + 2 * n;
    for (int64_t i = 0; i < n; i += PAD) {
      next.step();
      const N::Totals totals = totals_of<GRID>(part, count, [&](int64_t j) { return pair_of<GRID>(r[j], r[j + 1], n, i); });
      for (int p = 0; p < PARTS; p++) {
        const int64_t o = i + p * F::W;
        const F::T m = G.minima ? minima_of<GRID>(scales, sub, n, o) : F::zero();
        F::store(y + o, scaled<GRID>(F::load(y + o), floats_of<GRID>(totals, p), part, scales_of<GRID>(scales, sub, o), m, zeros + o));
      }
    }
  }
}

}  // namespace
