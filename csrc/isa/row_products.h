// The router's product: rows of tokens against rows of weights, neither packed. So few columns do not pay for packing the
// tokens, which are read once. A tile is kLanes sums, each a vector along the depth; one transposition turns them upright.
#pragma once
#include "isa/kernels_pack.h"

namespace flex {
namespace {

// Of a whole tile: about square, for the fewest loads, and as many sums as registers hold.
constexpr int kProductRows = kLanes >= 16 ? 6 : 2, kProductColumns = 4;

FLEX_INLINE Float rounded_to(const float*, Float value) { return value; }
FLEX_INLINE Float rounded_to(const Bfloat16*, Float value) { return (Float)(bfloat16_bits(value) << 16); }

// out[i, j] of kRows rows and kColumns columns. Past the last row or column stands that one again, and its sum is not
// stored. A single row is bound by reading the weights, of which the processor's own prefetchers follow so few streams;
// fetching the next columns by hand would halve what a second cache gives.
template <bool kPairs, int kRows, int kColumns, class T>
void product_tile(int64_t rows, int64_t columns, int64_t depth, const T* x, int64_t x_stride, const T* w,
                  int64_t w_stride, float* out, int64_t out_stride) {
  constexpr int64_t kStep = kPairs ? 2 * kLanes : kLanes;
  const T* of_row[kRows];
  const T* of_column[kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) of_row[i] = x + (i < rows ? i : rows - 1) * x_stride;
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) of_column[j] = w + (j < columns ? j : columns - 1) * w_stride;
  constexpr int kParts = (kRows * kColumns + kLanes - 1) / kLanes;
  Float sums[kParts][kLanes];
#pragma GCC unroll 32
  for (int i = 0; i < kParts * kLanes; ++i) sums[i / kLanes][i % kLanes] = zeros();
  const auto add = [&](int64_t step, int64_t left) __attribute__((always_inline)) {
    Float weights[kColumns];
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) weights[j] = load_words<kPairs>(of_column[j] + step, left);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Float state = load_words<kPairs>(of_row[i] + step, left);
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; ++j) {
        Float& sum = sums[(i * kColumns + j) / kLanes][(i * kColumns + j) % kLanes];
        sum = multiply_add<kPairs>(state, weights[j], sum);
      }
    }
  };
  int64_t step = 0;
  for (; step + kStep <= depth; step += kStep) add(step, kStep);
  if (step < depth) add(step, depth - step);
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    Float(&own)[kLanes] = sums[part];
    Simd::transpose(own);
#pragma GCC unroll 16
    for (int i = 1; i < kLanes; ++i) own[0] = own[0] + own[i];
    float lanes[kLanes];
    store(lanes, rounded_to(x, own[0]));
    constexpr int64_t kTileRows = kLanes / kColumns;
    for (int64_t i = 0, row = part * kTileRows; i < kTileRows && row < kRows && row < rows; ++i, ++row)
      std::memcpy(out + row * out_stride, lanes + i * kColumns, (columns < kColumns ? columns : kColumns) * sizeof(float));
  }
}

template <bool kPairs, int kRows, class T>
void product_rows(int64_t rows, int64_t columns, int64_t depth, const T* x, int64_t x_stride, const T* w,
                  int64_t w_stride, float* out, int64_t out_stride) {
  constexpr int kColumns = kRows <= 2 ? kLanes / 2 : kProductColumns;
  for (int64_t column = 0; column < columns; column += kColumns)
    product_tile<kPairs, kRows, kColumns>(rows, columns - column, depth, x, x_stride, w + column * w_stride, w_stride,
                                out + column, out_stride);
}

template <bool kPairs, class T>
void row_products(int64_t rows, int64_t columns, int64_t depth, const void* x, int64_t x_stride, const void* w,
                  int64_t w_stride, float* out, int64_t out_stride) {
  for (int64_t row = 0; row < rows; row += kProductRows) {
    const int64_t left = rows - row;
    const auto product = left == 1   ? product_rows<kPairs, 1, T>
                         : left == 2 ? product_rows<kPairs, 2, T>
                         : left <= 4 ? product_rows<kPairs, kProductRows < 4 ? kProductRows : 4, T>
                                     : product_rows<kPairs, kProductRows, T>;
    product(left < kProductRows ? left : kProductRows, columns, depth, static_cast<const T*>(x) + row * x_stride,
            x_stride, static_cast<const T*>(w), w_stride, out + row * out_stride, out_stride);
  }
}

// Four sums a row: one would wait for itself.
template <class T>
void row_dots(int64_t rows, int64_t depth, const void* x, int64_t x_stride, const float* w, float* out) {
  constexpr int64_t kSums = 4, kStep = kSums * kLanes;
  for (int64_t row = 0; row < rows; ++row) {
    const T* const states = static_cast<const T*>(x) + row * x_stride;
    Float sums[kSums] = {zeros(), zeros(), zeros(), zeros()};
    int64_t step = 0;
    for (; step + kStep <= depth; step += kStep)
#pragma GCC unroll 4
      for (int64_t i = 0; i < kSums; ++i)
        sums[i] = Simd::fma(load(states + step + i * kLanes), load(w + step + i * kLanes), sums[i]);
    for_lanes(depth - step, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      sums[0] = Simd::fma(load(states + step + i, count), load(w + step + i, count), sums[0]);
    });
    out[row] = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

void softmax(int64_t n, float* row) {
  float largest = row[0];
  for (int64_t i = 1; i < n; ++i) largest = row[i] > largest ? row[i] : largest;
  Float total = zeros();
  for_lanes(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    store(row + i, exponential(load(row + i, count) - largest), count);
    total = total + load(row + i, count);  // zeros behind the last
  });
  const float scale = 1.f / sum_lanes(total);
  for_lanes(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    store(row + i, load(row + i, count) * scale, count);
  });
}

}  // namespace
}  // namespace flex
