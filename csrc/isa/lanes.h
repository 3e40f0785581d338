// What the kernels say to a vector, written once on top of `Simd`: load, store, walk a row, exp, erf.
// Included after one simd_*.h, under the target of the including file; everything has internal linkage.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace flex {
namespace {

using Float = Simd::Float;
using Word = Simd::Word;
constexpr int64_t kLanes = Simd::kLanes;
constexpr int kPanelRows = Simd::kPanelRows;
constexpr int kPanelVectors = Simd::kPanelVectors;
constexpr int kPanelColumns = kPanelVectors * Simd::kLanes;

FLEX_INLINE Float zeros() { return Simd::broadcast(0.f); }
FLEX_INLINE Float load(const float* source) {
  Float value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}
FLEX_INLINE Float load(const Bfloat16* source) {
  Simd::Half half;
  std::memcpy(&half, source, sizeof(half));
  return (Float)(Simd::widen(half) << 16);
}
FLEX_INLINE void store(float* target, Float value) { std::memcpy(target, &value, sizeof(value)); }
// Round to nearest even; a NaN stays a NaN. In the low half of each word.
FLEX_INLINE Word bfloat16_bits(Float value) {
  const Word bits = (Word)value;
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value == value ? rounded : (rounded & 0u) + 0x7fc0u;
}
FLEX_INLINE void store(Bfloat16* target, Float value) {
#if defined(FLEX_BF16_PAIRS)
  const Simd::Half half = Simd::to_bfloat16(value);
#else
  const Simd::Half half = Simd::low_halves(bfloat16_bits(value));
#endif
  std::memcpy(target, &half, sizeof(half));
}

// The first `count` elements, zeros behind them.
template <class T>
FLEX_INLINE Float load(const T* source, int64_t count) {
  if (count == kLanes) return load(source);
  T padded[kLanes] = {};
  std::memcpy(padded, source, count * sizeof(T));
  return load(padded);
}
template <class T>
FLEX_INLINE void store(T* target, Float value, int64_t count) {
  if (count == kLanes) return store(target, value);
  T padded[kLanes];
  store(padded, value);
  std::memcpy(target, padded, count * sizeof(T));
}

// c + a b; of pairs of bf16, both of their products.
template <bool kPairs>
FLEX_INLINE Float multiply_add(Float a, Float b, Float c) {
#if defined(FLEX_BF16_PAIRS)
  if constexpr (kPairs) return Simd::dot_pairs(a, b, c);
#endif
  return Simd::fma(a, b, c);
}

// body(i, count) for i = 0, kLanes, ...; count is kLanes but perhaps at the end. A count the compiler knows costs no
// branch, which is why the body appears twice.
template <class Body>
FLEX_INLINE void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

FLEX_INLINE float sum_lanes(Float value) {
  float lanes[kLanes], sum = 0.f;
  store(lanes, value);
  for (float lane : lanes) sum += lane;
  return sum;
}

FLEX_INLINE Float clamp(Float x, float low, float high) { return Simd::at_most(Simd::at_least(x, low), high); }

// e^x to about 1 ulp: 2^n e^r with |r| <= ln(2) / 2 (Cephes' expf).
FLEX_INLINE Float exponential(Float x) {
  x = clamp(x, -87.f, 88.f);
  const Float to_integer = Simd::broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Float shifted = Simd::fma(x, Simd::broadcast(1.44269504088896341f), to_integer);
  const Float n = shifted - to_integer;
  Float r = Simd::fma(n, Simd::broadcast(-0.693359375f), x);
  r = Simd::fma(n, Simd::broadcast(2.12194440e-4f), r);
  Float p = Simd::broadcast(1.9875691500e-4f);
  p = Simd::fma(p, r, Simd::broadcast(1.3981999507e-3f));
  p = Simd::fma(p, r, Simd::broadcast(8.3334519073e-3f));
  p = Simd::fma(p, r, Simd::broadcast(4.1665795894e-2f));
  p = Simd::fma(p, r, Simd::broadcast(1.6666665459e-1f));
  p = Simd::fma(p, r, Simd::broadcast(5.0000001201e-1f));
  p = Simd::fma(p * r, r, r + 1.f);
  const Word exponent = ((Word)shifted - (Word)to_integer + 127u) << 23;
  return p * (Float)exponent;
}

FLEX_INLINE Float sigmoid(Float x) { return 1.f / (1.f + exponential(-x)); }

// Rational in x^2 (Eigen's and XLA's fp32 erf), beyond |x| = 4 it is +-1 in fp32.
FLEX_INLINE Float error_function(Float x) {
  x = clamp(x, -4.f, 4.f);
  const Float square = x * x;
  Float p = Simd::broadcast(-2.72614225801306e-10f);
  for (float c : {2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f, -7.34990630326855e-04f,
                  -2.95459980854025e-03f, -1.60960333262415e-02f})
    p = Simd::fma(p, square, Simd::broadcast(c));
  Float q = Simd::broadcast(-1.45660718464996e-05f);
  for (float c : {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f, -1.42647390514189e-02f})
    q = Simd::fma(q, square, Simd::broadcast(c));
  return x * p / q;
}

struct ActivationValue {
  Float value, derivative;
};

// silu: x s(x).  gelu: x Phi(x).  gelu_tanh: x s(2u), 2u = 2 sqrt(2/pi) (x + 0.044715 x^3), because
// (1 + tanh u) / 2 = s(2u). The derivative of x s(v(x)) is s + x s (1 - s) v'(x).
template <Activation kActivation>
FLEX_INLINE ActivationValue activation_of(Float x) {
  if constexpr (kActivation == Activation::kSilu) {
    const Float s = sigmoid(x);
    return {x * s, s * Simd::fma(x, 1.f - s, Simd::broadcast(1.f))};
  } else if constexpr (kActivation == Activation::kGelu) {
    const Float phi = 0.5f + 0.5f * error_function(x * 0.70710678118654752f);
    const Float density = 0.39894228040143268f * exponential(-0.5f * x * x);
    return {x * phi, Simd::fma(x, density, phi)};
  } else {
    constexpr float kScale = 1.5957691216057308f, kCube = 0.044715f;
    const Float square = x * x;
    const Float s = sigmoid(kScale * x * Simd::fma(square, Simd::broadcast(kCube), Simd::broadcast(1.f)));
    const Float slope = kScale * Simd::fma(square, Simd::broadcast(3.f * kCube), Simd::broadcast(1.f));
    return {x * s, Simd::fma(x * s * (1.f - s), slope, s)};
  }
}

}  // namespace
}  // namespace flex
