// pymm._C: loads the registrations of the C++ kernels, tells about the build and knows the machine's arithmetic limit.
// Nothing else is bound here; the kernels themselves are reached through torch's dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/peak.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and instruction-set choice of pymm's C++ kernels.";
  m.def(
      "isa", [] { return std::string(pymm::isa_name(pymm::current_isa())); },
      "The instruction set that the kernels use now.");
  m.def(
      "best_isa", [] { return std::string(pymm::isa_name(pymm::best_isa())); },
      "The best instruction set that this machine can run.");
  m.def("available_isas", &pymm::available_isas, "The instruction sets that this machine can run, lowest first.");
  m.def("compiled_isas", &pymm::compiled_isas, "The instruction sets that were compiled, lowest first.");
  m.def("set_isa", &pymm::set_isa, py::arg("name"),
        "Pin an instruction set by name; ValueError when it is unknown or the machine cannot run it.");
  m.def("peak_operations", &pymm::peak_operations, py::arg("dtype"), py::arg("steps"),
        py::call_guard<py::gil_scoped_release>(),
        "Run `steps` rounds of a loop of multiply-adds in registers on every thread; returns the operations done.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = PYMM_VERSION;
        info["torch"] = PYMM_BUILT_WITH_TORCH;
        info["stable_abi"] = "2.10";
#if defined(PYMM_EMULATE_AMX)
        info["amx"] = "emulated";
#else
        info["amx"] = "native";
#endif
        info["compiler"] = __VERSION__;
        return info;
      },
      "What the extension was built from.");
}
