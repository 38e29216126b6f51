// One Python class per C++ error class, each a subclass of loquetier_core.Error and of the natural built-in exception.
#include "bindings.h"

namespace loquetier::python {

namespace {

template <class CppError>
py::object add_error(py::module_& m, const char* name, const py::object& bases, const char* doc) {
  auto& cls = py::register_exception<CppError>(m, name, bases);
  cls.attr("__doc__") = doc;
  return cls;
}

}  // namespace

void bind_errors(py::module_& m) {
  const auto builtin = [](PyObject* type) { return py::reinterpret_borrow<py::object>(type); };
  // The translator registered last is asked first, so the base class comes first.
  const py::object error = add_error<Error>(m, "Error", builtin(PyExc_Exception), "Base class of every error of this package.");
  const auto with = [&](PyObject* type) { return py::make_tuple(error, builtin(type)); };
  add_error<InvalidArgument>(m, "InvalidArgument", with(PyExc_ValueError),
                             "An argument is wrong; the message says which, what was expected and what came. Nothing has changed.");
  const py::object not_found = add_error<NotFound>(m, "NotFound", with(PyExc_KeyError), "No such adapter, job, file or key.");
  // KeyError would show the message in quotes.
  not_found.attr("__str__") = py::cpp_function(
      [](const py::object& self) {
        const py::tuple args = self.attr("args");
        return args.empty() ? py::str("") : py::str(args[0]);
      },
      py::name("__str__"), py::is_method(not_found));
  add_error<OutOfMemory>(m, "OutOfMemory", with(PyExc_MemoryError),
                         "More memory was asked for than there is; the message names the bytes.");
  add_error<FormatError>(m, "FormatError", with(PyExc_ValueError),
                         "A file's content is not what its format says; the message names file and place.");
  add_error<DeviceError>(
      m, "DeviceError", with(PyExc_RuntimeError),
      "The device or its library failed. An engine refuses further work after one; host state can still be saved.");
  add_error<QueueFull>(m, "QueueFull", with(PyExc_RuntimeError), "Back-pressure: the queue is at max_queue; submit again later.");
}

}  // namespace loquetier::python
