"""attention_kd's kernel for the CPU, against the formula in float64 by the rule; and who calls it."""

import pytest
import torch
from testing_rules import assert_follows_rule, needs_native

from vitkd_fast.ops import attention_kd
from vitkd_fast.ops.attention_kd import KINDS, attention_kd_formula_with_grads

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# batch, tokens, heads of student and teacher, head_dim of both
SHAPES = [
    (2, 1, 1, 1, 1, 3),
    (3, 2, 2, 2, 5, 5),
    (2, 17, 4, 6, 10, 16),
    (1, 31, 1, 12, 7, 64),
    (2, 33, 3, 3, 33, 32),
    (3, 65, 3, 6, 64, 64),
    (2, 197, 3, 6, 64, 64),
    (1, 197, 2, 2, 64, 40),
    (1, 577, 12, 3, 32, 64),
    (1, 1370, 1, 2, 16, 24),
]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def draw(batch, tokens, heads, head_dim, dtype=torch.float32, seed=0, spread=1.0, slots=3):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, tokens, slots, heads, head_dim, generator=generator) * spread).to(dtype)


def both(shape, dtypes=(torch.float32, torch.float32), spread=1.0):
    batch, tokens, *heads, student_dim, teacher_dim = shape
    student = draw(batch, tokens, heads[0], student_dim, dtypes[0], 0, spread)
    return student, draw(batch, tokens, heads[1], teacher_dim, dtypes[1], 1, spread)


def run(op, student, teacher, kind, average, wanted=(True, True)):
    scales = student.shape[-1] ** -0.5, -1.3 * teacher.shape[-1] ** -0.5
    return op(student, teacher, KINDS.index(kind), average, *scales, *wanted)


@pytest.fixture
def asked(monkeypatch):
    """The arguments of every call of the op."""
    calls = []
    op = torch.ops.vitkd.attention_kd
    monkeypatch.setattr(torch.ops.vitkd, "attention_kd", lambda *args: calls.append(args) or op(*args))
    return calls


@needs_native
def test_the_kernel_is_there():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("vitkd::attention_kd", "CPU")


def check(student, teacher, kind, average, op=None):
    ours = run(op or torch.ops.vitkd.attention_kd, student, teacher, kind, average)
    exact = run(attention_kd_formula_with_grads, student.double(), teacher.double(), kind, average)
    precise = [side if side.dtype is torch.float64 else side.float() for side in (student, teacher)]
    formula = run(attention_kd_formula_with_grads, *precise, kind, average)
    for name, one, want, plain in zip(
        ("losses", "of the student", "of the teacher"), ours, exact, formula, strict=True
    ):
        assert_follows_rule(one, want, plain, name)
    return ours


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_follows_the_rule(kind, shape):
    student, teacher = both(shape)
    for average in [True, False] if shape[2] == shape[3] else [True]:
        check(student, teacher, kind, average)


@pytest.mark.parametrize("spread", [0.01, 4, 30])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_follows_the_rule_with_small_and_large_scores(kind, average, spread):
    """30: scores of several thousand, all weights but one nearly 0."""
    check(*both((24, 50, 2, 2, 64, 64), spread=spread), kind, average)


@pytest.mark.parametrize("teacher_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("student_dtype", FLOATS, ids=str)
def test_sixteen_bits_are_widened(student_dtype, teacher_dtype):
    student, teacher = both((16, 37, 3, 3, 24, 24), (student_dtype, teacher_dtype))
    ours = check(student, teacher, "kl", True)
    wide = run(torch.ops.vitkd.attention_kd, student.float(), teacher.float(), "kl", True)
    assert all(torch.equal(one, other) for one, other in zip(ours, wide, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_computed_in_float64(kind):
    student, teacher = both((2, 37, 3, 6, 24, 40), (torch.float64, torch.float64))
    ours = run(torch.ops.vitkd.attention_kd, student, teacher, kind, True)
    for one, want in zip(ours, run(attention_kd_formula_with_grads, student, teacher, kind, True), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("average", [True, False])
def test_gives_what_is_wanted_and_the_same_bits_in_any_layout(average):
    student, teacher = both((2, 37, 3, 3, 24, 40))
    expected = run(torch.ops.vitkd.attention_kd, student, teacher, "kl", average)
    for wanted in [(True, False), (False, True), (False, False)]:
        ours = run(torch.ops.vitkd.attention_kd, student, teacher, "kl", average, wanted)
        assert torch.equal(ours[0], expected[0])
        for one, want, grad in zip(ours[1:], wanted, expected[1:], strict=True):
            assert torch.equal(one, grad) if want else one.numel() == 0
    spread = torch.full((2, 3, 80, 4, 50), torch.nan)[:, :, 2:76:2, 1:, :24].permute(0, 2, 3, 1, 4)
    spread.copy_(student.permute(0, 1, 2, 3, 4))
    halves = torch.stack((student, student), -1)[..., 0]
    for strided in (spread, halves, student[:, :, :2]):
        again = run(torch.ops.vitkd.attention_kd, strided, teacher, "kl", average)
        assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


@needs_native
def test_any_number_of_threads_gives_the_same_bits():
    sides = both((5, 50, 3, 3, 16, 16))
    expected = run(torch.ops.vitkd.attention_kd, *sides, "mse", False)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            again = run(torch.ops.vitkd.attention_kd, *sides, "mse", False)
            assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_stay_in_their_image(kind):
    student, teacher = both((3, 20, 2, 2, 8, 8))
    student[0, 3, 1, 0, 2], teacher[2, 5, 0, 1, 1] = torch.nan, torch.inf
    losses, *grads = run(torch.ops.vitkd.attention_kd, student, teacher, kind, True)
    assert losses[0].isnan().all() and losses[1].isfinite().all() and losses[2].isnan().all()
    assert all(grad[1].isfinite().all() for grad in grads)


def test_eager_mode_asks_the_kernel_and_second_derivatives_the_formula(asked):
    student, teacher = both((2, 9, 2, 4, 8, 8))
    student.requires_grad_()
    loss = attention_kd(student, teacher)
    assert [args[-2:] for args in asked] == [(True, False)]
    (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
    (again,) = torch.autograd.grad(3 * loss, student, create_graph=True)
    torch.testing.assert_close(again, 3 * grad, rtol=1e-4, atol=1e-7)
    assert again.requires_grad and len(asked) == 1
    attention_kd(student.detach(), teacher)
    assert asked[-1][-2:] == (False, False)


def test_no_images_have_no_losses():
    student, teacher = (side.requires_grad_() for side in both((0, 9, 2, 4, 8, 8)))
    losses = attention_kd(student, teacher, reduction="none")
    assert losses.shape == (0,)
    losses.sum().backward()
    assert student.grad.shape == student.shape


def test_batched_gradients():
    """One for each image's loss, as torch.autograd.functional.jacobian(vectorize=True) asks for them."""
    student, teacher = both((3, 5, 2, 2, 8, 8))
    student.requires_grad_()
    losses = attention_kd(student, teacher, reduction="none")
    rows = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in losses]
    (together,) = torch.autograd.grad(losses, student, torch.eye(3), is_grads_batched=True)
    torch.testing.assert_close(together, torch.stack(rows), rtol=1e-4, atol=1e-7)


def test_a_teachers_output_of_inference_mode_is_taken():
    student, teacher = both((2, 9, 2, 2, 8, 8))
    expected = torch.autograd.grad(attention_kd(student.requires_grad_(), teacher), student)[0]
    with torch.inference_mode():
        teacher = teacher * 1
        assert attention_kd(student.detach(), teacher).isfinite()
    assert torch.equal(torch.autograd.grad(attention_kd(student, teacher), student)[0], expected)


def test_a_scale_that_requires_a_gradient_is_refused():
    student, teacher = both((2, 9, 2, 2, 8, 8))
    with pytest.raises(TypeError, match="student_scale is a tensor that requires a gradient"):
        attention_kd(student, teacher, student_scale=torch.tensor(0.3, requires_grad=True))


def test_wrong_arguments_of_the_op_are_refused():
    student, teacher = both((2, 9, 2, 4, 8, 8))
    op = torch.ops.vitkd.attention_kd
    if not torch._C._dispatch_has_kernel_for_dispatch_key("vitkd::attention_kd", "CPU"):
        pytest.skip("the formula stands in for the kernel")
    for sides, average, message in [
        ((student, teacher[:1]), True, "must both be"),
        ((student, teacher[:, :8]), True, "must both be"),
        ((student[:, :, :1], teacher), True, "must both be"),
        ((student, teacher), False, "heads can be paired only"),
        ((student.double(), teacher), True, "float64 goes with float64 alone"),
        ((student.int(), teacher), True, "must be float32"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*sides, 0, average, 1.0, 1.0, True, True)
    with pytest.raises(RuntimeError, match="unknown kind 2"):
        op(student, teacher, 2, True, 1.0, 1.0, True, True)
