"""Distillation of attention: each query of the student attends where the teacher's does; gradients to both sides."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from vitkd_fast.ops._library import LIBRARY, Below, is_plain, keepable, number, transformed
from vitkd_fast.ops._precise import (
    Reduction,
    check_choice,
    check_dtypes_and_devices,
    precise_dtype,
    reduced,
    without_autocast,
)

Kind = Literal["kl", "mse"]
KINDS = get_args(Kind)


def attention_scores(attention: Tensor, scale: float) -> Tensor:
    """What the softmax over keys turns into the attention map, (B, H, N, N), of a packed qkv or of the map itself."""
    if attention.dim() == 4:
        return attention.clamp_min(torch.finfo(attention.dtype).tiny).log()
    query, key = attention.permute(2, 0, 3, 1, 4)[:2]  # each (B, H, N, D)
    return query * scale @ key.mT


def log_attention(scores: Tensor, average_heads: bool) -> tuple[Tensor, Tensor]:
    """In logs, every head's map (B, H, N, N) and the one to compare: the same, or the heads' mean (B, 1, N, N)."""
    heads = torch.log_softmax(scores, dim=-1)
    return heads, heads.logsumexp(1, keepdim=True) - math.log(heads.shape[1]) if average_heads else heads


def attention_kd_rows(log_q: Tensor, log_p: Tensor, kind: Kind) -> Tensor:
    """The loss of each query, (B, H, N), between the log maps (B, H, N, N) of student (q) and teacher (p)."""
    if kind == "mse":
        return (log_p.exp() - log_q.exp()).square().sum(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


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
        return attention_kd_rows(log_q, log_p, kind).mean((1, 2))

    @staticmethod
    def backward(ctx, grad):
        return *_by_formula(ctx, ctx.saved_tensors, grad), None, None, None


class _Kept(torch.autograd.Function):
    """What the kernel gives: losses and, kept for backward, what queries and keys get of each image's."""

    @staticmethod
    def forward(ctx, student, teacher, kind, average_heads, scales):
        ctx.arguments = kind, average_heads, scales
        dtype = precise_dtype(student, teacher)
        sides = [side.to(dtype) if dtype is torch.float64 else side for side in (student, teacher)]
        with Below():
            losses, *grads = torch.ops.vitkd.attention_kd(
                *sides, KINDS.index(kind), average_heads, *scales, *ctx.needs_input_grad[:2]
            )
        ctx.save_for_backward(student, teacher, *grads)
        return losses.mean(1)

    @staticmethod
    def backward(ctx, grad):
        *sides, student_grad, teacher_grad = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain(grad):  # create_graph, or traced
            return *_by_formula(ctx, sides, grad), None, None, None
        packed = [_scaled(*pair, grad) for pair in zip((student_grad, teacher_grad), sides, strict=True)]
        return *packed, None, None, None


def _by_formula(ctx, sides, grad: Tensor) -> list[Tensor | None]:
    """What both sides get where `grad` (B,) comes from above, by ops that can be differentiated again."""
    with without_autocast(grad.device):
        (student, teacher), (kind, average_heads, scales) = sides, ctx.arguments
        grads = _grads(student, teacher, kind, average_heads, scales, ctx.needs_input_grad[:2], grad)
    return [*map(_packed, grads, sides)]


def _grads(student, teacher, kind, average_heads, scales, wanted, weight: Tensor | None = None):
    """What queries and keys get, each (B, N, 2, H, D), of all images' losses, each times its `weight` (B,)."""
    (q_heads, log_q), (p_heads, log_p) = _log_maps(student, teacher, average_heads, scales)
    grad_q, grad_p = attention_kd_grads_formula(log_q, log_p, kind)
    share = 1 / (log_q.shape[1] * log_q.shape[2])
    if weight is not None:
        share = (weight * share).view(-1, 1, 1, 1)
    return [
        _of_queries_and_keys(grad * share, heads, log_map, qkv, scale) if want else None
        for want, grad, heads, log_map, qkv, scale in (
            (wanted[0], grad_q, q_heads, log_q, student, scales[0]),
            (wanted[1], grad_p, p_heads, log_p, teacher, scales[1]),
        )
    ]


def _packed(grad: Tensor | None, qkv: Tensor) -> Tensor | None:
    """(B, N, 2, H, D) in the form and dtype of qkv, nothing for the values."""
    if grad is None:
        return None
    nothing = torch.zeros_like(qkv[:, :, 2:], dtype=grad.dtype)
    return torch.cat((grad, nothing), 2).to(qkv.dtype)


def _scaled(kept: Tensor, qkv: Tensor, weight: Tensor) -> Tensor | None:
    """The same of what was kept, empty where none was wanted, each image's times its weight."""
    if kept.dim() == 1:
        return None
    packed = torch.empty_like(qkv)
    torch.mul(kept, weight.view(-1, 1, 1, 1, 1), out=packed[:, :, :2])
    packed[:, :, 2:] = 0
    return packed


def attention_kd_formula_with_grads(
    student, teacher, kind, average_heads, student_scale, teacher_scale, student_grad, teacher_grad
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch: (B, 1 or H) losses, means over the queries; what queries and keys get of each image's mean
    over heads, (B, N, 2, H, D), where that is wanted (empty where not)."""
    scales, wanted = (student_scale, teacher_scale), (student_grad, teacher_grad)
    (_, log_q), (_, log_p) = _log_maps(student, teacher, average_heads, scales)
    grads = _grads(student, teacher, KINDS[kind], average_heads, scales, wanted) if any(wanted) else (None, None)
    losses = attention_kd_rows(log_q, log_p, KINDS[kind]).mean(2)
    student, teacher = (losses.new_empty(0) if grad is None else grad for grad in grads)
    return losses, student, teacher


# No op of the public kind: the CPU alone has a kernel for it, and `attention_kd` alone calls it.
LIBRARY.define(
    "attention_kd(Tensor student, Tensor teacher, int kind, bool average_heads, float student_scale,"
    " float teacher_scale, bool student_grad, bool teacher_grad) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("attention_kd", attention_kd_formula_with_grads, "CompositeExplicitAutograd")


def _log_maps(student, teacher, average_heads, scales):
    dtype = precise_dtype(student, teacher)
    return [
        log_attention(attention_scores(side.to(dtype), scale), average_heads)
        for side, scale in zip((student, teacher), scales, strict=True)
    ]


def _of_queries_and_keys(grad: Tensor, heads: Tensor, log_map: Tensor, qkv: Tensor, scale: float) -> Tensor:
    """From the gradient of the compared log map back through the heads' mean, the softmax and q kᵀ."""
    if heads is not log_map:
        # in logs: a head's share of the mean is at most H, however far both have underflowed
        grad = grad * (heads - log_map - math.log(heads.shape[1])).exp()
    grad = grad - heads.exp() * grad.sum(-1, keepdim=True)  # (B, H, N, N), of the scores
    query, key = qkv.to(grad.dtype).permute(2, 0, 3, 1, 4)[:2]
    return torch.stack(((grad @ key * scale).transpose(1, 2), (grad.mT @ query * scale).transpose(1, 2)), 2)


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

    No N×N map stays in memory between blocks: packed inputs are kept for backward and, on the CPU, where one kernel
    gives the loss and its gradients, those of queries and keys in float32. Source: the place of the loss is L_patch of
    Habib et al. 2024 (arXiv 2408.05952), "patch attention loss"; its exact form is not published, so this one is ours.
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
    scales = [
        side.shape[-1] ** -0.5 if scale is None else number(name, scale)
        for side, name, scale in (
            (student, "student_scale", student_scale),
            (teacher, "teacher_scale", teacher_scale),
        )
    ]
    with without_autocast(student.device):
        if student.dim() == teacher.dim() == 5 and not transformed():
            plain = is_plain(student, teacher)
            if plain:
                student, teacher = keepable(student), keepable(teacher)
            losses = (_Kept if plain and student.is_cpu else _Recomputed).apply(
                student, teacher, kind, average_heads, scales
            )
        else:
            (_, log_q), (_, log_p) = _log_maps(student, teacher, average_heads, scales)
            losses = attention_kd_rows(log_q, log_p, kind).mean((1, 2))
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
