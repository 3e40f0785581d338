// The kernels for AVX2 with FMA.
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "isa/simd_avx2.h"
// After its simd header:
#include "isa/multiply_lanes.h"
// Last:
#include "isa/kernels_table.h"
#pragma GCC pop_options
#endif

namespace flex {

const Kernels* avx2_kernels() {
#if defined(__x86_64__)
  static constexpr Kernels kTable = kernel_table<false>("avx2");
  return &kTable;
#else
  return nullptr;
#endif
}

}  // namespace flex
