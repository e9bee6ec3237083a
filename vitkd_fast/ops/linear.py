"""A linear layer in float32 on AMD's CPUs, where torch's takes twice as long as it must.

PyTorch multiplies float32 matrices on the CPU with MKL, which computes on AMD's CPUs with vectors of 256 bits whatever
they have: on a Zen 5 core 107 GF/s of 267. Convolutions go to oneDNN, which PyTorch has on board as well and which uses
what is there; and a linear layer is a convolution whose pixels are the rows.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from vitkd_fast.ops._library import is_plain, transformed

# Multiply-adds; of fewer, a convolution's preparations are too large a part.
LEAST_WORK = 1 << 24
LEAST_WORK_OF_WEIGHT = 1 << 25


@cache
def faster_by_convolution() -> frozenset[str]:
    """Which products of a linear layer in float32 are faster as convolutions on this machine: "output", "input" (its
    gradient), "weight". Empty but on AMD's CPUs, and where torch has not both libraries."""
    try:
        from vitkd_fast import _facts
    except ImportError:
        return frozenset()
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not both or not _facts.made_by_amd() or not _facts.cpu()["avx2"]:
        return frozenset()
    # oneDNN's gradient of a convolution's weights is slow with AVX2.
    return frozenset({"output", "input", "weight"} if _facts.cpu()["avx512"] else {"output", "input"})


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: `torch.nn.functional.linear`, in float32 on AMD's CPUs up to twice as fast.

    Args:
        x: (..., in). What is not contiguous float32 on the CPU, or is compiled, traced, transformed, under autocast, or
            too small to gain, is torch's.
        weight: (out, in).
        bias: (out,).

    Returns:
        (..., out). Its gradients are torch's within rounding, second derivatives included.
    """
    inputs = (x, weight, bias)
    if has_torch_function(inputs):
        return handle_torch_function(linear, inputs, x, weight, bias)
    if not _fits(x, weight, bias):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not x.is_cpu or x.numel() * weight.shape[0] < LEAST_WORK or not is_plain(*tensors) or transformed():
        return False
    if any(tensor.dtype is not torch.float32 or not _is_plainly_stored(tensor) for tensor in tensors):
        return False
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return False  # for torch to make something of, or to say what is wrong
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"):
        return False
    return torch._C._get_mkldnn_enabled() and bool(faster_by_convolution())


def _is_plainly_stored(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and tensor.is_contiguous()


def _pixels(rows: Tensor) -> Tensor:
    """(M, K) as one image of M pixels and K channels, channels last."""
    return rows[None, :, None].permute(0, 3, 1, 2)


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows weightᵀ + bias, rows (M, K) contiguous, weight (N, K) of any strides."""
    out = torch.conv2d(_pixels(rows), weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _multiply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, sums = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        for_x, for_weight, for_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if torch.is_grad_enabled() or not is_plain(grad):  # create_graph, or traced
            grad_x = grad @ weight if for_x else None
            grad_weight = sums.t() @ rows if for_weight else None
            return grad_x, grad_weight, sums.sum(0) if for_bias else None
        sums = sums.contiguous()
        if for_x:
            grad_x = _multiply(sums, weight.t()).view(x.shape)
        by_convolution = "weight" in faster_by_convolution() and x.numel() * len(weight) >= LEAST_WORK_OF_WEIGHT
        if for_weight and by_convolution:
            _, grad_weight, _ = torch.ops.aten.convolution_backward(
                _pixels(sums), _pixels(rows), weight[:, :, None, None], None,
                [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False],
            )  # fmt: skip
            grad_weight = grad_weight.view(weight.shape)
        elif for_weight:
            grad_weight = sums.t() @ rows
        if for_bias:
            grad_bias = sums.sum(0)
        return grad_x, grad_weight, grad_bias
