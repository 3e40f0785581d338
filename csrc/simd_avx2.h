// Eight lanes: AVX2 with FMA. Include <immintrin.h> before, and compile under that target.
#pragma once
#include <cstdint>

namespace flex {
namespace {

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kPanelRows = 6, kPanelVectors = 2;  // 12 sums, 2 columns, 1 broadcast in 16 registers
  typedef __m256 Float;
  typedef uint32_t Word __attribute__((vector_size(32)));
  typedef uint16_t Half __attribute__((vector_size(16)));

  static inline __attribute__((always_inline)) Float broadcast(float x) { return _mm256_set1_ps(x); }
  static inline __attribute__((always_inline)) Float fma(Float a, Float b, Float c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  static inline __attribute__((always_inline)) void transpose(Float (&rows)[8]) {
    Float pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
        quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
      }
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
  }
};

}  // namespace
}  // namespace flex
