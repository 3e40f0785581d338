// The router and the graft's gate in one pass over the tokens. Twin: reference.grafted_route.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace flex {

struct Router {
  int64_t num_tokens, hidden_size, num_experts, top_k;
  Scalar scalar;  // of hidden_states, router_weight and the router's logits
  bool renormalize;
  const void* hidden_states;        // [T, H]
  const void* router_weight;        // [E, H]
  const float* graft_logit_weight;  // [H], or null: no graft
  const float* graft_logit_bias;    // [1], or null
};

struct Routes {
  float* routing_weights;      // [T, K]
  int64_t* expert_indices;     // [T, K]
  float* graft_logits;         // [T], or null
  int32_t* tokens_per_expert;  // [E]
  void* router_logits;         // [T, E], or null
};

// Throws std::invalid_argument unless 1 <= top_k <= num_experts.
void grafted_route(const Router& router, const Routes& routes, int threads);

}  // namespace flex
