"""Which implementation of an op runs where: loads the native libraries, lets Triton stand in for CUDA, remembers why.

Importing this module registers everything. The dispatcher does the choosing from then on; `implementation` tells.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from vitkd_fast.ops._library import LIBRARY, OPS

HERE = Path(__file__).parent
Name = Literal["native", "triton", "formula"]


class Implementation(NamedTuple):
    name: Name
    reason: str


def implementation(op: str, device: str) -> Implementation:
    """What `torch.ops.vitkd.<op>` runs on a device type ("cpu", "cuda", …), and why."""
    if op not in OPS:
        raise ValueError(f"There is no op {op!r}; there are: {', '.join(sorted(OPS))}.")
    return _CHOICE.get(device, Implementation("formula", "no kernels of ours for this device: plain torch"))


def libraries() -> dict[str, str | None]:
    """For each native library, None when it is loaded, else why not."""
    return dict(_PROBLEMS)


def _load(library: str) -> str | None:
    """Load a native library; None, or what keeps it from running."""
    if os.environ.get("VITKD_NO_NATIVE"):
        return "VITKD_NO_NATIVE is set"
    path = HERE / f"{library}.so"
    if library == "_C_cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not path.exists():
        return f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except Exception as error:  # whatever is wrong with it, the formulas still work
        return f"{path.name} does not load: {error}"
    return None


def _triton() -> str | None:
    """Register the Triton kernels for CUDA; None, or what keeps them from running."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    for name in OPS:
        LIBRARY.impl(name, _when_called(name), "CUDA")
    return None


def _when_called(name: str) -> Callable:
    # importing triton takes a second, which a machine without a GPU need not spend
    def kernel(*args):
        return getattr(importlib.import_module("vitkd_fast.triton"), name)(*args)

    return kernel


def _choose() -> dict[str, Implementation]:
    choice = {}
    if _PROBLEMS["_C_cpu"] is None:
        from vitkd_fast import _facts

        isa, wish = _facts.isa(), os.environ.get("VITKD_CPU_ISA", "")
        if wish not in ("", isa):
            warnings.warn(f"VITKD_CPU_ISA={wish} cannot be had on this CPU; using {isa}.", stacklevel=2)
        choice["cpu"] = Implementation("native", f"C++ kernels, {isa}" + (" (VITKD_CPU_ISA)" if wish else ""))
    else:
        choice["cpu"] = Implementation("formula", f"plain torch, because {_PROBLEMS['_C_cpu']}")
        if not os.environ.get("VITKD_NO_NATIVE"):
            warnings.warn(
                f"vitkd_fast runs on plain torch, not its kernels: {_PROBLEMS['_C_cpu']}. Reinstall it to build them "
                "(pip install .); `vitkd doctor` tells more.",
                stacklevel=2,
            )
    if torch.version.cuda is not None:
        if _PROBLEMS["_C_cuda"] is None:
            choice["cuda"] = Implementation("native", "CUDA kernels")
        elif (problem := _triton()) is None:
            choice["cuda"] = Implementation("triton", f"Triton kernels, because {_PROBLEMS['_C_cuda']}")
        else:
            choice["cuda"] = Implementation("formula", f"plain torch, because {_PROBLEMS['_C_cuda']}, and {problem}")
    return choice


_PROBLEMS = {library: _load(library) for library in ("_C_cpu", "_C_cuda")}
_CHOICE = _choose()
