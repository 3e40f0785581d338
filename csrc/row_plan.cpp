#include "row_plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace flex {

void fill_row_plan(const Layer& layer, const RowPlan& plan) {
  const int64_t num_pairs = layer.num_tokens * layer.top_k;
  const int32_t* offsets = layer.expert_offsets;
  for (int64_t expert = 0; expert <= layer.num_experts; ++expert) {
    const int64_t least = expert == 0 ? 0 : offsets[expert - 1], most = expert == 0 ? 0 : num_pairs;
    if (offsets[expert] < least || offsets[expert] > most)
      throw std::invalid_argument("expert_offsets[" + std::to_string(expert) + "] is " +
                                  std::to_string(offsets[expert]) + ", want it to ascend from 0 to at most " +
                                  std::to_string(num_pairs));
  }
  const int64_t num_rows = offsets[layer.num_experts];
  const uint32_t top_k = static_cast<uint32_t>(layer.top_k);
  std::fill(plan.row_of_pair, plan.row_of_pair + num_pairs, -1);
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t pair = layer.sorted_pairs[row];
    if (pair < 0 || pair >= num_pairs || plan.row_of_pair[pair] >= 0)
      throw std::invalid_argument("sorted_pairs[" + std::to_string(row) + "] is " + std::to_string(pair) +
                                  ", want every pair from 0 to " + std::to_string(num_pairs) + " - 1 once");
    plan.row_of_pair[pair] = static_cast<int32_t>(row);
    plan.token_of_row[row] = static_cast<int32_t>(static_cast<uint32_t>(pair) / top_k);
  }
}

void fill_openings(const Layer& layer, float* openings) {
  for (int64_t token = 0; token < layer.num_tokens; ++token)
    openings[token] = 1.f / (1.f + std::exp(-layer.graft_logits[token]));
}

}  // namespace flex
