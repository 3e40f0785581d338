#include "routing_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace flex {

void routing_plan(const int64_t* expert_ids, int64_t num_pairs, int64_t num_experts, int32_t* sorted_pairs,
                  int32_t* tokens_per_expert, int32_t* expert_offsets) {
  // One pass to count, one to place: two reads of 8 bytes a pair, far below the cost of the layer it prepares, so it
  // stays on one thread. The last bin, number num_experts, is everybody else's.
  std::vector<int32_t> next(num_experts + 1, 0);
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    if (expert_ids[pair] < 0)
      throw std::invalid_argument("expert_indices must not be negative, got " + std::to_string(expert_ids[pair]));
    ++next[std::min(expert_ids[pair], num_experts)];
  }
  int32_t start = 0;
  for (int64_t expert = 0; expert <= num_experts; ++expert) {
    const int32_t count = next[expert];
    expert_offsets[expert] = start;
    if (expert < num_experts) tokens_per_expert[expert] = count;
    next[expert] = start;
    start += count;
  }
  for (int64_t pair = 0; pair < num_pairs; ++pair)
    sorted_pairs[next[std::min(expert_ids[pair], num_experts)]++] = static_cast<int32_t>(pair);
}

}  // namespace flex
