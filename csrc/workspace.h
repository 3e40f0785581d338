// One block of memory for a whole call: reserve every piece, then allocate once.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace flex {

// a * b, refused where it does not fit: sizes come from outside.
inline int64_t checked_product(int64_t a, int64_t b) {
  int64_t product;
  if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product))
    throw std::length_error("a size beyond 2^63 elements was asked for");
  return product;
}

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
    if (__builtin_add_overflow(size_, bytes, &size_) || __builtin_add_overflow(size_, kAlignment, &size_))
      throw std::length_error("a workspace beyond 2^63 bytes was asked for");
    size_ = size_ / kAlignment * kAlignment;
    return piece;
  }

  void allocate() {
    // Fresh pages cost 0.25 us each; large blocks ask for large pages.
    const int64_t alignment = size_ >= 2 * kHugePage ? kHugePage : kAlignment;
    const int64_t bytes = (size_ / alignment + 1) * alignment;
    memory_.reset(static_cast<char*>(std::aligned_alloc(alignment, bytes)));
    if (!memory_) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == kHugePage) madvise(memory_.get(), bytes, MADV_HUGEPAGE);  // advice: no matter if refused
#endif
  }

  template <class T>
  T* operator[](Piece<T> piece) const {
    return piece.offset < 0 || !memory_ ? nullptr : reinterpret_cast<T*>(memory_.get() + piece.offset);
  }
  int64_t bytes() const { return size_; }

 private:
  static constexpr int64_t kAlignment = 64, kHugePage = int64_t{1} << 21;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  int64_t size_ = 0;
  std::unique_ptr<char, Free> memory_;
};

}  // namespace flex
