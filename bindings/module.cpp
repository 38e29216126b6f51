// The Python extension loquetier_core._native: the public C++ API, name by name. Start at bindings.h.
#include "bindings.h"

PYBIND11_MODULE(_native, m) {
  using namespace loquetier::python;
  m.doc() = "Native runtime of loquetier_core; use it through the package.";
  m.attr("__version__") = LOQUETIER_VERSION;
  bind_errors(m);
  bind_options(m);
  bind_results(m);
  bind_engine(m);
  bind_simulator(m);
  m.def("build_report", &loquetier::build_report, py::call_guard<py::gil_scoped_release>(),
        "What this build can do: version, CPU features, whether a CUDA library is built, found and usable.");
}
