"""Which kernels take an op on a GPU: CUDA's ("native"), Triton's, or torch's scaled_dot_product_attention.

choice.json has an entry for each GPU that was measured, written by benchmarks/choose.py; where none fits the GPU, dtype
and head_dim, a default applies that nobody measured. VITKD_CUDA_BACKEND=native|triton|sdpa overrides both.

The ops ask at every call, so the answer depends on device, dtype and sizes alone: torch.compile guards those, and the
ranges are constants to it. The GPU is asked for its name when its first tensor comes, not at import.
"""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch

Name = Literal["native", "triton", "sdpa"]
_Function = TypeVar("_Function", bound=Callable)

# Not measured: tokens up to which our kernels take attention where nothing else is known. With 16 bits and these widths
# the CUDA kernels hold a head and its weights in shared memory, and how many tokens fit follows from how much of it a
# block has: 227 KiB, 163 KiB or 99. Other heads are streamed, up to where the others' tiles of 128 x 128 fit well.
WHOLE_HEAD_DIMS = (32, 64)
_WHOLE_TOKENS = {(9, 0): 208, (10, 0): 208, (10, 3): 208, (8, 0): 160, (8, 7): 160}
_OTHER_TOKENS = 112
OLDEST = 8  # compute capability, without its second part, that the kernels are compiled for


def default_tokens(capability: Sequence[int] | None, kind: str, head_dim: int | None) -> int:
    """The default for a GPU of that compute capability (None: unknown) and a head of that dtype class and width."""
    if kind != "16-bit" or head_dim not in WHOLE_HEAD_DIMS or capability is None:
        return _OTHER_TOKENS
    return _WHOLE_TOKENS.get((capability[0], capability[1]), _OTHER_TOKENS)


WISH = os.environ.get("VITKD_CUDA_BACKEND", "")
if WISH not in ("", *get_args(Name)):
    warnings.warn(
        f"VITKD_CUDA_BACKEND={WISH} is ignored; accepted: {', '.join(get_args(Name))}.", RuntimeWarning, stacklevel=2
    )
    WISH = ""


# What computes an op up to a size, and why: (tokens of attention or classes of a loss, None being any; name; reason).
# Plain tuples: Dynamo of torch 2.11 cannot unpack a named one that is part of a constant function's result.
Range = tuple[int | None, Name, str]


def dtype_class(dtype: torch.dtype) -> str:
    """bfloat16 and float16 move the same bytes and use the same tensor cores: one measurement serves both."""
    return f"{dtype.itemsize * 8}-bit"


def constant(function: _Function) -> _Function:
    """What torch.compiler.assume_constant_result does, which would import all of Dynamo, and Triton with it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@cache
def table() -> tuple[dict[str, Any], ...]:
    """The measured GPUs."""
    return tuple(json.loads((Path(__file__).parent / "choice.json").read_text())["gpus"])


@cache
def entry(device: torch.device) -> dict[str, Any]:
    """What was measured on this very GPU model; empty when nothing was, or when there is no GPU."""
    model = _model(device)
    return next((each for each in table() if (each["gpu"], each["capability"]) == model), {})


def _model(device: torch.device) -> tuple[str, list[int]] | None:
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(device), list(torch.cuda.get_device_capability(device))


@cache
def _attention(
    device: torch.device, dtype: torch.dtype, gradient: bool
) -> tuple[tuple[int | None, tuple[Range, ...]], ...]:
    if WISH:
        return ((None, _wished(device)),)
    kind = dtype_class(dtype)
    measured = entry(device).get("attention", {}).get(kind, {})
    if not gradient:
        measured = measured | entry(device).get("attention_forward", {}).get(kind, {})
    if refused := _too_old(device):
        return ((None, (refused,)),)
    widths: dict[int | None, tuple[Range, ...]]
    widths = {int(width): _measured(device, ranges, "tokens") for width, ranges in measured.items()}
    _, capability = _model(device) or (None, None)
    for width in (*WHOLE_HEAD_DIMS, None):
        widths.setdefault(width, _default(device, default_tokens(capability, kind, width)))
    return tuple(widths.items())  # None, which fits any width, comes last


def _wished(device: torch.device) -> tuple[Range, ...]:
    return (_range(device, None, WISH, f"VITKD_CUDA_BACKEND={WISH}"),)


def _default(device: torch.device, tokens: int) -> tuple[Range, ...]:
    return (
        _range(device, tokens, "native", f"up to {tokens} tokens (default, not measured)"),
        _range(device, None, "sdpa", f"more than {tokens} tokens (default, not measured)"),
    )


@constant
def attention(
    device: torch.device, dtype: torch.dtype, gradient: bool = True
) -> tuple[tuple[int | None, tuple[Range, ...]], ...]:
    """For each head_dim that was measured, and at last for any other (None), who takes how many tokens.

    gradient: as forward and backward together were measured; else as the forward alone was, where it was.
    """
    return _attention(device, dtype, gradient)


@cache
def _kd_loss(device: torch.device, dtype: torch.dtype) -> tuple[Range, ...]:
    if WISH in ("native", "triton"):
        return _wished(device)
    if refused := _too_old(device):
        return (refused,)
    measured = entry(device).get("kd_loss", {}).get(dtype_class(dtype))
    if measured:
        return _measured(device, measured, "classes")
    return (_range(device, None, "native", "default, not measured"),)


@constant
def kd_loss(device: torch.device, dtype: torch.dtype) -> tuple[Range, ...]:
    """Who takes how many classes. torch has no such loss, so "sdpa" stands for none of the kernels being there."""
    return _kd_loss(device, dtype)


def forget() -> None:
    """Look again at the table, the devices and the wish."""
    for function in (table, entry, _attention, _kd_loss):
        function.cache_clear()


def _too_old(device: torch.device) -> Range | None:
    """Torch for everything, if this GPU is one that the kernels are not compiled for."""
    _, capability = _model(device) or (None, None)
    if capability is None or capability[0] >= OLDEST:
        return None
    return None, "sdpa", f"compute capability {capability[0]}.{capability[1]} is below {OLDEST}.0"


def _measured(device: torch.device, ranges: list, what: str) -> tuple[Range, ...]:
    result, previous = [], 0
    for most, name in ranges:
        limits = (
            f"{previous + 1} to {most} {what}" if most else f"{what} above {previous}" if previous else f"any {what}"
        )
        result.append(_range(device, most, name, f"{limits} (measured)"))
        previous = most
    return tuple(result)


def _range(device: torch.device, most: int | None, wanted: str, reason: str) -> Range:
    """With the next best where those kernels are not there, or have no code for this GPU."""
    from vitkd_fast import backends  # which imports the ops, and they import this

    _, capability = _model(device) or (None, None)
    there = backends.cuda_kernels(capability)
    name: Name = next((name for name in get_args(Name) if name == wanted), "sdpa")
    if name == "sdpa" or name in there:
        return most, name, reason
    if not there:
        return most, "sdpa", "no CUDA kernels here"
    return most, there[0], f"{reason}; there is no {name}"
