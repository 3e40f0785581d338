// The table of what Python can call on a GPU: flex_kernels/native_cuda.py checks, then passes sizes, addresses and the
// stream's handle. Importing this needs neither a driver nor a device. std::invalid_argument arrives as ValueError,
// what CUDA refuses as RuntimeError.
#include <pybind11/pybind11.h>

#include "cuda/routing_plan_cuda.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  py::class_<flex::PlanLaunch>(m, "PlanLaunch")
      .def_readonly("num_blocks", &flex::PlanLaunch::num_blocks)
      .def_readonly("warps_per_block", &flex::PlanLaunch::warps_per_block)
      .def_readonly("pairs_per_warp", &flex::PlanLaunch::pairs_per_warp)
      .def_readonly("shared_bytes", &flex::PlanLaunch::shared_bytes)
      .def_readonly("num_counts", &flex::PlanLaunch::num_counts);
  m.def("plan_launch", &flex::plan_launch, py::arg("num_pairs"), py::arg("num_experts"), py::arg("num_processors"));
  m.def(
      "routing_plan",
      [](const flex::PlanLaunch& launch, uintptr_t expert_ids, bool wide_ids, int64_t num_pairs, int64_t num_experts,
         uintptr_t counts, uintptr_t sorted_pairs, uintptr_t tokens_per_expert, uintptr_t expert_offsets, int device,
         uintptr_t stream) {
        const flex::PlanArguments arguments{reinterpret_cast<const void*>(expert_ids),
                                            num_pairs,
                                            num_experts,
                                            reinterpret_cast<int32_t*>(counts),
                                            reinterpret_cast<int32_t*>(sorted_pairs),
                                            reinterpret_cast<int32_t*>(tokens_per_expert),
                                            reinterpret_cast<int32_t*>(expert_offsets)};
        flex::routing_plan_cuda(arguments, launch, wide_ids, device, reinterpret_cast<void*>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
}
