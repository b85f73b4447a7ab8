// The attention block of a block of tokens. Keys and values of every head are stored; only selected groups are computed:
//   q_h = Q_h a;   m_h = softmax(q_h k^T / sqrt(K)) v;   part of the heads' chunk += sum over d of m_h[d] O_h[d]
#include <algorithm>
#include <cmath>

#include "pass.h"

int64_t Pass::cache_row(int64_t layer, int64_t row, int64_t group, int64_t position) const {
  const int64_t page = block.table[row][position / block.page_size], offset = position % block.page_size;
  return ((layer * block.num_pages + page) * config.num_kv_heads + group) * block.page_size + offset;
}

RowList Pass::cache_rows(const void *pool, int64_t first, int64_t count, const unsigned char *next) const {
  return {(const unsigned char *)pool + first * cache_bytes, cache_bytes, nullptr, count, next == nullptr ? 0 : count * cache_bytes, 0, next};
}

// A head's vector, padded with zeros, into the cache: as it is, rounded, or as int8 times a scale (NaN where it is not finite).
void Pass::store(const float *head, void *pool, float *scales, int64_t at) const {
  const int64_t n = model.head_width;
  if (block.cache_dtype == DEJAVU_FP32) {
    std::copy_n(head, n, (float *)pool + at * n);
  } else if (block.cache_dtype == DEJAVU_FP16) {
    kernels.narrow(head, n, (half *)pool + at * n);
  } else {
    scales[at] = kernels.quantize(head, n, 127.0f, own.cached.data());
    int8_t *to = (int8_t *)pool + at * n;
    for (int64_t i = 0; i < n; i++) to[i] = (int8_t)own.cached[i];
  }
}

// RMSNorm of one head, where the model has it.
void Pass::norm_head(const Buffer<float> &weight, float *head) const {
  if (weight.empty()) return;
  const int64_t size = config.head_dim;
  float square = 0;
  for (int64_t i = 0; i < size; i++) square += head[i] * head[i];
  const float scale = 1.0f / std::sqrt(square / (float)size + config.norm_eps);
  for (int64_t i = 0; i < size; i++) head[i] = head[i] * scale * weight[i];
}

// Rotary position of one head, halves of what is rotated paired: (u, v) -> (u cos - v sin, v cos + u sin).
void Pass::rotate(int64_t row, float *head) const {
  if (!config.rope) return;
  const int64_t half = model.rotated;
  const float *cosine = engine.cosine.data() + row * half, *sine = engine.sine.data() + row * half;
  for (int64_t i = 0; i < half; i++) {
    const float u = head[i], v = head[i + half];
    head[i] = u * cosine[i] - v * sine[i];
    head[i + half] = v * cosine[i] + u * sine[i];
  }
}

// Rows of q for heads that some token selects, rows of k and v for all; one head is one thread's.
void Pass::project_heads(int64_t layer) {
  const Layer &weights = model.layers[(size_t)layer];
  const int64_t heads = config.num_heads, groups = config.num_kv_heads, size = config.head_dim, per_group = heads / groups;
  const auto selects = [&](int64_t r, int64_t head) { return own.groups[r * groups + head / per_group] != 0; };
  if (model.input_major()) return project_inputs(layer);
  own.units.clear();
  for (int64_t h = 0; h < heads; h++) {
    bool wanted = false;
    for (int64_t r = 0; r < rows && !wanted; r++) wanted = selects(r, h);
    if (wanted) own.units.push_back(h);
  }
  for (int64_t unit = heads; unit < heads + 2 * groups; unit++) own.units.push_back(unit);
  const int64_t count = (int64_t)own.units.size(), end = share_end(count);
  for (int64_t u = share(count); u < end; u++) {
    const int64_t unit = own.units[(size_t)u];
    const bool is_query = unit < heads, is_key = !is_query && unit < heads + groups;
    const int64_t head = is_query ? unit : (unit - heads) % groups;
    const Matrix &matrix = is_query ? weights.q : is_key ? weights.k : weights.v;
    for (int64_t tile = 0; tile < size; tile += TILE)
      for (int64_t r = 0; r < rows; r++)
        if (!is_query || selects(r, head)) {
          const int64_t first = head * size + tile, rows_here = std::min(TILE, size - tile);
          const Fetch after = rows == 1 ? rows_after(matrix, first, rows_here) : Fetch();
          dots(matrix, own.attention_in[r], nullptr, first, rows_here, own.query[r].f + tile, after);
        }
    place_head(layer, unit);
  }
}

// What was projected for a head, of queries, then keys, then values: normed, rotated, and to where attention reads it.
void Pass::place_head(int64_t layer, int64_t unit) {
  const Layer &weights = model.layers[(size_t)layer];
  const int64_t heads = config.num_heads, groups = config.num_kv_heads, size = config.head_dim;
  const bool is_query = unit < heads, is_key = !is_query && unit < heads + groups;
  for (int64_t r = 0; r < rows; r++) {
    if (is_query && own.groups[r * groups + unit / (heads / groups)] == 0) continue;
    float *computed = own.query[r].f;
    if (is_query || is_key) {
      norm_head(is_query ? weights.q_norm : weights.k_norm, computed);
      rotate(r, computed);
    }
    if (!is_query) {  // past `size` it is zero: nothing is written there
      const int64_t at = cache_row(layer, r, (unit - heads) % groups, block.position[r]);
      store(computed, is_key ? block.k_pool : block.v_pool, is_key ? block.k_scale : block.v_scale, at);
      continue;
    }
    float *to = engine.query.data() + (r * heads + unit) * model.head_width;
    for (int64_t i = 0; i < size; i++) to[i] = computed[i] * config.attention_scale;
  }
}

void Pass::attend(int64_t layer) {
  const Matrix &o = model.layers[(size_t)layer].o;
  const int64_t heads = config.num_heads, groups = config.num_kv_heads, size = config.head_dim, padded = model.head_width;
  const int64_t chunks = engine.head_chunks;
  const int dtype = block.cache_dtype;
  const auto dots_of = dtype == DEJAVU_INT8 ? kernels.dots_i8 : dtype == DEJAVU_FP16 ? kernels.dots_f16 : kernels.dots_f32;
  const auto axpys_of = dtype == DEJAVU_INT8 ? kernels.axpys_i8 : dtype == DEJAVU_FP16 ? kernels.axpys_f16 : kernels.axpys_f32;
  const int64_t begin = share(chunks), end = share_end(chunks);
  for (int64_t c = begin; c < end; c++) {
    fetch_neurons(layer, c - begin, end - begin);
    for (int64_t r = 0; r < rows; r++) std::fill_n(engine.attention_parts.data() + (c * engine.max_rows + r) * width, width, 0.0f);
    for (int64_t h = chunk_start(heads, c, chunks); h < chunk_start(heads, c + 1, chunks); h++) {
      const int64_t group = h / (heads / groups);
      for (int64_t r = 0; r < rows; r++) {
        if (!own.groups[r * groups + group]) continue;
        const int64_t length = block.position[r] + 1, page = block.page_size;
        const float *q = engine.query.data() + (r * heads + h) * padded;
        float *p = own.probabilities.data(), *mixed = own.mixed.data();
        // A page's keys of a head lie apart from the next page's: each is fetched while the one before is computed.
        const auto vectors = [&](const void *pool, int64_t t) { return (const unsigned char *)pool + cache_row(layer, r, group, t) * cache_bytes; };
        for (int64_t t = 0; t < length; t += page) {
          const int64_t count = std::min(page, length - t), first = cache_row(layer, r, group, t);
          const unsigned char *next = t + page < length ? vectors(block.k_pool, t + page) : vectors(block.v_pool, 0);
          dots_of(cache_rows(block.k_pool, first, count, next), q, padded, p + t);
          for (int64_t i = 0; dtype == DEJAVU_INT8 && i < count; i++) p[t + i] *= block.k_scale[first + i];
        }
        kernels.softmax(p, length);
        std::fill_n(mixed, padded, 0.0f);
        for (int64_t t = 0; t < length; t += page) {
          const int64_t count = std::min(page, length - t), first = cache_row(layer, r, group, t);
          const unsigned char *next = t + page < length ? vectors(block.v_pool, t + page) : nullptr;
          for (int64_t i = 0; dtype == DEJAVU_INT8 && i < count; i++) p[t + i] *= block.v_scale[first + i];
          axpys_of(cache_rows(block.v_pool, first, count, next), p + t, padded, mixed);
        }
        float *part = engine.attention_parts.data() + (c * engine.max_rows + r) * width;
        if (selects(layer, DEJAVU_AT_OUTPUT)) {
          add_kept_outputs(layer, r, h, mixed, part);
          continue;
        }
        o.scale_rows(nullptr, h * size, size, mixed);
        for (int64_t tile = 0; tile < size; tile += TILE) {
          const int64_t first_row = h * size + tile, count = std::min(TILE, size - tile);
          axpys(o, mixed + tile, nullptr, first_row, count, part, rows == 1 ? rows_after(o, first_row, count) : Fetch());
        }
      }
    }
  }
}
