"""Distillation losses between two sets of logits, with gradients to both of them."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from vitkd_fast import choice
from vitkd_fast.ops._library import LIBRARY, Below, define, differentiate, is_plain, keepable, number, transformed

Kind = Literal["kl", "reverse_kl", "js", "l1", "mse"]
Reduction = Literal["batchmean", "none"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # the order is the kernels' enum
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def kd_rows_formula(student: Tensor, teacher: Tensor, kind: Kind, temperature: float) -> Tensor:
    """The loss of each row, (B,), in plain differentiable torch: what every kernel must match."""
    if kind == "l1":
        return (student - teacher).abs().mean(-1)
    if kind == "mse":
        return (student - teacher).square().mean(-1)
    log_q = torch.log_softmax(student / temperature, dim=-1)
    log_p = torch.log_softmax(teacher / temperature, dim=-1)
    if kind == "kl":
        rows = _kl(log_p, log_q)
    elif kind == "reverse_kl":
        rows = _kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        rows = (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
    return rows * temperature**2


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kd_grads_formula(student: Tensor, teacher: Tensor, kind: Kind, temperature: float) -> tuple[Tensor, Tensor]:
    """The gradients of `kd_rows_formula` with respect to both logits, (B, C) each, written out."""
    if kind in ("l1", "mse"):
        difference = student - teacher
        grad = (difference.sign() if kind == "l1" else 2 * difference) / student.shape[-1]
        return grad, -grad
    log_q = torch.log_softmax(student / temperature, dim=-1)
    log_p = torch.log_softmax(teacher / temperature, dim=-1)
    q, p = log_q.exp(), log_p.exp()
    if kind == "kl":
        grads = q - p, _weigh(p, log_p - log_q)
    elif kind == "reverse_kl":
        grads = _weigh(q, log_q - log_p), p - q
    else:
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        grads = _weigh(q, log_q - log_m) / 2, _weigh(p, log_p - log_m) / 2
    return grads[0] * temperature, grads[1] * temperature


def _weigh(p: Tensor, log_ratio: Tensor) -> Tensor:
    """d KL(p || m) / d logits of p, where log_ratio = log p - log m and m does not depend on p to first order."""
    return p * (log_ratio - (p * log_ratio).sum(-1, keepdim=True))


def kd_loss_formula(
    student: Tensor,
    teacher: Tensor,
    kind: int,
    temperature: float,
    student_grad: bool,
    teacher_grad: bool,
    weight: float = 1.0,
    mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch: each row's loss, or the mean of all; and the gradients of the rows' losses times `weight`
    where wanted (empty where not)."""
    precise = student.to(_row_dtype(student)), teacher.to(_row_dtype(teacher))
    rows = kd_rows_formula(*precise, KINDS[kind], temperature)
    grads = kd_grads_formula(*precise, KINDS[kind], temperature) if student_grad or teacher_grad else precise
    return (
        rows.mean() if mean else rows,
        (grads[0] * weight).to(student.dtype).contiguous() if student_grad else student.new_empty(0),
        (grads[1] * weight).to(teacher.dtype).contiguous() if teacher_grad else teacher.new_empty(0),
    )


def _fake(student, teacher, kind, temperature, student_grad, teacher_grad, weight=1.0, mean=False):
    return (
        student.new_empty(() if mean else student.shape[:1], dtype=_row_dtype(student)),
        student.new_empty(student.shape if student_grad else (0,)),
        teacher.new_empty(teacher.shape if teacher_grad else (0,)),
    )


def _row_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


define(
    "kd_loss(Tensor student, Tensor teacher, int kind, float temperature, bool student_grad, bool teacher_grad,"
    " float weight=1.0, bool mean=False) -> (Tensor loss, Tensor student_grad, Tensor teacher_grad)",
    formula=kd_loss_formula,
    fake=_fake,
)


def _scale_formula(first: Tensor, second: Tensor, factor: Tensor, share: float) -> None:
    for grad in (first, second):
        grad.copy_(grad.to(factor.dtype) * (factor * share))


# No op of the public kind: in place, and called by `_Loss` alone.
LIBRARY.define("scale_(Tensor(a!) first, Tensor(b!) second, Tensor factor, float share) -> ()")
LIBRARY.impl("scale_", _scale_formula, "CompositeExplicitAutograd")


def _setup_context(ctx, inputs, output):
    student, teacher, kind, ctx.temperature, _, _, ctx.weight, ctx.mean = inputs
    _, *grads = output
    ctx.kind = KINDS[kind]
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, *grads)


def _backward(ops, ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    student, teacher, *kept = ctx.saved_tensors  # once: hooks may make other tensors each time, or refuse
    share = 1 / max(student.shape[0], 1) if ctx.mean else 1.0
    factor = grad.reshape(-1, 1)  # with dimensions, lest it be rounded to float16
    if torch.is_grad_enabled():
        grads = _differentiable(ctx, student, teacher, factor * share)
    else:
        grads = _scaled(ctx, kept, factor * (share / ctx.weight))
    return *grads, None, None, None, None, None, None


def _scaled(ctx, kept: list[Tensor], factor: Tensor | None) -> list[Tensor | None]:
    """The kept gradients where they are needed, times `factor` unless it is None."""
    return [
        (grad if factor is None else (grad * factor).to(grad.dtype)) if needed else None
        for grad, needed in zip(kept, ctx.needs_input_grad)
    ]


def _differentiable(ctx, student: Tensor, teacher: Tensor, factor: Tensor) -> list[Tensor | None]:
    """The gradients once more, from the logits, as create_graph asks for what can be differentiated again."""
    precise = _row_dtype(student)
    grads = kd_grads_formula(student.to(precise), teacher.to(precise), ctx.kind, ctx.temperature)
    return [(grad * factor).to(student.dtype) if needed else None for grad, needed in zip(grads, ctx.needs_input_grad)]


def _kept_weight(student: Tensor, kind: int, temperature: float, wanted: tuple[bool, ...]) -> float | None:
    """What float16 gradients are multiplied by as long as they are kept, lest they underflow before a loss scale makes
    up for it: a power of two, where they are known not to grow beyond the temperature; None for other dtypes."""
    if student.dtype is not torch.float16:
        return None
    bounded = KINDS[kind] == "js" or (KINDS[kind] == "kl" and not wanted[1])
    return 2.0 ** max(0, 8 - math.ceil(math.log2(max(temperature, 1)))) if bounded else 1.0


class _Loss(torch.autograd.Function):
    """Rows or their mean as one node for eager mode: nothing between torch and the kernels that has not to be.

    A mean's 1 / B is in the gradients from the start: where the upstream gradient is 1, backward hands them out as they
    are, and no second pass over them is needed. On the CPU looking costs nothing; on a GPU the kernel looks.
    """

    @staticmethod
    def forward(ctx, student, teacher, ops, kind, temperature, mean):
        ctx.ops, ctx.kind, ctx.temperature, ctx.mean = ops, KINDS[kind], temperature, mean
        wanted = ctx.needs_input_grad[:2]
        ctx.share = 1 / max(student.shape[0], 1) if mean else 1.0
        weight = _kept_weight(student, kind, temperature, wanted) or ctx.share
        ctx.rest = ctx.share / weight
        with Below():
            loss, *grads = ops.kd_loss(student, teacher, kind, temperature, *wanted, weight, mean)
        ctx.save_for_backward(student, teacher, *grads)
        return loss

    @staticmethod
    def backward(ctx, grad):
        student, teacher, *kept = ctx.saved_tensors  # once, as above
        factor = grad.reshape(-1, 1)  # with dimensions, lest it be rounded to float16
        if torch.is_grad_enabled():
            return *_differentiable(ctx, student, teacher, factor * ctx.share), None, None, None, None
        # a real number, nobody records the ops that work with it, and nobody asks for the kept gradients again
        known = ctx.mean and is_plain(grad) and not torch._C._len_torch_dispatch_stack()
        known = known and not torch._C._autograd._get_current_graph_task_keep_graph()
        if known and grad.is_cuda:
            scale = torch.ops.vitkd.scale_ if ctx.ops is torch.ops.vitkd else _scale_formula  # Triton has none
            with Below():
                scale(*kept, grad, ctx.rest)
            factor = None
        elif ctx.rest != 1:
            factor = factor * ctx.rest
        elif known and _is_one(grad):
            factor = None
        return *_scaled(ctx, kept, factor), None, None, None, None


def _ops(logits: Tensor):
    """The namespace whose kernel takes these logits; None: there is no kernel for them."""
    if logits.device.type == "cuda":
        for most, name, _ in choice.kd_loss(logits.device, logits.dtype):
            if most is None or logits.shape[1] <= most:
                return {"triton": torch.ops.vitkd_triton, "native": torch.ops.vitkd}.get(name)
    return torch.ops.vitkd


def _is_one(grad: Tensor) -> bool:
    """Looks only where looking costs nothing: on the CPU."""
    return grad.is_cpu and grad.item() == 1


differentiate("kd_loss", _backward, _setup_context)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: Kind = "kl",
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Distillation loss between student and teacher logits, loss and gradients from one sweep.

    Args:
        student_logits, teacher_logits: (B, C), float32, bfloat16, float16 or float64; different dtypes are promoted.
            Each receives a gradient if it requires one: the adversarial generator differentiates both. Then neither
            may be changed in place before backward.
        kind: with p, q the softmax of teacher and student logits divided by the temperature T,
            "kl" T² KL(p ‖ q) (Hinton et al. 2015); "reverse_kl" T² KL(q ‖ p); "js" T² (KL(p ‖ m) + KL(q ‖ m)) / 2 with
            m = (p + q) / 2 (Yin et al. 2020); "l1" and "mse": mean over the classes of |s - t| (Fang et al. 2019) and
            (s - t)² of the raw logits, for which temperature must stay 1.
        temperature: T > 0.
        reduction: "batchmean" (the mean over rows) or "none" (each row's loss).

    Returns:
        A scalar or (B,), in float32 (float64 for float64 logits) whatever the logits' dtype. In nats. Second
        derivatives, forward mode and torch.func are the formula's.

    Raises:
        ValueError: shapes that are not equal and (B, C) with C >= 1, an unknown kind or reduction, a bad temperature.
        TypeError, RuntimeError: a dtype that is none of the above, logits on different devices.
    """
    if has_torch_function_variadic(student_logits, teacher_logits):
        both = student_logits, teacher_logits
        return handle_torch_function(kd_loss, both, *both, kind=kind, temperature=temperature, reduction=reduction)
    temperature = number("temperature", temperature)
    _check(student_logits, teacher_logits, kind, temperature, reduction)
    student, teacher, dtype = student_logits, teacher_logits, student_logits.dtype
    if teacher.dtype is not dtype:
        dtype = torch.promote_types(dtype, teacher.dtype)
        student, teacher = student.to(dtype), teacher.to(dtype)
    mean = reduction == "batchmean"
    ops = _ops(student)
    if ops is None or transformed() or (dtype is torch.float64 and student.is_cuda):  # the CUDA kernels have no float64
        student, teacher = student.to(_row_dtype(student)), teacher.to(_row_dtype(teacher))
        rows = kd_rows_formula(student, teacher, kind, temperature)
        return rows.mean() if mean else rows
    enabled = torch.is_grad_enabled()
    wanted = enabled and student.requires_grad, enabled and teacher.requires_grad
    index = KINDS.index(kind)
    if is_plain(student, teacher):
        if wanted[0] or wanted[1]:
            return _Loss.apply(keepable(student), keepable(teacher), ops, index, temperature, mean)
        with Below():
            return ops.kd_loss(student, teacher, index, temperature, False, False, 1.0, mean)[0]
    weight = _kept_weight(student, index, temperature, wanted) or 1.0
    rows, _, _ = ops.kd_loss(student, teacher, index, temperature, *wanted, weight)
    return rows.mean() if mean else rows


def _check(student: Tensor, teacher: Tensor, kind: str, temperature: float, reduction: str) -> None:
    shape = student.shape
    if len(shape) != 2 or shape != teacher.shape or shape[1] == 0:
        raise ValueError(
            f"student_logits and teacher_logits must both be (batch, classes) with at least one class; got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits.dtype not in DTYPES:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{name} has dtype {str(logits.dtype).removeprefix('torch.')}; accepted: {accepted}.")
    if student.device != teacher.device:
        raise RuntimeError(
            f"student_logits is on {student.device} and teacher_logits on {teacher.device}; move one to the other."
        )
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; accepted: {', '.join(KINDS)}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; accepted: {', '.join(REDUCTIONS)}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be above 0 and finite.")
    if kind in ("l1", "mse") and temperature != 1:
        raise ValueError(f"kind {kind!r} compares raw logits, so temperature has no meaning there; leave it at 1.")
