// The MLP of a block of tokens, over all neurons or each token's own:
//   a_f = activation(up_f m + b_f), or activation(gate_f m + b_f) * (up_f m + b_f);   part of the chunk += sum over f of a_f down_f
// A chunk's neurons are one thread's: its rows are read once, for one token after another.
// In: the input m, and lists of neurons where the layer selects. Out: parts of the residual stream, and how many neurons were computed. A
// barrier lies between run and add.
#pragma once
#include "context.h"
#include "inputs.h"

class Mlp {
 public:
  Mlp(const dejavu_model &model, int threads, int64_t max_rows);

  // One of `parts` parts of this thread's selected neurons is fetched, while attention computes: where they are known by then and few enough
  // to stay in the second-level cache.
  static void fetch(const Context &context, int64_t layer, const Selected &selected, int64_t part, int64_t parts);
  // Reads the lists that a predictor selected; where the gate or inputs select, writes them first, a chunk at a time. in_kept: what of `in` is
  // kept, in an input-major model. Writes parts_ and counts.
  void run(const Context &context, int64_t layer, const Vectors &in, const Kept &in_kept, Selected &selected, InputMaps &inputs);
  // x += down's sums and bias.
  void add(const Context &context, int64_t layer, Vectors &x) const;

  // Of dejavu_block, for layers whose MLP runs over lists: see Selected for the parity.
  int64_t unions(int64_t layer) const { return sum(unions_[layer & 1]); }
  int64_t in_order(int64_t layer) const { return sum(in_order_[layer & 1]); }

 private:
  // What of a layer's activations lies in `selected.activated` before its MLP runs.
  enum class Known { NOTHING, GATES, ALL };
  struct alignas(64) Scratch {
    Buffer<float> values;   // [2, neurons]: of up, of the gate
    Buffer<int32_t> fired;  // neurons whose row of down is read
    // Of a tile's neurons, for several tokens: [2, rows, TILE] as `values`, and each row of what is read or written.
    Buffer<float> tile;
    std::vector<const Vector *> x;
    std::vector<const float *> coef;
    std::vector<float *> up, gate, y;
  };
  // One layer as a thread computes it.
  struct Run {
    const Context &ctx;
    const Layer &layer;
    const Vectors &in;
    const Selected &selected;
    const Known known;
    Scratch &own;
  };
  // Neurons idx[0 .. count), or first, first + 1, ...; of these where `kept` is given only kept[0 .. num_kept).
  struct Neurons {
    const int32_t *idx;
    int64_t first, count;
    const int32_t *kept = nullptr;
    int64_t num_kept = 0;
  };
  // Whether a neuron's value is a product of two.
  static bool reads_both(const Run &run) { return run.ctx.config.gated && run.known != Known::ALL; }
  // Values of the neurons of one token, in own.values. gate, up: what is fetched meanwhile.
  static float *values_of(const Run &run, int64_t row, const Neurons &neurons, Fetch gate, Fetch up);
  static void compute(const Run &run, int64_t row, const Neurons &neurons, bool skip_zeros, float *y);
  // y of every token += neurons first, first + 1, ..., count <= TILE.
  void compute_tile(const Run &run, int64_t chunk, int64_t first, int64_t count);
  static int64_t eighths_in_order(const Context &context, const Layer &layer, Known known);
  static int64_t sum(const Buffer<int64_t> &of_chunk);

  Parts parts_;
  Buffer<int64_t> unions_[2], in_order_[2];  // by the layer's parity, [chunks]
  std::vector<Scratch> scratch_;             // by thread
};
