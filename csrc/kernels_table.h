// The product, the row functions, and the table of one instruction set. Last header of a kernels_<isa>.cpp.
#pragma once
#include <utility>

#include "kernels_pack.h"

namespace flex {
namespace {

template <bool kPairs>
FLEX_INLINE Float multiply_add(Float a, Float b, Float c) {
#if defined(FLEX_BF16_PAIRS)
  if constexpr (kPairs) return Simd::dot_pairs(a, b, c);
#endif
  return Simd::fma(a, b, c);
}

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

// C tile of kRows x kPanelColumns. What was in C is added at the end: nobody waits for it.
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

template <Activation kActivation, class T>
void glu_row(int64_t n, const float* gate, const float* up, T* kept_gate, T* kept_up, T* activations) {
  for_lanes(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Float g = load(gate + i, count), u = load(up + i, count);
    if (kept_gate != nullptr) {
      store(kept_gate + i, g, count);
      store(kept_up + i, u, count);
    }
    store(activations + i, activation_of<kActivation>(g).value * u, count);
  });
}

template <class T>
void glu(Activation activation, int64_t n, const float* gate, const float* up, void* kept_gate, void* kept_up,
         void* activations) {
  const auto row = activation == Activation::kSilu   ? glu_row<Activation::kSilu, T>
                   : activation == Activation::kGelu ? glu_row<Activation::kGelu, T>
                                                     : glu_row<Activation::kGeluTanh, T>;
  row(n, gate, up, static_cast<T*>(kept_gate), static_cast<T*>(kept_up), static_cast<T*>(activations));
}

template <Activation kActivation, class T>
float d_glu_row(int64_t n, const float* d_activations, const T* gate, const T* up, float scale, T* d_gate, T* d_up,
                T* activations) {
  Float product = zeros();
  for_lanes(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Float d = load(d_activations + i, count), g = load(gate + i, count), u = load(up + i, count);
    const ActivationValue act = activation_of<kActivation>(g);
    const Float a = act.value * u, scaled = d * scale;
    product = Simd::fma(d, a, product);
    if (activations != nullptr) store(activations + i, a, count);
    if (d_gate == nullptr) return;
    store(d_gate + i, scaled * u * act.derivative, count);
    store(d_up + i, scaled * act.value, count);
  });
  return sum_lanes(product);
}

template <class T>
float d_glu(Activation activation, int64_t n, const float* d_activations, const void* gate, const void* up, float scale,
            void* d_gate, void* d_up, void* activations) {
  const auto row = activation == Activation::kSilu   ? d_glu_row<Activation::kSilu, T>
                   : activation == Activation::kGelu ? d_glu_row<Activation::kGelu, T>
                                                     : d_glu_row<Activation::kGeluTanh, T>;
  return row(n, d_activations, static_cast<const T*>(gate), static_cast<const T*>(up), scale, static_cast<T*>(d_gate),
             static_cast<T*>(d_up), static_cast<T*>(activations));
}

template <class T>
void sum_rows(int64_t n, int64_t count, const float* const* rows, const float* weights, void* out) {
  for_lanes(n, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
    Float sum = zeros();
    for (int64_t row = 0; row < count; ++row)
      sum = Simd::fma(load(rows[row] + i, lanes), Simd::broadcast(weights[row]), sum);
    store(static_cast<T*>(out) + i, sum, lanes);
  });
}

template <class T>
void residual_sums(int64_t n, const float* out, const void* target, float* sums) {
  Float residual = zeros(), inner = zeros(), energy = zeros();
  for_lanes(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Float y = load(out + i, count), f = load(static_cast<const T*>(target) + i, count), difference = f - y;
    residual = Simd::fma(difference, difference, residual);
    inner = Simd::fma(f, y, inner);
    energy = Simd::fma(y, y, energy);
  });
  sums[0] += sum_lanes(residual);
  sums[1] += sum_lanes(inner);
  sums[2] += sum_lanes(energy);
}

template <class T>
void neuron_sums(int64_t n, const void* activations, const float* products, float* energy, float* correlation) {
  for_lanes(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Float a = load(static_cast<const T*>(activations) + i, count);
    store(energy + i, Simd::fma(a, a, load(energy + i, count)), count);
    store(correlation + i, Simd::fma(a, load(products + i, count), load(correlation + i, count)), count);
  });
}

template <class T>
void add_squares(int64_t n, const void* row, float* sums) {
  for_lanes(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Float x = load(static_cast<const T*>(row) + i, count);
    store(sums + i, Simd::fma(x, x, load(sums + i, count)), count);
  });
}

template <bool kPairs>
constexpr Kernels kernel_table(const char* name) {
  Kernels table{};
  table.name = name;
  table.panel_rows = kPanelRows;
  table.panel_columns = kPanelColumns;
  table.word_elements = kPairs ? 2 : 1;
  if constexpr (!kPairs) {  // a pair is bf16 on both sides
    table.pack_a_rows[0] = pack_a_rows<false, float>;
    table.pack_a_depth[0] = pack_a_depth<false, float>;
    table.pack_b_rows[0] = pack_b_rows<false, float>;
    table.pack_b_depth[0] = pack_b_depth<false, float>;
    table.multiply_in_place[0] = multiply_in_place<false, float>;
  }
  table.pack_a_rows[1] = pack_a_rows<kPairs, Bfloat16>;
  table.pack_a_depth[1] = pack_a_depth<kPairs, Bfloat16>;
  table.pack_b_rows[1] = pack_b_rows<kPairs, Bfloat16>;
  table.pack_b_depth[1] = pack_b_depth<kPairs, Bfloat16>;
  table.multiply_in_place[1] = multiply_in_place<kPairs, Bfloat16>;
  table.multiply = multiply<kPairs>;
  table.glu[0] = glu<float>, table.glu[1] = glu<Bfloat16>;
  table.d_glu[0] = d_glu<float>, table.d_glu[1] = d_glu<Bfloat16>;
  table.sum_rows[0] = sum_rows<float>, table.sum_rows[1] = sum_rows<Bfloat16>;
  table.residual_sums[0] = residual_sums<float>, table.residual_sums[1] = residual_sums<Bfloat16>;
  table.neuron_sums[0] = neuron_sums<float>, table.neuron_sums[1] = neuron_sums<Bfloat16>;
  table.add_squares[0] = add_squares<float>, table.add_squares[1] = add_squares<Bfloat16>;
  return table;
}

}  // namespace
}  // namespace flex
