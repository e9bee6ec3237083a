// The Python module vitkd_fast._facts: how the libraries were built and what this CPU can do.
#include <pybind11/pybind11.h>

#include "../kernels/cpu/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_facts, module) {
  module.def(
      "build",
      [] {
        py::dict facts;
        facts["torch"] = VITKD_TORCH;
        facts["compiler"] = __VERSION__;
        facts["cuda_code"] = VITKD_CUDA_CODE;
        return facts;
      },
      "What the libraries were built with; cuda_code, such as sm_80,compute_80, is empty without CUDA.");
  module.def(
      "cpu",
      [] {
        const vitkd::cpu::CpuFacts cpu = vitkd::cpu::detect_cpu();
        py::dict facts;
        facts["avx2"] = cpu.avx2;
        facts["avx512"] = cpu.avx512;
        facts["avx512_bf16"] = cpu.avx512_bf16;
        facts["amx_bf16"] = cpu.amx_bf16;
        return facts;
      },
      "Which instruction sets this CPU has.");
  module.def("amd_family", &vitkd::cpu::amd_family, "The family of an AMD CPU, 26 for Zen 5; 0 for others.");
  module.def("isa", &vitkd::cpu::chosen_isa, "The instruction set that the CPU kernels use here.");
}
