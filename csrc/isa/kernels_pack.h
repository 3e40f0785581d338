// Packing: operands in memory -> panels of 32-bit words. Layouts in kernels.h. T is the scalar type in memory; with
// kPairs a word is two neighbouring bf16 along the depth, else bf16 is widened to fp32 here, once per use of the panel.
// Codes are dequantised here.
#pragma once
#include "isa/weight_row.h"

namespace flex {
namespace {

template <bool kPairs>
constexpr int64_t word_count(int64_t depth) {
  return kPairs ? (depth + 1) / 2 : depth;
}

// One depth step (a pair: two) of `count` neighbouring columns; the memory rows run across the depth.
template <bool kPairs, class T>
FLEX_INLINE Float load_across(const T* source, int64_t stride, int64_t steps, int64_t count) {
  const Float first = load(source, count);
  if constexpr (!kPairs) return first;
  const Float second = steps > 1 ? load(source + stride, count) : zeros();
  return (Float)(((Word)first >> 16) | (Word)second);
}

template <bool kPairs, class T>
FLEX_INLINE Float row_across(const Row<T>& row, const Row<T>& next, int64_t at, int64_t steps, int64_t count) {
  const Float first = row.lanes(at, count);
  if constexpr (!kPairs) return first;
  const Float second = steps > 1 ? next.lanes(at, count) : zeros();
  if constexpr (sizeof(T) == sizeof(Bfloat16)) return (Float)(((Word)first >> 16) | (Word)second);
#if defined(FLEX_BF16_PAIRS)
  return pairs_of(first, second);
#endif
}

// Weights come from main memory in pieces too short for the processor to see the pattern.
constexpr int64_t kRowsAhead = 16;
FLEX_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(row) + byte, 0, 2);
}

template <bool kPairs, class T>
void pack_a_rows(Rows source, int64_t rows, int64_t begin, int64_t depth, float* panels) {
  constexpr int64_t kVectors = kChunkWords / kLanes, kStep = kPairs ? 2 * kLanes : kLanes;
  const int64_t chunks = (word_count<kPairs>(depth) + kChunkWords - 1) / kChunkWords;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t memory_row = source.gather ? source.gather[row] : row;
    const T* from = static_cast<const T*>(source.data) + memory_row * source.stride + begin;
    float* to = panels + (row / kPanelRows * kPanelRows * chunks + row % kPanelRows) * kChunkWords;
    int64_t left = depth;
    for (; left >= kVectors * kStep; left -= kVectors * kStep, to += kPanelRows * kChunkWords)
      for (int64_t v = 0; v < kVectors; ++v, from += kStep) store(to + v * kLanes, load_words<kPairs>(from, kStep));
    for (int64_t v = 0; left > 0; ++v, from += kStep, left -= kStep)
      store(to + v * kLanes, load_words<kPairs>(from, left));
  }
}

template <bool kPairs, class T>
void pack_a_depth(Rows source, int64_t first, int64_t rows, int64_t begin, int64_t depth, const float* depth_scale,
                  float* panels) {
  constexpr int64_t kStep = kPairs ? 2 : 1;
  const int64_t words = word_count<kPairs>(depth), chunks = (words + kChunkWords - 1) / kChunkWords;
  for (int64_t word = 0; word < words; word += kLanes) {
    for (int64_t row = 0; row < rows; row += kLanes) {
      const int64_t count = rows - row < kLanes ? rows - row : kLanes;
      Float block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t step = begin + (word + i) * kStep, left = begin + depth - step;
        block[i] = zeros();
        if (left <= 0) continue;
        const T* from = static_cast<const T*>(source.data) + step * source.stride + first + row;
        if (depth_scale == nullptr) {
          block[i] = load_across<kPairs>(from, source.stride, left, count);
          continue;
        }
        block[i] = load(from, count) * depth_scale[step];
        if constexpr (kPairs) {
          const Float second = left > 1 ? load(from + source.stride, count) * depth_scale[step + 1] : zeros();
          block[i] = (Float)(bfloat16_bits(block[i]) | (bfloat16_bits(second) << 16));
        }
      }
      Simd::transpose(block);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t panel_row = (row + i) / kPanelRows * kPanelRows * chunks + (row + i) % kPanelRows;
        float* chunk = panels + (panel_row + word / kChunkWords * kPanelRows) * kChunkWords;
        store(chunk + word % kChunkWords, block[i]);
      }
    }
  }
}

// kLanes rows, 32 bits of memory at a time: turned upright as they lie, then unpacked (widened, dequantised).
template <class T>
FLEX_INLINE void pack_upright(const Row<T> (&from)[kLanes], int64_t at, int64_t ahead, float* to) {
  Float block[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    const char* const source = from[i].address(at);
    __builtin_prefetch(source + ahead, 0, 2);
    std::memcpy(&block[i], source, sizeof(Float));
  }
  Simd::transpose(block);
  constexpr int kPacked = Row<T>::kPacked;
  Float scales = Row<T>::row_scales(from, at);
  for (int i = 0; i < kLanes; ++i) {
    if (std::is_same_v<T, Nf4> && i > 0 && i * kPacked % kNf4Group == 0) scales = Row<T>::row_scales(from, at + i * kPacked);
#pragma GCC unroll 8
    for (int k = 0; k < kPacked; ++k)
      store(to + (i * kPacked + k) * kPanelColumns, Row<T>::unpacked((Word)block[i], k, scales));
  }
}

template <bool kPairs, class T>
void pack_b_rows(Rows source, int64_t first, int64_t columns, int64_t begin, int64_t depth, float* panels) {
  constexpr int64_t kStep = kPairs ? 2 : 1;
  const int64_t words = word_count<kPairs>(depth);
  for (int64_t column = 0; column < columns; column += kLanes) {
    const int64_t count = columns - column < kLanes ? columns - column : kLanes;
    Row<T> from[kLanes];  // past the last column: that one again, and what comes of it is zero
    for (int64_t i = 0; i < kLanes; ++i)
      from[i] = Row<T>::of(source, first + column + (i < count ? i : count - 1), begin);
    const int64_t ahead = Row<T>::bytes(kRowsAhead * source.stride);
    float* to = panels + column / kPanelColumns * kPanelColumns * words + column % kPanelColumns;
    int64_t word = 0;
    if constexpr (!kPairs)
      for (constexpr int64_t kWhole = kLanes * Row<T>::kPacked; count == kLanes && word + kWhole <= words; word += kWhole)
        pack_upright(from, word, ahead, to + word * kPanelColumns);
    for (; word < words; word += kLanes) {
      const int64_t left = depth - word * kStep, last = words - word < kLanes ? words - word : kLanes;
      Float block[kLanes];
      if (count == kLanes && left >= kLanes * kStep) {
        for (int64_t i = 0; i < kLanes; ++i) __builtin_prefetch(from[i].address(word * kStep) + ahead, 0, 2);
        for (int64_t i = 0; i < kLanes; ++i) block[i] = from[i].template words<kPairs>(word * kStep, kLanes * kStep);
        Simd::transpose(block);
        for (int64_t i = 0; i < kLanes; ++i) store(to + (word + i) * kPanelColumns, block[i]);
        continue;
      }
      for (int64_t i = 0; i < kLanes; ++i)
        block[i] = i < count ? from[i].template words<kPairs>(word * kStep, left) : zeros();
      Simd::transpose(block);
      for (int64_t i = 0; i < last; ++i) store(to + (word + i) * kPanelColumns, block[i]);
    }
  }
  const int64_t used = round_up(columns, kLanes);
  for (int64_t column = used; column < round_up(columns, kPanelColumns); column += kLanes)
    for (int64_t word = 0; word < words; ++word)
      store(panels + (used - used % kPanelColumns) * words + word * kPanelColumns + column % kPanelColumns, zeros());
}

// Four panels at a time: reads of a few cache lines, and four places to write that do not share a set of the cache.
template <bool kPairs, class T>
void pack_b_depth(Rows source, int64_t first, int64_t columns, int64_t begin, int64_t depth, float* panels) {
  constexpr int64_t kStep = kPairs ? 2 : 1, kGroup = 4 * kPanelColumns;
  const int64_t words = word_count<kPairs>(depth);
  for (int64_t group = 0; group < columns; group += kGroup) {
    const int64_t count = columns - group < kGroup ? columns - group : kGroup, whole = count / kPanelColumns;
    for (int64_t word = 0; word < words; ++word) {
      const int64_t steps = depth - word * kStep, row = begin + word * kStep;
      const Row<T> from = Row<T>::of(source, row, first + group);
      const Row<T> next = Row<T>::of(source, steps > 1 ? row + 1 : row, first + group);
      float* to = panels + group * words + word * kPanelColumns;
      for (int64_t step = 0; step < kStep; ++step)
        prefetch_row(from.address(0) + Row<T>::bytes((kRowsAhead + step) * source.stride), Row<T>::bytes(count));
      int64_t at = 0;
      for (int64_t panel = 0; panel < whole; ++panel, at += kPanelColumns, to += kPanelColumns * words)
        for (int64_t v = 0; v < kPanelColumns; v += kLanes)
          store(to + v, row_across<kPairs>(from, next, at + v, steps, kLanes));
      for (int64_t v = 0; at < count && v < kPanelColumns; v += kLanes) {
        const int64_t left = count - at - v, lanes = left < 0 ? 0 : left < kLanes ? left : kLanes;
        store(to + v, lanes ? row_across<kPairs>(from, next, at + v, steps, lanes) : zeros());
      }
    }
  }
}

}  // namespace
}  // namespace flex
