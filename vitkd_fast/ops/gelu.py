"""The activation of a ViT's MLP."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from vitkd_fast.ops._library import LIBRARY, Below, is_plain, transformed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the CPU's kernel


def gelu_formula(x: Tensor) -> Tensor:
    """x Φ(x) in plain torch (Hendrycks and Gimpel 2016), Φ the normal distribution: what every kernel must match."""
    return x * _normal(x)


def gelu_backward_formula(grad: Tensor, x: Tensor) -> Tensor:
    """grad times the derivative of `gelu_formula`, Φ(x) + x φ(x), written out."""
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    return grad * (_normal(x) + x * density)


def _normal(x: Tensor) -> Tensor:
    return torch.erfc(x * -(0.5**0.5)) / 2  # torch's ndtr is 1 + erf, which keeps no digit of a small one


# No ops of the public kind: the CPU alone has kernels for them, and `gelu` alone calls them.
LIBRARY.define("gelu(Tensor x) -> Tensor")
LIBRARY.define("gelu_backward(Tensor grad, Tensor x) -> Tensor")
LIBRARY.impl("gelu", F.gelu, "CompositeExplicitAutograd")
LIBRARY.impl("gelu_backward", torch.ops.aten.gelu_backward.default, "CompositeExplicitAutograd")


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        with Below():
            return torch.ops.vitkd.gelu(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain(grad):  # create_graph, for which torch's has a derivative; or traced
            return torch.ops.aten.gelu_backward(grad, x)
        with Below():
            return torch.ops.vitkd.gelu_backward(grad.contiguous(), x)


def _fits(x: Tensor) -> bool:
    return x.is_cpu and x.dtype in DTYPES and not x.is_nested and x.is_contiguous()


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), Φ the normal distribution: torch's `gelu` without approximation, on the CPU by a faster kernel.

    Args:
        x: any shape. The kernel takes contiguous float32, bfloat16 and float16 on the CPU; everything else, and what is
            compiled, traced or transformed, is torch's.

    Returns:
        x's shape and dtype. Its gradients are those of torch's, second derivatives included.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
    """
    if has_torch_function_unary(x):
        if isinstance(x, Tensor):
            return F.gelu(x)  # by which name tensors of other kinds know it
        return handle_torch_function(gelu, (x,), x)
    if not is_plain(x) or transformed() or not _fits(x):
        return F.gelu(x)
    if x.requires_grad and torch.is_grad_enabled():
        return _Gelu.apply(x)
    with Below():
        return torch.ops.vitkd.gelu(x)
