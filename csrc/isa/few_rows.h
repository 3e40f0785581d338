// The product of few rows in vector registers, the weights read where and as they lie.
#pragma once
#include "isa/kernels_pack.h"

namespace flex {
namespace {

// So few rows do not pay for packing B: they read it where it lies, once from memory and then from cache.
constexpr int kRowsInPlace = 4;

// kLanes columns at a time, each summed along the depth in its own vector; the transposition turns the sums upright.
// The next kLanes columns are fetched meanwhile: they lie behind these, and no prefetcher follows kLanes short streams.
template <bool kPairs, class T>
void multiply_few(int64_t rows, int64_t columns, int64_t depth, const float* a, Rows b, int64_t first, float* c,
                  int64_t c_stride) {
  constexpr int64_t kStep = kPairs ? 2 * kLanes : kLanes, kFetched = Row<T>::bytes(kLanes * kStep);
  for (int64_t column = 0; column < columns; column += kLanes) {
    Row<T> from[kLanes];  // past the last column: that one again, and its sum is never read
    for (int64_t i = 0; i < kLanes; ++i)
      from[i] = Row<T>::of(b, first + (column + i < columns ? column + i : columns - 1), 0);
    for (int64_t row = 0; row < rows; ++row) {
      const float* words = a + row * kChunkWords;
      const char* next = from[0].address(0) + Row<T>::bytes(kLanes * b.stride);
      Float sums[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) sums[i] = zeros();
      int64_t step = 0;
      for (; step + kStep <= depth; step += kStep) {
        const Float x = load(words);
        for (int64_t byte = 0; byte < kFetched; byte += kLineBytes) __builtin_prefetch(next + byte, 0, 2);
        next += kFetched;
        for (int64_t i = 0; i < kLanes; ++i)
          sums[i] = multiply_add<kPairs>(x, from[i].template words<kPairs>(step, kStep), sums[i]);
        words += kLanes;
        if (step / kStep % (kChunkWords / kLanes) == kChunkWords / kLanes - 1) words += (kPanelRows - 1) * kChunkWords;
      }
      if (step < depth)
        for (int64_t i = 0; i < kLanes; ++i)
          sums[i] = multiply_add<kPairs>(load(words), from[i].template words<kPairs>(step, depth - step), sums[i]);
      Simd::transpose(sums);
      for (int64_t i = 1; i < kLanes; ++i) sums[0] = sums[0] + sums[i];
      store(c + row * c_stride + column, sums[0]);
    }
  }
}

}  // namespace
}  // namespace flex
