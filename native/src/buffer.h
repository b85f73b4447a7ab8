// Memory for weights and scratch: aligned to cache lines, zeroed, freed with its owner.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

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

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The product of sizes; std::bad_alloc where no memory could hold it.
inline int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t total = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(total, size, &total)) throw std::bad_alloc();
  return total;
}
