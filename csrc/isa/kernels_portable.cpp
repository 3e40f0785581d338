// The kernels in plain C++ with four-lane vectors: any machine, and the yardstick of the tests.
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "isa/simd_portable.h"
// After its simd header:
#include "isa/multiply_lanes.h"
// Last:
#include "isa/kernels_table.h"

namespace flex {

const Kernels* portable_kernels() {
  static constexpr Kernels kTable = kernel_table<false>("portable");
  return &kTable;
}

}  // namespace flex
