// What the files of the Python extension share. module.cpp ties them together; errors.cpp maps exceptions, options.cpp binds plain
// data in, results.cpp plain data out, engine.cpp Engine and BaseModel; convert.cpp and dlpack.cpp turn Python values into C++
// ones.
//
// Rules: the GIL is held while Python objects are read or made and released around every engine call that may block; an adapter is
// None in Python and "" in C++; Python names are the C++ names.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "loquetier/engine.h"

namespace loquetier::python {

namespace py = pybind11;

// Argument types that are plain objects at run time and say in the type stub what they take.
struct ArrayLike : py::object {  // one-dimensional: list, tuple, numpy array, any object with __dlpack__
  PYBIND11_OBJECT_DEFAULT(ArrayLike, object, PyObject_Type)
  using object::object;
};
struct ExamplesLike : py::object {
  PYBIND11_OBJECT_DEFAULT(ExamplesLike, object, PyObject_Type)
  using object::object;
};
struct ModelLike : py::object {
  PYBIND11_OBJECT_DEFAULT(ModelLike, object, PyObject_Type)
  using object::object;
};
struct ConfigLike : py::object {
  PYBIND11_OBJECT_DEFAULT(ConfigLike, object, PyObject_Type)
  using object::object;
};
struct StateDictLike : py::object {
  PYBIND11_OBJECT_DEFAULT(StateDictLike, object, PyObject_Type)
  using object::object;
};

void bind_errors(py::module_& m);
void bind_options(py::module_& m);
void bind_results(py::module_& m);
void bind_engine(py::module_& m);
void bind_simulator(py::module_& m);

// ---- convert.cpp. `where` names the argument in errors: TypeError for a wrong type, InvalidArgument for a wrong value.
std::vector<int32_t> to_ids(py::handle value, const std::string& where);
std::vector<float> to_floats(py::handle value, const std::string& where);
Example to_example(py::handle value, const std::string& where);
std::vector<Example> to_examples(py::handle value, const std::string& where);
std::string to_config_json(py::handle config, const std::string& where);
std::string type_name(py::handle value);
py::typing::List<py::float_> float_list(const std::vector<float>& values);

// ---- dlpack.cpp
// Memory of another library, read in place. `strides` count elements.
struct ForeignArray {
  const void* data = nullptr;
  std::string dtype;  // "f32", "f16", "bf16", "f64", "i8" … "i64", "u8" … "u64", "bool"
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  std::shared_ptr<const void> owner;
  int64_t size() const;
  bool dense() const;  // row-major without gaps
};
bool is_array(py::handle value);  // numpy array or an object with __dlpack__
ForeignArray import_array(py::handle value, const std::string& where);
// The same values, dense: the array itself where it is, else a copy.
ForeignArray make_dense(ForeignArray array);
size_t element_bytes(const std::string& dtype);

// ---- value semantics of the option structs: repr, equality and pickling through their keyword constructor
template <class T, class... Extra>
void add_value_methods(py::class_<T, Extra...>& cls, std::vector<std::string> fields) {
  auto as_dict = [fields](const py::object& self) {
    py::dict values;
    for (const std::string& field : fields) values[field.c_str()] = self.attr(field.c_str());
    return values;
  };
  cls.def("__repr__", [fields, as_dict](const py::object& self) {
    std::string text = py::str(py::type::of(self).attr("__name__"));
    text += "(";
    for (const auto& [key, value] : as_dict(self)) {
      if (text.back() != '(') text += ", ";
      text += std::string(py::str(key)) + "=" + std::string(py::repr(value));
    }
    return text + ")";
  });
  cls.def(
      "__eq__",
      [as_dict](const py::object& self, const py::object& other) {
        return py::type::of(self).is(py::type::of(other)) && as_dict(self).equal(as_dict(other));
      },
      py::arg("other").none(true));
  cls.attr("__hash__") = py::none();
  cls.def("__getstate__", as_dict);
  cls.def("__reduce__", [as_dict](const py::object& self) -> py::tuple {
    const py::object make = py::module_::import("loquetier_core._native").attr("_from_fields");
    return py::make_tuple(make, py::make_tuple(py::type::of(self), as_dict(self)));
  });
}

}  // namespace loquetier::python

namespace pybind11::detail {
template <>
struct handle_type_name<loquetier::python::ArrayLike> {
  static constexpr auto name = const_name("numpy.typing.ArrayLike");
};
template <>
struct handle_type_name<loquetier::python::ExamplesLike> {
  static constexpr auto name = const_name(
      "collections.abc.Iterable[Example | collections.abc.Mapping[str, numpy.typing.ArrayLike | None] | numpy.typing.ArrayLike]");
};
template <>
struct handle_type_name<loquetier::python::ModelLike> {
  static constexpr auto name = const_name("str | os.PathLike[str] | BaseModel | typing.Any");
};
template <>
struct handle_type_name<loquetier::python::ConfigLike> {
  static constexpr auto name = const_name("typing.Any");
};
template <>
struct handle_type_name<loquetier::python::StateDictLike> {
  static constexpr auto name = const_name("collections.abc.Mapping[str, typing.Any]");
};
}  // namespace pybind11::detail
