"""The `vitkd` operator library: the one place where schemas, formulas, shapes and gradients meet the dispatcher.

Each op's file calls `define` once. The formula becomes the implementation for every device; the native libraries and
Triton register faster ones for CPU and CUDA against the same schema (see `vitkd_fast.backends`). The dispatcher holds
one implementation per op and device, and which of two is faster on a GPU depends on sizes, so every op stands there
twice: `torch.ops.vitkd.<op>`, and `torch.ops.vitkd_triton.<op>`, which is Triton's wherever there is CUDA.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

LIBRARY = torch.library.Library("vitkd", "DEF")
TRITON = torch.library.Library("vitkd_triton", "DEF")
_is_batched = torch._C._functorch.is_legacy_batchedtensor
Below = torch._C._AutoDispatchBelowAutograd
"""A context in which an op goes to its kernel without the Python function that `differentiate` puts before it."""
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


def number(name: str, value: float) -> float:
    """A scalar argument as a float, which takes a tensor out of the graph: an error where somebody waits for that."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise TypeError(f"{name} is a tensor that requires a gradient, and would get none; pass a number.")
    return float(value)


def keepable(tensor: Tensor) -> Tensor:
    """What autograd can keep for backward: of a tensor made in inference mode, as a teacher's output may be, a copy."""
    return tensor.clone() if tensor.is_inference() and torch.is_grad_enabled() else tensor


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are real tensors in eager mode, which nothing traces or transforms.

    Then the public functions differentiate with a node of their own around the op's kernel, which spares the host some
    10 µs a step; `differentiate` serves everything else: torch.compile, export, subclasses.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not Parameter:
            return False
        if _is_batched(tensor):  # by autograd's own vmap (is_grads_batched)
            return False
    return True


def transformed() -> bool:
    """Whether forward-mode derivatives or torch.func's transforms are under way, for which there are formulas: an op
    with a gradient of its own drops the former in silence and has no rule for the latter."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that autocast asks matrix products of this tensor to run in; its own dtype outside autocast."""
    if not torch._C._is_any_autocast_enabled():  # asking for one kind of device takes 5 µs
        return tensor.dtype
    kind = tensor.device.type
    if tensor.dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype
