"""Distillation of attention: each query of the student attends where the teacher's does; gradients to both sides."""

import math
from typing import Literal

import torch
from torch import Tensor

from vitkd_fast.ops._library import transformed
from vitkd_fast.ops._precise import (
    Reduction,
    check_choice,
    check_dtypes_and_devices,
    precise_dtype,
    reduced,
    without_autocast,
)

Kind = Literal["kl", "mse"]


def attention_scores(attention: Tensor, scale: float | None = None) -> Tensor:
    """What the softmax over keys turns into the attention map, (B, H, N, N), of a packed qkv or of the map itself."""
    if attention.dim() == 4:
        return attention.clamp_min(torch.finfo(attention.dtype).tiny).log()
    query, key = attention.permute(2, 0, 3, 1, 4)[:2]  # each (B, H, N, D)
    return query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.mT


def log_attention(scores: Tensor, average_heads: bool) -> tuple[Tensor, Tensor]:
    """In logs, every head's map (B, H, N, N) and the one to compare: the same, or the heads' mean (B, 1, N, N)."""
    heads = torch.log_softmax(scores, dim=-1)
    return heads, heads.logsumexp(1, keepdim=True) - math.log(heads.shape[1]) if average_heads else heads


def attention_kd_formula(log_q: Tensor, log_p: Tensor, kind: Kind) -> Tensor:
    """The loss of each image, (B,), between the log maps (B, H, N, N) of student (q) and teacher (p)."""
    if kind == "mse":
        rows = (log_p.exp() - log_q.exp()).square().sum(-1)
    else:
        rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    return rows.mean((1, 2))


def attention_kd_grads_formula(log_q: Tensor, log_p: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Gradients of every row's loss with respect to log_q and log_p, less what a softmax's backward takes out."""
    p = log_p.exp()
    if kind == "mse":
        q = log_q.exp()
        return 2 * (q - p) * q, 2 * (p - q) * p
    return -p, p * (log_p - log_q)


class _Recomputed(torch.autograd.Function):
    """Keeps the packed inputs alone and makes the maps again in backward: kept, they would be the largest tensors of
    the step (DeiT-B, batch 64: 119 MB each, two to five of them per block). Its backward is differentiable in turn."""

    @staticmethod
    def forward(ctx, student, teacher, kind, average_heads, scales):
        ctx.save_for_backward(student, teacher)
        ctx.arguments = kind, average_heads, scales
        (_, log_q), (_, log_p) = _log_maps(student, teacher, average_heads, scales)
        return attention_kd_formula(log_q, log_p, kind)

    @staticmethod
    def backward(ctx, grad):
        student, teacher = ctx.saved_tensors
        kind, average_heads, scales = ctx.arguments
        with without_autocast(student.device):
            (q_heads, log_q), (p_heads, log_p) = _log_maps(student, teacher, average_heads, scales)
            weight = (grad / (log_q.shape[1] * log_q.shape[2])).view(-1, 1, 1, 1)
            grad_q, grad_p = attention_kd_grads_formula(log_q, log_p, kind)
            student_grad = teacher_grad = None
            if ctx.needs_input_grad[0]:
                student_grad = _packed_grad(grad_q * weight, q_heads, log_q, student, scales[0])
            if ctx.needs_input_grad[1]:
                teacher_grad = _packed_grad(grad_p * weight, p_heads, log_p, teacher, scales[1])
        return student_grad, teacher_grad, None, None, None


def _log_maps(student, teacher, average_heads, scales):
    dtype = precise_dtype(student, teacher)
    return [
        log_attention(attention_scores(side.to(dtype), scale), average_heads)
        for side, scale in zip((student, teacher), scales, strict=True)
    ]


def _packed_grad(grad: Tensor, heads: Tensor, log_map: Tensor, qkv: Tensor, scale: float | None) -> Tensor:
    """From the gradient of the compared log map back through the heads' mean, the softmax and q kᵀ."""
    if heads is not log_map:
        # in logs: a head's share of the mean is at most H, however far both have underflowed
        grad = grad * (heads - log_map - math.log(heads.shape[1])).exp()
    grad = grad - heads.exp() * grad.sum(-1, keepdim=True)  # (B, H, N, N), of the scores
    query, key = qkv.to(grad.dtype).permute(2, 0, 3, 1, 4)[:2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    packed = torch.zeros_like(qkv)
    packed[:, :, 0] = (grad @ key * scale).transpose(1, 2)
    packed[:, :, 1] = (grad.mT @ query * scale).transpose(1, 2)
    return packed


def attention_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: Kind = "kl",
    average_heads: bool | None = None,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Distance between the attention maps of a student's block and a teacher's, mean over heads and queries.

    Args:
        student, teacher: (B, N, 3, H, D), a block's packed qkv as `vitkd_fast.taps` records it; (B, N, 2, H, D), q and
            k alone; or (B, H, N, N), the map itself, with rows of probabilities (they are normalised again). float32,
            bfloat16, float16 or float64, any strides. H and D may differ between the two, and so may the form. Each
            receives a gradient if it requires one: the adversarial generator differentiates both.
        kind: with rows p of the teacher's map and q of the student's, "kl" KL(p ‖ q) in nats, or "mse" ‖p − q‖², summed
            over the keys.
        average_heads: compare the mean of the heads' maps rather than head h with head h; None does so where the
            numbers of heads differ.
        student_scale, teacher_scale: what q kᵀ is multiplied by; D ** -0.5 when None. Not used for a map.
        reduction: "batchmean" (the mean over images) or "none" (each image's loss).

    Returns:
        A scalar or (B,), computed in float32 (float64 where an input is) whatever the inputs' dtype and autocast.

    Raises:
        ValueError: another shape, different B or N, heads that cannot be paired, an unknown kind or reduction.
        TypeError, RuntimeError: a dtype that is none of the above, tensors on different devices.

    Packed inputs are all that is kept for backward: no N×N map stays in memory between blocks. Source: the place of
    the loss is L_patch of Habib et al. 2024 (arXiv 2408.05952), "patch attention loss"; its exact form is not
    published, so this one is ours.
    """
    check_choice("kind", kind, Kind)
    check_choice("reduction", reduction, Reduction)
    check_dtypes_and_devices(student=student, teacher=teacher)
    student_heads, student_tokens = check_attention("student", student)
    teacher_heads, teacher_tokens = check_attention("teacher", teacher)
    if len(student) != len(teacher):
        raise ValueError(f"student has {len(student)} images and teacher {len(teacher)}; they must be the same images.")
    if student_tokens != teacher_tokens:
        raise ValueError(
            f"student attends over {student_tokens} tokens and teacher over {teacher_tokens}; maps can be compared "
            f"over the same tokens only. If one has more class, distillation or register tokens, drop each one's own: "
            f"qkv[:, prefix_tokens:], prefix_tokens being the model's num_prefix_tokens. If the patch grids differ, "
            f"give the student images or patches of another size."
        )
    if average_heads is None:
        average_heads = student_heads != teacher_heads
    elif not average_heads and student_heads != teacher_heads:
        raise ValueError(
            f"student has {student_heads} heads and teacher {teacher_heads}, which cannot be paired; leave "
            f"average_heads at None."
        )
    scales = student_scale, teacher_scale
    with without_autocast(student.device):
        if student.dim() == teacher.dim() == 5 and not transformed():
            losses = _Recomputed.apply(student, teacher, kind, average_heads, scales)
        else:
            (_, log_q), (_, log_p) = _log_maps(student, teacher, average_heads, scales)
            losses = attention_kd_formula(log_q, log_p, kind)
    return reduced(losses, reduction)


def check_attention(name: str, attention: Tensor) -> tuple[int, int]:
    """The numbers of heads and tokens of a packed qkv or a map."""
    packed = attention.dim() == 5 and attention.shape[2] in (2, 3)
    square = attention.dim() == 4 and attention.shape[2] == attention.shape[3]
    if not (packed or square) or 0 in attention.shape[1:]:
        raise ValueError(
            f"{name} must be a packed qkv, (batch, tokens, 3 or 2, heads, head_dim), or an attention map, (batch, "
            f"heads, tokens, tokens), with at least one of each; got shape {tuple(attention.shape)}."
        )
    return (attention.shape[3], attention.shape[1]) if packed else (attention.shape[1], attention.shape[2])
