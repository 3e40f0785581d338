// The routing plan: a stable counting sort of the (token, slot) pairs by expert. Twin: reference.routing_plan.
#pragma once
#include <cstdint>

namespace flex {

// expert_ids [num_pairs] -> sorted_pairs [num_pairs], tokens_per_expert [num_experts], expert_offsets [num_experts + 1].
// Ids >= num_experts belong to another rank: counted for nobody, in their order at the tail of sorted_pairs.
// Throws std::invalid_argument for a negative id; the outputs are then undefined.
void routing_plan(const int64_t* expert_ids, int64_t num_pairs, int64_t num_experts, int32_t* sorted_pairs,
                  int32_t* tokens_per_expert, int32_t* expert_offsets);

}  // namespace flex
