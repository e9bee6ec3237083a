"""Triton's distillation losses against the formula in exact arithmetic: on CUDA, or under Triton's interpreter."""

import os

import pytest
import torch
from testing_rules import assert_follows_rule

from vitkd_fast.ops.kd_loss import KINDS, kd_loss_formula

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no CUDA device; test_triton_interpreter.py runs this file interpreted", allow_module_level=True)

from vitkd_fast.triton.kd_loss import kd_loss  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter truncates to bfloat16 instead of rounding, so bfloat16 waits for a GPU.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
SOFTMAX_KINDS = tuple(kind for kind in KINDS if kind not in ("l1", "mse"))
CLASSES = (1, 2, 10, 31, 32, 33, 100, 256, 257, 1000, 1024, 1025, 4096, 4097, 8193)
if not INTERPRETED:
    CLASSES += (8192, 20_000, 65_536)

pytestmark = [pytest.mark.usefixtures("poisoned_memory")] + ([] if INTERPRETED else [pytest.mark.gpu])
gpu_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no such thing")


def draw(batch, classes, dtype, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, batch, classes, generator=generator) * spread
    return logits.to(DEVICE, dtype).unbind(0)


def rows_for(classes):
    """Enough that the largest error is a property of the arithmetic: below a few thousand logits it is luck."""
    if not INTERPRETED:
        return 256
    return min(64, 4096 // classes) if classes <= 100 else 16 if classes <= 1025 else 6


def check(student, teacher, kind, temperature=1.0):
    arguments = KINDS.index(kind), temperature, True, True
    result = kd_loss(student, teacher, *arguments)
    exact = kd_loss_formula(student.double(), teacher.double(), *arguments)
    formula = kd_loss_formula(student, teacher, *arguments)
    for name, *values in zip(("rows", "student_grad", "teacher_grad"), result, exact, formula):
        assert_follows_rule(*values, name)
        assert values[0].is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_every_size(classes, dtype, kind):
    if INTERPRETED and classes > 1025 and dtype is not torch.float32:
        pytest.skip("long rows in one dtype are enough for the interpreter")
    check(*draw(rows_for(classes), classes, dtype), kind)


@pytest.mark.parametrize("kind", SOFTMAX_KINDS)
@pytest.mark.parametrize("temperature", [0.5, 3.0, 20.0])
@pytest.mark.parametrize("classes", [10, 8200])
def test_every_temperature(classes, temperature, kind):
    check(*draw(rows_for(classes), classes, torch.float32), kind, temperature)


def odd_offset(logits):
    return torch.cat([logits.new_full((1,), float("nan")), logits.flatten()])[1:].view(logits.shape)


def padded_rows(logits):
    return torch.cat([logits, torch.full_like(logits, float("nan"))], dim=1)[:, : logits.shape[1]]


def one_row(logits):
    return logits[:1].expand_as(logits)


def classes_first(logits):
    return logits.mT.contiguous().mT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layout", [odd_offset, padded_rows, one_row, classes_first], ids=lambda layout: layout.__name__
)
@pytest.mark.parametrize("classes", [10, 8200])
def test_any_strides(classes, layout, kind):
    """A layout changes the order of the sums at most, so the contiguous result judges it."""
    student, teacher = draw(6 if classes < 8192 else 2, classes, torch.float32)
    arguments = KINDS.index(kind), 1.0, True, True
    for pair in ((layout(student), teacher), (student, layout(teacher))):
        contiguous = kd_loss(*(logits.contiguous() for logits in pair), *arguments)
        for mine, expected in zip(kd_loss(*pair, *arguments), contiguous):
            assert mine.is_contiguous()
            torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [10, 8200])
def test_only_what_is_wanted(classes, kind):
    student, teacher = draw(3, classes, torch.float32)
    both = kd_loss(student, teacher, KINDS.index(kind), 1.0, True, True)
    for student_grad, teacher_grad in ((False, False), (True, False), (False, True)):
        result = kd_loss(student, teacher, KINDS.index(kind), 1.0, student_grad, teacher_grad)
        assert torch.equal(result[0], both[0])
        for grad, expected, wanted in zip(result[1:], both[1:], (student_grad, teacher_grad)):
            assert torch.equal(grad, expected) if wanted else grad.shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [10, 8200])
def test_weight_is_of_the_gradients(classes, kind):
    student, teacher = draw(3, classes, torch.float32)
    index = KINDS.index(kind)
    rows, *grads = kd_loss(student, teacher, index, 1.0, True, True)
    weighted_rows, *weighted = kd_loss(student, teacher, index, 1.0, True, True, 0.25)
    assert torch.equal(weighted_rows, rows)
    assert torch.equal(kd_loss(student, teacher, index, 1.0, False, False, 1.0, True)[0], rows.mean())
    for mine, expected in zip(weighted, grads):
        assert torch.equal(mine, expected / 4)


@pytest.mark.parametrize("classes", [10, 8200])
def test_reverse_kl_is_kl_with_the_sides_exchanged(classes):
    student, teacher = draw(3, classes, torch.float16)
    teacher = padded_rows(teacher)
    for wanted in ((True, True), (True, False), (False, True)):
        rows, student_grad, teacher_grad = kd_loss(student, teacher, KINDS.index("reverse_kl"), 2.0, *wanted)
        exchanged = kd_loss(teacher, student, KINDS.index("kl"), 2.0, *wanted[::-1])
        for mine, other in zip((rows, teacher_grad, student_grad), exchanged):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", SOFTMAX_KINDS)
@pytest.mark.parametrize("descending", [False, True])
def test_maximum_that_moves_from_block_to_block(descending, kind):
    student, teacher = draw(6, 8200, torch.float32, spread=30)
    check(student.sort(descending=descending).values, teacher.sort(descending=not descending).values, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [10, 8200])
def test_logits_of_ten_thousand(classes, kind):
    """Probabilities underflow to 0, whose logarithm must not be taken from them."""
    student, teacher = draw(rows_for(classes), classes, torch.float32, spread=1e4)
    check(student, teacher, kind)
    check(student - 1e4, teacher + 1e4, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("classes", [10, 8200])
def test_equal_logits(classes, temperature, kind):
    student, _ = draw(3, classes, torch.float32)
    rows, student_grad, teacher_grad = kd_loss(student, student, KINDS.index(kind), temperature, True, True)
    for value in (rows, student_grad, teacher_grad):
        assert value.abs().max() <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("classes", [10, 8200])
def test_non_finite_logits(classes, bad, kind):
    """They reach exactly what they reach in the formula, and no other row."""
    student, teacher = draw(4, classes, torch.float32)
    student[1, 3] = teacher[2, 5] = bad
    arguments = KINDS.index(kind), 1.0, True, True
    result, expected = kd_loss(student, teacher, *arguments), kd_loss_formula(student, teacher, *arguments)
    for mine, other in zip(result, expected):
        assert torch.equal(mine.isnan(), other.isnan())
        assert torch.equal(mine.isinf(), other.isinf())


def test_no_rows():
    rows, student_grad, teacher_grad = kd_loss(*draw(0, 10, torch.float32), 0, 1.0, True, False)
    assert (rows.shape, student_grad.shape, teacher_grad.shape) == ((0,), (0, 10), (0,))


def test_wrong_arguments():
    student, teacher = draw(2, 10, torch.float32)
    with pytest.raises(TypeError, match="student has dtype float64"):
        kd_loss(student.double(), teacher.double(), 0, 1.0, True, True)
    with pytest.raises(TypeError, match="teacher has dtype float16; the Triton kernel takes float32"):
        kd_loss(student, teacher.half(), 0, 1.0, True, True)
    with pytest.raises(ValueError, match="kind is 5"):
        kd_loss(student, teacher, 5, 1.0, True, True)


@gpu_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1000, 8200])
def test_repeats_bit_by_bit(classes, kind):
    student, teacher = draw(512, classes, torch.float32)
    arguments = KINDS.index(kind), 1.0, True, True
    first = kd_loss(student, teacher, *arguments)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(first, kd_loss(student, teacher, *arguments)))


@gpu_only
def test_more_rows_than_a_grid_axis_allows():
    check(*draw(70_000, 10, torch.float32), "kl")


@gpu_only
@pytest.mark.parametrize("kind", ["js", "l1"])
@pytest.mark.parametrize("classes", [1000, 65_536])
def test_offsets_beyond_31_bits(classes, kind):
    if torch.cuda.mem_get_info()[0] < 4 * 2 * 2**31 * 1.1:
        pytest.skip("needs 19 GB of GPU memory")
    batch = 2**31 // classes + 16
    student, teacher = (torch.zeros(batch, classes, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    student[-4:], teacher[-4:] = draw(4, classes, torch.bfloat16)
    result = kd_loss(student, teacher, KINDS.index(kind), 1.0, True, True)
    exact = kd_loss_formula(student[-4:].double(), teacher[-4:].double(), KINDS.index(kind), 1.0, True, True)
    formula = kd_loss_formula(student[-4:], teacher[-4:], KINDS.index(kind), 1.0, True, True)
    for whole, expected, low in zip(result, exact, formula):
        assert_follows_rule(whole[-4:], expected, low)


@gpu_only
def test_graph_capture():
    student, teacher = draw(32, 1000, torch.bfloat16)
    arguments = 0, 2.0, True, True
    kd_loss(student, teacher, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kd_loss(student, teacher, *arguments)
    for seed in (1, 2, 3):
        for logits, new in zip((student, teacher), draw(32, 1000, torch.bfloat16, seed)):
            logits.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, kd_loss(student, teacher, *arguments)))
