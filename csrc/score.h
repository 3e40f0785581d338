// Scoring pretrained components against a target: reference.score_experts and reference.score_neurons.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace flex {

// T tokens, hidden H, E experts of width I; everything contiguous.
struct Scoring {
  int64_t num_tokens, hidden_size, num_experts, intermediate_size;
  Scalar scalar;         // of hidden states and target
  Scalar weight_scalar;  // of the experts' weights
  Activation activation;
  const void* hidden_states;  // [T, H]
  const void* target;         // [T, H]
  const void* gate_up_proj;   // [E, 2I, H]
  const void* down_proj;      // [E, H, I]
  const void* gate_up_scales = nullptr;  // of codes
  const void* down_scales = nullptr;
};

// scores [B, E, 3]: sum ||F - E_i||^2, <F, E_i>, ||E_i||^2 over the tokens [batch_offsets[b], batch_offsets[b + 1]).
// Throws std::invalid_argument unless batch_offsets [B + 1] ascend from 0 to T.
void score_experts(const Scoring& scoring, const int64_t* batch_offsets, int64_t num_batches, float* scores,
                   int threads);

// energy [E, I] = sum_t a^2 ||d||^2 and correlation [E, I] = sum_t a <d, F_t>.
void score_neurons(const Scoring& scoring, float* energy, float* correlation, int threads);

}  // namespace flex
