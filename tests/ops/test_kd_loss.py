"""The distillation losses and both their gradients, against the formula in exact arithmetic and torch's own losses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from testing_rules import IMPLEMENTATIONS, assert_follows_rule, assert_native, needs_native

from vitkd_fast.ops import kd_loss
from vitkd_fast.ops.kd_loss import KINDS, kd_grads_formula, kd_loss_formula, kd_rows_formula

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLASSES = (1, 2, 10, 100, 1000, 1025)
SOFTENED = ("kl", "reverse_kl", "js")
# (kind, temperature): the raw-logit kinds have no temperature
LOSSES = [(kind, temperature) for kind in SOFTENED for temperature in (0.5, 1.0, 4.0, 20.0)]
LOSSES += [(kind, 1.0) for kind in KINDS if kind not in SOFTENED]


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


def draw(rows, classes, dtype, device="cpu", seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, classes, generator=generator) * spread
    return student.to(device, dtype), teacher.to(device, dtype)


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


def torch_loss(student, teacher, kind, temperature, reduction):
    """The same losses from torch.nn.functional alone."""
    if kind in ("l1", "mse"):
        each = {"l1": F.l1_loss, "mse": F.mse_loss}[kind](student, teacher, reduction="none").mean(1)
    else:
        log_q, log_p = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()

        def kl(log_p, log_q):
            return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)

        each = {
            "kl": lambda: kl(log_p, log_q),
            "reverse_kl": lambda: kl(log_q, log_p),
            "js": lambda: (kl(log_p, log_m) + kl(log_q, log_m)) / 2,
        }[kind]() * temperature**2
    return each.mean() if reduction == "batchmean" else each


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize(("kind", "temperature"), LOSSES)
def test_equals_torch_and_its_autograd(kind, temperature, classes, reduction):
    student, teacher = (tensor.double().requires_grad_() for tensor in draw(33, classes, torch.float32))
    weights = torch.linspace(-1, 2, 33, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7).double()
    loss = kd_loss(student, teacher, kind=kind, temperature=temperature, reduction=reduction)
    expected = torch_loss(student, teacher, kind, temperature, reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
    grads = torch.autograd.grad((loss * weights).sum(), (student, teacher))
    expected_grads = torch.autograd.grad((expected * weights).sum(), (student, teacher))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-13)


def test_batchmean_is_torchs():
    student, teacher = draw(33, 10, torch.float32)
    expected = F.kl_div(F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean") * 16
    torch.testing.assert_close(kd_loss(student, teacher, temperature=4.0), expected)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize(("kind", "temperature"), [(kind, 1.0) for kind in KINDS] + [("kl", 4.0), ("js", 0.5)])
def test_gradcheck(kind, temperature, needs):
    logits = [
        tensor.double().requires_grad_(need) for tensor, need in zip(draw(4, 7, torch.float32), needs, strict=True)
    ]
    assert torch.autograd.gradcheck(
        lambda *logits: kd_loss(*logits, kind=kind, temperature=temperature, reduction="none"), logits, nondet_tol=0.0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_public_function_in_every_dtype(device, dtype):
    student, teacher = (tensor.requires_grad_() for tensor in draw(33, 100, dtype, device))
    loss = kd_loss(student, teacher, temperature=4.0)
    assert loss.dtype is torch.float32
    loss.backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (student, teacher)]
    exact = kd_rows_formula(*wide, "kl", 4.0).mean()
    for tensor, exact_grad in zip((student, teacher), torch.autograd.grad(exact, wide), strict=True):
        assert tensor.grad.dtype is dtype
        torch.testing.assert_close(tensor.grad, exact_grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    torch.testing.assert_close(loss, exact.float())


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype", "loss_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_different_dtypes_are_promoted(student_dtype, teacher_dtype, loss_dtype):
    student, teacher = draw(33, 10, torch.float32)
    student = student.to(student_dtype).requires_grad_()
    teacher = teacher.to(teacher_dtype).requires_grad_()
    loss = kd_loss(student, teacher)
    loss.backward()
    assert (loss.dtype, student.grad.dtype, teacher.grad.dtype) == (loss_dtype, student_dtype, teacher_dtype)
    torch.testing.assert_close(loss.double(), kd_rows_formula(student.double(), teacher.double(), "kl", 1.0).mean())


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_the_public_function(device, reduction, upstream, dtype):
    """Twice through the same graph: a gradient handed out the first time must not be changed by what becomes of it."""
    student, teacher = (tensor.requires_grad_() for tensor in draw(65, 100, dtype, device))
    loss = kd_loss(student, teacher, kind="js", temperature=2.0, reduction=reduction).sum() * upstream
    double = [tensor.detach().double() for tensor in (student, teacher)]
    share = upstream / (65 if reduction == "batchmean" else 1)
    exact = [grad * share for grad in kd_grads_formula(*double, "js", 2.0)]
    formula = [
        (grad.float() * share).to(dtype) for grad in kd_grads_formula(*(each.float() for each in double), "js", 2.0)
    ]
    for _ in range(2):
        student.grad = teacher.grad = None
        loss.backward(retain_graph=True)
        for side, want, plain in zip((student, teacher), exact, formula, strict=True):
            # stored once before the upstream gradient and once after it: up to two roundings
            bound = 2 * (plain.double() - want).abs().max() + 3 * torch.finfo(dtype).eps * want.abs().max()
            assert (side.grad.double() - want).abs().max() <= bound
            side.grad.mul_(7)
    student.grad = None
    (2 * loss).backward()
    assert (student.grad.double() - 2 * exact[0]).abs().max() <= 6 * torch.finfo(dtype).eps * exact[
        0
    ].abs().max() + 1e-7


def test_what_becomes_of_a_gradient_does_not_change_the_next():
    """A sum into a view, a hook, a change by hand: each in place, on what an earlier backward handed out."""
    student, teacher = draw(4, 10, torch.float32)
    exact = torch.autograd.grad(kd_loss(x := student.clone().requires_grad_(), teacher), x)[0]
    flat = student.flatten().requires_grad_()
    loss = kd_loss(flat.view(4, 10), teacher)
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(flat.grad, 3 * exact.flatten())
    hooked = student.clone().requires_grad_()
    (between := hooked * 1).register_hook(lambda grad: grad.mul_(2))
    loss = kd_loss(between, teacher)
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss, hooked, retain_graph=True)
        torch.testing.assert_close(grad.mul_(1), 2 * exact)
        grad.zero_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "in place, as on a GPU"])
def test_saved_tensors_that_are_others_each_time(dtype, scaled, monkeypatch):
    """As save_on_cpu and checkpointing make them; a factor must not go into one that is thrown away."""
    student, teacher = draw(6, 10, dtype)
    exact = student.double().requires_grad_()
    (kd_loss(exact, teacher.double()) * 5).backward()

    def gradient(loss_of):
        x = student.clone().requires_grad_()
        loss = loss_of(x)
        with monkeypatch.context() as patch:
            if scaled:
                patch.setattr(torch.Tensor, "is_cuda", True)
            loss.backward()
        torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0.02, atol=1e-3)

    def loss_of(x):
        return kd_loss(x, teacher) * 5

    def copied(x):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            return loss_of(x)

    gradient(loss_of)
    gradient(copied)
    gradient(lambda x: torch.utils.checkpoint.checkpoint(loss_of, x, use_reentrant=False))


def test_the_mean_of_many_rows_of_float16_keeps_its_share():
    """1 / B of 200,000 rows is no float16."""
    student, teacher = (side.half().requires_grad_() for side in draw(200_000, 2, torch.float32))
    (kd_loss(student, teacher, kind="js") * 65536).backward(retain_graph=True)
    exact = kd_grads_formula(student.double(), teacher.double(), "js", 1.0)[0] * 65536 / 200_000
    assert (student.grad.double() - exact).abs().max() <= 2e-3 * exact.abs().max()


@pytest.mark.parametrize("kind", ["kl", "js"])
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_a_loss_scale_saves_small_gradients_of_float16(kind, temperature):
    """Unscaled, a third of them would be no float16."""
    torch.manual_seed(0)
    logits = (torch.randn(2, 16, 20000) * 3).half().unbind(0)

    def gradient(student, teacher):
        student = student.clone().requires_grad_()
        (kd_loss(student, teacher, kind=kind, temperature=temperature) * 65536).backward()
        return student.grad.double()

    found, expected = gradient(*logits), gradient(*(side.float() for side in logits))
    assert ((found - expected).abs() / expected.abs()).median() < 1e-3
    assert (found == 0).double().mean() < 0.02


def test_the_mean_of_an_empty_batch_differentiates():
    student, teacher = (tensor.requires_grad_() for tensor in draw(0, 10, torch.float32))
    kd_loss(student, teacher).backward()
    assert student.grad.shape == teacher.grad.shape == (0, 10)
