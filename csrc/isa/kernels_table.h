// The row functions, and the table of one instruction set. Last header of a kernels_<isa>.cpp, after one multiply_*.h.
#pragma once
#include "isa/kernels_pack.h"
#include "isa/row_products.h"

namespace flex {
namespace {

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
void add_squares(int64_t n, Rows row, float* sums) {
  const Row<T> own = Row<T>::of(row, 0, 0);
  for_lanes(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Float x = own.lanes(i, count);
    store(sums + i, Simd::fma(x, x, load(sums + i, count)), count);
  });
}

// Frozen weights kept as codes of type T.
template <bool kPairs, class T>
constexpr void add_codes(Kernels& table, Scalar scalar) {
  const int index = static_cast<int>(scalar);
  table.pack_b_rows[index] = pack_b_rows<kPairs, T>;
  table.pack_b_depth[index] = pack_b_depth<kPairs, T>;
  table.few_rows[index] = kRowsInPlace<T>;
  table.multiply_in_place[index] = multiply_few<kPairs, T>;
  table.pack_few[index][1] = pack_a_rows<kPairs, Bfloat16>;
  if constexpr (!kPairs) table.pack_few[index][0] = pack_a_rows<false, float>;
  table.add_squares[index] = add_squares<T>;
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
    table.pack_few[0][0] = table.pack_few[1][0] = pack_few<false, float>;
    table.multiply_in_place[0] = multiply_in_place<false, float>;
    table.row_products[0] = row_products<false, float>;
  }
  table.pack_a_rows[1] = pack_a_rows<kPairs, Bfloat16>;
  table.pack_a_depth[1] = pack_a_depth<kPairs, Bfloat16>;
  table.pack_b_rows[1] = pack_b_rows<kPairs, Bfloat16>;
  table.pack_b_depth[1] = pack_b_depth<kPairs, Bfloat16>;
  table.few_rows[0] = kFewRows<float>, table.few_rows[1] = kFewRows<Bfloat16>;
  table.pack_few[0][1] = table.pack_few[1][1] = pack_few<kPairs, Bfloat16>;
  table.multiply_in_place[1] = multiply_in_place<kPairs, Bfloat16>;
  table.multiply = multiply<kPairs>;
  table.row_products[1] = row_products<kPairs, Bfloat16>;
  table.row_dots[0] = row_dots<float>, table.row_dots[1] = row_dots<Bfloat16>;
  table.softmax = softmax;
  table.glu[0] = glu<float>, table.glu[1] = glu<Bfloat16>;
  table.d_glu[0] = d_glu<float>, table.d_glu[1] = d_glu<Bfloat16>;
  table.sum_rows[0] = sum_rows<float>, table.sum_rows[1] = sum_rows<Bfloat16>;
  table.residual_sums[0] = residual_sums<float>, table.residual_sums[1] = residual_sums<Bfloat16>;
  table.neuron_sums[0] = neuron_sums<float>, table.neuron_sums[1] = neuron_sums<Bfloat16>;
  table.add_squares[0] = add_squares<float>, table.add_squares[1] = add_squares<Bfloat16>;
  add_codes<kPairs, Int8>(table, Scalar::kInt8);
  add_codes<kPairs, Nf4>(table, Scalar::kNf4);
  if constexpr (!kPairs) {
    constexpr int kIndex = static_cast<int>(Scalar::kNf4);
    table.pack_few[kIndex][0] = pack_eighths<float>, table.pack_few[kIndex][1] = pack_eighths<Bfloat16>;
    table.multiply_in_place[kIndex] = multiply_few_nf4;
    table.few_rows[kIndex] = kMostNf4Rows;
  }
  return table;
}

}  // namespace
}  // namespace flex
