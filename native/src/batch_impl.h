// The functions of kernels.h that read rows of matrices once for several tokens, over the vectors of one simd_*.h: see kernels_impl.h. What
// is computed for a token is what rows_impl.h computes for it alone, operation by operation: the same bits.
#include "rows_impl.h"

namespace {

constexpr int64_t MANY = 64;  // tokens whose coefficients are integers at a time
constexpr int TOGETHER = 4;  // tokens that a row is read once for: their sums, two of floats each, fit the registers

// TOGETHER tokens of a batch from token t on; the last one repeated where it has no more.
struct Four {
  const Vector *x[TOGETHER];
  Four(const Batch &batch, int64_t t) {
    for (int64_t j = 0; j < TOGETHER; j++) x[j] = batch.x[t + j < batch.count ? t + j : batch.count - 1];
  }
};

inline void put_products(const float *four, const Batch &batch, int64_t t, int64_t k) {
  for (int64_t j = 0; j < TOGETHER && t + j < batch.count; j++) batch.out[t + j][k] = four[j];
}

template <class W> void products(const RowList &rows, const Batch &batch, int64_t n) {
  for (int64_t t = 0; t < batch.count; t += TOGETHER) {
    const Four four(batch, t);
    for (int64_t k = 0; k < rows.count; k++) {
      const W *r = row_of<W>(rows, k);
      F::T a[TOGETHER], b[TOGETHER];
      for (int j = 0; j < TOGETHER; j++) a[j] = b[j] = F::zero();
      int64_t i = 0;
      for (; i + 2 * F::W <= n; i += 2 * F::W) {
        const F::T w0 = F::load(r + i), w1 = F::load(r + i + F::W);
        for (int j = 0; j < TOGETHER; j++) {
          a[j] = F::fma(w0, F::load(four.x[j]->f + i), a[j]);
          b[j] = F::fma(w1, F::load(four.x[j]->f + i + F::W), b[j]);
        }
      }
      for (; i < n; i += F::W) {
        const F::T w0 = F::load(r + i);
        for (int j = 0; j < TOGETHER; j++) a[j] = F::fma(w0, F::load(four.x[j]->f + i), a[j]);
      }
      float out[TOGETHER];
      F::sum4(F::add(a[0], b[0]), F::add(a[1], b[1]), F::add(a[2], b[2]), F::add(a[3], b[3]), out);
      put_products(out, batch, t, k);
    }
  }
}

void products_i8_i16(const RowList &rows, const Batch &batch, int64_t n) {
  for (int64_t t = 0; t < batch.count; t += TOGETHER) {
    const Four four(batch, t);
    for (int64_t k = 0; k < rows.count; k++) {
      const int8_t *r = row_of<int8_t>(rows, k);
      I::T a[TOGETHER];
      for (int j = 0; j < TOGETHER; j++) a[j] = I::zero();
      for (int64_t i = 0; i < n; i += I::W)
        for (int j = 0; j < TOGETHER; j++) a[j] = I::step(a[j], r + i, four.x[j]->q + i);
      float out[TOGETHER];
      I::sum4(a[0], a[1], a[2], a[3], 1.0f, out);
      for (int j = 0; j < TOGETHER; j++) out[j] *= four.x[j]->scale;
      put_products(out, batch, t, k);
    }
  }
}

template <int GRID> void products_grid(const RowList &rows, const Batch &batch, int64_t n) {
  const int64_t groups = n / GROUP;
  for (int64_t t = 0; t < batch.count; t += TOGETHER) {
    const Four four(batch, t);
    for (int64_t k = 0; k < rows.count; k++) {
      const uint8_t *r = row_of<uint8_t>(rows, k);
      F::T a[TOGETHER];
      for (int j = 0; j < TOGETHER; j++) a[j] = F::zero();
      for (int64_t g = 0; g < groups; g += 8) {
        const int64_t count = groups - g < 8 ? groups - g : 8;
        N::Scales s[TOGETHER];
        const int8_t *sub = nullptr, *q[TOGETHER];
        for (int j = 0; j < TOGETHER; j++) {
          a[j] = start8<GRID>(a[j], r, n, g, count, four.x[j]->groups, s[j], sub);
          q[j] = four.x[j]->groups.q + g * GROUP;
        }
        if (count == 8)
          for (int pair = 0; pair < 4; pair++)
            for (int j = 0; j < TOGETHER; j++) a[j] = pair_step<GRID>(a[j], r, n, q[j], s[j], g, pair, sub);
        else
          for (int pair = 0; pair < count / 2; pair++)
            for (int j = 0; j < TOGETHER; j++) a[j] = pair_step<GRID>(a[j], r, n, q[j], s[j], g, pair, sub);
      }
      float out[TOGETHER];
      F::sum4(a[0], a[1], a[2], a[3], out);
      put_products(out, batch, t, k);
    }
  }
}

// Values i .. i + P * F::W of the sums, of rows that become floats once.
template <class W, int P> inline void sums_at(const RowList &rows, const Tokens &tokens, int64_t i) {
  float wide[SUMMED][P * F::W];
  for (int64_t j = 0; j < rows.count; j++)
    for (int p = 0; p < P; p++) F::store(wide[j] + p * F::W, F::load(row_of<W>(rows, j) + i + p * F::W));
  for (int64_t t = 0; t < tokens.count; t++) {
    float *y = tokens.y[t] + i;
    F::T v[P];
    for (int p = 0; p < P; p++) v[p] = F::load(y + p * F::W);
    for (int64_t j = 0; j < rows.count; j++) {
      const F::T c = F::set(tokens.coef[t][j]);
      for (int p = 0; p < P; p++) v[p] = F::fma(F::load(wide[j] + p * F::W), c, v[p]);
    }
    for (int p = 0; p < P; p++) F::store(y + p * F::W, v[p]);
  }
}

template <class W> void sums(const RowList &rows, const Tokens &tokens, int64_t n) {
  int64_t i = 0;
  for (; i + PAD <= n; i += PAD) sums_at<W, PAD / F::W>(rows, tokens, i);
  for (; i < n; i += F::W) sums_at<W, 1>(rows, tokens, i);  // heads
}

// As panels of rows_impl.h. Rows are of one part.
void sums_rows_i4(const PanelList &list, const Tokens &tokens, int64_t n) {
  const Rows<INT4_ROWS> rows(list, n);
  uint8_t pairs[SUMMED / 2][2 * PAD];
  for (int64_t k = 0; k < list.count;) {
    const int64_t input = list.first + k, end = input / SUMMED * SUMMED + SUMMED, left = list.first + list.count;
    const int64_t count = (end < left ? end : left) - input;
    const uint8_t *r[SUMMED];
    for (int64_t j = 0; j < SUMMED; j++) r[j] = rows.row(input + (j < count ? j : count - 1));
    for (int64_t first = 0; first < n / GROUP; first += GroupedPart::MOST) {
      for (int64_t begin = 0; begin < tokens.count; begin += MANY) {
        const int64_t last = begin + MANY < tokens.count ? begin + MANY : tokens.count;
        GroupedPart part[MANY];
        for (int64_t t = begin; t < last; t++) part[t - begin] = GroupedPart(r, tokens.coef[t] + k, count, n, first, n / GROUP);
        for (int64_t g = 0; g < GroupedPart::MOST && first + g < n / GROUP; g += 2) {
          const int64_t i = (first + g) * GROUP;
          for (int64_t j = 0; j < count; j += 2) N::store(pairs[j / 2], pair_of<INT4_ROWS>(r[j], r[j + 1], n, i));
          for (int64_t t = begin; t < last; t++) add_groups(part[t - begin], g, count, [&](int64_t j) { return N::load_pairs(pairs[j / 2]); }, tokens.y[t] + i);
        }
      }
    }
    k += count;
  }
}

// As panels of rows_impl.h: rows lie in pairs, and scales become floats, once for all tokens.
template <int GRID> void sums_panels(const PanelList &list, const Tokens &tokens, int64_t n) {
  constexpr Grid G = grid_of_rows<GRID>();
  constexpr int PARTS = PAD / F::W;
  constexpr int64_t MOST = summed(G);
  const Rows<GRID> rows(list, n);
  float s[PAD], m[PAD];
  uint8_t pairs[MOST / 2][(G.bytes() ? 4 : 2) * PAD];
  for (int64_t k = 0; k < list.count;) {
    const int64_t input = list.first + k, end = input / MOST * MOST + MOST, left = list.first + list.count;
    const int64_t count = (end < left ? end : left) - input;
    const uint8_t *scales = rows.scales(input), *sub = rows.sub_scales(input);
    const int8_t *zeros = (const int8_t *)scales + 2 * n;
    const auto row = [&](int64_t j) { return rows.row(input + (j < count ? j : count - 1)); };
    const auto load = [&](int64_t j) {
      if constexpr (G.bytes()) return N::load_wide_pairs(pairs[j / 2]);
      else return N::load_pairs(pairs[j / 2]);
    };
    for (int64_t first = 0; first < tokens.count; first += MANY) {
      const int64_t last = first + MANY < tokens.count ? first + MANY : tokens.count;
      Part<GRID> part[MANY];
      for (int64_t t = first; t < last; t++) part[t - first] = Part<GRID>(tokens.coef[t] + k, count);
      for (int64_t i = 0; i < n; i += PAD) {
        for (int64_t j = 0; j < count; j += 2) N::store(pairs[j / 2], pair_of<GRID>(row(j), row(j + 1), n, i));
        for (int p = 0; p < PARTS; p++) {
          F::store(s + p * F::W, scales_of<GRID>(scales, sub, i + p * F::W));
          if constexpr (G.minima) F::store(m + p * F::W, minima_of<GRID>(scales, sub, n, i + p * F::W));
        }
        for (int64_t t = first; t < last; t++) {
          const N::Totals totals = totals_of<GRID>(part[t - first], count, load);
          float *y = tokens.y[t] + i;
          for (int p = 0; p < PARTS; p++) {
            const F::T minima = G.minima ? F::load(m + p * F::W) : F::zero();
            const int64_t o = p * F::W;
            F::store(y + o, scaled<GRID>(F::load(y + o), floats_of<GRID>(totals, p), part[t - first], F::load(s + o), minima, zeros + i + o));
          }
        }
      }
    }
    k += count;
  }
}

}  // namespace
