// How this compiler laid out the structs of the interface. In: dejavu_native.h. Out: a text that a mirror of them can be held against.
//
// Every field is named here once: one that is added, removed, moved or widened changes the text.
#include <cstddef>
#include <string>
#include <type_traits>

#include "../dejavu_native.h"

namespace {

template <class Field> std::string field(const char *name, size_t offset) {
  using Value = std::remove_extent_t<Field>;
  const char kind = std::is_pointer_v<Value> ? 'p' : std::is_floating_point_v<Value> ? 'f' : 'i';
  return std::string(" ") + name + ':' + kind + std::to_string(sizeof(Field)) + '@' + std::to_string(offset);
}

std::string line(const char *name, const std::string &fields, size_t size) { return name + fields + " size:" + std::to_string(size) + '\n'; }

#define FIELD(name) field<decltype(Struct::name)>(#name, offsetof(Struct, name))

std::string config() {
  using Struct = dejavu_config;
  return line("dejavu_config",
              FIELD(vocab_size) + FIELD(hidden_size) + FIELD(embed_size) + FIELD(intermediate_size) + FIELD(num_layers) + FIELD(num_heads) +
                  FIELD(num_kv_heads) + FIELD(head_dim) + FIELD(max_positions) + FIELD(position_offset) + FIELD(activation) +
                  FIELD(gated) + FIELD(rms) + FIELD(pre_norm) + FIELD(parallel) + FIELD(final_norm) + FIELD(rope) + FIELD(tied_head) + FIELD(layout) + FIELD(threads) +
                  FIELD(norm_eps) + FIELD(activation_threshold) + FIELD(rotary_factor) + FIELD(local_rotary_factor) +
                  FIELD(attention_scale) + FIELD(embed_scale) + FIELD(residual_scale) + FIELD(logit_scale) + FIELD(attention_cap) + FIELD(logit_cap),
              sizeof(Struct));
}

std::string matrix() {
  using Struct = dejavu_matrix;
  return line("dejavu_matrix", FIELD(data) + FIELD(scale) + FIELD(bias) + FIELD(order) + FIELD(rows) + FIELD(columns) + FIELD(dtype) + FIELD(transposed),
              sizeof(Struct));
}

std::string block() {
  using Struct = dejavu_block;
  return line("dejavu_block",
              FIELD(rows) + FIELD(first_logits) + FIELD(num_pages) + FIELD(page_size) + FIELD(head_stride) + FIELD(token) + FIELD(position) +
                  FIELD(table) + FIELD(k_pool) + FIELD(v_pool) + FIELD(k_scale) + FIELD(v_scale) + FIELD(cache_dtype) + FIELD(sparse) + FIELD(prompt) + FIELD(full_head) +
                  FIELD(logits) + FIELD(neurons) + FIELD(heads) + FIELD(neuron_mask) + FIELD(group_mask) + FIELD(inputs) + FIELD(input_mask) +
                  FIELD(unions) + FIELD(in_order),
              sizeof(Struct));
}

std::string profile() {
  using Struct = dejavu_profile;
  return line("dejavu_profile", FIELD(seconds) + FIELD(fired) + FIELD(groups) + FIELD(inputs), sizeof(Struct));
}

}  // namespace

extern "C" const char *dejavu_layouts(void) {
  static const std::string text = config() + matrix() + block() + profile();
  return text.c_str();
}
