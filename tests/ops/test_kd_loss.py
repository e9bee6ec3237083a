"""The distillation losses and both their gradients, against the formula in exact arithmetic and torch's own losses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logits import DTYPES, LOSSES, SOFTENED, draw
from testing_rules import IMPLEMENTATIONS, assert_follows_rule, assert_native, needs_native

from vitkd_fast.ops import kd_loss
from vitkd_fast.ops.kd_loss import KINDS, kd_grads_formula, kd_loss_formula, kd_rows_formula

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CLASSES = (1, 2, 10, 100, 1000, 1025)


class Op:
    """(student, teacher, kind, temperature) -> rows, student_grad, teacher_grad of one implementation."""

    def __init__(self, device, call):
        self.device, self.call = device, call

    def __call__(self, student, teacher, kind, temperature, student_grad=True, teacher_grad=True):
        return self.call(student, teacher, KINDS.index(kind), temperature, student_grad, teacher_grad)


@pytest.fixture(params=IMPLEMENTATIONS)
def op(request):
    if request.param == "formula":
        return Op("cpu", kd_loss_formula)
    if request.param == "cpu":
        assert_native("kd_loss")
    return Op(request.param, torch.ops.vitkd.kd_loss)


def check(op, student, teacher, kind, temperature):
    """Hold the rows and both gradients to the rule.

    The op promises float32 arithmetic whatever the logits' dtype, so the formula is judge in float32; gradients are
    then rounded to the logits' dtype.
    """
    rows, *grads = op(student, teacher, kind, temperature)
    exact_inputs = student.double(), teacher.double()
    wide_inputs = student.float(), teacher.float()
    exact = kd_rows_formula(*exact_inputs, kind, temperature)
    assert_follows_rule(rows, exact, kd_rows_formula(*wide_inputs, kind, temperature), "rows", correlated=1)
    exact_grads = kd_grads_formula(*exact_inputs, kind, temperature)
    formula_grads = kd_grads_formula(*wide_inputs, kind, temperature)
    for name, grad, exact, formula in zip(
        ("student_grad", "teacher_grad"), grads, exact_grads, formula_grads, strict=True
    ):
        assert_follows_rule(grad, exact, formula.to(student.dtype), name, correlated=student.shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize(("kind", "temperature"), LOSSES)
def test_every_loss(op, kind, temperature, classes, dtype):
    rows = 257 if classes <= 100 else 65
    check(op, *draw(rows, classes, dtype, op.device), kind, temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bias_over_many_rows(op, kind, dtype):
    """4096 rows: a bias of a tenth of the RMS error is seen."""
    check(op, *draw(4096, 10, dtype, op.device), kind, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_many_classes(op, kind, dtype):
    """ImageNet-21k's: a sum over so many classes in one float32 accumulator loses to the formula's."""
    check(op, *draw(17, 21841, dtype, op.device), kind, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_converging_networks(op, kind):
    """Student and teacher nearly agree, as they do late in training: the loss is a small difference of large terms."""
    student, teacher = draw(512, 100, torch.float32, op.device)
    check(op, teacher + 0.01 * student, teacher, kind, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "temperature"), LOSSES)
def test_logits_of_ten_thousand(op, kind, temperature, dtype):
    """exp overflows unless the maximum is taken off. Classes come in close pairs, or nearly all gradients would be 0
    and the comparison chance."""
    logits = torch.stack(draw(129, 10, torch.float32, op.device, spread=3e3))
    logits[:, :, 1::2] = logits[:, :, ::2] + 0.001 * logits[:, :, 1::2]
    student, teacher = logits.to(dtype)
    check(op, student, teacher, kind, temperature)


@pytest.mark.parametrize("level", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_log_sum_exp_far_from_zero(op, kind, level):
    student, teacher = draw(1024, 100, torch.float32, op.device)
    check(op, student + level, teacher - level, kind, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_cost_nothing(op, kind):
    student, _ = draw(33, 100, torch.float32, op.device)
    rows, student_grad, teacher_grad = op(student, student.clone(), kind, 1.0)
    assert rows.abs().max() < 1e-6
    assert student_grad.abs().max() < 1e-6
    assert teacher_grad.abs().max() < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_in_gives_non_finite_out(op, kind, side, bad):
    """In its own row and in no other. (torch's sign of NaN is 0, so the formula's l1 gradient there may be NaN or not;
    the loss is NaN.)"""
    logits = draw(5, 33, torch.float32, op.device)
    logits[side][2, 7] = bad
    rows, *grads = op(*logits, kind, 1.0)
    exact = kd_rows_formula(*(tensor.double() for tensor in logits), kind, 1.0)
    assert not exact[2].isfinite()
    assert torch.equal(rows.isnan(), exact.isnan())
    assert torch.equal(rows.isfinite(), exact.isfinite())
    others = torch.tensor([0, 1, 3, 4], device=rows.device)
    exact_grads = kd_grads_formula(*(tensor.double() for tensor in logits), kind, 1.0)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert grad[others].isfinite().all()
        assert grad[exact_grad.isnan()].isnan().all()


@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_only_where_wanted(op, kind, wanted):
    student, teacher = draw(9, 33, torch.float32, op.device)
    everything = op(student, teacher, kind, 1.0)
    rows, *grads = op(student, teacher, kind, 1.0, *wanted)
    assert torch.equal(rows, everything[0])
    for grad, expected, is_wanted in zip(grads, everything[1:], wanted, strict=True):
        assert torch.equal(grad, expected) if is_wanted else grad.shape == (0,)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 1000])
def test_the_mean_is_that_of_the_rows(op, rows, dtype):
    if op.device == "cuda" and dtype is torch.float64:
        pytest.skip("the CUDA kernels have no float64")
    student, teacher = draw(rows, 33, dtype, op.device)
    losses, *grads = op(student, teacher, "kl", 2.0)
    mean, *same = op.call(student, teacher, 0, 2.0, True, True, 1.0, True)
    assert mean.dtype is losses.dtype
    torch.testing.assert_close(mean, losses.double().mean().to(losses.dtype), rtol=1e-6, atol=0, equal_nan=True)
    assert all(map(torch.equal, grads, same))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_ops_own_gradient_of_the_mean(weight, wanted):
    sides = [tensor.requires_grad_(want) for tensor, want in zip(draw(9, 33, torch.float64), wanted, strict=True)]
    asked = [side for side, want in zip(sides, wanted, strict=True) if want]
    mean, _, _ = torch.ops.vitkd.kd_loss(*sides, 0, 2.0, *wanted, weight, True)
    expected = torch.autograd.grad(kd_rows_formula(*sides, "kl", 2.0).mean(), asked)
    for grad, exact in zip(torch.autograd.grad(mean, asked), expected, strict=True):
        torch.testing.assert_close(grad, exact)


def test_empty_batch(op):
    rows, student_grad, teacher_grad = op(*draw(0, 10, torch.float32, op.device), "kl", 1.0)
    assert rows.shape == (0,)
    assert student_grad.shape == teacher_grad.shape == (0, 10)


# Each gives a view of a fresh tensor, of shape (9, 33).
LAYOUTS = {
    "every other row": lambda new: new(18, 33)[::2],
    "every third class": lambda new: new(9, 99)[:, ::3],
    "classes before batch": lambda new: new(33, 9).T,
    "one row expanded": lambda new: new(1, 33).expand(9, -1),
    "one class expanded": lambda new: new(9, 1).expand(-1, 33),
    "odd storage offset": lambda new: new(9 * 33 + 3)[3:].view(9, 33),
    "columns of a wider head": lambda new: new(9, 40)[:, 5:38],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_layouts(op, layout, kind, side):
    logits = list(draw(9, 33, torch.float32, op.device))
    generator = torch.Generator().manual_seed(1)
    logits[side] = LAYOUTS[layout](lambda *shape: torch.randn(shape, generator=generator).to(op.device))
    before = logits[side].clone()
    check(op, *logits, kind, 1.0)
    assert torch.equal(logits[side], before), "the input was written to"


@needs_native
@given(
    rows=st.integers(0, 40),
    classes=st.integers(1, 140),
    transposed=st.booleans(),
    step=st.integers(1, 3),
    offset=st.integers(0, 7),
    kind=st.sampled_from(KINDS),
    temperature=st.floats(0.1, 50),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200)
def test_any_size_and_stride(rows, classes, transposed, step, offset, kind, temperature, dtype, seed):
    assert_native("kd_loss")
    student, teacher = draw(rows, classes, dtype, seed=seed)
    strides = (step, step * rows + 1) if transposed else (step * classes + 1, step)
    strided = torch.empty(offset + 3 * rows * classes + rows + classes + 1, dtype=dtype)
    strided = strided.as_strided((rows, classes), strides, offset)
    strided.copy_(student)
    temperature = temperature if kind in SOFTENED else 1.0
    op = Op("cpu", torch.ops.vitkd.kd_loss)
    for result, expected in zip(
        op(strided, teacher, kind, temperature), op(student, teacher, kind, temperature), strict=True
    ):
        assert torch.equal(result, expected)
    many = max(rows, 2048 // classes)  # the largest of a handful of roundings would be chance
    check(op, *draw(many, classes, dtype, seed=seed), kind, temperature)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_against_longdouble(op, kind):
    """Only the rows: their gradients in float64 are gradcheck's."""
    if op.device == "cuda":
        pytest.skip("the CUDA kernels have no float64")
    student, teacher = draw(129, 100, torch.float64)
    temperature = 3.0 if kind in SOFTENED else 1.0
    s, t = (tensor.numpy().astype(np.longdouble) for tensor in (student, teacher))

    def log_softmax(logits):
        shifted = (logits - logits.max(-1, keepdims=True)) / np.longdouble(temperature)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    def kl(log_p, log_q):
        return (np.exp(log_p) * (log_p - log_q)).sum(-1) * np.longdouble(temperature) ** 2

    log_q, log_p = log_softmax(s), log_softmax(t)
    log_m = np.log((np.exp(log_p) + np.exp(log_q)) / 2)
    exact = {
        "kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "js": lambda: (kl(log_p, log_m) + kl(log_q, log_m)) / 2,
        "l1": lambda: np.abs(s - t).mean(-1),
        "mse": lambda: np.square(s - t).mean(-1),
    }[kind]()
    rows, _, _ = op(student, teacher, kind, temperature)
    assert_follows_rule(rows, exact, kd_rows_formula(student, teacher, kind, temperature), "rows", correlated=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_repeats_bitwise(op, kind, dtype):
    student, teacher = draw(65, 1000, dtype, op.device)
    expected = op(student, teacher, kind, 1.0)
    for _ in range(20):
        for result, first in zip(op(student, teacher, kind, 1.0), expected, strict=True):
            assert torch.equal(result, first)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_thread_count_does_not_change_a_bit(kind):
    assert_native("kd_loss")
    student, teacher = draw(257, 1000, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.vitkd.kd_loss(student, teacher, KINDS.index(kind), 1.0, True, True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_scales_the_gradients_alone(op, kind):
    student, teacher = draw(9, 33, torch.float32, op.device)
    rows, *grads = op.call(student, teacher, KINDS.index(kind), 1.0, True, True)
    weighed_rows, *weighed = op.call(student, teacher, KINDS.index(kind), 1.0, True, True, 0.25)  # exact in binary
    assert torch.equal(weighed_rows, rows)
    for grad, expected in zip(weighed, grads, strict=True):
        assert torch.equal(grad, 0.25 * expected)


def test_scale_is_one_multiplication_in_place():
    first, second = torch.randn(3, 5), torch.randn(2, dtype=torch.float32)
    expected = first * 0.75, second * 0.75
    torch.ops.vitkd.scale_(first, second, torch.tensor(1.5), 0.5)
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_teachers_output_of_inference_mode_is_taken(kind):
    student, teacher = (torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    student.requires_grad_()
    (expected,) = torch.autograd.grad(kd_loss(student, teacher, kind=kind), student)
    with torch.inference_mode():
        teacher = teacher * 1
        kd_loss(student.detach(), teacher, kind=kind)
    assert torch.equal(torch.autograd.grad(kd_loss(student, teacher, kind=kind), student)[0], expected)
