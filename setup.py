"""Builds the native libraries with ninja; everything else is in pyproject.toml.

    _C_cpu.so    csrc/ + kernels/cpu/    always; each kernel once per instruction set, chosen when it runs
    _C_cuda.so   csrc/ + kernels/cuda/   wherever nvcc is found, GPU or not
    _facts.*.so  csrc/facts.cpp          pybind11: how this was built, what this CPU can do

Environment: VITKD_CUDA=0 skips CUDA, VITKD_CUDA=1 makes a missing nvcc an error; CUDA_HOME, TORCH_CUDA_ARCH_LIST,
MAX_JOBS and CXX mean what they mean to PyTorch's own extensions. VITKD_EMULATED=1 is for tests: every instruction set
works, those beyond AVX2 slowly.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "_build"))

import native  # noqa: E402
from environment import runtime_requirements  # noqa: E402


class NinjaBuild(build_ext):
    def get_ext_filename(self, fullname):
        if fullname.endswith("_facts"):
            return super().get_ext_filename(fullname)
        return fullname.replace(".", "/") + ".so"  # loaded by torch, not by Python: no Python version in its name

    def run(self):
        folder = ROOT / "build/native"  # kept between builds, so that ninja redoes only what changed
        found = native.libraries(ROOT, folder)
        targets = {name: Path(self.get_ext_fullpath(f"vitkd_fast.{name}")).resolve() for name in found}
        for target in targets.values():
            target.parent.mkdir(parents=True, exist_ok=True)
        if "_C_cuda" not in found:  # what an earlier build left in the checkout is not what _facts tells of
            targets["_C_cpu"].with_name("_C_cuda.so").unlink(missing_ok=True)
        native.build(targets, found, folder, verbose=self.verbose > 1)


setup(
    ext_modules=[Extension(f"vitkd_fast.{name}", []) for name in native.library_names()],
    cmdclass={"build_ext": NinjaBuild},
    install_requires=runtime_requirements(),
)
