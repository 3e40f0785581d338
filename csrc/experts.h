// The layer on the CPU: routed experts, the gated graft, their sum, and the backward with frozen experts.
// Equations and names: flex_kernels/backends/pytorch.py, whose twin this is, and reference.grafted_experts.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace flex {

// Everything contiguous. T tokens, H hidden, E experts of width I, top-K; a graft of width I_g, or none.
struct Layer {
  int64_t num_tokens, hidden_size, num_experts, intermediate_size, top_k;
  int64_t graft_width;          // -1: no graft
  Scalar scalar;                // of hidden states, graft, outputs and everything kept
  Scalar weight_scalar;         // of the experts' weights
  bool convex;
  Activation activation;
  const void* hidden_states;      // [T, H]
  const int32_t* sorted_pairs;    // [T * K], by expert
  const int32_t* expert_offsets;  // [E + 1]; rows from the last one on belong to nobody here
  const float* routing_weights;   // [T, K]
  const void* gate_up_proj;       // [E, 2I, H]
  const void* down_proj;          // [E, H, I]
  const void* graft_gate_up_proj;  // [2I_g, H]
  const void* graft_down_proj;     // [H, I_g]
  const float* graft_logits;       // [T]
  const void* gate_up_scales = nullptr;  // of codes
  const void* down_scales = nullptr;

  bool has_graft() const { return graft_width >= 0; }
};

// What the backward is asked for; null: not wanted. The two of the graft's weights come together.
struct Gradients {
  void* hidden_states;     // [T, H]
  float* routing_weights;  // [T, K]; 0 where the pair has no expert here
  void* graft_gate_up_proj;
  void* graft_down_proj;
  float* graft_logits;  // [T]
};

// out [T, H]; preactivations [T * K, 2I] by row of sorted_pairs (0 where nobody here has the row) and
// graft_preactivations [T, 2I_g], or null. Without out only they are computed.
// Both throw std::invalid_argument where offsets or pairs do not describe T * K pairs.
void experts_forward(const Layer& layer, void* out, void* preactivations, void* graft_preactivations, int threads);
void experts_backward(const Layer& layer, const void* d_out, const void* preactivations,
                      const void* graft_preactivations, const Gradients& gradients, int threads);

// The size of the one block of memory that a call allocates.
int64_t forward_workspace_bytes(const Layer& layer, int threads);
int64_t backward_workspace_bytes(const Layer& layer, const Gradients& gradients, int threads);

}  // namespace flex
