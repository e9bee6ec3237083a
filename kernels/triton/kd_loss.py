"""Distillation losses between two sets of logits and both their gradients, in Triton: one launch, one program per row.

A row of up to 4096 classes is read once and stays in registers. A longer one is swept three times (softmax statistics,
means, gradients); the second sweep goes backwards, so that it begins with what the caches still hold. (Of 8192 classes
in registers, one row would fill an SM, which would load nothing while it computes.)

An exponential is taken once per sweep and nothing is divided per class: by the machine code for sm_90, kl of 1000
classes takes 38 instructions per pair of bfloat16 logits, both gradients included; an H200 issues 49 while it moves the
8 bytes of a pair (32 pairs per instruction, 528 schedulers, 1.755 GHz, 4.8 TB/s).

What is compiled for depends on the dtype, the kind, the gradients wanted, the length of a row rounded up to a power of
2, and the largest of 1, 2, 4, 8 that divides it and both strides; not on the batch size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkd_fast.triton._launch import check_dtype, in_units, strides_of, unit_stride

# In the order of vitkd_fast.ops.kd_loss.KINDS. reverse_kl is kl with the sides exchanged.
_KL, _REVERSE_KL, _JS, _L1, _MSE = (tl.constexpr(kind) for kind in range(5))
_UNITS = ("class_units", "student_units", "teacher_units")
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(row, columns, classes):
    """A piece of a row in float32; -inf, which weighs nothing, beyond its end."""
    return tl.load(row + columns, mask=columns < classes, other=float("-inf")).to(tl.float32)


@triton.jit
def _exp(x, PRECISE: tl.constexpr):
    """e^x for x <= 0, and 0 far below.

    Not precise: within |x| float32 roundings, which x * log2(e) loses; half-precision logits came with thousands.
    """
    if PRECISE:  # x = n ln 2 + r, both products below exact; 2^n is exact too
        n = tl.maximum(x * _LOG2_E, -150.0) + 12582912.0 - 12582912.0  # 1.5 * 2^23: to the nearest whole number
        r = x - n * 0.693359375 + n * 2.12194440e-4
        return tl.exp2(r * _LOG2_E) * tl.exp2(n)
    return tl.exp2(x * _LOG2_E)


@triton.constexpr_function
def _is_precise(dtype, block):
    """float32 has twice the time of half precision, and a short row is over sooner than it is launched."""
    return dtype == tl.float32 or block <= 256


@triton.jit
def _log_half_1p(x):
    """log((1 + x) / 2) for x in [0, 1], to a relative 1e-7 and its roundings, and exactly 0 at 1.

    The polynomial in y = x - 1 is that of least relative error on [-1, 0] among those that begin with y / 2, for what
    is left of js when networks agree is of second order, and end on log(1 / 2), where they have nothing in common: 9
    instructions where log takes 20.
    """
    y = x - 1.0
    result = -0.0047722305 * y - 0.0088950917
    result = result * y - 0.01279169
    result = result * y + 0.00091420556
    result = result * y - 0.017072868
    result = result * y + 0.041483507
    result = result * y - 0.12500778
    result = result * y + 0.5
    return result * y


@triton.jit
def _log_ratios(s, t, scale, log_sums, inside, KIND: tl.constexpr, PRECISE: tl.constexpr):
    """Per class log(q / m) and log(p / m), for kl 0 and log(p / q); s, t are logits less their row's largest.

    q, p are the softmax of student and teacher, m is their mean, log_sums is log(student's sum / teacher's). Scaled is
    the difference: of two scaled logits the compiler would round one and fuse the other, and equal ones would differ.
    """
    ratio = tl.where(inside, (t - s) * scale + log_sums, 0.0)
    if KIND == _KL:
        return tl.zeros_like(ratio), ratio
    of_larger = _log_half_1p(_exp(-tl.abs(ratio), PRECISE))  # log(m / max(p, q))
    return tl.minimum(-ratio, 0.0) - of_larger, tl.minimum(ratio, 0.0) - of_larger


@triton.jit
def _gradients(
    student_exp, teacher_exp, student_ratio, teacher_ratio, student_mean, teacher_mean, student_factor, teacher_factor,
    KIND: tl.constexpr,
):  # fmt: skip
    """d loss / d student logits and d loss / d teacher logits; the factors turn exponentials into probabilities."""
    teacher = teacher_exp * teacher_factor
    student = student_exp * student_factor
    if KIND == _KL:
        student = student - teacher
    else:
        student = student * (student_ratio - student_mean)
    return student, teacher * (teacher_ratio - teacher_mean)


@triton.jit
def _row_loss(student_mean, teacher_mean, temperature, KIND: tl.constexpr):
    loss = (student_mean + teacher_mean) * temperature * temperature
    if KIND == _JS:
        loss = loss * 0.5
    return loss


@triton.jit
def _gradient_factor(temperature, weight, KIND: tl.constexpr):
    factor = temperature * weight
    if KIND == _JS:
        factor = factor * 0.5
    return factor


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
    per_class = tl.div_rn(1.0, classes.to(tl.float32))
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
        gradient = slope * per_class * weight
        _store(student_grad, row, classes, columns, gradient, STUDENT_GRAD)
        _store(teacher_grad, row, classes, columns, -gradient, TEACHER_GRAD)
    tl.store(rows + row, tl.sum(sums, 0) / classes)


@triton.jit(do_not_specialize=_UNITS)
def _softmax_kernel(
    student, teacher, rows, student_grad, teacher_grad, class_units, student_units, teacher_units, temperature,
    weight, KIND: tl.constexpr, STUDENT_GRAD: tl.constexpr, TEACHER_GRAD: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """kl and js of a row that fits one block."""
    PRECISE: tl.constexpr = _is_precise(student.dtype.element_ty, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    classes = class_units * UNIT
    columns = tl.arange(0, BLOCK)
    inside = columns < classes
    scale = tl.div_rn(1.0, temperature)
    s = _load(student + row * student_units * UNIT, columns, classes)
    t = _load(teacher + row * teacher_units * UNIT, columns, classes)
    s -= tl.max(s, 0)
    t -= tl.max(t, 0)
    q, p = _exp(s * scale, PRECISE), _exp(t * scale, PRECISE)
    s_sum, t_sum = tl.sum(q, 0), tl.sum(p, 0)
    log_sums = tl.log(tl.div_rn(s_sum, t_sum))
    s_per_sum, t_per_sum = tl.div_rn(1.0, s_sum), tl.div_rn(1.0, t_sum)
    student_ratio, teacher_ratio = _log_ratios(s, t, scale, log_sums, inside, KIND, PRECISE)
    student_mean = tl.sum(q * student_ratio, 0) * s_per_sum
    teacher_mean = tl.sum(p * teacher_ratio, 0) * t_per_sum
    tl.store(rows + row, _row_loss(student_mean, teacher_mean, temperature, KIND))
    factor = _gradient_factor(temperature, weight, KIND)
    gradients = _gradients(
        q, p, student_ratio, teacher_ratio, student_mean, teacher_mean, factor * s_per_sum, factor * t_per_sum, KIND
    )
    _store(student_grad, row, classes, columns, gradients[0], STUDENT_GRAD)
    _store(teacher_grad, row, classes, columns, gradients[1], TEACHER_GRAD)


@triton.jit
def _accumulate(logits, row_max, sums, scale, PRECISE: tl.constexpr):
    """Online softmax statistics of one more block: the maximum is the row's, sums are each lane's own."""
    new_max = tl.maximum(row_max, tl.max(logits, 0))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    return new_max, sums * _exp((row_max - shift) * scale, PRECISE) + _exp((logits - shift) * scale, PRECISE)


@triton.jit(do_not_specialize=_UNITS)
def _long_softmax_kernel(
    student, teacher, rows, student_grad, teacher_grad, class_units, student_units, teacher_units, temperature,
    weight, KIND: tl.constexpr, STUDENT_GRAD: tl.constexpr, TEACHER_GRAD: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """kl and js of a row of several blocks."""
    PRECISE: tl.constexpr = _is_precise(student.dtype.element_ty, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    classes = class_units * UNIT
    student += row * student_units * UNIT
    teacher += row * teacher_units * UNIT
    scale = tl.div_rn(1.0, temperature)
    s_max, t_max = float("-inf"), float("-inf")
    s_sums = tl.zeros([BLOCK], tl.float32)
    t_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s_max, s_sums = _accumulate(_load(student, columns, classes), s_max, s_sums, scale, PRECISE)
        t_max, t_sums = _accumulate(_load(teacher, columns, classes), t_max, t_sums, scale, PRECISE)
    s_sum, t_sum = tl.sum(s_sums, 0), tl.sum(t_sums, 0)
    log_sums = tl.log(tl.div_rn(s_sum, t_sum))
    s_per_sum, t_per_sum = tl.div_rn(1.0, s_sum), tl.div_rn(1.0, t_sum)

    student_sums = tl.zeros([BLOCK], tl.float32)
    teacher_sums = tl.zeros([BLOCK], tl.float32)
    last = (classes - 1) // BLOCK * BLOCK
    for done in range(0, classes, BLOCK):
        columns = last - done + tl.arange(0, BLOCK)
        s = _load(student, columns, classes) - s_max
        t = _load(teacher, columns, classes) - t_max
        student_ratio, teacher_ratio = _log_ratios(s, t, scale, log_sums, columns < classes, KIND, PRECISE)
        student_sums += _exp(s * scale, PRECISE) * student_ratio
        teacher_sums += _exp(t * scale, PRECISE) * teacher_ratio
    student_mean, teacher_mean = tl.sum(student_sums, 0) * s_per_sum, tl.sum(teacher_sums, 0) * t_per_sum
    tl.store(rows + row, _row_loss(student_mean, teacher_mean, temperature, KIND))

    if STUDENT_GRAD or TEACHER_GRAD:
        factor = _gradient_factor(temperature, weight, KIND)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = _load(student, columns, classes) - s_max
            t = _load(teacher, columns, classes) - t_max
            student_ratio, teacher_ratio = _log_ratios(s, t, scale, log_sums, columns < classes, KIND, PRECISE)
            q, p = _exp(s * scale, PRECISE), _exp(t * scale, PRECISE)
            gradients = _gradients(
                q, p, student_ratio, teacher_ratio, student_mean, teacher_mean, factor * s_per_sum,
                factor * t_per_sum, KIND,
            )  # fmt: skip
            _store(student_grad, row, classes, columns, gradients[0], STUDENT_GRAD)
            _store(teacher_grad, row, classes, columns, gradients[1], TEACHER_GRAD)


_LONGEST_BLOCK = 4096  # of a row in registers, and of a sweep


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    kind: int,
    temperature: float,
    student_grad: bool,
    teacher_grad: bool,
    weight: float = 1.0,
    mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss and the gradients that are wanted; see `vitkd_fast.ops.kd_loss`.

    Args:
        student, teacher: (B, C) logits of one dtype, float32, bfloat16 or float16; any strides, copied if C's is not
            1.
        kind: index into `vitkd_fast.ops.kd_loss.KINDS`.
        temperature: what the logits are divided by (not for l1 and mse).
        student_grad, teacher_grad: which gradients are wanted.
        weight: what they are multiplied by.
        mean: whether the mean of the losses is wanted in their place.

    Returns:
        The losses (B,), or their mean (), in float32, and weight * d loss / d student and / d teacher, (B, C)
        contiguous in the logits' dtype, or (0,) where not wanted.

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
        return rows.mean() if mean else rows, *grads
    sides = (student, student_grad, grads[0]), (teacher, teacher_grad, grads[1])
    if kind == _REVERSE_KL.value:
        kind, sides = _KL.value, sides[::-1]
    (student, student_grad, grad_student), (teacher, teacher_grad, grad_teacher) = sides
    kernel, block = _plan(kind, classes)
    # By itself Triton sees only multiples of 16, and would read a row of 1000 one by one.
    units, unit = in_units((classes, *strides_of(student), *strides_of(teacher)))
    with torch.cuda.device_of(student):
        kernel[(batch,)](
            student, teacher, rows, grad_student, grad_teacher, *units, temperature, weight, KIND=kind,
            STUDENT_GRAD=student_grad, TEACHER_GRAD=teacher_grad, BLOCK=block, UNIT=unit,
            **_options(student.dtype, block),
        )  # fmt: skip
    return rows.mean() if mean else rows, *grads


def _plan(kind: int, classes: int) -> tuple[triton.JITFunction, int]:
    """The kernel for such rows, and how many classes it takes at a time."""
    block = triton.next_power_of_2(max(32, classes))
    if kind in (_L1.value, _MSE.value):
        return _difference_kernel, min(_LONGEST_BLOCK, block)
    if block > _LONGEST_BLOCK:
        return _long_softmax_kernel, _LONGEST_BLOCK
    return _softmax_kernel, block


def _options(dtype: torch.dtype, block: int) -> dict[str, int | bool]:
    """How a kernel is compiled.

    32 classes of each side per lane, so that 1024 need no barrier, of which each reduction of a row would cost two. A
    lane then holds 96 values of a row for kl and 128 for js, in 149 and 160 registers: 12 rows of 4 KB are under way
    on an SM, where an H200 needs 13 KB (2.4 TB/s of reads, 0.7 µs, 132 SMs).

    Which products and sums become one multiply-add, the compiler decides by all that is computed, so that a float32
    loss had other last bits where a gradient was wanted beside it (seen on an H200). It has the time to do without,
    and beyond 2048 classes not the registers, of which 16 classes a lane need fewer.
    """
    fused = dtype is not torch.float32
    per_warp = 1024 if fused or block <= 2048 else 512
    return {"num_warps": max(1, block // per_warp), "enable_fp_fusion": fused}
