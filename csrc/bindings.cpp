// The table of what Python can call: flex_kernels/native.py checks its arguments, then passes addresses.
#include <pybind11/pybind11.h>

#include "routing_plan.h"

namespace py = pybind11;

template <typename T>
static T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(_native, m) {
  m.def(
      "routing_plan",
      [](uintptr_t expert_ids, int64_t num_pairs, int64_t num_experts, uintptr_t sorted_pairs,
         uintptr_t tokens_per_expert, uintptr_t expert_offsets) {
        flex::routing_plan(at<const int64_t>(expert_ids), num_pairs, num_experts, at<int32_t>(sorted_pairs),
                           at<int32_t>(tokens_per_expert), at<int32_t>(expert_offsets));
      },
      py::call_guard<py::gil_scoped_release>());
}
