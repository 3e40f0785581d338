// The kernels for AVX-512.
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 about its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wuninitialized"        // the same, where it is sure
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "isa/simd_avx512.h"
// After its simd header:
#include "isa/multiply_lanes.h"
// Last:
#include "isa/kernels_table.h"
#pragma GCC pop_options
#endif

namespace flex {

const Kernels* avx512_kernels() {
#if defined(__x86_64__)
  static constexpr Kernels kTable = kernel_table<false>("avx512");
  return &kTable;
#else
  return nullptr;
#endif
}

}  // namespace flex
