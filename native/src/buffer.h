// Memory for scratch (Buffer) and weights (Arena): aligned to cache lines, zeroed, freed with its owner.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// `count` values of T, all zero. Throws std::bad_alloc where the memory is not there or the size does not fit.
template <class T> class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    constexpr int64_t LINE = 64;
    if (count < 0 || count > (INT64_MAX - LINE) / (int64_t)sizeof(T)) throw std::bad_alloc();
    const int64_t bytes = (count * (int64_t)sizeof(T) + LINE - 1) / LINE * LINE;
    data_ = static_cast<T *>(std::aligned_alloc(LINE, (size_t)(bytes > 0 ? bytes : LINE)));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(static_cast<void *>(data_), 0, (size_t)(bytes > 0 ? bytes : LINE));
    size_ = count;
  }
  Buffer(Buffer &&other) noexcept { swap(other); }
  Buffer &operator=(Buffer &&other) noexcept {
    swap(other);
    return *this;
  }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { std::free(data_); }

  T *data() const { return data_; }
  int64_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T &operator[](int64_t i) const { return data_[i]; }

 private:
  void swap(Buffer &other) {
    T *data = data_;
    const int64_t size = size_;
    data_ = other.data_, size_ = other.size_;
    other.data_ = data, other.size_ = size;
  }
  T *data_ = nullptr;
  int64_t size_ = 0;
};

// Memory that is taken piece by piece and freed as a whole. Pieces lie close together in huge pages where the system has them: of
// weights of 4 KB pages a step spends up to half of its time on looking addresses up (docs/log.md).
class Arena {
 public:
  Arena() = default;
  Arena(const Arena &) = delete;
  Arena &operator=(const Arena &) = delete;
  ~Arena() {
    for (void *slab : slabs_) std::free(slab);
  }

  unsigned char *take(int64_t bytes) {
    if (bytes < 0 || bytes > INT64_MAX - 2 * PAGE) throw std::bad_alloc();
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > left_) add(bytes);
    unsigned char *piece = next_;
    next_ += bytes, left_ -= bytes;
    std::memset(piece, 0, (size_t)bytes);
    return piece;
  }

 private:
  static constexpr int64_t PAGE = 2 << 20;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t SLAB = 0;  // every piece its own, so that reads beyond it are seen
#else
  static constexpr int64_t SLAB = 16 * PAGE;
#endif

  void add(int64_t bytes) {
    const int64_t unit = SLAB == 0 ? 64 : PAGE, size = (std::max(bytes, std::max(SLAB, unit)) + unit - 1) / unit * unit;
    slabs_.reserve(slabs_.size() + 1);
    void *slab = std::aligned_alloc((size_t)unit, (size_t)size);
    if (slab == nullptr) throw std::bad_alloc();
    slabs_.push_back(slab);
#if defined(MADV_HUGEPAGE)
    if (SLAB > 0) madvise(slab, (size_t)size, MADV_HUGEPAGE);  // advice: where it is refused, pages are small
#endif
    next_ = static_cast<unsigned char *>(slab), left_ = size;
  }
  std::vector<void *> slabs_;
  unsigned char *next_ = nullptr;
  int64_t left_ = 0;
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The product of sizes; std::bad_alloc where no memory could hold it.
inline int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t total = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(total, size, &total)) throw std::bad_alloc();
  return total;
}
