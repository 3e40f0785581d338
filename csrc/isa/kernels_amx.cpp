// The kernels for AMX with BF16: the product of bf16 in tile registers, everything else by AVX-512.
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__) && __GNUC__ >= 11
#define FLEX_HAS_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define FLEX_BF16_PAIRS 1
#define FLEX_AMX 1

#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 about its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wuninitialized"        // the same, where it is sure
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#include "isa/simd_avx512.h"
// After its simd header:
#include "isa/multiply_amx.h"
// Last:
#include "isa/kernels_table.h"
#pragma GCC pop_options
#endif

namespace flex {

const Kernels* amx_kernels() {
#if defined(FLEX_HAS_AMX)
  static constexpr Kernels kTable = kernel_table<true>("amx");
  return &kTable;
#else
  return nullptr;
#endif
}

bool amx_permitted() {
#if defined(FLEX_HAS_AMX)
  // Linux gives a process the 8 KB of tile registers only when it asks.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

}  // namespace flex
