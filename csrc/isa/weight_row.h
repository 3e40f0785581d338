// A memory row of a weight, in any scalar type, as the loops read it: whole vectors of fp32, or of words.
// Codes become `code * scale`, in fp32 or, as pairs, rounded to bf16; what stands past the end of an nf4 row is zero.
#pragma once
#include "isa/lanes.h"

namespace flex {
namespace {

// `count` words that lie side by side in memory along the depth; `elements` are left from here to the end of the depth.
template <bool kPairs, class T>
FLEX_INLINE Float load_words(const T* source, int64_t elements) {
  if constexpr (kPairs) {
    static_assert(sizeof(T) == 2, "pairs are pairs of bf16");
    Float words;
    if (elements >= 2 * kLanes) {
      std::memcpy(&words, source, sizeof(words));
    } else {
      words = zeros();
      std::memcpy(&words, source, elements * sizeof(T));
    }
    return words;
  } else {
    return load(source, elements < kLanes ? elements : kLanes);
  }
}

#if defined(FLEX_BF16_PAIRS)
// Words whose halves are bf16 of the two.
FLEX_INLINE Float pairs_of(Float low, Float high) {
  return (Float)(Simd::widen(Simd::to_bfloat16(low)) | Simd::widen(Simd::to_bfloat16(high)) << 16);
}
#endif

using Signed = int32_t __attribute__((vector_size(sizeof(Float))));
using Numbers = float __attribute__((vector_size(sizeof(Float))));

// `at`: a multiple of kLanes elements (in words: of a whole vector of them) from where the row was taken.
template <class T>
struct Row {
  const T* data;

  static FLEX_INLINE Row of(const Rows& source, int64_t row, int64_t begin) {
    return {static_cast<const T*>(source.data) + row * source.stride + begin};
  }
  static constexpr int64_t bytes(int64_t elements) { return elements * sizeof(T); }
  FLEX_INLINE const char* address(int64_t at) const { return reinterpret_cast<const char*>(data + at); }
  FLEX_INLINE Float lanes(int64_t at, int64_t count) const { return load(data + at, count); }
  // 32 bits of memory hold kPacked elements. Of such a piece of each of kLanes rows, element k.
  static constexpr int kPacked = 4 / sizeof(T);
  static FLEX_INLINE Float row_scales(const Row*, int64_t) { return zeros(); }
  static FLEX_INLINE Float unpacked(Word pieces, int k, Float) {
    if constexpr (kPacked == 1) return (Float)pieces;
    return (Float)(k == 0 ? pieces << 16 : pieces & 0xffff0000u);
  }
  template <bool kPairs>
  FLEX_INLINE Float words(int64_t at, int64_t elements) const {
    return load_words<kPairs>(data + at, elements);
  }
};

template <>
struct Row<Int8> {
  const int8_t* codes;
  float scale;

  static FLEX_INLINE Row of(const Rows& source, int64_t row, int64_t begin) {
    return {static_cast<const int8_t*>(source.data) + row * source.stride + begin,
            static_cast<const float*>(source.scales)[row]};
  }
  static constexpr int64_t bytes(int64_t elements) { return elements; }
  static constexpr int kPacked = 4;
  static FLEX_INLINE Float row_scales(const Row* rows, int64_t) {
    float scales[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) scales[i] = rows[i].scale;
    return load(scales);
  }
  static FLEX_INLINE Float unpacked(Word pieces, int k, Float scales) {
    return (Float)__builtin_convertvector((Signed)(pieces << (24 - 8 * k)) >> 24, Numbers) * scales;
  }
  FLEX_INLINE const char* address(int64_t at) const { return reinterpret_cast<const char*>(codes + at); }
  FLEX_INLINE Float lanes(int64_t at, int64_t count) const {
    if (count == kLanes) return Simd::signed_bytes(codes + at) * scale;
    int8_t padded[kLanes] = {};
    std::memcpy(padded, codes + at, count);
    return Simd::signed_bytes(padded) * scale;
  }
  template <bool kPairs>
  FLEX_INLINE Float words(int64_t at, int64_t elements) const {
    if constexpr (!kPairs) return lanes(at, elements < kLanes ? elements : kLanes);
#if defined(FLEX_BF16_PAIRS)
    int8_t padded[2 * kLanes] = {};
    const int8_t* from = codes + at;
    if (elements < 2 * kLanes) {
      std::memcpy(padded, from, elements);
      from = padded;
    }
    Float low, high;
    Simd::signed_byte_pairs(from, low, high);
    return pairs_of(low * scale, high * scale);
#endif
  }
};

constexpr float kNf4Values[16] = {-1.0f,
                                  -0.6961928009986877f,
                                  -0.5250730514526367f,
                                  -0.39491748809814453f,
                                  -0.28444138169288635f,
                                  -0.18477343022823334f,
                                  -0.09105003625154495f,
                                  0.0f,
                                  0.07958029955625534f,
                                  0.16093020141124725f,
                                  0.24611230194568634f,
                                  0.33791524171829224f,
                                  0.44070982933044434f,
                                  0.5626170039176941f,
                                  0.7229568362236023f,
                                  1.0f};

// Rows are whole groups: nothing asks how many elements are left.
template <>
struct Row<Nf4> {
  const uint8_t* codes;
  const Bfloat16* scales;
  int64_t begin;

  static FLEX_INLINE Row of(const Rows& source, int64_t row, int64_t begin) {
    return {static_cast<const uint8_t*>(source.data) + row * source.stride / 2,
            static_cast<const Bfloat16*>(source.scales) + row * source.stride / kNf4Group, begin};
  }
  static constexpr int64_t bytes(int64_t elements) { return elements / 2; }
  static constexpr int kPacked = 8;
  static FLEX_INLINE Float row_scales(const Row* rows, int64_t at) {
    float scales[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) scales[i] = rows[i].scale(rows[i].begin + at);
    return load(scales);
  }
  static FLEX_INLINE Float unpacked(Word pieces, int k, Float scales) {
    Simd::Table table;
    std::memcpy(&table, kNf4Values, sizeof(table));
    return Simd::lookup(table, pieces >> (4 * k)) * scales;
  }
  FLEX_INLINE const char* address(int64_t at) const { return reinterpret_cast<const char*>(codes + (begin + at) / 2); }
  FLEX_INLINE float scale(int64_t element) const {
    const uint32_t bits = uint32_t{scales[element / kNf4Group].bits} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  FLEX_INLINE Float lanes(int64_t at, int64_t) const {
    const int64_t element = begin + at;
    Simd::Table table;
    std::memcpy(&table, kNf4Values, sizeof(table));
    return Simd::lookup(table, Simd::nibbles(codes + element / 2)) * scale(element);
  }
  template <bool kPairs>
  FLEX_INLINE Float words(int64_t at, int64_t elements) const {
    if constexpr (!kPairs) return lanes(at, elements);
#if defined(FLEX_BF16_PAIRS)
    const int64_t element = begin + at;
    // The 16 products with the scale, rounded once, instead of every weight's.
    const Word table = Simd::widen(Simd::to_bfloat16(load(kNf4Values) * scale(element)));
    const Word bytes = Simd::unsigned_bytes(codes + element / 2);
    const Word low = (Word)Simd::lookup((Float)table, bytes & 15u), high = (Word)Simd::lookup((Float)(table << 16), bytes >> 4);
    return (Float)(low | high);
#endif
  }
};

}  // namespace
}  // namespace flex
