"""The `vitkd` operator library: the one place where schemas, formulas, shapes and gradients meet the dispatcher.

Each op's file calls `define` once. The formula becomes the implementation for every device; the native libraries and
Triton register faster ones for CPU and CUDA against the same schema (see `vitkd_fast.backends`).
"""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("vitkd", "DEF")
OPS: list[str] = []  # the names of all that is defined


def define(schema: str, formula: Callable, fake: Callable) -> None:
    """Define an op: its schema, its plain-torch formula (any device) and the shapes of what it returns."""
    name = schema.split("(", 1)[0]
    OPS.append(name)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, formula, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vitkd::{name}", fake, lib=LIBRARY)


def differentiate(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give an op its gradient."""
    torch.library.register_autograd(f"vitkd::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def forbid_double_backward(name: str) -> None:
    """Make differentiating a backward op an error that says so, instead of a silent zero."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"vitkd::{name} has no second derivative; use the formula in vitkd_fast.ops for gradients of gradients"
        )

    differentiate(name, backward, lambda ctx, inputs, output: None)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that autocast asks matrix products of this tensor to run in; its own dtype outside autocast."""
    kind = tensor.device.type
    if tensor.dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype
