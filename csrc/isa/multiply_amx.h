// The product in AMX's tile registers: 16 rows of 64 bytes each. The panels are what they read: a chunk of an A panel is
// 16 rows of 16 pairs, 16 depth steps of half a B panel are 16 rows of 16 columns.
#pragma once
#include "isa/few_rows.h"

namespace flex {
namespace {

static_assert(kPanelRows == 16 && kPanelColumns == 32 && kChunkWords == 16, "one chunk of a panel is one tile register");

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC 12's own _tile_loadconfig and _tile_loadd do not say that they read memory: what was stored before, and is read by
// nothing else, may be left out.
FLEX_INLINE void load_config(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
FLEX_INLINE void finish_stores() { asm volatile("" ::: "memory"); }

// C tile of one or two panels of 16 rows and 32 columns. Tile registers 0 to 3 are its quarters, 4 and 5 of A, 6 and 7 of B.
template <bool kTwoPanels>
FLEX_INLINE void tile(int64_t chunks, const float* a, int64_t a_panel, const float* b, const float* last_b, float* c,
                      int64_t c_stride, bool accumulate) {
  constexpr int64_t kBytes = sizeof(float), kLeft = 16;
  float* const below = c + kPanelRows * c_stride;
  if (accumulate) {
    _tile_loadd(0, c, c_stride * kBytes);
    _tile_loadd(1, c + kLeft, c_stride * kBytes);
    if (kTwoPanels) {
      _tile_loadd(2, below, c_stride * kBytes);
      _tile_loadd(3, below + kLeft, c_stride * kBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (kTwoPanels) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk, a += kPanelRows * kChunkWords, b += kChunkWords * kPanelColumns) {
    const float* const b_here = chunk + 1 < chunks ? b : last_b;
    _tile_loadd(6, b_here, kPanelColumns * kBytes);
    _tile_loadd(4, a, kChunkWords * kBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b_here + kLeft, kPanelColumns * kBytes);
    _tile_dpbf16ps(1, 4, 7);
    if (kTwoPanels) {
      _tile_loadd(5, a + a_panel, kChunkWords * kBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_stride * kBytes);
  _tile_stored(1, c + kLeft, c_stride * kBytes);
  if (kTwoPanels) {
    _tile_stored(2, below, c_stride * kBytes);
    _tile_stored(3, below + kLeft, c_stride * kBytes);
  }
}

// Rows past the last one, up to a whole panel, are multiplied and written too: whatever lies in A's panel.
template <bool kPairs>
void multiply(int64_t rows, int64_t columns, int64_t words, const float* a, const float* b, float* c, int64_t c_stride,
              bool accumulate, Fetch&) {
  static_assert(kPairs, "bf16 alone");
  const TileConfig config;
  load_config(config);
  const int64_t chunks = (words + kChunkWords - 1) / kChunkWords, rest = words % kChunkWords;
  const int64_t a_panel = chunks * kChunkWords * kPanelRows;
  alignas(64) float padded[kChunkWords * kPanelColumns] = {};  // a last chunk that is not whole; A's is filled with zeros
  for (int64_t column = 0; column < columns; column += kPanelColumns) {
    const float* const b_panel = b + column * words;
    const float* last = b_panel + (words - kChunkWords) * kPanelColumns;
    if (rest != 0) {
      std::memcpy(padded, b_panel + (words - rest) * kPanelColumns, rest * kPanelColumns * sizeof(float));
      finish_stores();
      last = padded;
    }
    int64_t row = 0;
    for (; row + kPanelRows < rows; row += 2 * kPanelRows)
      tile<true>(chunks, a + row * chunks * kChunkWords, a_panel, b_panel, last, c + row * c_stride + column, c_stride,
                 accumulate);
    if (row < rows)
      tile<false>(chunks, a + row * chunks * kChunkWords, a_panel, b_panel, last, c + row * c_stride + column, c_stride,
                  accumulate);
  }
  _tile_release();
}

// Few rows and B's memory rows along the depth: the tile turns over, C^T = B^T A^T. 16 memory rows are a tile register as
// they lie; A's rows are packed as 16 columns: a panel is [depth / 16 words][16 words][16 rows]. Weights are then read
// from memory in one direction, which pays as long as all the rows stay in the second cache.
template <class T>
constexpr int kFewRows = 192;
constexpr int kRowsAtOnce = 4 * kPanelRows;
constexpr int64_t kTileWords = kChunkWords * kPanelRows;

template <bool kPairs, class T>
void pack_few(Rows source, int64_t rows, int64_t begin, int64_t depth, float* panels) {
  constexpr int64_t kStep = 2 * kLanes;
  for (int64_t row = 0; row < rows; row += kPanelRows) {
    const T* from[kPanelRows];  // past the last row: that one again, and its sums are never read
    for (int64_t i = 0; i < kPanelRows; ++i) {
      const int64_t own = row + i < rows ? row + i : rows - 1;
      from[i] = static_cast<const T*>(source.data) + (source.gather ? source.gather[own] : own) * source.stride + begin;
    }
    for (int64_t step = 0; step < depth; step += kStep, panels += kTileWords) {
      Float words[kPanelRows];
      for (int64_t i = 0; i < kPanelRows; ++i) words[i] = load_words<kPairs>(from[i] + step, depth - step);
      Simd::transpose(words);
      for (int64_t i = 0; i < kChunkWords; ++i) store(panels + i * kPanelRows, words[i]);
    }
  }
}

// Tile registers 0 to 3 are the sums of up to 64 rows, 4 is of B (bf16 in memory), 5 to 7 of A.
template <int kPanels>
void turned_tile(Rows b, Rows last_b, int64_t chunks, const float* a, float (&sums)[4][kTileWords]) {
  constexpr int64_t kBytes = sizeof(float), kRowBytes = kPanelRows * kBytes;
  const int64_t panel = chunks * kTileWords;
  _tile_zero(0);
  if (kPanels > 1) _tile_zero(1);
  if (kPanels > 2) _tile_zero(2);
  if (kPanels > 3) _tile_zero(3);
  for (int64_t chunk = 0; chunk < chunks; ++chunk, a += kTileWords) {
    if (chunk + 1 < chunks)
      _tile_loadd(4, static_cast<const char*>(b.data) + chunk * kLineBytes, b.stride * 2);
    else
      _tile_loadd(4, last_b.data, last_b.stride * 2);
    _tile_loadd(5, a, kRowBytes);
    _tile_dpbf16ps(0, 4, 5);
    if (kPanels > 1) {
      _tile_loadd(6, a + panel, kRowBytes);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (kPanels > 2) {
      _tile_loadd(7, a + 2 * panel, kRowBytes);
      _tile_dpbf16ps(2, 4, 7);
    }
    if (kPanels > 3) {
      _tile_loadd(5, a + 3 * panel, kRowBytes);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, sums[0], kRowBytes);
  if (kPanels > 1) _tile_stored(1, sums[1], kRowBytes);
  if (kPanels > 2) _tile_stored(2, sums[2], kRowBytes);
  if (kPanels > 3) _tile_stored(3, sums[3], kRowBytes);
}

template <bool kPairs, class T>
void multiply_in_place(int64_t rows, int64_t columns, int64_t depth, const float* a, Rows b, int64_t first, float* c,
                       int64_t c_stride) {
  constexpr int64_t kStep = 2 * kChunkWords;
  const int64_t chunks = (depth + kStep - 1) / kStep, before_last = (chunks - 1) * kStep;
  alignas(64) T padded[kPanelRows * kStep] = {};  // a last chunk that is not whole
  alignas(64) float sums[4][kTileWords] = {};
  TileConfig config;
  load_config(config);
  for (int64_t column = 0; column < columns; column += kPanelRows) {
    const int64_t count = columns - column < kPanelRows ? columns - column : kPanelRows;
    if (count < kPanelRows) {
      for (int i = 0; i < 5; ++i) config.rows[i] = static_cast<uint8_t>(count);
      load_config(config);
    }
    const T* const from = static_cast<const T*>(b.data) + (first + column) * b.stride;
    Rows last{from + before_last, b.stride, nullptr};
    if (depth - before_last < kStep) {
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(padded + i * kStep, from + i * b.stride + before_last, (depth - before_last) * sizeof(T));
      finish_stores();
      last = {padded, kStep, nullptr};
    }
    for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
      const int64_t left = rows - row < kRowsAtOnce ? rows - row : kRowsAtOnce;
      const auto tile = left <= 16 ? turned_tile<1> : left <= 32 ? turned_tile<2> : left <= 48 ? turned_tile<3> : turned_tile<4>;
      tile({from, b.stride, nullptr}, last, chunks, a + row * chunks * kChunkWords, sums);
      for (int64_t panel = 0; panel < left; panel += kPanelRows) {
        Float upright[kPanelRows];
        for (int64_t i = 0; i < kPanelRows; ++i) upright[i] = load(sums[panel / kPanelRows] + i * kPanelRows);
        Simd::transpose(upright);
        for (int64_t i = 0; i < kPanelRows && panel + i < left; ++i)
          store(c + (row + panel + i) * c_stride + column, upright[i]);
      }
    }
  }
  _tile_release();
}

}  // namespace
}  // namespace flex
