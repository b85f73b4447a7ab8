// The start of the residual stream. In: token ids and positions of the block. Out: x, of every thread.
#pragma once
#include "context.h"

class Embedding {
 public:
  Embedding(const dejavu_model &model, int threads, int64_t max_rows);
  // Writes x[0 .. rows). A model that projects its embeddings waits at a barrier.
  void run(const Context &context, Vectors &x);

 private:
  // Where embeddings are projected:
  std::vector<Vectors> embedded_;  // by thread
  Buffer<float> projected_;        // shared: [rows, width]
};
