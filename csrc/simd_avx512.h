// Sixteen lanes: AVX-512 (F, BW, DQ, VL). Include <immintrin.h> before, and compile under that target.
#pragma once
#include <cstdint>

namespace flex {
namespace {

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kPanelRows = 12, kPanelVectors = 2;  // 24 sums, 2 columns, 1 broadcast in 32 registers
  typedef __m512 Float;
  typedef uint32_t Word __attribute__((vector_size(64)));
  typedef uint16_t Half __attribute__((vector_size(32)));

  static inline __attribute__((always_inline)) Float broadcast(float x) { return _mm512_set1_ps(x); }
  static inline __attribute__((always_inline)) Float fma(Float a, Float b, Float c) {
    return _mm512_fmadd_ps(a, b, c);
  }
#if defined(FLEX_BF16_PAIRS)
  // c + a.low * b.low + a.high * b.high, the words of a and b being pairs of bf16
  static inline __attribute__((always_inline)) Float dot_pairs(Float a, Float b, Float c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
#endif
  static inline __attribute__((always_inline)) void transpose(Float (&rows)[16]) {
    Float pairs[16], quads[16], halves[16];
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; ++j) {
        quads[i + 2 * j] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
        quads[i + 2 * j + 1] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
      }
    for (int i = 0; i < 16; i += 8)  // 128-bit lanes (0, 2) and (1, 3) of rows four apart
      for (int j = 0; j < 4; ++j) {
        halves[i + j] = _mm512_shuffle_f32x4(quads[i + j], quads[i + j + 4], 0x88);
        halves[i + j + 4] = _mm512_shuffle_f32x4(quads[i + j], quads[i + j + 4], 0xdd);
      }
    for (int j = 0; j < 8; ++j) {
      rows[j] = _mm512_shuffle_f32x4(halves[j], halves[j + 8], 0x88);
      rows[j + 8] = _mm512_shuffle_f32x4(halves[j], halves[j + 8], 0xdd);
    }
  }
};

}  // namespace
}  // namespace flex
