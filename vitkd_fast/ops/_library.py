"""The `vitkd` operator library: the one place where schemas, formulas, shapes and gradients meet the dispatcher.

Each op's file calls `define` once. The formula becomes the implementation for every device; the native libraries and
Triton register faster ones for CPU and CUDA against the same schema (see `vitkd_fast.backends`). The dispatcher holds
one implementation per op and device, and which of two is faster on a GPU depends on sizes, so every op stands there
twice: `torch.ops.vitkd.<op>`, and `torch.ops.vitkd_triton.<op>`, which is Triton's wherever there is CUDA.
"""

from collections.abc import Callable
from functools import partial

import torch

LIBRARY = torch.library.Library("vitkd", "DEF")
TRITON = torch.library.Library("vitkd_triton", "DEF")
OPS: list[str] = []  # the names of all that is defined


def define(schema: str, formula: Callable, fake: Callable) -> None:
    """Define an op: its schema, its plain-torch formula (any device) and the shapes of what it returns."""
    name = schema.split("(", 1)[0]
    OPS.append(name)
    for library in (LIBRARY, TRITON):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, formula, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)


def differentiate(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give an op its gradient: `backward(ops, ctx, *grads)`, where `ops` is the namespace that the op was called in."""
    for library in (LIBRARY, TRITON):
        op = f"{library.ns}::{name}"
        ops = getattr(torch.ops, library.ns)
        torch.library.register_autograd(op, partial(backward, ops), setup_context=setup_context, lib=library)


def forbid_double_backward(name: str) -> None:
    """Make differentiating a backward op an error that says so, instead of a silent zero."""

    def backward(ops, ctx, *grads):
        raise NotImplementedError(
            f"{name} has no second derivative; use the formula in vitkd_fast.ops for gradients of gradients"
        )

    differentiate(name, backward, lambda ctx, inputs, output: None)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that autocast asks matrix products of this tensor to run in; its own dtype outside autocast."""
    kind = tensor.device.type
    if tensor.dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype
