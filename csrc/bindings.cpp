// The table of what Python can call: flex_kernels/backends/native.py checks, then passes sizes and addresses, or tensors
// to what checks them itself (bindings_tensors.h).
// Address 0 is a null pointer. std::invalid_argument and std::length_error arrive in Python as ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings_tensors.h"
#include "cpu_features.h"
#include "experts.h"
#include "routing_plan.h"
#include "score.h"

namespace py = pybind11;

template <typename T>
static T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Of experts that are kept as codes.
template <class Described>
static void set_scales(Described& described, uintptr_t gate_up_scales, uintptr_t down_scales) {
  described.gate_up_scales = at<const void>(gate_up_scales);
  described.down_scales = at<const void>(down_scales);
}

PYBIND11_MODULE(_native, m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "routing_plan",
      [](uintptr_t expert_ids, int64_t num_pairs, int64_t num_experts, uintptr_t sorted_pairs,
         uintptr_t tokens_per_expert, uintptr_t expert_offsets) {
        flex::routing_plan(at<const int64_t>(expert_ids), num_pairs, num_experts, at<int32_t>(sorted_pairs),
                           at<int32_t>(tokens_per_expert), at<int32_t>(expert_offsets));
      },
      no_gil);

  m.def("available_isas", &flex::available_isas);
  py::enum_<flex::Scalar>(m, "Scalar")
      .value("float32", flex::Scalar::kFloat32)
      .value("bfloat16", flex::Scalar::kBfloat16)
      .value("int8", flex::Scalar::kInt8)
      .value("nf4", flex::Scalar::kNf4);
  m.def("know_tensors", &flex::know_tensors);
  m.def("grafted_route", &flex::grafted_route_of_tensors);

  py::enum_<flex::Activation>(m, "Activation")
      .value("silu", flex::Activation::kSilu)
      .value("gelu", flex::Activation::kGelu)
      .value("gelu_tanh", flex::Activation::kGeluTanh);

  py::class_<flex::Layer>(m, "Layer")
      .def(py::init([](int64_t num_tokens, int64_t hidden_size, int64_t num_experts, int64_t intermediate_size,
                       int64_t top_k, int64_t graft_width, flex::Scalar scalar, flex::Scalar weight_scalar, bool convex,
                       flex::Activation activation, uintptr_t hidden_states, uintptr_t sorted_pairs,
                       uintptr_t expert_offsets, uintptr_t routing_weights, uintptr_t gate_up_proj,
                       uintptr_t down_proj, uintptr_t graft_gate_up_proj, uintptr_t graft_down_proj,
                       uintptr_t graft_logits) {
        return flex::Layer{num_tokens,
                           hidden_size,
                           num_experts,
                           intermediate_size,
                           top_k,
                           graft_width,
                           scalar,
                           weight_scalar,
                           convex,
                           activation,
                           at<const void>(hidden_states),
                           at<const int32_t>(sorted_pairs),
                           at<const int32_t>(expert_offsets),
                           at<const float>(routing_weights),
                           at<const void>(gate_up_proj),
                           at<const void>(down_proj),
                           at<const void>(graft_gate_up_proj),
                           at<const void>(graft_down_proj),
                           at<const float>(graft_logits)};
      }))
      .def("set_scales", &set_scales<flex::Layer>);
  py::class_<flex::Gradients>(m, "Gradients")
      .def(py::init([](uintptr_t hidden_states, uintptr_t routing_weights, uintptr_t graft_gate_up_proj,
                       uintptr_t graft_down_proj, uintptr_t graft_logits) {
        return flex::Gradients{at<void>(hidden_states), at<float>(routing_weights), at<void>(graft_gate_up_proj),
                               at<void>(graft_down_proj), at<float>(graft_logits)};
      }));
  m.def(
      "experts_forward",
      [](const flex::Layer& layer, uintptr_t out, uintptr_t preactivations, uintptr_t graft_preactivations,
         int threads) {
        flex::experts_forward(layer, at<void>(out), at<void>(preactivations), at<void>(graft_preactivations), threads);
      },
      no_gil);
  m.def(
      "experts_backward",
      [](const flex::Layer& layer, uintptr_t d_out, uintptr_t preactivations, uintptr_t graft_preactivations,
         const flex::Gradients& gradients, int threads) {
        flex::experts_backward(layer, at<const void>(d_out), at<const void>(preactivations),
                               at<const void>(graft_preactivations), gradients, threads);
      },
      no_gil);
  m.def("forward_workspace_bytes", &flex::forward_workspace_bytes);
  m.def("backward_workspace_bytes", &flex::backward_workspace_bytes);

  py::class_<flex::Scoring>(m, "Scoring")
      .def(py::init([](int64_t num_tokens, int64_t hidden_size, int64_t num_experts, int64_t intermediate_size,
                       flex::Scalar scalar, flex::Scalar weight_scalar, flex::Activation activation,
                       uintptr_t hidden_states, uintptr_t target, uintptr_t gate_up_proj, uintptr_t down_proj) {
        return flex::Scoring{num_tokens,
                             hidden_size,
                             num_experts,
                             intermediate_size,
                             scalar,
                             weight_scalar,
                             activation,
                             at<const void>(hidden_states),
                             at<const void>(target),
                             at<const void>(gate_up_proj),
                             at<const void>(down_proj)};
      }))
      .def("set_scales", &set_scales<flex::Scoring>);
  m.def(
      "score_experts",
      [](const flex::Scoring& scoring, uintptr_t batch_offsets, int64_t num_batches, uintptr_t scores, int threads) {
        flex::score_experts(scoring, at<const int64_t>(batch_offsets), num_batches, at<float>(scores), threads);
      },
      no_gil);
  m.def(
      "score_neurons",
      [](const flex::Scoring& scoring, uintptr_t energy, uintptr_t correlation, int threads) {
        flex::score_neurons(scoring, at<float>(energy), at<float>(correlation), threads);
      },
      no_gil);
}
