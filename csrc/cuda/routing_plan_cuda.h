// The routing plan on a GPU: a stable counting sort of the (token, slot) pairs by expert, in one launch.
// Twin: reference.routing_plan. Addresses are device pointers, `stream` is a cudaStream_t.
#pragma once
#include <cstdint>

namespace flex {

// How many programs work, and on what. A run is what one warp walks through, in order.
struct PlanLaunch {
  int64_t num_blocks;
  int64_t warps_per_block;
  int64_t pairs_per_warp;  // a multiple of 32
  int64_t shared_bytes;
  int64_t num_counts;  // int32 entries of scratch
};

// At most one block a processor, so that all of them are resident and may wait for each other.
// Throws std::invalid_argument for sizes that the kernel does not cover; touches no device.
PlanLaunch plan_launch(int64_t num_pairs, int64_t num_experts, int64_t num_processors);

struct PlanArguments {
  const void* expert_ids;      // [num_pairs] int32 or int64; ids < 0 or >= num_experts stay in order at the tail
  int64_t num_pairs;
  int64_t num_experts;
  int32_t* counts;             // [num_counts], scratch that the caller keeps until the stream has passed
  int32_t* sorted_pairs;       // [num_pairs]
  int32_t* tokens_per_expert;  // [num_experts]
  int32_t* expert_offsets;     // [num_experts + 1]
};

// One launch, no allocation, no synchronisation with the host. Throws std::runtime_error with CUDA's own words.
void routing_plan_cuda(const PlanArguments& arguments, const PlanLaunch& launch, bool wide_ids, int device,
                       void* stream);

}  // namespace flex
