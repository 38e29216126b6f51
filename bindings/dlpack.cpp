// Arrays of other libraries, read where they lie: numpy through its own C structures, everything else through DLPack (both the
// plain and the versioned capsule). The ABI structs below are declared from the specification (https://dmlc.github.io/dlpack), only
// what is read. A ForeignArray keeps its producer alive; the last holder may let go on any thread, so releasing takes the GIL.
#include <pybind11/numpy.h>

#include <cstring>

#include "bindings.h"

namespace loquetier::python {

namespace {

struct DlDevice {
  int32_t type;  // 1: CPU, 3: CUDA pinned host memory
  int32_t id;
};
struct DlDataType {
  uint8_t code;  // 0 int, 1 unsigned, 2 IEEE float, 4 bfloat, 6 bool
  uint8_t bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDataType dtype;
  int64_t* shape;
  int64_t* strides;  // elements; null: row-major
  uint64_t byte_offset;
};
struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};
struct DlManagedTensorVersioned {
  uint32_t major;
  uint32_t minor;
  void* context;
  void (*deleter)(DlManagedTensorVersioned*);
  uint64_t flags;
  DlTensor tensor;
};
constexpr uint32_t kDlpackMajor = 1;

// A shared owner whose release runs `release` under the GIL. At interpreter exit nothing is released: the process ends anyway.
template <class Release>
std::shared_ptr<const void> owner_of(const void* data, Release release) {
  return std::shared_ptr<const void>(data, [release](const void*) {
    if (!Py_IsInitialized()) return;
    py::gil_scoped_acquire gil;
    release();
  });
}

std::string dtype_of(DlDataType type, const std::string& where) {
  const std::string bits = std::to_string(type.bits);
  if (type.lanes == 1) {
    switch (type.code) {
      case 0:
        return "i" + bits;
      case 1:
        return "u" + bits;
      case 2:
        return "f" + bits;
      case 4:
        return "bf" + bits;
      case 6:
        return "bool";
    }
  }
  throw InvalidArgument(where + ": unsupported DLPack element type (code " + std::to_string(type.code) + ", " + bits + " bits, " +
                        std::to_string(type.lanes) + " lanes)");
}

ForeignArray view_of(const DlTensor& tensor, const std::string& where) {
  if (tensor.device.type != 1 && tensor.device.type != 3) {
    throw InvalidArgument(where + ": expected a tensor in host memory, got one on DLPack device type " +
                          std::to_string(tensor.device.type) + "; move it with .cpu()");
  }
  ForeignArray array;
  array.data = static_cast<const std::byte*>(tensor.data) + tensor.byte_offset;
  array.dtype = dtype_of(tensor.dtype, where);
  array.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  array.strides.resize(array.shape.size());
  int64_t dense_stride = 1;
  for (size_t i = array.shape.size(); i-- > 0; dense_stride *= array.shape[i]) {
    array.strides[i] = tensor.strides != nullptr ? tensor.strides[i] : dense_stride;
  }
  return array;
}

template <class Managed>
ForeignArray take_capsule(const py::capsule& capsule, const char* name, const char* used_name, const std::string& where) {
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (managed == nullptr) throw py::error_already_set();
  if constexpr (std::is_same_v<Managed, DlManagedTensorVersioned>) {
    if (managed->major != kDlpackMajor) {
      throw InvalidArgument(where + ": expected DLPack version " + std::to_string(kDlpackMajor) + ".x, got " +
                            std::to_string(managed->major) + "." + std::to_string(managed->minor));
    }
  }
  ForeignArray array = view_of(managed->tensor, where);
  if (PyCapsule_SetName(capsule.ptr(), used_name) != 0) throw py::error_already_set();  // from here on the tensor is ours to delete
  array.owner = owner_of(managed, [managed] {
    if (managed->deleter != nullptr) managed->deleter(managed);
  });
  return array;
}

ForeignArray import_dlpack(py::handle value, const std::string& where) {
  py::object source = py::reinterpret_borrow<py::object>(value);
  if (py::hasattr(source, "detach")) source = source.attr("detach")();  // a parameter: its values are wanted, not its graph
  py::object capsule;
  try {
    capsule = source.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = source.attr("__dlpack__")();  // a producer from before max_version
  }
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    return take_capsule<DlManagedTensorVersioned>(capsule, "dltensor_versioned", "used_dltensor_versioned", where);
  }
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    return take_capsule<DlManagedTensor>(capsule, "dltensor", "used_dltensor", where);
  }
  throw py::type_error(where + ": __dlpack__ of " + type_name(value) + " returned no DLPack capsule");
}

ForeignArray import_numpy(py::handle value, const std::string& where) {
  py::array array = py::reinterpret_borrow<py::array>(value);
  const char kind = array.dtype().kind();
  const std::string bits = std::to_string(array.itemsize() * 8);
  ForeignArray result;
  switch (kind) {
    case 'f':
      result.dtype = "f" + bits;
      break;
    case 'i':
      result.dtype = "i" + bits;
      break;
    case 'u':
      result.dtype = "u" + bits;
      break;
    case 'b':
      result.dtype = "bool";
      break;
    default:
      if (std::string(py::str(array.dtype().attr("name"))) != "bfloat16") {
        throw InvalidArgument(where + ": expected a numeric array, got numpy dtype " + std::string(py::str(array.dtype())));
      }
      result.dtype = "bf16";
  }
  if (array.dtype().byteorder() == '>' || !(array.flags() & py::array::c_style) ||
      !(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_)) {
    array = py::module_::import("numpy").attr("require")(array, array.dtype().attr("newbyteorder")("="), "CA");
  }
  result.data = array.data();
  result.shape.assign(array.shape(), array.shape() + array.ndim());
  result.strides.resize(result.shape.size());
  int64_t stride = 1;
  for (size_t i = result.shape.size(); i-- > 0; stride *= result.shape[i]) result.strides[i] = stride;
  PyObject* object = array.release().ptr();
  result.owner = owner_of(object, [object] { Py_DECREF(object); });
  return result;
}

void copy_strided(const ForeignArray& array, size_t bytes, size_t dim, const std::byte* src, std::byte*& dst) {
  const auto stride = array.strides[dim] * static_cast<int64_t>(bytes);
  for (int64_t i = 0; i < array.shape[dim]; ++i, src += stride) {
    if (dim + 1 < array.shape.size()) {
      copy_strided(array, bytes, dim + 1, src, dst);
    } else {
      std::memcpy(dst, src, bytes);
      dst += bytes;
    }
  }
}

}  // namespace

int64_t ForeignArray::size() const {
  int64_t n = 1;
  for (const int64_t extent : shape) n *= extent;
  return n;
}

bool ForeignArray::dense() const {
  int64_t expected = 1;
  for (size_t i = shape.size(); i-- > 0; expected *= shape[i]) {
    if (shape[i] != 1 && strides[i] != expected) return false;
  }
  return true;
}

size_t element_bytes(const std::string& dtype) {
  if (dtype == "bool") return 1;
  return static_cast<size_t>(std::stoi(dtype.substr(dtype.find_first_of("0123456789")))) / 8;
}

bool is_array(py::handle value) { return py::isinstance<py::array>(value) || py::hasattr(value, "__dlpack__"); }

ForeignArray import_array(py::handle value, const std::string& where) {
  if (py::isinstance<py::array>(value)) return import_numpy(value, where);
  if (py::hasattr(value, "__dlpack__")) return import_dlpack(value, where);
  throw py::type_error(where + ": expected a numpy array or an object with __dlpack__, got " + type_name(value));
}

ForeignArray make_dense(ForeignArray array) {
  if (array.dense() || array.size() == 0) return array;
  const size_t bytes = element_bytes(array.dtype);
  auto copy = std::make_shared<std::vector<std::byte>>(static_cast<size_t>(array.size()) * bytes);
  std::byte* dst = copy->data();
  copy_strided(array, bytes, 0, static_cast<const std::byte*>(array.data), dst);
  int64_t stride = 1;
  for (size_t i = array.shape.size(); i-- > 0; stride *= array.shape[i]) array.strides[i] = stride;
  array.data = copy->data();
  array.owner = copy;
  return array;
}

}  // namespace loquetier::python
