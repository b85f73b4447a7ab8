// The attention of a block of tokens. Keys and values of every head are stored; only selected groups are computed:
//   q_h = Q_h a;   m_h = softmax(cap(scale q_h k^T)) v;   part of the heads' chunk += sum over d of m_h[d] O_h[d]
// In a layer with a window a token sees the last tokens alone, and their pages are all that is read.
// In: the input a of q, k and v, and the groups that are selected. Out: keys and values in the caller's cache, and parts of the residual
// stream. A barrier lies between project and attend, and one between attend and add.
#pragma once
#include "context.h"
#include "inputs.h"

class Attention {
 public:
  Attention(const dejavu_model &model, int threads, int64_t max_rows);
  // Angles of a block's positions, by the caller before the threads start.
  void prepare(const dejavu_model &model, const dejavu_block &block);

  // Queries of heads that some token selects, keys and values of all; one head is one thread's. Writes query_ and the cache. groups:
  // [rows, key/value heads].
  void project(const Context &context, int64_t layer, const Vectors &in, const Buffer<uint8_t> &groups);
  // The same from the inputs that are kept, in an input-major model: each panel of heads is one thread's.
  void project_kept(const Context &context, int64_t layer, const Kept &in, const Buffer<uint8_t> &groups, InputMaps &inputs);
  // Reads query_ and the cache; writes one chunk of parts_.
  void attend(const Context &context, int64_t layer, int64_t chunk, const Buffer<uint8_t> &groups, InputMaps &inputs);
  // x += o's sums and bias.
  void add(const Context &context, int64_t layer, Vectors &x) const;

  const int64_t chunks;  // of heads

 private:
  struct alignas(64) Scratch {
    Vectors head;  // of each row, the one head that is being placed
    Buffer<float> probabilities;         // [TOGETHER, stride_]
    Buffer<float> mixed;                 // of each row, one head
    std::vector<const Vector *> x;       // of the rows that are multiplied together
    std::vector<const float *> coef;     // of the rows that o is added up for
    std::vector<float *> y;
    Buffer<int16_t> cached;
    std::vector<int64_t> units;  // heads to project: queries, then keys, then values
  };
  void place_head(const Context &context, int64_t layer, int64_t unit, const Buffer<uint8_t> &groups, Scratch &own);
  // Of a block's positions: [rows, pairs].
  struct Angles {
    Buffer<float> cosine, sine;
    void make_room(const Rotary &rotary, int64_t rows) { cosine = Buffer<float>(rows * rotary.pairs), sine = Buffer<float>(rows * rotary.pairs); }
    void fill(const Rotary &rotary, const dejavu_block &block);
    void rotate(int64_t pairs, int64_t row, float *head) const;
  };
  static constexpr int64_t TOGETHER = 4;  // tokens of a sequence that read keys and values together
  static int64_t together(const Context &context, int64_t row, int64_t group, const Buffer<uint8_t> &groups);
  void mix(const Context &context, int64_t layer, int64_t head, int64_t row, int64_t count, Scratch &own);

  Buffer<float> query_;         // shared: [rows, heads, padded head_dim]
  Angles angles_, local_angles_;  // shared
  int64_t stride_ = 0;  // room for the probabilities of one token
  Parts parts_;
  std::vector<Scratch> scratch_;  // by thread
};
