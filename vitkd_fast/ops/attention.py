"""Multi-head self-attention on a packed qkv: what a ViT block does between its two linear layers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from vitkd_fast import choice
from vitkd_fast.ops._library import Below, autocast_dtype, define, differentiate, is_plain, number, transformed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 128  # of the fused kernels; wider heads go to torch's scaled_dot_product_attention


def attention_formula(qkv: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v in plain torch ("Attention Is All You Need", eq. 1): what every kernel must match."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
    weights = _weights(query, key, scale)  # (B, H, N, N)
    return (weights @ value).transpose(1, 2).flatten(2).contiguous()  # (B, N, H*D)


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return torch.softmax(query * scale @ key.mT, dim=-1)  # scaled first: float16 ends at 65,504


def attention_backward_formula(grad_out: Tensor, qkv: Tensor, scale: float) -> Tensor:
    """The gradient of `attention_formula` with respect to qkv, written out."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    grad_out = grad_out.unflatten(2, qkv.shape[3:]).transpose(1, 2)  # (B, H, N, D)
    weights = _weights(query, key, scale)
    grad_weights = grad_out @ value.mT
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
    grads = grad_scores @ key, grad_scores.mT @ query, weights.mT @ grad_out
    return torch.stack(grads).permute(1, 3, 0, 2, 4).contiguous()  # (B, N, 3, H, D)


def _attention(qkv, scale, bfloat16=False):
    return attention_formula(qkv.to(torch.bfloat16) if bfloat16 else qkv, scale)


def _attention_fake(qkv, scale, bfloat16=False):
    shape = qkv.shape[0], qkv.shape[1], qkv.shape[3] * qkv.shape[4]
    return qkv.new_empty(shape, dtype=torch.bfloat16 if bfloat16 else qkv.dtype)


# With bfloat16, a float32 qkv on the CPU gives a bfloat16 output, and no rounded copy of it is made.
define("attention(Tensor qkv, float scale, bool bfloat16=False) -> Tensor", formula=_attention, fake=_attention_fake)


def _attention_backward(grad_out, qkv, scale):
    return attention_backward_formula(grad_out, qkv.to(grad_out.dtype), scale).to(qkv.dtype)


define(
    "attention_backward(Tensor grad_out, Tensor qkv, float scale) -> Tensor",
    formula=_attention_backward,
    fake=lambda grad_out, qkv, scale: qkv.new_empty(qkv.shape),
)


def _setup_context(ctx, inputs, output):
    qkv, ctx.scale, _ = inputs
    ctx.save_for_backward(qkv)


def _backward(ops, ctx, grad_out):
    (qkv,) = ctx.saved_tensors
    # create_graph asks for a gradient that can be differentiated again
    backward = _attention_backward if torch.is_grad_enabled() else ops.attention_backward
    return backward(grad_out, qkv, ctx.scale), None, None


class _Attention(torch.autograd.Function):
    """The same node for eager mode: nothing between torch and the kernels that has not to be."""

    @staticmethod
    def forward(ctx, qkv, ops, scale, bfloat16):
        ctx.save_for_backward(qkv)
        ctx.ops, ctx.scale = ops, scale
        with Below():
            return ops.attention(qkv, scale, bfloat16)

    @staticmethod
    def backward(ctx, grad_out):
        if torch.is_grad_enabled() or not is_plain(grad_out):  # create_graph, or traced
            return *_backward(ctx.ops, ctx, grad_out), None
        (qkv,) = ctx.saved_tensors
        with Below():
            return ctx.ops.attention_backward(grad_out, qkv, ctx.scale), None, None, None


differentiate("attention", _backward, _setup_context)


def attention(qkv: Tensor, scale: float | None = None) -> Tensor:
    """Self-attention of a ViT block: softmax(scale * q kᵀ) v, per head, without an N×N matrix in memory.

    Args:
        qkv: (B, N, 3, H, D), the output of a block's qkv linear, viewed; any strides. float32, bfloat16 or float16;
            float64 on the CPU. Under autocast it is cast to autocast's dtype first, as torch's attention does.
        scale: what the scores are multiplied by; D ** -0.5 when None.

    Returns:
        (B, N, H*D) in qkv's dtype (autocast's under autocast), contiguous, ready for the output projection.

    Raises:
        ValueError: qkv is not (B, N, 3, H, D) with N, H, D >= 1.
        TypeError: qkv's dtype is none of the above.

    Heads wider than 128, a single token and, on a GPU, sequences of more tokens than our kernels are good for (see
    `vitkd_fast.choice`) are computed by torch's scaled_dot_product_attention. The gradient is deterministic wherever
    ours compute it. Second derivatives, forward mode and torch.func are the formula's, with its N×N matrices. Source:
    Vaswani et al. 2017, eq. 1.
    """
    if has_torch_function_unary(qkv):
        return handle_torch_function(attention, (qkv,), qkv, scale=scale)
    _check(qkv)
    scale = qkv.shape[-1] ** -0.5 if scale is None else number("scale", scale)
    dtype = autocast_dtype(qkv)
    if transformed():
        return attention_formula(qkv.to(dtype), scale)
    gradient = qkv.requires_grad and torch.is_grad_enabled()
    name, _ = choose(qkv.device, dtype, qkv.shape[-1], qkv.shape[1], gradient)
    if name == "sdpa":
        return _by_torch(qkv.to(dtype), scale)
    bfloat16 = dtype is torch.bfloat16 and qkv.dtype is torch.float32 and qkv.device.type == "cpu"
    if qkv.dtype is not dtype and not bfloat16:
        qkv = qkv.to(dtype)
    ops = torch.ops.vitkd_triton if name == "triton" else torch.ops.vitkd
    if not is_plain(qkv):
        return ops.attention(qkv, scale, bfloat16)
    if gradient:
        return _Attention.apply(qkv, ops, scale, bfloat16)
    with Below():
        return ops.attention(qkv, scale, bfloat16)


def _by_torch(qkv: Tensor, scale: float) -> Tensor:
    """torch's own attention, kept from what breaks its kernels: on a GPU what is not aligned, on the CPU strides after
    which it lays out a result that it then writes as if it were contiguous."""
    if is_plain(qkv):
        if not (_loads_by_16_bytes(qkv) if qkv.is_cuda else _is_packed(qkv)):
            qkv = qkv.clone(memory_format=torch.contiguous_format)
        if len(qkv) > (most := _most_images(qkv)):
            return torch.cat([_by_torch(part, scale) for part in qkv.split(most)])
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    if abs(scale) < torch.finfo(torch.float32).tiny:  # FlashAttention hides by -inf before it multiplies by the scale
        query, scale = query * scale, 1.0
    elif scale < 0:
        query, scale = -query, -scale
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2).contiguous()


def _most_images(qkv: Tensor) -> int:
    """How many torch's attention takes at once: FlashAttention has a row of blocks for each, of which a GPU launches
    65,535, and in backward counts the elements of a tensor padded to 128 tokens and 32 channels in 32 bits."""
    if not qkv.is_cuda:
        return len(qkv)
    _, tokens, _, heads, head_dim = qkv.shape
    padded = heads * (-(-tokens // 128) * 128) * max(head_dim, 32)
    return max(1, min(65_535, (2**31 - 1) // padded))


def _is_packed(qkv: Tensor) -> bool:
    """Contiguous, and by its strides alone: those of dimensions of size 1, which may be any, count here."""
    packed = [math.prod(qkv.shape[dim + 1 :]) for dim in range(qkv.dim())]
    return list(qkv.stride()) == packed


def _loads_by_16_bytes(qkv: Tensor) -> bool:
    """Whether every head begins where torch's kernels may load 16 bytes at once, which not all of them look at."""
    unit = 16 // qkv.element_size()
    if qkv.shape[-1] % unit != 0:  # then they copy it to where they may
        return True
    strides = (stride for stride, size in zip(qkv.stride()[:-1], qkv.shape) if size > 1)
    return qkv.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in strides)


def choose(
    device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int, gradient: bool = True
) -> tuple[choice.Name, str]:
    """Who computes attention of this kind, with a gradient or without, and why; "native": what the dispatcher has."""
    if head_dim > MAX_HEAD_DIM:
        return "sdpa", f"head_dim {head_dim} is above {MAX_HEAD_DIM}"
    if tokens == 1:
        return "sdpa", "one token attends to itself alone: there is nothing to fuse"
    if device.type != "cuda":
        return "native", "the dispatcher has one implementation for this device"
    if dtype is torch.float64:
        return "sdpa", "the CUDA kernels have no float64"
    for width, ranges in choice.attention(device, dtype, gradient):
        if width is None or head_dim == width:
            for most, name, reason in ranges:
                if most is None or tokens <= most:
                    return name, reason
    raise AssertionError("the last range of the last width has no end")


def fallback_reason(device: torch.device | str, dtype: torch.dtype, head_dim: int, tokens: int) -> str | None:
    """Why attention of this kind goes to torch's scaled_dot_product_attention; None when the fused op takes it."""
    name, reason = choose(torch.device(device), dtype, head_dim, tokens)
    return reason if name == "sdpa" else None


def _check(qkv: Tensor) -> None:
    shape = qkv.shape
    if len(shape) != 5 or shape[2] != 3 or 0 in shape[1:]:
        raise ValueError(
            f"qkv must be (batch, tokens, 3, heads, head_dim) with at least one token, head and channel; got shape "
            f"{tuple(shape)}. From a (B, N, 3*C) linear: qkv.view(B, N, 3, heads, C // heads)."
        )
    if qkv.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"qkv has dtype {str(qkv.dtype).removeprefix('torch.')}; accepted: {accepted}. Cast it first.")
