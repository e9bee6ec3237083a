"""Which implementation of an op runs where: loads the native libraries, registers Triton's kernels, remembers why.

Importing this module registers everything. On a CPU the dispatcher does the choosing from then on, and
`implementation` tells. On a GPU both the CUDA and the Triton kernels are registered, under `torch.ops.vitkd` and
`torch.ops.vitkd_triton` (Triton stands in for CUDA in the first where the CUDA library is missing), and the public
functions go by `vitkd_fast.choice`.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from vitkd_fast import choice
from vitkd_fast.ops._library import LIBRARY, OPS, TRITON

HERE = Path(__file__).parent
Name = Literal["native", "triton", "formula"]
PLAIN = os.environ.get("VITKD_NO_NATIVE", "") not in ("", "0")
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


class Implementation(NamedTuple):
    name: Name
    reason: str


def implementation(op: str, device: str) -> Implementation:
    """What `torch.ops.vitkd.<op>` runs on a device type ("cpu", "cuda", …), and why."""
    if op not in OPS:
        raise ValueError(f"There is no op {op!r}; there are: {', '.join(sorted(OPS))}.")
    return _CHOICE.get(device, Implementation("formula", "no kernels of ours for this device: plain torch"))


def libraries() -> dict[str, str | None]:
    """For each native library, and for Triton's kernels, None when it is loaded, else why not."""
    return dict(_PROBLEMS)


def cuda_kernels(capability: Sequence[int] | None = None) -> tuple[Literal["native", "triton"], ...]:
    """Which of the kernels for CUDA are registered, and run on a GPU of that capability; the preferred ones first."""
    names: list[Literal["native", "triton"]] = []
    if _PROBLEMS["_C_cuda"] is None and (capability is None or has_code_for(capability)):
        names.append("native")
    if _PROBLEMS["triton"] is None:
        names.append("triton")
    return tuple(names)


def has_code_for(capability: Sequence[int]) -> bool:
    """Whether the CUDA library has code that such a GPU runs: machine code (sm_86) of an earlier GPU of its generation,
    or intermediate code (compute_80) of any earlier one; sm_90a is for 9.0 alone, sm_120f for its generation."""
    from vitkd_fast import _facts

    gpu = tuple(capability)
    for code in filter(None, _facts.build()["cuda_code"].split(",")):
        kind, _, number = code.partition("_")
        made_for = divmod(int(number.rstrip("af")), 10)
        if made_for == gpu:
            return True
        any_later = kind == "compute" and number.isdigit()
        if made_for < gpu and "a" not in number and (any_later or made_for[0] == gpu[0]):
            return True
    return False


def _load(library: str) -> str | None:
    """Load a native library; None, or what keeps it from running."""
    if PLAIN:
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


def _register_triton(stands_in: bool) -> str | None:
    """Register the Triton kernels for CUDA; None, or what keeps them from running."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    for name in OPS:
        for library in (TRITON, *([LIBRARY] if stands_in else [])):
            library.impl(name, _when_called(name), "CUDA")
    return None


def _when_called(name: str) -> Callable:
    # importing triton takes a second, which a machine without a GPU need not spend
    def kernel(*args):
        return getattr(importlib.import_module("vitkd_fast.triton"), name)(*args)

    return kernel


def _choose() -> dict[str, Implementation]:
    found = {}
    if _PROBLEMS["_C_cpu"] is None:
        from vitkd_fast import _facts

        isa, wish = _facts.isa(), os.environ.get("VITKD_CPU_ISA", "")
        if wish and wish not in ISAS:
            warnings.warn(f"VITKD_CPU_ISA={wish} is ignored; accepted: {', '.join(ISAS)}.", stacklevel=2)
            wish = ""
        elif wish not in ("", isa):
            warnings.warn(f"VITKD_CPU_ISA={wish} cannot be had on this CPU; using {isa}.", stacklevel=2)
        found["cpu"] = Implementation("native", f"C++ kernels, {isa}" + (" (VITKD_CPU_ISA)" if wish else ""))
    else:
        found["cpu"] = Implementation("formula", f"plain torch, because {_PROBLEMS['_C_cpu']}")
        if not PLAIN:
            advice = "Reinstall it to build them (pip install .)"
            if (HERE.parent / "setup.py").exists():
                advice = (
                    "This is the checkout, which hides an installed package: start Python in another folder, or build "
                    "here (pip install -e .)"
                )
            warnings.warn(
                f"vitkd_fast runs on plain torch, not its kernels: {_PROBLEMS['_C_cpu']}. {advice}; `vitkd doctor` "
                "tells more.",
                stacklevel=2,
            )
    if torch.version.cuda is not None:
        why_not_native, why_not_triton = _PROBLEMS["_C_cuda"], _PROBLEMS["triton"]
        if why_not_native is None:
            found["cuda"] = Implementation("native", "CUDA kernels")
        elif why_not_triton is None:
            found["cuda"] = Implementation("triton", f"Triton kernels, because {why_not_native}")
        else:
            reason = f"plain torch, because {why_not_native}, and {why_not_triton}"
            found["cuda"] = Implementation("formula", reason)
        if choice.WISH in ("native", "triton") and choice.WISH not in cuda_kernels():
            why = why_not_native if choice.WISH == "native" else why_not_triton
            warnings.warn(f"VITKD_CUDA_BACKEND={choice.WISH} cannot be had: {why}.", stacklevel=2)
    return found


_PROBLEMS = {library: _load(library) for library in ("_C_cpu", "_C_cuda")}
_PROBLEMS["triton"] = _register_triton(stands_in=_PROBLEMS["_C_cuda"] is not None)
_CHOICE = _choose()
