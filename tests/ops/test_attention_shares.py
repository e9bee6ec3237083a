"""The kernel of attention_consistency for the CPU, against the formula in float64 by the rule; and who calls it."""

import pytest
import torch
from testing_rules import assert_follows_rule, needs_native

from vitkd_fast.ops import attention_consistency
from vitkd_fast.ops.attention_consistency import (
    HorizontalFlip,
    attention_shares_backward_formula,
    attention_shares_formula,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# batch, tokens, heads, head_dim, queries, keys
SHAPES = [
    (2, 1, 1, 3, 1, 1),
    (3, 5, 2, 5, 1, 4),
    (2, 17, 4, 16, 16, 16),
    (1, 33, 12, 7, 2, 31),
    (3, 65, 3, 64, 64, 64),
    (2, 197, 3, 64, 196, 196),
    (1, 197, 2, 40, 196, 17),
    (1, 577, 4, 32, 576, 576),
    (1, 1370, 2, 24, 33, 1369),
]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHARES = torch.ops.vitkd.attention_shares
BACKWARD = torch.ops.vitkd.attention_shares_backward


def draw(shape, dtype=torch.float32, spread=1.0, seed=0, slots=3):
    batch, tokens, heads, head_dim, queries, keys = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = (torch.randn(batch, tokens, slots, heads, head_dim, generator=generator) * spread).to(dtype)
    numbers = [torch.randperm(tokens, generator=generator)[:count] for count in (queries, keys)]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return qkv, *numbers, torch.randn(batch, heads, keys, generator=generator).to(wide)


def check(shape, dtype=torch.float32, spread=1.0, scale=None):
    qkv, queries, keys, grad = draw(shape, dtype, spread)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    shares, grad_qkv = SHARES(qkv, queries, keys, scale), BACKWARD(grad, qkv, queries, keys, scale)
    assert (shares.dtype, grad_qkv.dtype, grad_qkv.shape) == (torch.float32, dtype, qkv.shape)
    arguments = queries, keys, scale
    exact = attention_shares_formula(qkv.double(), *arguments)
    assert_follows_rule(shares, exact, attention_shares_formula(qkv.float(), *arguments), "shares")
    exact = attention_shares_backward_formula(grad.double(), qkv.double(), *arguments)
    formula = attention_shares_backward_formula(grad, qkv.float(), *arguments).to(dtype)
    assert_follows_rule(grad_qkv, exact, formula, "gradient")
    return shares, grad_qkv


@needs_native
@pytest.mark.parametrize("name", ["attention_shares", "attention_shares_backward"])
def test_the_kernel_is_there(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vitkd::{name}", "CPU")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_follows_the_rule(shape):
    check(shape)


@pytest.mark.parametrize("scale", [None, -0.7, 0.0])
@pytest.mark.parametrize("spread", [0.01, 4, 30])
def test_follows_the_rule_with_small_and_large_scores(spread, scale):
    """30: scores of several thousand, all weights but one nearly 0."""
    check((24, 50, 2, 64, 49, 49), spread=spread, scale=scale)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("shape", [(16, 37, 3, 24, 36, 36), (4, 65, 3, 7, 1, 64)], ids=str)
def test_sixteen_bits_are_widened(shape, dtype):
    shares, grad = check(shape, dtype)
    qkv, queries, keys, upstream = draw(shape, dtype)
    scale = qkv.shape[-1] ** -0.5
    assert torch.equal(shares, SHARES(qkv.float(), queries, keys, scale))
    assert torch.equal(grad, BACKWARD(upstream, qkv.float(), queries, keys, scale).to(dtype))


def test_float64_is_computed_in_float64():
    qkv, queries, keys, grad = draw((2, 37, 3, 24, 36, 30), torch.float64)
    torch.testing.assert_close(
        SHARES(qkv, queries, keys, 0.3), attention_shares_formula(qkv, queries, keys, 0.3), rtol=1e-12, atol=0
    )
    expected = attention_shares_backward_formula(grad, qkv, queries, keys, 0.3)
    torch.testing.assert_close(BACKWARD(grad, qkv, queries, keys, 0.3), expected, rtol=1e-11, atol=1e-16)


def test_the_formula_of_the_gradient_is_that_of_autograd():
    qkv, queries, keys, grad = draw((2, 7, 2, 3, 4, 5), torch.float64)
    shares = attention_shares_formula(qkv.requires_grad_(), queries, keys, 0.3)
    (expected,) = torch.autograd.grad(shares, qkv, grad)
    ours = attention_shares_backward_formula(grad, qkv.detach(), queries, keys, 0.3)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)


def test_a_token_that_is_asked_for_twice_counts_twice():
    qkv, _, _, _ = draw((2, 9, 2, 8, 9, 9))
    queries, keys = torch.tensor([1, 4, 4, 0, 8]), torch.tensor([2, 2, 5, 7])
    grad = torch.randn(2, 2, 4)
    torch.testing.assert_close(SHARES(qkv, queries, keys, 0.3), attention_shares_formula(qkv, queries, keys, 0.3))
    expected = attention_shares_backward_formula(grad, qkv, queries, keys, 0.3)
    torch.testing.assert_close(BACKWARD(grad, qkv, queries, keys, 0.3), expected)


def test_any_layout_gives_the_same_bits_and_values_get_nothing():
    qkv, queries, keys, grad = draw((2, 37, 3, 24, 30, 36))
    expected = SHARES(qkv, queries, keys, 0.3), BACKWARD(grad, qkv, queries, keys, 0.3)
    assert not expected[1][:, :, 2].any() and expected[1][:, :, :2].any()
    spread = torch.full((2, 3, 80, 4, 50), torch.nan)[:, :, 2:76:2, 1:, :24].permute(0, 2, 3, 1, 4)
    spread = spread.transpose(2, 3)
    spread.copy_(qkv)
    halves = torch.stack((qkv, qkv), -1)[..., 0]
    for strided in (spread, halves, qkv[:, :, :2]):
        assert torch.equal(SHARES(strided, queries, keys, 0.3), expected[0])
        again = BACKWARD(grad, strided, queries, keys, 0.3)
        assert torch.equal(again, expected[1][:, :, : strided.shape[2]])


@needs_native
def test_any_number_of_threads_gives_the_same_bits():
    qkv, queries, keys, grad = draw((5, 50, 3, 16, 49, 49))
    expected = SHARES(qkv, queries, keys, 0.3), BACKWARD(grad, qkv, queries, keys, 0.3)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(SHARES(qkv, queries, keys, 0.3), expected[0])
            assert torch.equal(BACKWARD(grad, qkv, queries, keys, 0.3), expected[1])
    finally:
        torch.set_num_threads(threads)


def test_nan_and_infinity_stay_in_their_head():
    qkv, queries, keys, grad = draw((3, 20, 2, 8, 20, 20))
    qkv[0, 3, 1, 0, 2], qkv[2, 5, 0, 1, 1] = torch.nan, torch.inf
    shares, grad_qkv = SHARES(qkv, queries, keys, 0.3), BACKWARD(grad, qkv, queries, keys, 0.3)
    finite = torch.tensor([[False, True], [True, True], [True, False]])
    assert torch.equal(shares.isfinite().all(2), finite)
    assert torch.equal(grad_qkv.isfinite().all(4).all(2).all(1), finite)


SIDES = dict(grid=(4, 4), prefix_tokens=1)


@pytest.fixture
def asked(monkeypatch):
    """How often each op is called."""
    calls = []
    for name in ("attention_shares", "attention_shares_backward"):
        op = getattr(torch.ops.vitkd, name)
        monkeypatch.setattr(torch.ops.vitkd, name, lambda *args, op=op, name=name: calls.append(name) or op(*args))
    return calls


def sides(dtype=torch.float32, spread=1.0):
    return [draw((2, 17, 3, 8, 1, 1), dtype, spread, seed)[0].requires_grad_() for seed in (1, 2)]


@pytest.mark.parametrize("queries", ["patches", "prefix"])
def test_eager_mode_asks_the_kernel_and_second_derivatives_the_formula(asked, queries):
    before, after = sides()
    loss = attention_consistency(before, after, HorizontalFlip(), queries=queries, **SIDES)
    grads = torch.autograd.grad(loss, (before, after), retain_graph=True)
    assert asked == ["attention_shares"] * 2 + ["attention_shares_backward"] * 2
    again = torch.autograd.grad(3 * loss, (before, after), create_graph=True)
    assert len(asked) == 4
    for one, grad in zip(again, grads, strict=True):
        torch.testing.assert_close(one, 3 * grad, rtol=1e-4, atol=1e-7)
        assert one.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shares_of_next_to_nothing_are_left_to_logs(asked, dtype):
    before, after = sides(dtype, spread=30.0)
    options = dict(queries="prefix", reduction="none", **SIDES)
    losses = attention_consistency(before, after, HorizontalFlip(), **options)
    assert asked == ["attention_shares"] * 2 and losses.isfinite().all() and (losses > 100).all()
    grads = torch.autograd.grad(losses.sum(), (before, after))
    exact = [side.detach().double().requires_grad_() for side in (before, after)]
    expected = attention_consistency(*exact, HorizontalFlip(), **options)
    torch.testing.assert_close(losses, expected.to(dtype), rtol=1e-5, atol=0)
    for grad, want in zip(grads, torch.autograd.grad(expected.sum(), exact), strict=True):
        torch.testing.assert_close(grad, want.to(dtype), rtol=1e-4, atol=1e-4)


def test_second_derivatives():
    before, after = sides(torch.float64)

    def loss(before, after):
        return attention_consistency(before, after, HorizontalFlip(), reduction="none", **SIDES)

    assert torch.autograd.gradgradcheck(loss, (before[:, :, :, :1, :2], after[:, :, :, :1, :2]))


def test_batched_gradients():
    """One for each image's loss, as torch.autograd.functional.jacobian(vectorize=True) asks for them."""
    before, after = sides()
    losses = attention_consistency(before, after, HorizontalFlip(), reduction="none", **SIDES)
    rows = [torch.autograd.grad(loss, before, retain_graph=True)[0] for loss in losses]
    (together,) = torch.autograd.grad(losses, before, torch.eye(2), is_grads_batched=True)
    torch.testing.assert_close(together, torch.stack(rows), rtol=1e-4, atol=1e-7)


def test_traced_and_transformed_calls_take_the_formula(asked):
    before, after = sides()
    eager = attention_consistency(before, after, HorizontalFlip(), **SIDES)
    asked.clear()
    compiled = torch.compile(attention_consistency, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(before, after, HorizontalFlip(), **SIDES), eager)
    mapped = torch.func.vmap(
        lambda one, other: attention_consistency(one[None], other[None], HorizontalFlip(), **SIDES)
    )(before, after)
    torch.testing.assert_close(mapped.mean(), eager)
    assert not asked


def test_no_images_have_no_losses():
    before, after = (side.detach()[:0].requires_grad_() for side in sides())
    losses = attention_consistency(before, after, HorizontalFlip(), reduction="none", **SIDES)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert before.grad.shape == before.shape


def test_a_teachers_output_of_inference_mode_is_taken():
    before, after = sides()
    expected = torch.autograd.grad(attention_consistency(before, after, HorizontalFlip(), **SIDES), after)[0]
    with torch.inference_mode():
        before = before.detach() * 1
        assert attention_consistency(before, after.detach(), HorizontalFlip(), **SIDES).isfinite()
    loss = attention_consistency(before, after, HorizontalFlip(), **SIDES)
    assert torch.equal(torch.autograd.grad(loss, after)[0], expected)


def test_a_scale_that_requires_a_gradient_is_refused():
    with pytest.raises(TypeError, match="scale is a tensor that requires a gradient"):
        attention_consistency(*sides(), HorizontalFlip(), scale=torch.tensor(0.3, requires_grad=True), **SIDES)


@needs_native
def test_wrong_arguments_of_the_op_are_refused():
    qkv, queries, keys, grad = draw((2, 9, 2, 8, 8, 7))
    for wrong, message in [
        ((qkv[0], queries, keys), "qk must be"),
        ((qkv[:, :, :1], queries, keys), "qk must be"),
        ((qkv.int(), queries, keys), "must be float32"),
        ((qkv, queries + 9, keys), "queries must be numbers of tokens, below 9"),
        ((qkv, queries, keys - 9), "keys must be numbers of tokens, below 9"),
        ((qkv, queries.int(), keys), "queries must be one int64 or more"),
        ((qkv, queries, keys[:0]), "keys must be one int64 or more"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            SHARES(*wrong, 1.0)
    for wrong in (grad[:1], grad[:, :, :6], grad.double(), grad.mT.contiguous().mT):
        with pytest.raises(RuntimeError, match="grad must be"):
            BACKWARD(wrong, qkv, queries, keys, 1.0)
