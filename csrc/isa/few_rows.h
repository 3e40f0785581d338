// The product of few rows in vector registers, the weights read where and as they lie.
#pragma once
#include <utility>

#include "isa/kernels_pack.h"

namespace flex {
namespace {

// So few rows do not pay for packing B: they read it where it lies. By B's type, measured: codes are dequantised, and bf16
// that is widened is converted, once for every tile of rows, which few lanes take long for.
template <class T>
constexpr int kRowsInPlace = kLanes < 16 ? (sizeof(T) == sizeof(float) ? 24 : 6) : 96;
template <>
constexpr int kRowsInPlace<Int8> = kLanes < 16 ? 6 : 12;
template <>
constexpr int kRowsInPlace<Nf4> = kRowsInPlace<Int8>;

// Of a whole tile: as many sums as registers hold beside a vector a column. Each is a vector along the depth, and some
// transpositions turn them upright. Fewer rows read more columns at a time, so that no sum waits for itself. The columns that come
// next are fetched meanwhile, in the direction in which they lie: no prefetcher follows many short streams.
constexpr int kFewTileRows = 6;
template <int kRows>
constexpr int kFewColumns = kRows == 1 ? (kLanes < 8 ? kLanes : 8) : kRows == 2 ? kLanes / 2 : kLanes / 4;

template <bool kPairs, int kRows, class T>
void few_tile(int64_t first_row, int64_t columns, int64_t depth, const float* a, int64_t a_panel, const Rows& b, int64_t first,
              float* c, int64_t c_stride, const char* next, int64_t lines) {
  constexpr int kColumns = kFewColumns<kRows>, kParts = (kRows * kColumns + kLanes - 1) / kLanes;
  constexpr int64_t kStep = kPairs ? 2 * kLanes : kLanes, kVectors = kChunkWords / kLanes;
  const float* of_row[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
    of_row[i] = a + (first_row + i) / kPanelRows * a_panel + (first_row + i) % kPanelRows * kChunkWords;
  Row<T> from[kColumns];  // past the last column: that one again, and its sum is never read
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) from[j] = Row<T>::of(b, first + (j < columns ? j : columns - 1), 0);
  Float sums[kParts][kLanes];
#pragma GCC unroll 32
  for (int i = 0; i < kParts * kLanes; ++i) sums[i / kLanes][i % kLanes] = zeros();
  const auto add = [&](int64_t step, int64_t left) __attribute__((always_inline)) {
    const int64_t vector = step / kStep, at = vector / kVectors * kPanelRows * kChunkWords + vector % kVectors * kLanes;
    Float weights[kColumns];
    for (int64_t line = 0; line < lines; ++line, next += kLineBytes) __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) weights[j] = from[j].template words<kPairs>(step, left);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Float x = load(of_row[i] + at);
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; ++j) {
        Float& sum = sums[(i * kColumns + j) / kLanes][(i * kColumns + j) % kLanes];
        sum = multiply_add<kPairs>(x, weights[j], sum);
      }
    }
  };
  int64_t step = 0;
  for (; step + kStep <= depth; step += kStep) add(step, kStep);
  if (step < depth) add(step, depth - step);
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    Float(&own)[kLanes] = sums[part];
    Simd::transpose(own);
#pragma GCC unroll 16
    for (int i = 1; i < kLanes; ++i) own[0] = own[0] + own[i];
    float upright[kLanes];
    store(upright, own[0]);
    constexpr int kPartRows = kLanes / kColumns;
    for (int i = 0; i < kPartRows && part * kPartRows + i < kRows; ++i)
      std::memcpy(c + (first_row + part * kPartRows + i) * c_stride, upright + i * kColumns, kColumns * sizeof(float));
  }
}

template <bool kPairs, class T, int... kRow>
FLEX_INLINE void few_tile_of(int64_t rows, int64_t first_row, int64_t columns, int64_t depth, const float* a, int64_t a_panel,
                             const Rows& b, int64_t first, float* c, int64_t c_stride, const char* next, int64_t lines,
                             std::integer_sequence<int, kRow...>) {
  using Tile = void (*)(int64_t, int64_t, int64_t, const float*, int64_t, const Rows&, int64_t, float*, int64_t, const char*,
                        int64_t);
  static constexpr Tile kTiles[] = {few_tile<kPairs, kRow + 1, T>...};
  kTiles[rows - 1](first_row, columns, depth, a, a_panel, b, first, c, c_stride, next, lines);
}

// All rows beside some columns, then beside the next. Tiles of about as many rows each, each of which fetches its share.
template <bool kPairs, class T>
void multiply_few(int64_t rows, int64_t columns, int64_t depth, const float* a, Rows b, int64_t first, float* c,
                  int64_t c_stride) {
  const int64_t words = kPairs ? (depth + 1) / 2 : depth, a_panel = round_up(words, kChunkWords) * kPanelRows;
  const int64_t tiles = (rows + kFewTileRows - 1) / kFewTileRows;
  const int64_t width = rows == 1 ? kFewColumns<1> : rows == 2 ? kFewColumns<2> : kFewColumns<kFewTileRows>;
  const int64_t steps = (words + kLanes - 1) / kLanes, step_bytes = Row<T>::bytes(kPairs ? 2 * kLanes : kLanes);
  const int64_t lines = (width * step_bytes + tiles * kLineBytes - 1) / (tiles * kLineBytes);
  for (int64_t column = 0; column < columns; column += width) {
    const char* next = Row<T>::of(b, first + column, 0).address(0) + Row<T>::bytes(width * b.stride);
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile, next += steps * lines * kLineBytes) {
      const int64_t count = (rows - row + tiles - tile - 1) / (tiles - tile);
      few_tile_of<kPairs, T>(count, row, columns - column, depth, a, a_panel, b, first + column, c + column, c_stride,
                             next, lines, std::make_integer_sequence<int, kFewTileRows>());
      row += count;
    }
  }
}

// Beside nf4 weights as fp32: a word of memory is eight codes, and a vector of words gives every eighth weight of a block of
// 8 kLanes with a shift and a lookup. The rows of A are in that order: [block][eighth][kLanes], zeros behind the last.
constexpr int kMostNf4Rows = 4;
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
