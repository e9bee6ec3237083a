"""Distillation losses between two sets of logits and both their gradients, in Triton: one launch, one program per row.

A row of up to 8192 classes is read once and stays in registers. A longer one is swept three times (softmax statistics,
sums, gradients); the second and third sweep find it in L2.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkd_fast.triton._launch import check_dtype, unit_stride

# In the order of vitkd_fast.ops.kd_loss.KINDS.
_KL, _REVERSE_KL, _JS, _L1, _MSE = (tl.constexpr(kind) for kind in range(5))
_UNITS = ("class_units", "student_units", "teacher_units")
_LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(row, columns, classes):
    """A piece of a row in float32; -inf, which weighs nothing, beyond its end."""
    return tl.load(row + columns, mask=columns < classes, other=float("-inf")).to(tl.float32)


@triton.jit
def _log_ratio_to_mean(log_p, log_q):
    """log p - log m with m = (p + q) / 2: log 2 - log(1 + q / p), without overflow for either sign."""
    ratio = log_q - log_p
    return _LOG_2 - tl.maximum(ratio, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(ratio)))


@triton.jit
def _log_ratios(log_q, log_p, inside, KIND: tl.constexpr):
    """Per class: log(q / its target) and log(p / its target), 0 for the side whose divergence the loss lacks."""
    student = tl.zeros_like(log_q)
    teacher = tl.zeros_like(log_p)
    if KIND == _KL:
        teacher = log_p - log_q
    elif KIND == _REVERSE_KL:
        student = log_q - log_p
    else:
        student = _log_ratio_to_mean(log_q, log_p)
        teacher = _log_ratio_to_mean(log_p, log_q)
    return tl.where(inside, student, 0.0), tl.where(inside, teacher, 0.0)


@triton.jit
def _gradients(q, p, student_ratio, teacher_ratio, student_sum, teacher_sum, factor, KIND: tl.constexpr):
    """d loss / d student logits and d loss / d teacher logits; the sums are those of q * ratio and p * ratio."""
    student = q * (student_ratio - student_sum)
    teacher = p * (teacher_ratio - teacher_sum)
    if KIND == _KL:
        student = q - p
    elif KIND == _REVERSE_KL:
        teacher = p - q
    else:
        factor = factor * 0.5
    return student * factor, teacher * factor


@triton.jit
def _row_loss(student_sum, teacher_sum, temperature, KIND: tl.constexpr):
    loss = (student_sum + teacher_sum) * temperature * temperature
    if KIND == _JS:
        loss = loss * 0.5
    return loss


@triton.jit
def _store(gradient, row, classes, columns, tile, WANTED: tl.constexpr):
    if WANTED:
        tl.store(gradient + row * classes + columns, tile.to(gradient.dtype.element_ty), mask=columns < classes)


@triton.jit(do_not_specialize=_UNITS)
def _difference_kernel(
    student, teacher, rows, student_grad, teacher_grad, class_units, student_units, teacher_units, temperature,
    weight, KIND: tl.constexpr, STUDENT_GRAD: tl.constexpr, TEACHER_GRAD: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """l1 and mse: nothing of a row is needed before its gradients, so any length takes one sweep."""
    row = tl.program_id(0).to(tl.int64)
    classes = class_units * UNIT
    student += row * student_units * UNIT
    teacher += row * teacher_units * UNIT
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _load(student, columns, classes)
        t = _load(teacher, columns, classes)
        difference = tl.where(columns < classes, s - t, 0.0)
        if KIND == _L1:
            sums += tl.abs(difference)
            slope = (difference > 0).to(tl.float32) - (difference < 0).to(tl.float32)
        else:
            sums += difference * difference
            slope = 2.0 * difference
        gradient = tl.div_rn(slope, classes.to(tl.float32)) * weight
        _store(student_grad, row, classes, columns, gradient, STUDENT_GRAD)
        _store(teacher_grad, row, classes, columns, -gradient, TEACHER_GRAD)
    tl.store(rows + row, tl.sum(sums, 0) / classes)


@triton.jit(do_not_specialize=_UNITS)
def _softmax_kernel(
    student, teacher, rows, student_grad, teacher_grad, class_units, student_units, teacher_units, temperature,
    weight, KIND: tl.constexpr, STUDENT_GRAD: tl.constexpr, TEACHER_GRAD: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """kl, reverse_kl, js of a row that fits one block."""
    row = tl.program_id(0).to(tl.int64)
    classes = class_units * UNIT
    student += row * student_units * UNIT
    teacher += row * teacher_units * UNIT
    columns = tl.arange(0, BLOCK)
    inside = columns < classes
    factor = temperature * weight
    s = tl.div_rn(_load(student, columns, classes), temperature)
    t = tl.div_rn(_load(teacher, columns, classes), temperature)
    s -= tl.max(s, 0)
    t -= tl.max(t, 0)
    q, p = tl.exp(s), tl.exp(t)
    s_sum, t_sum = tl.sum(q, 0), tl.sum(p, 0)
    q = tl.div_rn(q, s_sum)
    p = tl.div_rn(p, t_sum)
    student_ratio, teacher_ratio = _log_ratios(s - tl.log(s_sum), t - tl.log(t_sum), inside, KIND)
    student_sum, teacher_sum = tl.sum(q * student_ratio, 0), tl.sum(p * teacher_ratio, 0)
    tl.store(rows + row, _row_loss(student_sum, teacher_sum, temperature, KIND))
    gradients = _gradients(q, p, student_ratio, teacher_ratio, student_sum, teacher_sum, factor, KIND)
    _store(student_grad, row, classes, columns, gradients[0], STUDENT_GRAD)
    _store(teacher_grad, row, classes, columns, gradients[1], TEACHER_GRAD)


@triton.jit
def _accumulate(logits, row_max, row_sum):
    """Online softmax statistics of one more block; each lane keeps its own until the end."""
    new_max = tl.maximum(row_max, logits)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    return new_max, row_sum * tl.exp(row_max - shift) + tl.exp(logits - shift)


@triton.jit
def _reduce(row_max, row_sum):
    """The row's maximum and sum of exponentials, from the lanes' own."""
    top = tl.max(row_max, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(row_sum * tl.exp(row_max - shift), 0)


@triton.jit(do_not_specialize=_UNITS)
def _long_softmax_kernel(
    student, teacher, rows, student_grad, teacher_grad, class_units, student_units, teacher_units, temperature,
    weight, KIND: tl.constexpr, STUDENT_GRAD: tl.constexpr, TEACHER_GRAD: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """kl, reverse_kl, js of a row of several blocks."""
    row = tl.program_id(0).to(tl.int64)
    classes = class_units * UNIT
    student += row * student_units * UNIT
    teacher += row * teacher_units * UNIT
    s_max = tl.full([BLOCK], float("-inf"), tl.float32)
    t_max = tl.full([BLOCK], float("-inf"), tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s_max, s_sum = _accumulate(tl.div_rn(_load(student, columns, classes), temperature), s_max, s_sum)
        t_max, t_sum = _accumulate(tl.div_rn(_load(teacher, columns, classes), temperature), t_max, t_sum)
    s_top, s_total = _reduce(s_max, s_sum)
    t_top, t_total = _reduce(t_max, t_sum)
    s_log_total, t_log_total = tl.log(s_total), tl.log(t_total)

    student_sums = tl.zeros([BLOCK], tl.float32)
    teacher_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = tl.div_rn(_load(student, columns, classes), temperature) - s_top
        t = tl.div_rn(_load(teacher, columns, classes), temperature) - t_top
        student_ratio, teacher_ratio = _log_ratios(s - s_log_total, t - t_log_total, columns < classes, KIND)
        student_sums += tl.exp(s) * student_ratio
        teacher_sums += tl.exp(t) * teacher_ratio
    student_sum, teacher_sum = tl.sum(student_sums, 0) / s_total, tl.sum(teacher_sums, 0) / t_total
    tl.store(rows + row, _row_loss(student_sum, teacher_sum, temperature, KIND))

    factor = temperature * weight
    if STUDENT_GRAD or TEACHER_GRAD:
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = tl.div_rn(_load(student, columns, classes), temperature) - s_top
            t = tl.div_rn(_load(teacher, columns, classes), temperature) - t_top
            student_ratio, teacher_ratio = _log_ratios(s - s_log_total, t - t_log_total, columns < classes, KIND)
            q = tl.div_rn(tl.exp(s), s_total)
            p = tl.div_rn(tl.exp(t), t_total)
            gradients = _gradients(q, p, student_ratio, teacher_ratio, student_sum, teacher_sum, factor, KIND)
            _store(student_grad, row, classes, columns, gradients[0], STUDENT_GRAD)
            _store(teacher_grad, row, classes, columns, gradients[1], TEACHER_GRAD)


_LONGEST_BLOCK = 8192
_SWEPT_BLOCK = 2048


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    kind: int,
    temperature: float,
    student_grad: bool,
    teacher_grad: bool,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss and the gradients that are wanted; see `vitkd_fast.ops.kd_loss`.

    Args:
        student, teacher: (B, C) logits of one dtype, float32, bfloat16 or float16; any strides, copied if C's is not
            1.
        kind: index into `vitkd_fast.ops.kd_loss.KINDS`.
        temperature: what the logits are divided by (not for l1 and mse).
        student_grad, teacher_grad: which gradients are wanted.
        weight: what they are multiplied by.

    Returns:
        The losses (B,) in float32, and weight * d loss / d student and / d teacher, (B, C) contiguous in the logits'
        dtype, or (0,) where not wanted.

    Raises:
        TypeError: another dtype, or two different ones.
        ValueError: a kind that is not in the list.
    """
    check_dtype("student", student)
    check_dtype("teacher", teacher, student.dtype)
    if not 0 <= kind <= _MSE.value:
        raise ValueError(f"kind is {kind}; accepted: 0 to {_MSE.value}.")
    batch, classes = student.shape
    student, teacher = unit_stride(student), unit_stride(teacher)
    rows = student.new_empty(batch, dtype=torch.float32)
    grads = [
        torch.empty((batch, classes) if wanted else (0,), dtype=student.dtype, device=student.device)
        for wanted in (student_grad, teacher_grad)
    ]
    if batch == 0:
        return rows, *grads
    kernel, block = _plan(kind, classes)
    sizes = classes, student.stride(0), teacher.stride(0)
    unit = math.gcd(8, *sizes)  # by itself Triton sees only multiples of 16, and would read a row of 1000 one by one
    with torch.cuda.device_of(student):
        kernel[(batch,)](
            student, teacher, rows, *grads, *(size // unit for size in sizes), temperature, weight,
            KIND=kind, STUDENT_GRAD=student_grad, TEACHER_GRAD=teacher_grad, BLOCK=block, UNIT=unit,
            num_warps=_warps(block),
        )  # fmt: skip
    return rows, *grads


def _plan(kind: int, classes: int) -> tuple[triton.JITFunction, int]:
    """The kernel for such rows, and how many classes it takes at a time."""
    if kind in (_L1.value, _MSE.value):
        return _difference_kernel, min(_SWEPT_BLOCK, triton.next_power_of_2(max(32, classes)))
    if classes > _LONGEST_BLOCK:
        return _long_softmax_kernel, _SWEPT_BLOCK
    return _softmax_kernel, triton.next_power_of_2(max(32, classes))


def _warps(block: int) -> int:
    """8 classes of each side per lane, 16 in the longest block."""
    return min(16, max(1, block // 256))
