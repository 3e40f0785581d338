// An operation on torch's own tensors, without torch's headers: DLPack's table of C functions, which `torch.Tensor`
// offers, tells where a tensor lies; new ones are asked of Python. It takes a tenth of the time that a dozen questions by
// attribute take, which for one token is more than the arithmetic.
#pragma once
#include <pybind11/pybind11.h>

namespace flex {

// What is used of torch: `torch.Tensor` and `nn.Parameter`, and a tensor on the CPU of each dtype that results have.
// Before anything else here. Throws AttributeError or std::runtime_error where torch's table is not there or of
// another version.
void know_tensors(pybind11::type tensor, pybind11::type parameter, pybind11::object float32, pybind11::object bfloat16,
                  pybind11::object int64, pybind11::object int32);

// grafted_route.h on hidden_states [T, H], router_weight [E, H] and the gate's [H] and [1] (None: no graft). Returns
// (routing_weights, expert_indices, graft_logits, tokens_per_expert), and the router's logits if `keep_logits`.
// Returns None, and computes nothing, where anything is not as csrc reads it: device, dtype, shape, order in memory,
// range of top_k; if `plain`, also where a tensor is of a class of its own or owes a minus sign.
pybind11::object grafted_route_of_tensors(pybind11::handle hidden_states, pybind11::handle router_weight,
                                          pybind11::handle graft_logit_weight, pybind11::handle graft_logit_bias,
                                          pybind11::handle top_k, pybind11::handle renormalize, bool keep_logits,
                                          bool plain, int threads);

}  // namespace flex
