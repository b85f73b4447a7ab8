// The end of the residual stream. In: x. Out: logits of the block from its row first_logits on, of a sparse block those of a shortlist.
#pragma once
#include "context.h"
#include "screen.h"

class Head {
 public:
  Head(const dejavu_model &model, int threads, int64_t max_rows);
  // Writes the block's logits, and context.finite. A model that projects before its head waits at a barrier, and so does a screen.
  void run(const Context &context, const Vectors &x);

  Screen screen;

 private:
  struct alignas(64) Scratch {
    Vectors normed, projected;
    std::vector<const Vector *> x;  // of the rows whose logits are computed together, and where those go
    std::vector<float *> out;
  };
  Buffer<float> projected_;       // shared: [rows, embed_width]
  std::vector<Scratch> scratch_;  // by thread
};
