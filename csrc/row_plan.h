// From the routing plan to rows: which token a row reads, which row holds a pair, and in which order they are computed.
#pragma once
#include <cstdint>
#include <vector>

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

// Rows of one expert, or of the graft, that are computed together.
struct Segment {
  int64_t expert;  // kGraft: the graft, whose rows are the tokens
  int64_t first, rows;
  int64_t place;  // of its first activation in the wave's buffer, in elements
};
constexpr int64_t kGraft = -1;
// What lies between the two projections exists for one wave of rows at a time, so that it stays in cache and costs the
// same memory for any number of tokens.
using Wave = std::vector<Segment>;
// Depends on nothing but the layer. The experts' rows and the graft's are taken where `routed` and `grafted`.
std::vector<Wave> waves_of(const Layer& layer, bool routed, bool grafted);
// The activations of a wave are at most so many elements.
int64_t most_wave_elements(const Layer& layer, bool routed, bool grafted);

// Multiply-adds of the forward, about those of either half of the backward.
inline double operations_of(const Layer& layer) {
  const double width = double(layer.top_k) * layer.intermediate_size + (layer.has_graft() ? layer.graft_width : 0);
  return 3. * layer.num_tokens * layer.hidden_size * width;
}

// Memory row `row` of a matrix with rows of `width`; null of null.
inline const char* row_of(const void* data, int64_t row, int64_t width, Scalar scalar) {
  return data ? static_cast<const char*>(data) + row * width * scalar_bytes(scalar) : nullptr;
}
inline char* row_of(void* data, int64_t row, int64_t width, Scalar scalar) {
  return data ? static_cast<char*>(data) + row * width * scalar_bytes(scalar) : nullptr;
}

}  // namespace flex
