// Maps of which inputs are selected: at each point (q, k, v; o; gate and up; down) those with |x_i| n_i > threshold are kept.
//
// Matrices hold a row for each input, and a map is a sum of the kept rows. A thread takes panels of columns, some chunks' neurons or some
// heads, over all inputs in their order: no sums to be added up afterwards, and no bit that depends on the number of threads.
// A dense block keeps all inputs. int8 values have the scale of their column, which the sum takes at its end; grids are panels (grids.h).
// In: the input of a map. Out: what of it was kept, and the map's sums. Of input-major models alone.
#pragma once
#include "context.h"

class InputMaps {
 public:
  InputMaps(const dejavu_model &model, int threads, int64_t max_rows);

  // At the points of the residual stream. Writes kept, of x.
  static void keep(const Context &context, int64_t layer, int point, const Vectors &x, Kept &kept);
  // columns(thread, r) = the kept inputs of each row r times the columns of a panel's heads, and their bias.
  void project(const Context &context, const HeadPanel &panel, const Kept &kept);
  float *columns(int thread, int64_t row) const { return columns_[(size_t)thread].data() + row * num_columns_; }
  // How many chunks the neurons of a panel make.
  static int64_t chunks_of_panel(const Context &context, int64_t layer, const Selected &selected) {
    return selected.chunks / (int64_t)context.model.layers[(size_t)layer].neuron_panels.size();
  }
  // Activations of a panel's neurons into `selected.activated`, from what gate and up keep; of these the inputs of down that are kept into
  // the lists of its chunks, as others select.
  void activate(const Context &context, int64_t layer, int64_t panel, const Kept &kept, Selected &selected);
  // part += the kept inputs of o of one head times their rows. mixed: what the head gives, written over. Writes the head's own list.
  void add_outputs(const Context &context, int64_t layer, int64_t row, int64_t head, float *mixed, float *part);

  // Calls visit(point, list, count) for every list of kept inputs of one row and layer, once it is computed. Points that keep all have none.
  template <class Visit>
  void visit(const Context &context, int64_t layer, int64_t row, const Replicated &own, const Selected &selected, Visit visit) const;

 private:
  // columns(thread, r) from `at` on = the kept inputs of each row r times the columns of a matrix, and its bias.
  void sum_columns(const Context &context, const Matrix &panel, const Kept &kept, int64_t at);
  void sum_tiles(const Context &context, const Matrix &panel, const Kept &kept, int64_t at);

  int64_t num_columns_ = 0;  // more than any panel has
  // Shared: inputs of o, a head's from its first on.
  Buffer<int32_t> output_kept_;    // [rows, heads x head_dim]
  Buffer<int64_t> output_counts_;  // [rows, heads]
  std::vector<Buffer<float>> columns_;  // by thread: [rows, columns]
  // By thread, of each row: what a tile's rows are multiplied by, and where they are added to.
  std::vector<std::vector<const float *>> coef_;
  std::vector<std::vector<float *>> y_;
};

template <class Visit>
void InputMaps::visit(const Context &ctx, int64_t layer, int64_t r, const Replicated &own, const Selected &selected, Visit visit) const {
  const dejavu_config &c = ctx.config;
  const auto &selectors = ctx.selector(layer).inputs;
  if (selectors[DEJAVU_AT_ATTENTION].present()) visit(DEJAVU_AT_ATTENTION, own.attention_kept.idx.data() + r * c.hidden_size, own.attention_kept.count[r]);
  for (int64_t h = 0; selectors[DEJAVU_AT_OUTPUT].present() && h < c.num_heads; h++)
    visit(DEJAVU_AT_OUTPUT, output_kept_.data() + (r * c.num_heads + h) * c.head_dim, output_counts_[r * c.num_heads + h]);
  if (selectors[DEJAVU_AT_MLP].present()) visit(DEJAVU_AT_MLP, own.mlp_kept.idx.data() + r * c.hidden_size, own.mlp_kept.count[r]);
  for (int64_t k = 0; selectors[DEJAVU_AT_DOWN].present() && k < selected.chunks; k++)
    visit(DEJAVU_AT_DOWN, selected.list(layer, r) + selected.start(k), selected.count(layer, r, k));
}
