// One block of memory for a whole call: reserve every piece, then allocate once.
#pragma once
#include <cstdint>
#include <stdexcept>

namespace flex {

// a * b, refused where it does not fit: sizes come from outside.
inline int64_t checked_product(int64_t a, int64_t b) {
  int64_t product;
  if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product))
    throw std::length_error("a size beyond 2^63 elements was asked for");
  return product;
}

inline int64_t checked_sum(int64_t a, int64_t b) {
  int64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) throw std::length_error("a size beyond 2^63 elements was asked for");
  return sum;
}

struct MemoryBlock {
  char* data;
  int64_t bytes;
};
// At least `bytes`, aligned to 64, contents undefined. One block of moderate size outlives its call and serves the next:
// its pages are there already and perhaps still in cache. Throws std::bad_alloc.
MemoryBlock take_block(int64_t bytes);
void give_block(MemoryBlock block);
// Memory about to be written for the first time: large blocks ask for large pages, which arrive faster.
void expect_writes(void* data, int64_t bytes);

class Workspace {
 public:
  // Where a piece will lie. Null: a piece of no elements, or any piece before allocate().
  template <class T>
  struct Piece {
    int64_t offset = -1;
  };

  template <class T>
  Piece<T> reserve(int64_t count) {
    const int64_t bytes = checked_product(count, sizeof(T));
    if (bytes == 0) return {};
    const Piece<T> piece{size_};
    size_ = checked_sum(size_, checked_sum(bytes, kAlignment - 1)) / kAlignment * kAlignment;
    return piece;
  }

  void allocate() { memory_ = take_block(size_); }
  ~Workspace() { give_block(memory_); }
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <class T>
  T* operator[](Piece<T> piece) const {
    return piece.offset < 0 || !memory_.data ? nullptr : reinterpret_cast<T*>(memory_.data + piece.offset);
  }
  int64_t bytes() const { return size_; }

 private:
  static constexpr int64_t kAlignment = 64;
  int64_t size_ = 0;
  MemoryBlock memory_{nullptr, 0};
};

}  // namespace flex
