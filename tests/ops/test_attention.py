"""Attention, forward and backward, against the formula in exact arithmetic."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing_rules import IMPLEMENTATIONS, assert_follows_rule, assert_native, needs_native

from vitkd_fast.ops import attention
from vitkd_fast.ops.attention import attention_backward_formula, attention_formula

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (1, 2, 15, 16, 17, 49, 50, 64, 65, 127, 128, 129, 196, 197, 198, 257, 577, 35)
HEAD_DIMS = (7, 16, 20, 24, 32, 48, 64, 80, 96, 128)
# Batch and heads go through their values as tokens × head_dims does, so that each of them meets each of the others.
SIZES = [
    (batch if tokens < 196 else 1, tokens, heads if tokens < 127 else min(heads, 3), head_dim)
    for (tokens, head_dim), batch, heads in zip(
        itertools.product(TOKENS, HEAD_DIMS), itertools.cycle((1, 2, 3)), itertools.cycle((1, 12, 2, 6, 3, 5, 1))
    )
]


class Formula:
    device = "cpu"
    forward = staticmethod(attention_formula)
    backward = staticmethod(attention_backward_formula)


class Dispatched:
    """The ops themselves: backward is reached without autograd, so that grad_out can be anything."""

    def __init__(self, device):
        self.device = device
        self.forward = torch.ops.vitkd.attention
        self.backward = torch.ops.vitkd.attention_backward


@pytest.fixture(params=IMPLEMENTATIONS)
def op(request):
    if request.param == "formula":
        return Formula
    if request.param == "cpu":
        assert_native("attention")
    return Dispatched(request.param)


def draw(batch, tokens, heads, head_dim, dtype, device="cpu", seed=0, spread=1.0):
    """A packed qkv and a gradient for the output, drawn on the CPU so that every device sees the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator) * spread
    grad_out = torch.randn(batch, tokens, heads * head_dim, generator=generator)
    return qkv.to(device, dtype), grad_out.to(device, dtype)


def check(op, qkv, grad_out, scale=None):
    """Hold both directions of an implementation to the rule, on the very numbers (and strides) given."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    exact = attention_formula(qkv.double(), scale)
    assert_follows_rule(op.forward(qkv, scale), exact, attention_formula(qkv, scale), "out")

    grad = op.backward(grad_out, qkv, scale)
    exact = attention_backward_formula(grad_out.double(), qkv.double(), scale)
    formula = attention_backward_formula(grad_out, qkv, scale)
    assert_follows_rule(grad, exact, formula, "grad_qkv")
    # Of one token, or of tokens that are all alike, the weights do not depend on the scores: query and key gradients
    # are 0, and what is there is the rounding of a few sums, one for each head, of which a maximum would be chance.
    if not (qkv == qkv[:, :1]).all():
        for i, name in enumerate(("grad_query", "grad_key", "grad_value")):
            assert_follows_rule(grad[:, :, i], exact[:, :, i], formula[:, :, i], name)


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "B{}_N{}_H{}_D{}".format(*size))
def test_every_size(op, size, dtype):
    check(op, *draw(*size, dtype, op.device))


@pytest.mark.parametrize("dtype", LOW_DTYPES[:2], ids=str)
@pytest.mark.parametrize("tokens", [1025, 2305])
def test_long_sequences(op, tokens, dtype):
    """ViTs at 512 and 768 pixels: a sum over that many keys in one float32 accumulator loses to the formula's."""
    check(op, *draw(1, tokens, 1, 32, dtype, op.device))


@pytest.mark.parametrize("tokens", [197, 1025])
def test_what_tokens_have_in_common(op, tokens):
    """Of gradients of scores, which add up to 0 for a query, times keys around 1, nearly all cancels in grad_query."""
    qkv, grad_out = draw(2, tokens, 2, 64, torch.float32, op.device)
    check(op, qkv + 1, grad_out + 1)


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_bias_over_many_rows(op, dtype):
    """8 × 6 heads of ViT size: 1576 groups of errors, so a bias of a sixth of the RMS error is seen."""
    check(op, *draw(8, 197, 6, 64, dtype, op.device))


@pytest.mark.parametrize("size", [(1, 1, 1, 16), (2, 17, 3, 24), (1, 50, 2, 64), (2, 65, 2, 20), (1, 130, 1, 128)])
def test_float64_against_longdouble(op, size):
    if op.device == "cuda":
        pytest.skip("the CUDA kernels have no float64: attention() falls back")
    qkv, grad_out = draw(*size, torch.float64)
    scale = qkv.shape[-1] ** -0.5
    exact, exact_grad = attention_longdouble(qkv, grad_out, scale)
    assert_follows_rule(op.forward(qkv, scale), exact, attention_formula(qkv, scale), "out")
    formula_grad = attention_backward_formula(grad_out, qkv, scale)
    assert_follows_rule(op.backward(grad_out, qkv, scale), exact_grad, formula_grad, "grad_qkv")


def attention_longdouble(qkv, grad_out, scale):
    """The formula and its gradient once more, in numpy: the only wider arithmetic than float64 at hand."""
    query, key, value = qkv.numpy().astype(np.longdouble).transpose(2, 0, 3, 1, 4)  # (B, H, N, D) each
    grad = grad_out.unflatten(2, qkv.shape[3:]).numpy().astype(np.longdouble).transpose(0, 2, 1, 3)
    scores = query @ key.swapaxes(-1, -2) * np.longdouble(scale)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ value
    grad_scores = weights * (grad @ value.swapaxes(-1, -2) - (grad * out).sum(-1, keepdims=True)) * np.longdouble(scale)
    grads = np.stack((grad_scores @ key, grad_scores.swapaxes(-1, -2) @ query, weights.swapaxes(-1, -2) @ grad))
    batch, tokens, _, heads, head_dim = qkv.shape
    return out.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * head_dim), grads.transpose(1, 3, 0, 2, 4)


@pytest.mark.parametrize("size", [(2, 1, 2, 16), (3, 17, 2, 20), (2, 50, 3, 64), (2, 197, 2, 33)], ids=str)
def test_float32_in_bfloat16_out(op, size):
    """What autocast asks for, without a rounded copy of qkv: as good as the formula on that copy."""
    if op.device == "cuda":
        pytest.skip("the CUDA kernels take one dtype: attention() casts")
    qkv, grad_out = draw(*size, torch.float32)
    grad_out, scale, rounded = grad_out.bfloat16(), 0.2, qkv.bfloat16()
    out = torch.ops.vitkd.attention(qkv, scale, True) if op is not Formula else op.forward(rounded, scale)
    assert_follows_rule(out, attention_formula(qkv.double(), scale), attention_formula(rounded, scale), "out")
    grad = op.backward(grad_out, qkv if op is not Formula else rounded, scale)
    assert grad.dtype == (torch.float32 if op is not Formula else torch.bfloat16)
    exact = attention_backward_formula(grad_out.double(), qkv.double(), scale)
    formula = attention_backward_formula(grad_out, rounded, scale)
    assert_follows_rule(grad.bfloat16(), exact, formula, "grad_qkv")


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_scores_of_ten_thousand(op, dtype):
    """Scores between ±1e4: exp overflows unless the maximum is taken off, and a score's rounding error is all there is.

    Keys come in pairs close enough for both to count, or else so few rows would have any error that a comparison
    would be chance. head_dim 16 and scale 1 keep the products themselves within float16, where the formula is judge.
    """
    qkv, grad_out = draw(4, 65, 3, 16, torch.float32, op.device)
    query, key, _ = qkv.unbind(2)
    peak = torch.einsum("bnhd,bmhd->bhnm", query, key).abs().max()
    query.mul_((1e4 / peak).sqrt())
    key.mul_((1e4 / peak).sqrt())
    key[:, 1::2] = key[:, :-1:2] + 0.01 * torch.sin(key[:, 1::2])
    check(op, qkv.to(dtype), grad_out.to(dtype), scale=1.0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("level", [-1e4, -120.0, 120.0, 1e4])
def test_log_sum_exp_far_from_zero(op, level, dtype):
    """All scores of all rows near `level`: below −90, a float32 softmax without the maximum taken off is 0 / 0."""
    qkv, grad_out = draw(2, 50, 2, 32, dtype, op.device, spread=0.5)
    qkv[:, :, 0, :, 0] = level
    qkv[:, :, 1, :, 0] = 1
    scale = 1.0
    scores = torch.einsum("bnhd,bmhd->bhnm", qkv[:, :, 0].double(), qkv[:, :, 1].double()) * scale
    assert (scores.logsumexp(-1) < -90).all() if level < 0 else (scores.logsumexp(-1) > 90).all()
    check(op, qkv, grad_out, scale)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0, 7.0])
def test_scales(op, scale):
    check(op, *draw(2, 33, 2, 32, torch.float32, op.device), scale)


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
def test_non_finite_in_gives_nan_out(op, part, bad, dtype):
    """One bad element of (batch 1, token 20, head 1): the output goes bad exactly where the formula's does.

    The gradient may go bad in more places of that head, since 0 · inf depends on the order of the products.
    """
    qkv, grad_out = draw(2, 50, 3, 32, dtype, op.device)
    qkv[1, 20, part, 1, 5] = bad
    exact = attention_formula(qkv.double(), 0.2)
    assert not exact.isfinite().all()
    assert_follows_rule(op.forward(qkv, 0.2), exact, attention_formula(qkv, 0.2), "out")

    grad = op.backward(grad_out, qkv, 0.2)
    exact = attention_backward_formula(grad_out.double(), qkv.double(), 0.2)
    assert grad[exact.isnan()].isnan().all()
    grad[1, :, :, 1] = 0
    assert grad.isfinite().all()


def test_all_nan(op):
    qkv, grad_out = draw(1, 65, 2, 64, torch.float32, op.device)
    qkv.fill_(float("nan"))
    assert op.forward(qkv, 0.125).isnan().all()
    assert op.backward(grad_out, qkv, 0.125).isnan().all()


def test_empty_batch(op):
    qkv, grad_out = draw(0, 17, 3, 32, torch.float32, op.device)
    assert op.forward(qkv, 0.2).shape == (0, 17, 96)
    assert op.backward(grad_out, qkv, 0.2).shape == qkv.shape


# Each gives a view of a fresh tensor, of shape (2, 33, 3, 2, 32), laid out as its name says.
LAYOUTS = {
    "every other batch entry": lambda new: new(4, 33, 3, 2, 32)[::2],
    "a batch entry expanded": lambda new: new(1, 33, 3, 2, 32).expand(2, -1, -1, -1, -1),
    "a token expanded": lambda new: new(2, 1, 3, 2, 32).expand(-1, 33, -1, -1, -1),
    "every third token": lambda new: new(2, 99, 3, 2, 32)[:, ::3],
    "without the class token": lambda new: new(2, 34, 3, 2, 32)[:, 1:],
    "tokens before batch": lambda new: new(33, 2, 3, 2, 32).transpose(0, 1),
    "heads before tokens": lambda new: new(3, 2, 2, 33, 32).permute(1, 3, 0, 2, 4),
    "channels strided": lambda new: new(2, 33, 3, 2, 64)[..., ::2],
    "channels before tokens": lambda new: new(2, 3, 2, 32, 33).permute(0, 4, 1, 2, 3),
    "heads inside channels": lambda new: new(2, 33, 3, 32, 2).transpose(3, 4),
    "odd storage offset": lambda new: new(2 * 33 * 3 * 2 * 32 + 3)[3:].view(2, 33, 3, 2, 32),
    "rows of odd length": lambda new: new(2, 33, 3 * 2 * 32 + 5)[..., 5:].view(2, 33, 3, 2, 32),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(op, layout, dtype):
    generator = torch.Generator().manual_seed(1)
    qkv = LAYOUTS[layout](lambda *shape: torch.randn(shape, generator=generator).to(op.device, dtype))
    assert qkv.shape == (2, 33, 3, 2, 32)
    _, grad_out = draw(2, 33, 2, 32, dtype, op.device)
    before = qkv.clone()
    check(op, qkv, grad_out)
    assert torch.equal(qkv, before), "the input was written to"


GRADS = {
    "of a sum": lambda new: new(1, 1, 1).expand(2, 33, 64),
    "of a mean over tokens": lambda new: new(2, 1, 64).expand(-1, 33, -1),
    "of the class token": lambda new: torch.nn.functional.pad(new(2, 1, 64), (0, 0, 0, 32)),
    "transposed": lambda new: new(33, 2, 64).transpose(0, 1),
    "channels first": lambda new: new(2, 64, 33).transpose(1, 2),
    "channels strided": lambda new: new(2, 33, 128)[..., ::2],
    "odd storage offset": lambda new: new(2 * 33 * 64 + 1)[1:].view(2, 33, 64),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", GRADS)
def test_layouts_of_grad_out(op, layout, dtype):
    generator = torch.Generator().manual_seed(1)
    qkv, _ = draw(2, 33, 2, 32, dtype, op.device)
    check(op, qkv, GRADS[layout](lambda *shape: torch.randn(shape, generator=generator).to(op.device, dtype)))


@needs_native
@given(
    size=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 4), st.integers(1, 128)),
    order=st.permutations(range(5)),
    steps=st.tuples(*[st.integers(1, 3)] * 5),
    offset=st.integers(0, 7),
    dtype=st.sampled_from(LOW_DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150)
def test_any_size_and_stride(size, order, steps, offset, dtype, seed):
    """A qkv whose dimensions lie in any order in memory, with gaps, at any offset: not a bit may depend on that."""
    assert_native("attention")
    batch, tokens, heads, head_dim = size
    shape = (batch, tokens, 3, heads, head_dim)
    strides, stride = [0] * 5, 1
    for dim in order:
        strides[dim] = stride * steps[dim]
        stride = strides[dim] * max(shape[dim], 1)
    packed, grad_out = draw(*size, dtype, seed=seed)
    qkv = torch.empty(offset + stride, dtype=dtype).as_strided(shape, strides, offset)
    qkv.copy_(packed)
    op, scale = Dispatched("cpu"), head_dim**-0.5
    out, grad = op.forward(qkv, scale), op.backward(grad_out, qkv, scale)
    assert torch.equal(out, op.forward(packed, scale))
    assert torch.equal(grad, op.backward(grad_out, packed, scale))
    many = max(batch, 4096 // (tokens * heads * head_dim))  # the largest of a handful of roundings would be chance
    check(op, *draw(many, tokens, heads, head_dim, dtype, seed=seed))


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_backward_repeats_bitwise(op, dtype):
    qkv, grad_out = draw(2, 197, 2, 64, dtype, op.device)
    out, grad = op.forward(qkv, 0.125), op.backward(grad_out, qkv, 0.125)
    for _ in range(20):
        assert torch.equal(op.forward(qkv, 0.125), out)
        assert torch.equal(op.backward(grad_out, qkv, 0.125), grad)


@needs_native
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [50, 577])
def test_thread_count_does_not_change_a_bit(tokens, dtype):
    """Of the native kernel: the formula's matrix products are MKL's, which splits its sums by the thread count."""
    assert_native("attention")
    qkv, grad_out = draw(1200 // tokens, tokens, 3, 64, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((Dispatched("cpu").forward(qkv, 0.125), Dispatched("cpu").backward(grad_out, qkv, 0.125)))
    finally:
        torch.set_num_threads(threads)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("size", [(2, 5, 2, 16), (1, 17, 1, 7), (1, 1, 2, 8), (1, 3, 1, 130)])
def test_gradcheck(size):
    qkv = draw(*size, torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(attention, (qkv,), nondet_tol=0.0)


def test_gradgradcheck():
    qkv = draw(2, 5, 2, 4, torch.float64)[0].requires_grad_()
    assert torch.autograd.gradgradcheck(attention, (qkv,))


@pytest.mark.parametrize("head_dim", [16, 160])
def test_the_output_is_contiguous_whatever_qkv_is(head_dim):
    qkv = draw(17, 3, 2, head_dim, torch.float32)[0].transpose(0, 1)
    out = attention(qkv)
    assert out.is_contiguous() and out.shape == (3, 17, 2 * head_dim)
    assert attention_formula(draw(1, 63, 2, 1, torch.float32)[0], 1.0).is_contiguous()


def test_scores_beyond_float16_are_scaled_before_they_overflow():
    qkv = draw(1, 64, 2, 64, torch.float32)[0] * 30
    qkv[:, :, 1] = qkv[:, :, 0]
    expected = attention_formula(qkv.double(), 0.125)
    for out in (attention(qkv.half(), 0.125), attention_formula(qkv.half(), 0.125)):
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=0.1)


def test_gradcheck_through_a_strided_view():
    base = draw(2, 6, 2, 10, torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda base: attention(base[:, ::2, :, :, 1:], scale=0.7), (base,), nondet_tol=0.0)


@pytest.mark.parametrize("head_dim", [64, 160])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_public_function_and_its_gradient(device, head_dim, dtype):
    """Through autograd, with the expanded gradient of a sum, for a fused head and one that is too wide."""
    qkv, _ = draw(2, 65, 3, head_dim, dtype, device)
    qkv.requires_grad_()
    scale = head_dim**-0.5
    out = attention(qkv)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert_follows_rule(out, attention_formula(qkv.double(), scale), attention_formula(qkv, scale), "out")
    ones = torch.ones_like(out)
    exact = attention_backward_formula(ones.double(), qkv.detach().double(), scale)
    formula = attention_backward_formula(ones, qkv.detach(), scale)
    # Under a sum all channels of a value's gradient are one number, and all keys share their queries' denominators.
    assert_follows_rule(grad, exact, formula, "grad_qkv", correlated=65 * head_dim)
    assert out.is_contiguous()


@needs_native
def test_where_the_rows_lie_changes_no_bit():
    """Rows 12 KB apart are packed, for they would crowd a few sets of the caches; others are read where they are."""
    qkv, grad_out = draw(1, 300, 16, 64, torch.float32)
    wide = torch.empty(1, 300, 3 * 16 * 64 + 64)
    wide[..., :-64] = qkv.flatten(2)
    apart = wide[..., :-64].unflatten(-1, (3, 16, 64))
    out, grad = torch.ops.vitkd.attention(qkv, 0.125), torch.ops.vitkd.attention_backward(grad_out, qkv, 0.125)
    assert torch.equal(torch.ops.vitkd.attention(apart, 0.125), out)
    assert torch.equal(torch.ops.vitkd.attention_backward(grad_out, apart, 0.125), grad)
    one, one_grad = qkv[:, :, :, 3:4].contiguous(), grad_out[..., 192:256]
    assert torch.equal(torch.ops.vitkd.attention(one, 0.125), out[..., 192:256])
    assert torch.equal(torch.ops.vitkd.attention_backward(one_grad, one, 0.125), grad[:, :, :, 3:4])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [17, 65, 197])
def test_scores_far_beyond_what_their_exponentials_can_hold(tokens, dtype, device):
    """Around 1e12: the largest, rounded, is off by more than an exponential can make up for."""
    qkv = torch.randn(1, tokens, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    qkv[:, :, :2] *= 1e6
    qkv = qkv.to(device, dtype).requires_grad_()
    out, expected = attention(qkv), attention_formula(qkv.float(), 0.125)
    torch.testing.assert_close(out.float(), expected, atol=1e-5, rtol=0.01)
    assert torch.autograd.grad(out.sum(), qkv)[0].isfinite().all()


def test_odd_strides_of_heads_for_torchs_attention():
    memory = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for shape, strides in [
        ((2, 5, 3, 1, 160), (1, 480, 160, 160, 1)),
        ((2, 5, 3, 1, 130), (0, 0, 130, 1, 1)),
        ((1, 5, 3, 1, 160), (7, 480, 160, 1, 1)),
    ]:
        qkv = memory.as_strided(shape, strides)
        junk = torch.full((2 * 5 * 160,), 1e20)
        del junk
        torch.testing.assert_close(attention(qkv), attention_formula(qkv, shape[-1] ** -0.5), atol=1e-5, rtol=1e-4)
