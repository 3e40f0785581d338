// Four lanes by the compiler's vector extension: SSE2, NEON, or whatever the machine has.
#pragma once
#include <cstdint>
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace flex {
namespace {

struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kPanelRows = 4, kPanelVectors = 2;  // 8 sums in 16 registers
  typedef float Float __attribute__((vector_size(16)));
  typedef uint32_t Word __attribute__((vector_size(16)));
  typedef uint16_t Half __attribute__((vector_size(8)));

  static Float broadcast(float x) { return Float{x, x, x, x}; }
  static Float fma(Float a, Float b, Float c) {
#if defined(__aarch64__)
    return (Float)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
  }
  static Word widen(Half halves) { return __builtin_convertvector(halves, Word); }
  static Half low_halves(Word words) { return __builtin_convertvector(words, Half); }
  // Bytes and half bytes of a vector's worth of neighbours, each in a word of its own.
  static Float signed_bytes(const int8_t* bytes) {
    return Float{float(bytes[0]), float(bytes[1]), float(bytes[2]), float(bytes[3])};
  }
  static Word nibbles(const uint8_t* bytes) {
    return Word{bytes[0] & 15u, uint32_t{bytes[0]} >> 4, bytes[1] & 15u, uint32_t{bytes[1]} >> 4};
  }
  // 16 values, and those at the indices: their lowest four bits.
  struct Table {
    float values[16];
  };
  static Float lookup(const Table& table, Word indices) {
    indices &= 15u;
    return Float{table.values[indices[0]], table.values[indices[1]], table.values[indices[2]], table.values[indices[3]]};
  }
  static Float halves(float low, float high) { return Float{low, low, high, high}; }
  // A NaN in x stays a NaN.
  static Float at_least(Float x, float low) {
    for (int i = 0; i < 4; ++i) x[i] = x[i] < low ? low : x[i];
    return x;
  }
  static Float at_most(Float x, float high) {
    for (int i = 0; i < 4; ++i) x[i] = x[i] > high ? high : x[i];
    return x;
  }
  static void transpose(Float (&rows)[4]) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < i; ++j) {
        const float upper = rows[j][i];
        rows[j][i] = rows[i][j];
        rows[i][j] = upper;
      }
  }
};

}  // namespace
}  // namespace flex
