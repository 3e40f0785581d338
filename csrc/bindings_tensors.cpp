#include "bindings_tensors.h"

#include <cstdint>
#include <initializer_list>
#include <stdexcept>

#include "grafted_route.h"

namespace py = pybind11;

namespace flex {
namespace {

// DLPack 1.x as far as it is used here.
struct DlTensor {
  void* data;
  int32_t device_type, device_index, num_dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DlExchange {
  uint32_t major, minor;
  void* earlier;
  void *allocate, *to_managed, *from_managed;
  int (*look_at)(void* tensor, DlTensor* seen);  // 0, or -1 with a Python exception
  void* current_stream;
};
constexpr uint32_t kDlMajor = 1;
constexpr int32_t kDlCpu = 1;
constexpr uint8_t kDlFloat = 2, kDlBfloat = 4;

// Never freed: at exit Python may be gone before.
struct Torch {
  const DlExchange* exchange = nullptr;
  PyTypeObject *tensor, *parameter;
  PyObject *float32, *bfloat16, *int64, *int32;  // a tensor of each
  PyObject *new_empty, *is_neg;                  // names
} torch;

bool is_plain(py::handle tensor) {
  if (Py_TYPE(tensor.ptr()) != torch.tensor && Py_TYPE(tensor.ptr()) != torch.parameter) return false;
  PyObject* arguments[] = {tensor.ptr()};
  const auto owes = py::reinterpret_steal<py::object>(
      PyObject_VectorcallMethod(torch.is_neg, arguments, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  if (!owes) throw py::error_already_set();
  return owes.ptr() == Py_False;
}

// A matrix or a vector on the CPU, rows side by side.
struct Seen {
  int64_t rows, columns;  // of a vector: 1 and its length
  uint8_t code, bits;
  const void* data;

  bool is(uint8_t its_code, uint8_t its_bits) const { return code == its_code && bits == its_bits; }
};

bool look_at(py::handle tensor, int32_t dimensions, bool plain, Seen& seen) {
  if (plain && !is_plain(tensor)) return false;
  DlTensor found;
  if (torch.exchange->look_at(tensor.ptr(), &found) != 0) {
    PyErr_Clear();  // no memory of its own, sparse, not a tensor at all
    return false;
  }
  if (found.device_type != kDlCpu || found.num_dimensions != dimensions || found.lanes != 1) return false;
  int64_t wanted = 1;
  const int64_t count = found.shape[0] * (dimensions == 2 ? found.shape[1] : 1);
  for (int32_t i = dimensions - 1; i >= 0; --i) {
    if (count > 1 && found.shape[i] != 1 && found.strides[i] != wanted) return false;
    wanted *= found.shape[i];
  }
  if (count > 0 && found.data == nullptr) return false;
  seen = {dimensions == 2 ? found.shape[0] : 1, found.shape[dimensions - 1], found.code, found.bits,
          static_cast<const char*>(found.data) + found.byte_offset};
  return true;
}

// Of the dtype of `like`, and where it lies. Not of DLPack's allocator: those tensors could not be resized.
struct Made {
  py::object tensor;
  void* data;
};

Made new_empty(PyObject* like, std::initializer_list<int64_t> shape) {
  py::object sizes[2];
  PyObject* arguments[3] = {like};
  size_t count = 1;
  for (const int64_t size : shape) {
    sizes[count - 1] = py::int_(size);
    arguments[count] = sizes[count - 1].ptr();
    ++count;
  }
  auto tensor = py::reinterpret_steal<py::object>(
      PyObject_VectorcallMethod(torch.new_empty, arguments, count | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  DlTensor found;
  if (!tensor || torch.exchange->look_at(tensor.ptr(), &found) != 0) throw py::error_already_set();
  return {std::move(tensor), static_cast<char*>(found.data) + found.byte_offset};
}

}  // namespace

void know_tensors(py::type tensor, py::type parameter, py::object float32, py::object bfloat16, py::object int64,
                  py::object int32) {
  const py::capsule table = tensor.attr("__dlpack_c_exchange_api__");
  const auto* const exchange = static_cast<const DlExchange*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
  if (exchange == nullptr) throw py::error_already_set();
  if (exchange->major != kDlMajor || exchange->look_at == nullptr)
    throw std::runtime_error("torch offers DLPack " + std::to_string(exchange->major) + ", expected 1");
  torch = {exchange,
           reinterpret_cast<PyTypeObject*>(tensor.release().ptr()),
           reinterpret_cast<PyTypeObject*>(parameter.release().ptr()),
           float32.release().ptr(),
           bfloat16.release().ptr(),
           int64.release().ptr(),
           int32.release().ptr(),
           PyUnicode_InternFromString("new_empty"),
           PyUnicode_InternFromString("is_neg")};
}

py::object grafted_route_of_tensors(py::handle hidden_states, py::handle router_weight, py::handle graft_logit_weight,
                                    py::handle graft_logit_bias, py::handle top_k, py::handle renormalize,
                                    bool keep_logits, bool plain, int threads) {
  const bool has_graft = !graft_logit_weight.is_none();
  Seen states, weight, gate{}, bias{};
  if (!PyLong_CheckExact(top_k.ptr()) || !PyBool_Check(renormalize.ptr())) return py::none();
  if (has_graft == graft_logit_bias.is_none()) return py::none();
  if (!look_at(hidden_states, 2, plain, states) || !look_at(router_weight, 2, plain, weight)) return py::none();
  const bool narrow = states.is(kDlBfloat, 16);
  if (!narrow && !states.is(kDlFloat, 32)) return py::none();
  if (!weight.is(states.code, states.bits) || weight.columns != states.columns) return py::none();
  if (has_graft) {
    if (!look_at(graft_logit_weight, 1, plain, gate) || !look_at(graft_logit_bias, 1, plain, bias)) return py::none();
    if (!gate.is(kDlFloat, 32) || gate.columns != states.columns) return py::none();
    if (!bias.is(kDlFloat, 32) || bias.columns != 1) return py::none();
  }
  int overflow;
  const int64_t slots = PyLong_AsLongLongAndOverflow(top_k.ptr(), &overflow);
  if (overflow != 0 || slots < 1 || slots > weight.rows) return py::none();

  const Made weights = new_empty(torch.float32, {states.rows, slots});
  const Made indices = new_empty(torch.int64, {states.rows, slots});
  const Made logits = new_empty(torch.float32, {has_graft ? states.rows : 0});
  const Made counts = new_empty(torch.int32, {weight.rows});
  Made kept{py::none(), nullptr};
  if (keep_logits) kept = new_empty(narrow ? torch.bfloat16 : torch.float32, {states.rows, weight.rows});
  const Router router{states.rows,
                      states.columns,
                      weight.rows,
                      slots,
                      narrow ? Scalar::kBfloat16 : Scalar::kFloat32,
                      renormalize.ptr() == Py_True,
                      states.data,
                      weight.data,
                      has_graft ? static_cast<const float*>(gate.columns > 0 ? gate.data : bias.data) : nullptr,
                      static_cast<const float*>(bias.data)};
  const Routes routes{static_cast<float*>(weights.data), static_cast<int64_t*>(indices.data),
                      static_cast<float*>(logits.data), static_cast<int32_t*>(counts.data), kept.data};
  {
    const py::gil_scoped_release no_gil;
    grafted_route(router, routes, threads);
  }
  if (!keep_logits) return py::make_tuple(weights.tensor, indices.tensor, logits.tensor, counts.tensor);
  return py::make_tuple(weights.tensor, indices.tensor, logits.tensor, counts.tensor, kept.tensor);
}

}  // namespace flex
