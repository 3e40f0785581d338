// From the routing plan to rows: which token a row reads, which row holds a pair.
#pragma once
#include <cstdint>

#include "experts.h"

namespace flex {

struct RowPlan {
  int32_t* token_of_row;  // [T * K]
  int32_t* row_of_pair;   // [T * K]; -1: no expert here
};

// Fills the plan. Throws std::invalid_argument unless expert_offsets ascend from 0 within T * K and sorted_pairs is a
// permutation of the pairs: what follows trusts both.
void fill_row_plan(const Layer& layer, const RowPlan& plan);

// sigmoid of the graft's logits, [T].
void fill_openings(const Layer& layer, float* openings);

inline const char* row_of(const void* data, int64_t row, int64_t width, Scalar scalar) {
  return static_cast<const char*>(data) + row * width * scalar_bytes(scalar);
}
inline char* row_of(void* data, int64_t row, int64_t width, Scalar scalar) {
  return static_cast<char*>(data) + row * width * scalar_bytes(scalar);
}

}  // namespace flex
