// Eight lanes: AVX2 with FMA. Include <immintrin.h> before, and compile under that target.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace flex {
namespace {

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kPanelRows = 6, kPanelVectors = 2;  // 12 sums, 2 columns, 1 broadcast in 16 registers
  typedef __m256 Float;
  typedef uint32_t Word __attribute__((vector_size(32)));
  typedef uint16_t Half __attribute__((vector_size(16)));

  static FLEX_INLINE Float broadcast(float x) { return _mm256_set1_ps(x); }
  static FLEX_INLINE Float fma(Float a, Float b, Float c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  static FLEX_INLINE Word widen(Half halves) {
    return (Word)_mm256_cvtepu16_epi32((__m128i)halves);
  }
  static FLEX_INLINE Half low_halves(Word words) {  // each below 2^16
    const __m256i halves = _mm256_packus_epi32((__m256i)words, (__m256i)words);
    return (Half)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0xd8));
  }
  // Bytes and half bytes of a vector's worth of neighbours, each in a word of its own.
  static FLEX_INLINE Float signed_bytes(const int8_t* bytes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)bytes)));
  }
  static FLEX_INLINE Word nibbles(const uint8_t* bytes) {
    int32_t four;
    std::memcpy(&four, bytes, sizeof(four));
    const __m128i once = _mm_cvtsi32_si128(four);
    const __m256i twice = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(once, once));
    const __m256i shifts = _mm256_set_epi32(4, 0, 4, 0, 4, 0, 4, 0);
    return (Word)_mm256_and_si256(_mm256_srlv_epi32(twice, shifts), _mm256_set1_epi32(15));
  }
  // 16 values, and those at the indices: their lowest four bits.
  struct Table {
    __m256 low, high;
  };
  static FLEX_INLINE Float lookup(const Table& table, Word indices) {
    const __m256i at = (__m256i)indices;
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, at), _mm256_permutevar8x32_ps(table.high, at),
                            (__m256)_mm256_slli_epi32(at, 28));
  }
  static FLEX_INLINE Float halves(float low, float high) {
    return _mm256_blend_ps(broadcast(low), broadcast(high), 0xf0);
  }
  // A NaN in x stays a NaN: these instructions then return their second operand.
  static FLEX_INLINE Float at_least(Float x, float low) {
    return _mm256_max_ps(broadcast(low), x);
  }
  static FLEX_INLINE Float at_most(Float x, float high) {
    return _mm256_min_ps(broadcast(high), x);
  }
  static FLEX_INLINE void transpose(Float (&rows)[8]) {
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
