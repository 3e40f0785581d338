// The product in vector registers, of packed operands (a tile of C is kPanelRows x 2 vectors of sums) and of few rows.
#pragma once
#include <utility>

#include "isa/few_rows.h"

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
void tile(int64_t words, const float* a, const float* b, float* c, int64_t c_stride, bool accumulate, Fetch& fetch) {
  constexpr std::make_integer_sequence<int, kRows> kEveryRow{};
  Float sums[kRows][kPanelVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) sums[i][v] = zeros();
  for (; words >= kChunkWords; words -= kChunkWords, a += kPanelRows * kChunkWords) {
    fetch.some();
#pragma GCC unroll 4
    for (int k = 0; k < kChunkWords; ++k, b += kPanelColumns) tile_step<kPairs>(sums, a + k, b, kEveryRow);
  }
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
                         bool accumulate, Fetch& fetch, std::integer_sequence<int, kRow...>) {
  using Tile = void (*)(int64_t, const float*, const float*, float*, int64_t, bool, Fetch&);
  static constexpr Tile kTiles[] = {tile<kPairs, kRow + 1>...};
  kTiles[rows - 1](words, a, b, c, c_stride, accumulate, fetch);
}

// The B panel stays in the first cache while the A panels of the block pass by.
template <bool kPairs>
void multiply(int64_t rows, int64_t columns, int64_t words, const float* a, const float* b, float* c, int64_t c_stride,
              bool accumulate, Fetch& fetch) {
  const int64_t a_panel = round_up(words, kChunkWords) * kPanelRows;
  for (int64_t column = 0; column < columns; column += kPanelColumns)
    for (int64_t row = 0; row < rows; row += kPanelRows) {
      const int64_t count = rows - row < kPanelRows ? rows - row : kPanelRows;
      tile_of<kPairs>(count, words, a + row / kPanelRows * a_panel, b + column * words, c + row * c_stride + column,
                      c_stride, accumulate, fetch, std::make_integer_sequence<int, kPanelRows>());
    }
}

template <class T>
constexpr int kFewRows = kRowsInPlace<T>;

template <bool kPairs, class T>
void pack_few(Rows source, int64_t rows, int64_t begin, int64_t depth, float* panels) {
  pack_a_rows<kPairs, T>(source, rows, begin, depth, panels);
}

template <bool kPairs, class T>
void multiply_in_place(int64_t rows, int64_t columns, int64_t depth, const float* a, Rows b, int64_t first, float* c,
                       int64_t c_stride) {
  multiply_few<kPairs, T>(rows, columns, depth, a, b, first, c, c_stride);
}

}  // namespace
}  // namespace flex
