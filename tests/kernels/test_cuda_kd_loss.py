"""The CUDA kd_loss against the formula in float64, run on the CPU by the emulator in cuda_host (ASan, UBSan)."""

import importlib
import math

import pytest
import torch
from testing_rules import assert_follows_rule

from vitkd_fast.ops.kd_loss import KINDS, kd_grads_formula, kd_loss_formula, kd_rows_formula

host = importlib.import_module("emulator")  # conftest.py knows where it is

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def cuda(emulator):
    emulator.schedule = "ascending"
    return emulator


def logits(rows: int, classes: int, dtype: torch.dtype, spread: float = 3.0):
    generator = torch.Generator().manual_seed(classes)
    return [(torch.randn(rows, classes, generator=generator) * spread).to(dtype) for _ in range(2)]


def assert_all_accurate(cuda, student, teacher, kind, temperature):
    actual = cuda.kd_loss(student, teacher, KINDS.index(kind), temperature, True, True)
    plain = kd_loss_formula(student, teacher, KINDS.index(kind), temperature, True, True)
    double = student.double(), teacher.double()
    exact = kd_rows_formula(*double, kind, temperature), *kd_grads_formula(*double, kind, temperature)
    for name, *tensors in zip(("loss", "student grad", "teacher grad"), actual, exact, plain, strict=True):
        assert_follows_rule(*tensors, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", (1, 2, 10, 100, 256, 1000, 1024, 1025, 4097))
def test_matches_the_formula(cuda, classes, kind, dtype):
    assert_all_accurate(cuda, *logits(7, classes, dtype), kind, 1.0 if kind in ("l1", "mse") else 4.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("kl", "js", "mse"))
@pytest.mark.parametrize("classes", (255, 257, 264, 999, 1001, 1032, 4095, 4096, 4104))
def test_either_side_of_a_vector_and_of_a_team(cuda, classes, kind, dtype):
    """Rows of whole vectors and of single elements, just within a team's registers and just beyond."""
    assert_all_accurate(cuda, *logits(3, classes, dtype), kind, 1.0)


@pytest.mark.parametrize("kind", ("kl", "reverse_kl", "js"))
@pytest.mark.parametrize("temperature", (0.3, 3.0, 20.0))
@pytest.mark.parametrize("classes", (10, 1000, 5000))
def test_temperatures(cuda, classes, temperature, kind):
    assert_all_accurate(cuda, *logits(7, classes, torch.float32), kind, temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("kl", "js"))
@pytest.mark.parametrize("classes", (10, 1000, 5000))
def test_near_students(cuda, classes, kind, dtype):
    """As late in a training: the loss is what is left of large terms."""
    student, noise = logits(7, classes, torch.float32)
    assert_all_accurate(cuda, student.to(dtype), (student + noise / 30).to(dtype), kind, 4.0)


@pytest.mark.parametrize("kind", ("kl", "reverse_kl", "js"))
@pytest.mark.parametrize("classes", (10, 1000, 1001, 4097))
@pytest.mark.parametrize("largest", (-3e38, 3e38))
def test_logits_as_large_as_float32_has(cuda, largest, classes, kind):
    """What lies beyond the row, or beyond a thread's last class, must not meet them."""
    student = torch.full((2, classes), largest)
    teacher = student.clone()
    teacher[1, classes // 2 :] *= 1 - 2**-20 if largest > 0 else 1 + 2**-20
    loss, *grads = cuda.kd_loss(student, teacher, KINDS.index(kind), 1.0, True, True)
    expected = kd_rows_formula(student.double(), teacher.double(), kind, 1.0)
    assert loss.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert all(grad[0].eq(0).all() and grad[1].isfinite().all() for grad in grads)


@pytest.mark.parametrize("kind", ("kl", "js"))
@pytest.mark.parametrize("descending", (False, True))
def test_maximum_that_moves_from_stretch_to_stretch(cuda, descending, kind):
    student, teacher = logits(5, 20_000, torch.float32)
    student, teacher = student.sort(descending=descending).values, teacher.sort(descending=not descending).values
    assert_all_accurate(cuda, student, teacher, kind, 1.0)


@pytest.mark.parametrize("classes", (10, 1000, 1001, 5000))
def test_reverse_kl_is_kl_with_the_sides_exchanged(cuda, classes):
    student, teacher = logits(3, classes, torch.bfloat16)
    teacher = torch.cat([teacher, teacher], dim=1)[:, :classes]
    for wanted in ((True, True), (True, False), (False, True)):
        loss, student_grad, teacher_grad = cuda.kd_loss(student, teacher, KINDS.index("reverse_kl"), 2.0, *wanted)
        exchanged = cuda.kd_loss(teacher, student, KINDS.index("kl"), 2.0, *wanted[::-1])
        assert all(torch.equal(a, b) for a, b in zip((loss, teacher_grad, student_grad), exchanged, strict=True))


@pytest.mark.parametrize("classes", (10, 1000, 1001, 5000))
@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_of_the_gradients(cuda, kind, classes):
    student, teacher = logits(3, classes, torch.float32)
    loss, *grads = cuda.kd_loss(student, teacher, KINDS.index(kind), 1.0, True, True)
    weighted_loss, *weighted = cuda.kd_loss(student, teacher, KINDS.index(kind), 1.0, True, True, weight=0.25)
    assert torch.equal(weighted_loss, loss)
    assert all(torch.equal(a, b / 4) for a, b in zip(weighted, grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_very_wide_row(cuda, kind):
    assert_all_accurate(cuda, *logits(4, 65_539, torch.bfloat16), kind, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("kl", "reverse_kl", "js"))
def test_logits_spread_over_ten_thousand(cuda, kind, dtype):
    assert_all_accurate(cuda, *logits(5, 100, dtype, spread=5e3), kind, 2.0)


@pytest.mark.parametrize("kind", ("kl", "reverse_kl", "js"))
def test_rows_of_very_negative_logits(cuda, kind):
    student, teacher = logits(5, 77, torch.float32)
    assert_all_accurate(cuda, student - 5e3, teacher - 5e3, kind, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits(cuda, kind):
    student, _ = logits(4, 50, torch.float32)
    loss, *grads = cuda.kd_loss(student, student, KINDS.index(kind), 1.0, True, True)
    assert loss.abs().max() < 1e-6
    for grad in grads:
        assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("classes", (10, 5000))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")), ids=str)
def test_nan_and_inf_stay_in_their_row_and_match_the_formula(cuda, value, kind, classes):
    student, teacher = logits(3, classes, torch.float32)
    student[1, 7] = value
    actual = cuda.kd_loss(student, teacher, KINDS.index(kind), 1.0, True, True)
    expected = kd_loss_formula(student, teacher, KINDS.index(kind), 1.0, True, True)
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.isinf(), wanted.isinf())
        assert got[0].isfinite().all() and got[2].isfinite().all()


@pytest.mark.parametrize("classes", (10, 1000, 5000))
@pytest.mark.parametrize("kind", ("kl", "reverse_kl", "js"))
def test_masked_classes_match_the_formula(cuda, kind, classes):
    """So many logits of -inf that a thread has no other."""
    student, teacher = logits(3, classes, torch.float32)
    student[0, : classes // 2] = teacher[1, : classes // 2] = teacher[2] = -math.inf
    actual = cuda.kd_loss(student, teacher, KINDS.index(kind), 1.0, True, True)
    expected = kd_loss_formula(student, teacher, KINDS.index(kind), 1.0, True, True)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("classes", (10, 1000, 1001, 4104))
def test_unwanted_gradients_are_not_written_and_change_nothing(cuda, classes):
    student, teacher = logits(5, classes, torch.bfloat16)
    loss, student_grad, teacher_grad = cuda.kd_loss(student, teacher, 0, 2.0, True, True)
    for wanted in ((True, False), (False, True), (False, False)):
        got = cuda.kd_loss(student, teacher, 0, 2.0, *wanted)
        assert torch.equal(got[0], loss)
        for grad, full, asked in zip(got[1:], (student_grad, teacher_grad), wanted, strict=True):
            assert torch.equal(grad, full) if asked else grad.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", (101, 104, 1000, 1001, 4104))
def test_layouts_change_no_bit(cuda, classes, dtype):
    student, teacher = logits(5, classes, dtype)
    expected = cuda.kd_loss(student, teacher, 2, 1.5, True, True)

    def strided(tensor, offset, extra):
        room = torch.full((5, offset + classes + extra), float("nan"), dtype=dtype)
        return room[:, offset : offset + classes].copy_(tensor)

    for student_, teacher_, out_offset in (
        (strided(student, 1, 0), teacher, 0),
        (student, strided(teacher, 8, 8), 0),
        (strided(student, 0, 3), strided(teacher, 16, 1), 1),
        (student, teacher, 3),
    ):
        assert torch.equal(student_, student) and torch.equal(teacher_, teacher)
        got = cuda.kd_loss(student_, teacher_, 2, 1.5, True, True, out_offset=out_offset)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    one = student[:1].expand(5, -1)
    got, wanted = (cuda.kd_loss(rows, teacher, 2, 1.5, True, True) for rows in (one, one.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("classes", (10, 1000, 2000, 5000))
def test_the_order_in_which_threads_run_changes_no_bit(cuda, classes):
    student, teacher = logits(5, classes, torch.float16)
    results = []
    for cuda.schedule in host.SCHEDULES:
        results.append(cuda.kd_loss(student, teacher, 2, 2.0, True, True))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.fixture(params=(True, False), ids=("counted", "another launch"))
def slots(cuda, request):
    """Whether the blocks can count themselves, so that the last one takes the mean."""
    cuda.slots = request.param
    yield request.param
    cuda.slots = True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "classes"), [(1, 10), (7, 10), (1, 1000), (3, 1000), (3, 1025), (2, 4104)])
def test_mean(cuda, slots, rows, classes, kind):
    """In one block and in many, the last of which may have teams without a row; and the rest is what it was. That the
    count is 0 again the emulator sees."""
    student, teacher = logits(rows, classes, torch.bfloat16)
    arguments = student, teacher, KINDS.index(kind), 1.0
    for wanted in ((True, True), (False, False)):
        expected = cuda.kd_loss(*arguments, *wanted)
        for cuda.schedule in host.SCHEDULES[:2]:
            mean, *rest = cuda.kd_loss(*arguments, *wanted, mean=True)
            assert all(torch.equal(a, b) for a, b in zip(rest, expected, strict=True))
            torch.testing.assert_close(mean.double(), expected[0].double().mean(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(1025, 1), (4099, 2), (8193, 1), (300, 257)])
def test_mean_of_many_rows(cuda, rows, classes, dtype):
    """More than a block's threads have at once, and so many that one block of the launch would take long."""
    student, teacher = logits(rows, classes, dtype)
    mean, loss, *_ = cuda.kd_loss(student, teacher, KINDS.index("mse"), 1.0, False, False, mean=True)
    torch.testing.assert_close(mean.double(), loss.double().mean(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("classes", (10, 1000, 2000, 5000))
def test_the_order_in_which_blocks_end_changes_no_bit_of_the_mean(cuda, classes):
    student, teacher = logits(9, classes, torch.float16)
    means = []
    for cuda.schedule in host.SCHEDULES:
        means += [cuda.kd_loss(student, teacher, 2, 2.0, True, True, mean=True, out_offset=i)[0] for i in range(2)]
    assert all(torch.equal(mean, means[0]) for mean in means)


@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
def test_mean_of_rows_that_are_not_finite(cuda, slots, value):
    student, teacher = logits(7, 10, torch.float32)
    student[5, 3] = value
    mean, loss, *_ = cuda.kd_loss(student, teacher, KINDS.index("l1"), 1.0, True, True, mean=True)
    torch.testing.assert_close(mean, loss.mean(), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("classes", (264, 1000, 1024))
def test_rows_fetched_ahead_change_no_bit(cuda, classes, dtype):
    """Two blocks run at once here, so that of 7 rows some are fetched ahead; of rows off their alignment none is."""
    for rows in (3, 7):
        both = logits(rows, classes, dtype)
        odd = [torch.empty(rows, classes + 1, dtype=dtype)[:, :classes].copy_(each) for each in both]
        for wanted in ((True, True), (False, True)):
            expected = cuda.kd_loss(*odd, 0, 4.0, *wanted, 0.5, True)
            for cuda.schedule in host.SCHEDULES:
                found = cuda.kd_loss(*both, 0, 4.0, *wanted, 0.5, True)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_rows_and_unsupported_dtype(cuda):
    student, teacher = logits(0, 10, torch.float32)
    assert cuda.kd_loss(student, teacher, 0, 1.0, True, True)[0].shape == (0,)
    student, teacher = logits(2, 10, torch.float64)
    with pytest.raises(ValueError, match="unsupported dtype"):
        cuda.kd_loss(student, teacher, 0, 1.0, True, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("factor", "share"), [(1.0, 1.0), (0.3, 1.0), (2.0, 0.5), (65536.0, 1 / 7), (math.nan, 1.0)])
@pytest.mark.parametrize("counts", [(3, 5), (0, 1000), (4099, 0), (8, 600_001)], ids=str)
def test_scale(cuda, counts, factor, share, dtype):
    """Whatever the factor is, each element is multiplied once; elements beyond the last whole vector too."""
    both = [torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype) for count in counts]
    scaled = cuda.scale(*both, torch.tensor(factor), share)
    for before, after in zip(both, scaled, strict=True):
        expected = (before.float() * (torch.tensor(factor) * torch.tensor(share, dtype=torch.float32))).to(dtype)
        torch.testing.assert_close(after, expected, rtol=0, atol=0, equal_nan=True)
