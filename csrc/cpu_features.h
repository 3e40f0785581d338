// Which kernels this machine runs.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace flex {

// The instruction sets that can be chosen here, best first: of amx, avx512_bf16, avx512, avx2, portable.
std::vector<std::string> available_isas();

// The kernels for activations and weights of these types: those of the best instruction set here, or of the one that
// the environment variable FLEX_ISA names. It is read anew by every call. amx and avx512_bf16 are avx512 with products of
// bf16 pairs where both operands are bf16. Throws std::invalid_argument for a name that is not available here.
const Kernels& kernels_for(Scalar activations, Scalar weights);

}  // namespace flex
