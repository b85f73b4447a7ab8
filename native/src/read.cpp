// A sequential read by an engine's threads: the ceiling that its own reads are held against.
#include <algorithm>

#include "engine.h"

double dejavu_engine::read(const float *data, int64_t count) {
  constexpr int64_t PIECE = 1 << 16;  // sums of a piece stay small enough for fp32
  std::lock_guard<std::mutex> lock(mutex);
  const int64_t threads = pool.threads();
  std::vector<double> sums((size_t)threads);
  pool.run([&](int thread) {
    double total = 0.0;
    const int64_t end = count * (thread + 1) / threads;
    for (int64_t i = count * thread / threads; i < end; i += PIECE) total += (double)kernels->sum(data + i, std::min(PIECE, end - i));
    sums[(size_t)thread] = total;
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}
