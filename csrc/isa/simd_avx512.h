// Sixteen lanes: AVX-512 (F, BW, DQ, VL). Include <immintrin.h> before, and compile under that target.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace flex {
namespace {

struct Simd {
  static constexpr int kLanes = 16;
#if defined(FLEX_AMX)
  static constexpr int kPanelRows = 16, kPanelVectors = 2;  // a tile register has 16 rows of 16 words
#else
  static constexpr int kPanelRows = 12, kPanelVectors = 2;  // 24 sums, 2 columns, 1 broadcast in 32 registers
#endif
  typedef __m512 Float;
  typedef uint32_t Word __attribute__((vector_size(64)));
  typedef uint16_t Half __attribute__((vector_size(32)));

  static FLEX_INLINE Float broadcast(float x) { return _mm512_set1_ps(x); }
  static FLEX_INLINE Float fma(Float a, Float b, Float c) {
    return _mm512_fmadd_ps(a, b, c);
  }
#if defined(FLEX_BF16_PAIRS)
  // c + a.low * b.low + a.high * b.high, the words of a and b being pairs of bf16
  static FLEX_INLINE Float dot_pairs(Float a, Float b, Float c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
  static FLEX_INLINE Half to_bfloat16(Float value) {
    return (Half)_mm512_cvtneps_pbh(value);
  }
#endif
  static FLEX_INLINE Word widen(Half halves) {
    return (Word)_mm512_cvtepu16_epi32((__m256i)halves);
  }
  static FLEX_INLINE Half low_halves(Word words) {
    return (Half)_mm512_cvtepi32_epi16((__m512i)words);
  }
  // Bytes and half bytes of a vector's worth of neighbours, each in a word of its own.
  static FLEX_INLINE Word unsigned_bytes(const uint8_t* bytes) {
    return (Word)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
  }
  static FLEX_INLINE Float signed_bytes(const int8_t* bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)bytes)));
  }
  static FLEX_INLINE void signed_byte_pairs(const int8_t* bytes, Float& low, Float& high) {
    const __m512i both = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)bytes));
    low = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(both, 24), 24));
    high = _mm512_cvtepi32_ps(_mm512_srai_epi32(both, 8));
  }
  static FLEX_INLINE Word nibbles(const uint8_t* bytes) {
    const __m128i eight = _mm_loadl_epi64((const __m128i*)bytes);
    const __m512i twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(eight, eight));
    const __m512i shifts = _mm512_set_epi32(4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0);
    return (Word)_mm512_and_si512(_mm512_srlv_epi32(twice, shifts), _mm512_set1_epi32(15));
  }
  // 16 values, and those at the indices: their lowest four bits.
  typedef __m512 Table;
  static FLEX_INLINE Float lookup(Table table, Word indices) {
    return _mm512_permutexvar_ps((__m512i)indices, table);
  }
  static FLEX_INLINE Float halves(float low, float high) {
    return _mm512_mask_blend_ps(0xff00, broadcast(low), broadcast(high));
  }
  // A NaN in x stays a NaN: these instructions then return their second operand.
  static FLEX_INLINE Float at_least(Float x, float low) {
    return _mm512_max_ps(broadcast(low), x);
  }
  static FLEX_INLINE Float at_most(Float x, float high) {
    return _mm512_min_ps(broadcast(high), x);
  }
  static FLEX_INLINE void transpose(Float (&rows)[16]) {
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
