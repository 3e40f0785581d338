// The product in vector registers, of packed operands (a tile of C is kPanelRows x 2 vectors of sums) and of few rows.
#pragma once
#include <utility>

#include "isa/kernels_pack.h"

namespace flex {
namespace {

// One depth step of a tile. The rows are spelled out by the pack expansion: GCC 12 keeps an array of sums in registers
// only where every index is a constant when it first looks (a plain loop stored all of them in every step, 2.3x slower).
template <bool kPairs, int... kRow>
FLEX_INLINE void tile_step(Float (&sums)[sizeof...(kRow)][kPanelVectors], const float* a, const float* b,
                           std::integer_sequence<int, kRow...>) {
  static_assert(kPanelVectors == 2, "the two columns below");
  const Float b0 = load(b), b1 = load(b + kLanes);
  const auto row = [&](Float(&sum)[kPanelVectors], const float* word) __attribute__((always_inline)) {
    const Float x = Simd::broadcast(*word);
    sum[0] = multiply_add<kPairs>(x, b0, sum[0]);
    sum[1] = multiply_add<kPairs>(x, b1, sum[1]);
  };
  (row(sums[kRow], a + kRow * kChunkWords), ...);
}

// C tile of kRows x kPanelColumns. C is added last, so its load is off the critical path.
template <bool kPairs, int kRows>
void tile(int64_t words, const float* a, const float* b, float* c, int64_t c_stride, bool accumulate) {
  constexpr std::make_integer_sequence<int, kRows> kEveryRow{};
  Float sums[kRows][kPanelVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) sums[i][v] = zeros();
  for (; words >= kChunkWords; words -= kChunkWords, a += kPanelRows * kChunkWords)
#pragma GCC unroll 4
    for (int k = 0; k < kChunkWords; ++k, b += kPanelColumns) tile_step<kPairs>(sums, a + k, b, kEveryRow);
  for (int k = 0; k < words; ++k, b += kPanelColumns) tile_step<kPairs>(sums, a + k, b, kEveryRow);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) {
      float* const place = c + i * c_stride + v * kLanes;
      store(place, accumulate ? load(place) + sums[i][v] : sums[i][v]);
    }
}

template <bool kPairs, int... kRow>
FLEX_INLINE void tile_of(int64_t rows, int64_t words, const float* a, const float* b, float* c, int64_t c_stride,
                         bool accumulate, std::integer_sequence<int, kRow...>) {
  using Tile = void (*)(int64_t, const float*, const float*, float*, int64_t, bool);
  static constexpr Tile kTiles[] = {tile<kPairs, kRow + 1>...};
  kTiles[rows - 1](words, a, b, c, c_stride, accumulate);
}

// The B panel stays in the first cache while the A panels of the block pass by.
template <bool kPairs>
void multiply(int64_t rows, int64_t columns, int64_t words, const float* a, const float* b, float* c, int64_t c_stride,
              bool accumulate) {
  const int64_t a_panel = round_up(words, kChunkWords) * kPanelRows;
  for (int64_t column = 0; column < columns; column += kPanelColumns)
    for (int64_t row = 0; row < rows; row += kPanelRows) {
      const int64_t count = rows - row < kPanelRows ? rows - row : kPanelRows;
      tile_of<kPairs>(count, words, a + row / kPanelRows * a_panel, b + column * words, c + row * c_stride + column,
                      c_stride, accumulate, std::make_integer_sequence<int, kPanelRows>());
    }
}

// So few rows do not pay for packing B: they read it where it lies, once from memory and then from cache.
constexpr int kFewRows = 4;

template <bool kPairs, class T>
void pack_few(Rows source, int64_t rows, int64_t begin, int64_t depth, float* panels) {
  pack_a_rows<kPairs, T>(source, rows, begin, depth, panels);
}

// kLanes columns at a time, each summed along the depth in its own vector; the transposition turns the sums upright.
// The next kLanes columns are fetched meanwhile: they lie behind these, and no prefetcher follows kLanes short streams.
template <bool kPairs, class T>
void multiply_in_place(int64_t rows, int64_t columns, int64_t depth, const float* a, Rows b, int64_t first, float* c,
                       int64_t c_stride) {
  constexpr int64_t kStep = kPairs ? 2 * kLanes : kLanes, kFetched = kLanes * kStep * sizeof(T);
  for (int64_t column = 0; column < columns; column += kLanes) {
    const T* from[kLanes];  // past the last column: that one again, and its sum is never read
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t own = column + i < columns ? column + i : columns - 1;
      from[i] = static_cast<const T*>(b.data) + (first + own) * b.stride;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float* words = a + row * kChunkWords;
      const char* next = reinterpret_cast<const char*>(from[0]) + kLanes * b.stride * int64_t{sizeof(T)};
      Float sums[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) sums[i] = zeros();
      int64_t step = 0;
      for (; step + kStep <= depth; step += kStep) {
        const Float x = load(words);
        for (int64_t byte = 0; byte < kFetched; byte += kLineBytes) __builtin_prefetch(next + byte, 0, 2);
        next += kFetched;
        for (int64_t i = 0; i < kLanes; ++i)
          sums[i] = multiply_add<kPairs>(x, load_words<kPairs>(from[i] + step, kStep), sums[i]);
        words += kLanes;
        if (step / kStep % (kChunkWords / kLanes) == kChunkWords / kLanes - 1) words += (kPanelRows - 1) * kChunkWords;
      }
      if (step < depth)
        for (int64_t i = 0; i < kLanes; ++i)
          sums[i] = multiply_add<kPairs>(load(words), load_words<kPairs>(from[i] + step, depth - step), sums[i]);
      Simd::transpose(sums);
      for (int64_t i = 1; i < kLanes; ++i) sums[0] = sums[0] + sums[i];
      store(c + row * c_stride + column, sums[0]);
    }
  }
}

}  // namespace
}  // namespace flex
