// Python values to C++: token ids and floats from lists or arrays, training examples, model configurations.
#include <pybind11/numpy.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "bindings.h"

namespace loquetier::python {

namespace {

float from_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  float value;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
  } else if (exponent == 31) {
    value = mantissa == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  } else {
    value = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -value : value;
}

int32_t checked_id(int64_t value, size_t index, const std::string& where) {
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    throw InvalidArgument(where + "[" + std::to_string(index) + "]: expected a 32-bit integer, got " + std::to_string(value));
  }
  return static_cast<int32_t>(value);
}

// Calls visit(index, value) with every element of a dense array of element type T.
template <class T, class Visit>
void each(const ForeignArray& array, Visit visit) {
  const auto* bytes = static_cast<const std::byte*>(array.data);
  for (int64_t i = 0; i < array.size(); ++i) {
    T value;
    std::memcpy(&value, bytes + static_cast<size_t>(i) * sizeof(T), sizeof(T));  // the producer need not align
    visit(static_cast<size_t>(i), value);
  }
}

// False when the dtype is not an integer.
template <class Visit>
bool each_integer(const ForeignArray& array, Visit visit) {
  const std::string& d = array.dtype;
  if (d == "i64") each<int64_t>(array, visit);
  else if (d == "i32") each<int32_t>(array, visit);
  else if (d == "i16") each<int16_t>(array, visit);
  else if (d == "i8") each<int8_t>(array, visit);
  else if (d == "u8") each<uint8_t>(array, visit);
  else if (d == "u16") each<uint16_t>(array, visit);
  else if (d == "u32") each<uint32_t>(array, visit);
  else if (d == "u64") each<uint64_t>(array, visit);
  else return false;
  return true;
}

ForeignArray one_dimensional(py::handle value, const std::string& where) {
  ForeignArray array = make_dense(import_array(value, where));
  if (array.shape.size() != 1) {
    throw InvalidArgument(where + ": expected a one-dimensional array, got " + std::to_string(array.shape.size()) + " dimensions");
  }
  return array;
}

// A list or tuple of the items of any iterable that is no string or mapping.
py::object item_sequence(py::handle value, const std::string& where, const char* expected) {
  if (PyUnicode_Check(value.ptr()) || PyBytes_Check(value.ptr()) || PyDict_Check(value.ptr()) ||
      !py::isinstance<py::iterable>(value)) {
    throw py::type_error(where + ": expected " + expected + ", got " + type_name(value));
  }
  PyObject* items = PySequence_Fast(value.ptr(), expected);
  if (items == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(items);
}

}  // namespace

std::string type_name(py::handle value) { return py::str(py::type::handle_of(value).attr("__name__")); }

std::vector<int32_t> to_ids(py::handle value, const std::string& where) {
  std::vector<int32_t> ids;
  if (is_array(value)) {
    const ForeignArray array = one_dimensional(value, where);
    ids.resize(static_cast<size_t>(array.size()));
    const bool integers = each_integer(array, [&]<class T>(size_t i, T item) {
      if constexpr (std::is_same_v<T, uint64_t>) {
        ids[i] = checked_id(item > static_cast<uint64_t>(INT64_MAX) ? INT64_MAX : static_cast<int64_t>(item), i, where);
      } else {
        ids[i] = checked_id(item, i, where);
      }
    });
    if (!integers) throw py::type_error(where + ": expected integers, got an array of " + array.dtype);
    return ids;
  }
  const py::object items = item_sequence(value, where, "a list or array of integers");
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(items.ptr());
  ids.reserve(static_cast<size_t>(n));
  for (Py_ssize_t i = 0; i < n; ++i) {
    const py::handle item = PySequence_Fast_GET_ITEM(items.ptr(), i);
    const py::object index = py::reinterpret_steal<py::object>(PyBool_Check(item.ptr()) ? nullptr : PyNumber_Index(item.ptr()));
    if (!index) {
      PyErr_Clear();
      throw py::type_error(where + "[" + std::to_string(i) + "]: expected an integer, got " + type_name(item));
    }
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow != 0) {
      throw InvalidArgument(where + "[" + std::to_string(i) + "]: expected a 32-bit integer, got " + std::string(py::str(index)));
    }
    ids.push_back(checked_id(number, static_cast<size_t>(i), where));
  }
  return ids;
}

std::vector<float> to_floats(py::handle value, const std::string& where) {
  std::vector<float> floats;
  if (is_array(value)) {
    const ForeignArray array = one_dimensional(value, where);
    floats.resize(static_cast<size_t>(array.size()));
    const auto store = [&](size_t i, auto item) { floats[i] = static_cast<float>(item); };
    if (array.dtype == "f32") each<float>(array, store);
    else if (array.dtype == "f64") each<double>(array, store);
    else if (array.dtype == "f16") each<uint16_t>(array, [&](size_t i, uint16_t bits) { floats[i] = from_half(bits); });
    else if (array.dtype == "bf16")
      each<uint16_t>(array, [&](size_t i, uint16_t bits) { floats[i] = std::bit_cast<float>(uint32_t{bits} << 16); });
    else if (!each_integer(array, store)) throw py::type_error(where + ": expected numbers, got an array of " + array.dtype);
    return floats;
  }
  const py::object items = item_sequence(value, where, "a list or array of numbers");
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(items.ptr());
  floats.reserve(static_cast<size_t>(n));
  for (Py_ssize_t i = 0; i < n; ++i) {
    const py::handle item = PySequence_Fast_GET_ITEM(items.ptr(), i);
    const double number = PyFloat_AsDouble(item.ptr());
    if (number == -1.0 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      throw py::type_error(where + "[" + std::to_string(i) + "]: expected a number, got " + type_name(item));
    }
    floats.push_back(static_cast<float>(number));
  }
  return floats;
}

Example to_example(py::handle value, const std::string& where) {
  if (py::isinstance<Example>(value)) return value.cast<Example>();
  Example example;
  if (!py::isinstance<py::dict>(value) && !py::hasattr(value, "keys")) {
    example.input_ids = to_ids(value, where);
    return example;
  }
  bool has_ids = false;
  for (const py::handle key : value.attr("keys")()) {
    const std::string name = py::str(key);
    const py::object field = value[key];
    const std::string field_where = where + "[\"" + name + "\"]";
    if (name == "input_ids") {
      example.input_ids = to_ids(field, field_where);
      has_ids = true;
    } else if (name != "labels" && name != "weights" && name != "logprobs" && name != "advantages") {
      throw InvalidArgument(field_where + ": unknown key; expected input_ids, labels, weights, logprobs, advantages");
    } else if (field.is_none()) {
      continue;
    } else if (name == "labels") {
      example.labels = to_ids(field, field_where);
    } else {
      (name == "weights"    ? example.weights
       : name == "logprobs" ? example.logprobs
                            : example.advantages) = to_floats(field, field_where);
    }
  }
  if (!has_ids) throw InvalidArgument(where + ": expected the key \"input_ids\"");
  return example;
}

std::vector<Example> to_examples(py::handle value, const std::string& where) {
  const char* expected = "a list of examples (Example, dict, or token ids each)";
  if (py::isinstance<Example>(value))
    throw py::type_error(where + ": expected " + expected + ", got one Example; put it in a list");
  const py::object items = item_sequence(value, where, expected);
  std::vector<Example> examples;
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(items.ptr());
  examples.reserve(static_cast<size_t>(n));
  for (Py_ssize_t i = 0; i < n; ++i) {
    const py::handle item = PySequence_Fast_GET_ITEM(items.ptr(), i);
    if (PyIndex_Check(item.ptr()) && !is_array(item)) {
      throw py::type_error(where + "[" + std::to_string(i) + "]: expected an Example, dict, or list of token ids, got " +
                           type_name(item));
    }
    examples.push_back(to_example(item, where + "[" + std::to_string(i) + "]"));
  }
  return examples;
}

std::string to_config_json(py::handle config, const std::string& where) {
  py::object fields = py::reinterpret_borrow<py::object>(config);
  if (py::hasattr(fields, "to_dict")) fields = fields.attr("to_dict")();
  if (!py::isinstance<py::dict>(fields)) {
    throw py::type_error(where + ": expected a dict or an object with to_dict(), got " + type_name(config));
  }
  try {
    return py::str(py::module_::import("json").attr("dumps")(fields));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError) && !error.matches(PyExc_ValueError)) throw;
    throw InvalidArgument(where + ": not JSON: " + std::string(py::str(error.value())));
  }
}

py::typing::List<py::float_> float_list(const std::vector<float>& values) {
  py::typing::List<py::float_> list;
  for (const float value : values) list.append(static_cast<double>(value));
  return list;
}

}  // namespace loquetier::python
