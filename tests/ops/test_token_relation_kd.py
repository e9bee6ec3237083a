"""token_relation_kd: against cosines taken pair by pair, gradients to both sides, tokens of length 0, errors."""

import pytest
import torch
import torch.nn.functional as F

from vitkd_fast.ops import token_relation_kd


def draw(batch=2, tokens=5, channels=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64).to(dtype)


def naive(student, teacher):
    """By the (B, N, N, C) broadcast that the op avoids."""
    similarities = [F.cosine_similarity(each.unsqueeze(1), each.unsqueeze(2), dim=-1) for each in (student, teacher)]
    return (similarities[0] - similarities[1]).pow(2).flatten(1).mean(1)


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels", [(4, 4), (2, 9), (30, 3)], ids=str)
def test_equals_the_naive_formula_and_its_gradients(channels, batch, tokens):
    sides = [draw(batch, tokens, width, seed=width).requires_grad_() for width in channels]
    sides[1] = (sides[1].detach() + 0.5).requires_grad_()
    losses, expected = token_relation_kd(*sides, reduction="none"), naive(*sides)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(token_relation_kd(*sides), expected.mean(), rtol=1e-10, atol=1e-14)
    weights = torch.linspace(-1, 2, batch, dtype=torch.float64)
    grads = torch.autograd.grad((losses * weights).sum(), sides)
    wanted = torch.autograd.grad((expected * weights).sum(), sides)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_gradcheck(needs):
    sides = [draw(tokens=4, channels=3 + seed, seed=seed).requires_grad_(need) for seed, need in enumerate(needs)]
    assert torch.autograd.gradcheck(lambda *sides: token_relation_kd(*sides, reduction="none"), sides, nondet_tol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_tokens_of_length_zero(dtype):
    student, teacher = draw(dtype=dtype), draw(dtype=dtype, seed=1)
    student[:, 1] = 0
    teacher[:, 2:4] = 0
    student.requires_grad_(), teacher.requires_grad_()
    losses = token_relation_kd(student, teacher, reduction="none")
    wide = naive(student.double(), teacher.double())  # torch's cosine of a zero vector is 0, too
    torch.testing.assert_close(losses.double(), wide, rtol=1e-5, atol=0)
    for grad in torch.autograd.grad(losses.sum(), (student, teacher)):
        assert grad.isfinite().all() and grad.any()
    losses = token_relation_kd(student, teacher)
    assert not torch.autograd.grad(losses, student)[0][:, 1].any()


@pytest.mark.parametrize("scale", [1e4, 1e-3])
def test_length_does_not_matter(scale):
    student, teacher = draw(dtype=torch.float32), draw(dtype=torch.float32, seed=1)
    expected = token_relation_kd(student, teacher)
    torch.testing.assert_close(token_relation_kd(student * scale, teacher), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    """A token of 64 channels of 1e4 has a squared length that float16 does not hold."""
    student, teacher = draw(channels=64, dtype=dtype) * 1e4, draw(dtype=dtype, seed=1)
    expected = token_relation_kd(student.float(), teacher.float())
    assert expected.isfinite()
    assert torch.equal(token_relation_kd(student, teacher), expected)
    assert torch.equal(token_relation_kd(student, teacher.float()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_relation_kd(student.float(), teacher.float()), expected)


def test_strides_do_not_matter():
    student, teacher = draw(3, 7), draw(3, 8, seed=1)
    strided = student.mT.contiguous().mT
    patches = teacher[:, 1:]
    assert not strided.is_contiguous() and not patches.is_contiguous()
    expected = token_relation_kd(student, patches.contiguous())
    torch.testing.assert_close(token_relation_kd(strided, patches), expected, rtol=1e-12, atol=0)


def test_one_map_is_kept_for_backward():
    student, teacher = draw(1, 128, 3).requires_grad_(), draw(1, 128, 5).requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
        token_relation_kd(student, teacher)
    assert list(kept.values()).count(128 * 128) == 1 and max(kept.values()) == 128 * 128


def test_repeats_bitwise():
    sides = [draw(4, 17, 8, torch.float32, seed).requires_grad_() for seed in (0, 1)]
    first = torch.autograd.grad(token_relation_kd(*sides), sides)
    for _ in range(5):
        again = torch.autograd.grad(token_relation_kd(*sides), sides)
        assert all(torch.equal(grad, want) for grad, want in zip(again, first, strict=True))


def test_compiles_in_one_graph():
    sides = [draw(seed=seed).requires_grad_() for seed in (0, 1)]
    loss = torch.compile(token_relation_kd, fullgraph=True, backend="eager")(*sides)
    expected = token_relation_kd(*sides)
    torch.testing.assert_close(loss, expected)
    for grad, want in zip(torch.autograd.grad(loss, sides), torch.autograd.grad(expected, sides), strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ((2, 5), (2, 5, 4), {}, r"student_tokens must be \(batch, tokens, channels\).*got shape \(2, 5\)"),
        ((2, 5, 4), (2, 0, 4), {}, "teacher_tokens must be .* at least one"),
        ((2, 5, 4), (2, 6, 4), {}, r"\(2, 5\) and \(2, 6\).*tokens\[:, prefix_tokens:\]"),
        ((2, 5, 4), (3, 5, 4), {}, "same images"),
        ((2, 5, 4), (2, 5, 4), {"reduction": "mean"}, "reduction is 'mean'; accepted: batchmean, none"),
    ],
)
def test_errors_say_what_to_do(student, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        token_relation_kd(torch.zeros(student), torch.zeros(teacher), **options)


def test_wrong_dtypes_and_devices():
    tokens = draw(dtype=torch.float32)
    with pytest.raises(TypeError, match="student_tokens has dtype int64"):
        token_relation_kd(tokens.long(), tokens)
    with pytest.raises(RuntimeError, match="student_tokens is on cpu and teacher_tokens on meta"):
        token_relation_kd(tokens, tokens.to("meta"))
