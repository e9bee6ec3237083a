"""attention_kd: against maps made one by one, its gradients to both sides, what it keeps in memory, its errors."""

import pytest
import torch

from vitkd_fast.ops import attention_kd

KINDS = ("kl", "mse")


def draw(batch=2, tokens=5, heads=2, head_dim=3, slots=3, dtype=torch.float64, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, tokens, slots, heads, head_dim
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def attention_map(qkv):
    """(B, H, N, N) by the definition: exponentials over their sum."""
    query, key = qkv[:, :, 0], qkv[:, :, 1]
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / qkv.shape[-1] ** 0.5
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def naive(student, teacher, kind):
    """Row by row over probabilities."""
    q, p = attention_map(student), attention_map(teacher)
    if q.shape[1] != p.shape[1]:
        q, p = q.mean(1, keepdim=True), p.mean(1, keepdim=True)
    each = p * (p / q).log() if kind == "kl" else (p - q) ** 2
    return each.sum(-1).flatten(1).mean(1)


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [(2, 2), (1, 3), (4, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_naive_formula_and_its_gradients(kind, heads, batch, tokens):
    student = draw(batch, tokens, heads[0], 3).requires_grad_()
    teacher = draw(batch, tokens, heads[1], 8, seed=1).requires_grad_()
    losses, expected = attention_kd(student, teacher, kind=kind, reduction="none"), naive(student, teacher, kind)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(attention_kd(student, teacher, kind=kind), expected.mean(), rtol=1e-10, atol=1e-14)
    weights = torch.linspace(-1, 2, batch, dtype=torch.float64)
    grads = torch.autograd.grad((losses * weights).sum(), (student, teacher))
    wanted = torch.autograd.grad((expected * weights).sum(), (student, teacher))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-14)
        assert not grad[:, :, 2].any(), "values have no part in a map"


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("average_heads", [None, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, average_heads, needs):
    sides = [draw(tokens=3, seed=seed).requires_grad_(need) for seed, need in enumerate(needs)]

    def loss(*sides):
        return attention_kd(*sides, kind=kind, average_heads=average_heads, student_scale=0.9, reduction="none")

    assert torch.autograd.gradcheck(loss, sides, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(loss, sides)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_and_packed_are_the_same(kind):
    student, teacher = draw(heads=2), draw(heads=4, head_dim=6, seed=1)
    expected = attention_kd(student, teacher, kind=kind)
    for student_form in (student, student[:, :, :2], attention_map(student)):
        for teacher_form in (teacher, teacher[:, :, :2], attention_map(teacher)):
            torch.testing.assert_close(attention_kd(student_form, teacher_form, kind=kind), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_maps(kind):
    maps = [attention_map(draw(tokens=3, seed=seed)).requires_grad_() for seed in (0, 1)]
    assert torch.autograd.gradcheck(lambda *maps: attention_kd(*maps, kind=kind), maps)


def test_a_map_with_zeros_has_finite_gradients():
    student = torch.eye(4).expand(1, 2, 4, 4).clone().requires_grad_()
    teacher = torch.eye(4).flip(0).expand(1, 2, 4, 4).clone().requires_grad_()
    for kind in KINDS:
        loss = attention_kd(student, teacher, kind=kind)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (student, teacher)))


@pytest.mark.parametrize("kind", KINDS)
def test_scales(kind):
    student, teacher = draw(), draw(seed=1)
    doubled = student * torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64).view(3, 1, 1)
    loss = attention_kd(student, teacher, kind=kind, student_scale=2 * 3**-0.5)
    torch.testing.assert_close(loss, attention_kd(doubled, teacher, kind=kind))
    assert attention_kd(student, teacher, kind=kind, teacher_scale=0.1) != attention_kd(student, teacher, kind=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_scores(kind, heads, dtype):
    """Scores of ±1e4, where every probability but one underflows: KL is then a difference of scores."""
    student = draw(2, 17, heads[0], 4, dtype=dtype, spread=100).requires_grad_()
    teacher = draw(2, 17, heads[1], 4, dtype=dtype, seed=1, spread=100).requires_grad_()
    loss = attention_kd(student, teacher, kind=kind)
    grads = torch.autograd.grad(loss, (student, teacher))
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    wide = [side.detach().double().requires_grad_() for side in (student, teacher)]
    exact = attention_kd(*wide, kind=kind)
    assert kind == "mse" or exact > 1e3
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_float32(kind, dtype):
    """A score of 200 · 200 · 64 / 8 = 320,000 is infinite in float16."""
    halves = [draw(2, 9, 2, 64, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1)]
    halves[0].data[0, 0] = 200
    floats = [half.detach().float().requires_grad_() for half in halves]
    loss, expected = attention_kd(*halves, kind=kind), attention_kd(*floats, kind=kind)
    assert loss.dtype is torch.float32 and torch.equal(loss, expected)
    loss.backward()
    for half, grad in zip(halves, torch.autograd.grad(expected, floats), strict=True):
        assert half.grad.dtype is dtype and torch.equal(half.grad, grad.to(dtype))
    mixed = attention_kd(halves[0].detach(), floats[1].detach(), kind=kind)
    assert torch.equal(mixed, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind):
    student, teacher = (draw(dtype=torch.float32, seed=seed).requires_grad_() for seed in (0, 1))
    expected = attention_kd(student, teacher, kind=kind)
    expected_grads = torch.autograd.grad(expected, (student, teacher))
    with torch.autocast("cpu", torch.bfloat16):
        loss = attention_kd(student, teacher, kind=kind)
        grads = torch.autograd.grad(loss, (student, teacher))
    assert torch.equal(loss, expected)
    assert all(torch.equal(grad, want) for grad, want in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind):
    student, teacher = draw(3, 7), draw(3, 7, seed=1)
    expected = attention_kd(student, teacher, kind=kind)
    for strided in (
        student.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4),
        torch.stack((student, student), -1)[..., 0],
        torch.cat((student, student), 1)[:, :7],
    ):
        assert not strided.is_contiguous()
        torch.testing.assert_close(attention_kd(strided, teacher, kind=kind), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_maps_have_loss_and_gradients_of_zero(kind):
    student = draw(dtype=torch.float32).requires_grad_()
    teacher = student.detach().clone().requires_grad_()
    loss = attention_kd(student, teacher, kind=kind)
    assert loss == 0
    for grad in torch.autograd.grad(loss, (student, teacher)):
        assert grad.abs().max() < 1e-7


@pytest.mark.parametrize("heads", [(2, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_map_is_kept_for_backward(kind, heads):
    student, teacher = (draw(1, 128, count, 2, seed=count).requires_grad_() for count in heads)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        attention_kd(student, teacher, kind=kind)
    assert max(kept) == max(student.numel(), teacher.numel()) < 128 * 128


@pytest.mark.parametrize("kind", KINDS)
def test_repeats_bitwise(kind):
    sides = [draw(4, 17, heads, 8, dtype=torch.float32, seed=heads).requires_grad_() for heads in (2, 3)]
    first = torch.autograd.grad(attention_kd(*sides, kind=kind), sides)
    for _ in range(5):
        again = torch.autograd.grad(attention_kd(*sides, kind=kind), sides)
        assert all(torch.equal(grad, want) for grad, want in zip(again, first, strict=True))


def test_compiles_in_one_graph():
    sides = [draw(heads=heads, seed=heads).requires_grad_() for heads in (2, 3)]
    compiled = torch.compile(attention_kd, fullgraph=True, backend="eager")
    loss, expected = compiled(*sides), attention_kd(*sides)
    torch.testing.assert_close(loss, expected)
    for grad, want in zip(torch.autograd.grad(loss, sides), torch.autograd.grad(expected, sides), strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ((2, 5, 9), (2, 5, 3, 2, 3), {}, r"student must be a packed qkv.*got shape \(2, 5, 9\)"),
        ((2, 5, 3, 2, 3), (2, 2, 5, 4), {}, r"teacher must be .*got shape \(2, 2, 5, 4\)"),
        ((2, 5, 4, 2, 3), (2, 5, 3, 2, 3), {}, "3 or 2"),
        ((2, 0, 3, 2, 3), (2, 0, 3, 2, 3), {}, "at least one"),
        ((2, 5, 3, 2, 3), (2, 6, 3, 2, 3), {}, r"over 5 tokens and teacher over 6.*qkv\[:, prefix_tokens:\]"),
        ((2, 5, 3, 2, 3), (3, 5, 3, 2, 3), {}, "student has 2 images and teacher 3"),
        ((2, 5, 3, 2, 3), (2, 5, 3, 4, 3), {"average_heads": False}, "student has 2 heads and teacher 4.*None"),
        ((2, 5, 3, 2, 3), (2, 5, 3, 2, 3), {"kind": "l1"}, "kind is 'l1'; accepted: kl, mse"),
        ((2, 5, 3, 2, 3), (2, 5, 3, 2, 3), {"reduction": "sum"}, "reduction is 'sum'; accepted: batchmean, none"),
    ],
)
def test_errors_say_what_to_do(student, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        attention_kd(torch.zeros(student), torch.zeros(teacher), **options)


def test_wrong_dtypes_and_devices():
    qkv = draw(dtype=torch.float32)
    with pytest.raises(TypeError, match="teacher has dtype int64; accepted: float32, bfloat16"):
        attention_kd(qkv, qkv.long())
    with pytest.raises(RuntimeError, match="student is on cpu and teacher on meta"):
        attention_kd(qkv, qkv.to("meta"))
