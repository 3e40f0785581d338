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

// Beside nf4 weights as fp32: a word of memory is eight codes, and a vector of words gives every eighth weight of a block of
// 8 kLanes with a shift and a lookup. The rows of A are in that order: [block][eighth][kLanes], zeros behind the last.
constexpr int64_t kEighths = 8, kNf4Block = kEighths * kLanes;
static_assert(kFewDepth % kNf4Block == 0);

template <class T>
void pack_eighths(Rows source, int64_t rows, int64_t begin, int64_t depth, float* words) {
  const int64_t padded = round_up(depth, kNf4Block);
  for (int64_t row = 0; row < rows; ++row, words += padded) {
    const T* const from = static_cast<const T*>(source.data) + (source.gather ? source.gather[row] : row) * source.stride + begin;
    for (int64_t at = 0; at < padded; at += kLanes) {
      const int64_t left = depth - at;
      float lanes[kLanes];
      store(lanes, left > 0 ? load(from + at, left < kLanes ? left : kLanes) : zeros());
      float* const block = words + at / kNf4Block * kNf4Block;
      for (int64_t i = 0; i < kLanes; ++i)
        block[(at + i) % kEighths * kLanes + (at + i) % kNf4Block / kEighths] = lanes[i];
    }
  }
}

// A tile is kLanes sums of kRows rows; weights are looked up once for all of them.
template <int kRows>
void few_nf4_tile(int64_t rows, int64_t columns, int64_t depth, const float* a, const Rows& b, int64_t first, float* c,
                  int64_t c_stride) {
  constexpr int64_t kColumns = kLanes / kRows;
  const int64_t padded = round_up(depth, kNf4Block), row_bytes = b.stride / 2;
  Row<Nf4> from[kColumns];  // past the last column: that one again, and its sum is never read
  for (int64_t i = 0; i < kColumns; ++i) from[i] = Row<Nf4>::of(b, first + (i < columns ? i : columns - 1), 0);
  const char* next = from[0].address(0) + kColumns * row_bytes;
  Float sums[kLanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) sums[i] = zeros();
  for (int64_t at = 0; at < padded; at += kNf4Block) {
    const int64_t there = b.stride - at < kNf4Block ? b.stride - at : kNf4Block;
    for (int64_t byte = 0; byte < kColumns * kNf4Block / 2; byte += kLineBytes) __builtin_prefetch(next + byte, 0, 2);
    next += kColumns * kNf4Block / 2;
#pragma GCC unroll 16
    for (int64_t i = 0; i < kColumns; ++i) {
      Word pieces = {};
      std::memcpy(&pieces, from[i].address(at), there == kNf4Block ? sizeof(pieces) : there / 2);
      const float scale = from[i].scale(at);
      Float scales = Simd::broadcast(scale);
      if constexpr (kNf4Block > kNf4Group) scales = Simd::halves(scale, there == kNf4Block ? from[i].scale(at + kNf4Group) : 0.f);
#pragma GCC unroll 8
      for (int k = 0; k < kEighths; ++k) {
        const Float weights = Row<Nf4>::unpacked(pieces, k, scales);
#pragma GCC unroll 4
        for (int64_t row = 0; row < kRows; ++row) {
          const int64_t own = row < rows ? row : rows - 1;
          sums[row * kColumns + i] = Simd::fma(load(a + own * padded + at + k * kLanes), weights, sums[row * kColumns + i]);
        }
      }
    }
  }
  Simd::transpose(sums);
  for (int64_t i = 1; i < kLanes; ++i) sums[0] = sums[0] + sums[i];
  float upright[kLanes];
  store(upright, sums[0]);
  for (int64_t row = 0; row < kRows && row < rows; ++row)
    for (int64_t i = 0; i < kColumns && i < columns; ++i) c[row * c_stride + i] = upright[row * kColumns + i];
}

inline void multiply_few_nf4(int64_t rows, int64_t columns, int64_t depth, const float* a, Rows b, int64_t first, float* c,
                             int64_t c_stride) {
  const auto tile = rows == 1 ? few_nf4_tile<1> : rows == 2 ? few_nf4_tile<2> : few_nf4_tile<4>;
  const int64_t width = kLanes / (rows == 1 ? 1 : rows == 2 ? 2 : 4);
  for (int64_t column = 0; column < columns; column += width)
    tile(rows, columns - column, depth, a, b, first + column, c + column, c_stride);
}

}  // namespace
}  // namespace flex
