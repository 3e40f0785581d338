#include "cpu_features.h"

#include <cstdlib>
#include <stdexcept>

namespace flex {
namespace {

struct Isa {
  const char* name;
  bool here;
  const Kernels* kernels;
  const Kernels* bf16_pairs;  // for bf16 times bf16, where that has an instruction of its own
};

constexpr int kFewSlowPairs = 4;  // rows; more were not measured there

// Intel's processors with AMX take a product of pairs every other cycle, and two of fp32 each cycle: twice the operations.
// Where AMX itself is not to be had (a virtual machine may hide it), bf16 is widened, but for the few rows that wait for
// memory.
const Kernels* pairs_for_few_rows() {
  if (avx512_kernels() == nullptr || avx512_bf16_kernels() == nullptr) return nullptr;
  static const Kernels mixed = [] {
    constexpr int kIndex = static_cast<int>(Scalar::kBfloat16);
    Kernels table = *avx512_kernels();
    const Kernels& pairs = *avx512_bf16_kernels();
    table.name = pairs.name;
    table.pack_few[kIndex][kIndex] = pairs.pack_few[kIndex][kIndex];
    table.multiply_in_place[kIndex] = pairs.multiply_in_place[kIndex];
    table.few_rows[kIndex] = kFewSlowPairs;
    table.row_products[kIndex] = pairs.row_products[kIndex];
    return table;
  }();
  return &mixed;
}

// Where pairs are fast they are so for bf16. Eight-bit codes beside few rows are widened to fp32 all the same: a word of
// memory is four codes either way, and to make pairs of them takes longer than the products that it saves.
const Kernels* pairs_but_for_few_codes() {
  if (avx512_kernels() == nullptr || avx512_bf16_kernels() == nullptr) return nullptr;
  static const Kernels mixed = [] {
    constexpr int kIndex = static_cast<int>(Scalar::kInt8), kStates = static_cast<int>(Scalar::kBfloat16);
    Kernels table = *avx512_bf16_kernels();
    const Kernels& widened = *avx512_kernels();
    table.pack_few[kIndex][kStates] = widened.pack_few[kIndex][kStates];
    table.multiply_in_place[kIndex] = widened.multiply_in_place[kIndex];
    return table;
  }();
  return &mixed;
}

std::vector<Isa> every_isa() {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false, slow_pairs = false;
#if defined(__x86_64__)
  __builtin_cpu_init();  // asks the operating system too: registers that it does not save do not count
  avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  slow_pairs = avx512_bf16 && __builtin_cpu_is("intel") && !__builtin_cpu_is("cooperlake");
#endif
#if defined(__x86_64__) && __GNUC__ >= 11
  amx = avx512_bf16 && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-tile") && amx_permitted();
#endif
  return {{"amx", amx, avx512_kernels(), amx_kernels()},
          {"avx512_bf16", avx512_bf16, avx512_kernels(), slow_pairs ? pairs_for_few_rows() : pairs_but_for_few_codes()},
          {"avx512", avx512, avx512_kernels(), nullptr},
          {"avx2", avx2, avx2_kernels(), nullptr},
          {"portable", true, portable_kernels(), nullptr}};
}

const std::vector<Isa>& isas_here() {
  static const std::vector<Isa> here = [] {
    std::vector<Isa> list;
    for (const Isa& isa : every_isa())
      if (isa.here && isa.kernels != nullptr) list.push_back(isa);
    return list;
  }();
  return here;
}

const Isa& chosen_isa() {
  const char* wanted = std::getenv("FLEX_ISA");
  if (wanted == nullptr || *wanted == '\0') return isas_here().front();
  for (const Isa& isa : isas_here())
    if (std::string(wanted) == isa.name) return isa;
  std::string names;
  for (const Isa& isa : isas_here()) names += (names.empty() ? "" : ", ") + std::string(isa.name);
  throw std::invalid_argument("FLEX_ISA is '" + std::string(wanted) + "', this machine has " + names);
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas_here()) names.emplace_back(isa.name);
  return names;
}

const Kernels& kernels_for(Scalar activations, Scalar weights) {
  const Isa& isa = chosen_isa();
  const bool pairs = isa.bf16_pairs && activations == Scalar::kBfloat16 && weights != Scalar::kFloat32;
  return pairs ? *isa.bf16_pairs : *isa.kernels;
}

}  // namespace flex
