"""The CUDA attention against the formula in float64, run on the CPU by the emulator in cuda_host (ASan, UBSan)."""

import importlib

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from testing_rules import assert_follows_rule

from vitkd_fast.ops.attention import attention_backward_formula, attention_formula

host = importlib.import_module("emulator")  # conftest.py knows where it is

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Heads of these widths that are not too long are computed whole in shared memory, if they are of 16-bit elements and
# aligned; all others are streamed through it.
WHOLE = (32, 64)
SHAPES = (  # tokens, heads, head_dim: every token count and every padded width, large with narrow
    (1, 1, 16),
    (2, 3, 7),
    (15, 2, 24),
    (16, 1, 32),
    (17, 2, 48),
    (49, 1, 80),
    (50, 3, 64),
    (65, 1, 96),
    (65, 1, 128),
    (127, 1, 32),
    (128, 1, 16),
    (129, 1, 24),
    (197, 1, 64),
    (257, 1, 16),
    (257, 1, 64),
)
WHOLE_SHAPES = (  # each length that is compiled for, one token more and less
    (1, 3, 64),
    (31, 5, 64),
    (32, 2, 32),
    (33, 3, 32),
    (64, 3, 64),
    (65, 3, 64),
    (66, 1, 32),
    (80, 1, 32),
    (81, 3, 64),
    (112, 1, 32),
    (113, 1, 64),
    (145, 1, 64),
    (160, 1, 32),
    (161, 1, 64),
    (198, 3, 64),
    (208, 1, 32),
    (209, 1, 32),
    (272, 1, 64),
)


@pytest.fixture
def cuda(emulator):
    emulator.schedule = "ascending"
    emulator.max_shared = 227 * 1024
    emulator.warpgroups = False
    return emulator


# sm_90 has instructions that multiply by four warps at once, and kernels of its own where they are enough.
both = pytest.mark.parametrize("warpgroups", (False, True), ids=("sm_100", "sm_90"))


def inputs(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, batch: int = 1, spread: float = 1.0):
    generator = torch.Generator().manual_seed(tokens * 1000 + head_dim)
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator)
    qkv[:, :, :2] *= spread**0.5
    grad_out = torch.randn(batch, tokens, heads * head_dim, generator=generator)
    return qkv.to(dtype), grad_out.to(dtype), head_dim**-0.5


def assert_both_accurate(cuda, qkv, grad_out, scale):
    exact, plain = attention_formula(qkv.double(), scale), attention_formula(qkv, scale)
    assert_follows_rule(cuda.attention(qkv, scale), exact, plain, "out")
    exact = attention_backward_formula(grad_out.double(), qkv.double(), scale)
    plain = attention_backward_formula(grad_out, qkv, scale)
    actual = cuda.attention_backward(grad_out, qkv, scale)
    for i, name in enumerate(("dq", "dk", "dv")):
        assert_follows_rule(actual[:, :, i], exact[:, :, i], plain[:, :, i], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formula(cuda, shape, dtype):
    assert_both_accurate(cuda, *inputs(*shape, dtype))


@both
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", WHOLE_SHAPES, ids=str)
def test_whole_heads_match_the_formula(cuda, shape, dtype, warpgroups):
    cuda.warpgroups = warpgroups
    assert_both_accurate(cuda, *inputs(*shape, dtype))


def test_a_head_that_does_not_fit_is_streamed(cuda):
    """What is not aligned is streamed on any device: on one with little shared memory the results are the same."""
    qkv, grad_out, scale = inputs(197, 1, 64, torch.bfloat16)
    whole = cuda.attention(qkv, scale), cuda.attention_backward(grad_out, qkv, scale)
    streamed = cuda.attention(qkv, scale, out_offset=1), cuda.attention_backward(grad_out, qkv, scale, out_offset=1)
    cuda.max_shared = 99 * 1024  # sm_86, sm_89, sm_120: the forward fits, the backward does not
    assert torch.equal(cuda.attention(qkv, scale), whole[0])
    assert torch.equal(cuda.attention_backward(grad_out, qkv, scale), streamed[1])
    assert not torch.equal(whole[1], streamed[1])
    cuda.max_shared = 82 * 1024  # what the streamed kernels take
    qkv, grad_out, scale = inputs(257, 1, 64, torch.bfloat16)
    streamed = cuda.attention(qkv, scale, out_offset=1)
    assert torch.equal(cuda.attention(qkv, scale), streamed)
    assert_both_accurate(cuda, qkv, grad_out, scale)


@pytest.mark.parametrize("tokens, head_dim", ((50, 64), (65, 32), (145, 64)))
def test_each_device_computes_the_same(cuda, tokens, head_dim):
    """sm_80 has 163 KiB of shared memory and must write weights pair by pair, which sm_90 does in blocks."""
    qkv, grad_out, scale = inputs(tokens, 3, head_dim, torch.bfloat16)
    grad = cuda.attention_backward(grad_out, qkv, scale)
    cuda.max_shared = 163 * 1024
    assert torch.equal(cuda.attention_backward(grad_out, qkv, scale), grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (24, 32))
@pytest.mark.parametrize("scale", (0.0, 1e-46))  # the second is 0 in float32
def test_scale_zero_is_a_mean(cuda, scale, head_dim, dtype):
    qkv, grad_out, _ = inputs(37, 2, head_dim, dtype)
    assert_both_accurate(cuda, qkv, grad_out, scale)


@both
@pytest.mark.parametrize("tokens, head_dim", ((17, 64), (65, 32), (65, 64), (197, 64)))
def test_scores_far_beyond_what_their_exponentials_can_hold(cuda, tokens, head_dim, warpgroups):
    """Around 1e12, and 3e9, where it begins: the largest, rounded, is off by more than an exponential can be."""
    cuda.warpgroups = warpgroups
    for spread in (1e12, 1e9):
        qkv, grad_out, scale = inputs(tokens, 2, head_dim, torch.bfloat16, spread=spread)
        expected = attention_formula(qkv.float(), scale)
        torch.testing.assert_close(cuda.attention(qkv, scale).float(), expected, atol=1e-5, rtol=0.01)
        assert cuda.attention_backward(grad_out, qkv, scale).isfinite().all()


def test_more_tokens_than_one_chunk_of_statistics(cuda):
    assert_both_accurate(cuda, *inputs(1030, 1, 8, torch.bfloat16))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (24, 32))
def test_batches_and_negative_scale(cuda, head_dim, dtype, warpgroups):
    cuda.warpgroups = warpgroups
    qkv, grad_out, scale = inputs(21, 2, head_dim, dtype, batch=3)
    assert_both_accurate(cuda, qkv, grad_out, -scale)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, head_dim", ((50, 24), (50, 32), (197, 32), (257, 64)))
def test_logits_spread_over_ten_thousand(cuda, tokens, head_dim, dtype, warpgroups):
    cuda.warpgroups = warpgroups
    qkv, grad_out, _ = inputs(tokens, 1, head_dim, dtype, spread=800.0)
    assert 1e4 < attention_scores(qkv).abs().max() < 6e4  # float16 ends at 65504
    assert_both_accurate(cuda, qkv, grad_out, scale=1.0)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, head_dim", ((50, 24), (50, 32), (197, 32), (257, 64)))
def test_rows_of_very_negative_logits(cuda, tokens, head_dim, dtype, warpgroups):
    """A padded column counted as a logit of 0 would outweigh these rows, whose log-sum-exp is near -2000."""
    cuda.warpgroups = warpgroups
    qkv, grad_out, scale = inputs(tokens, 1, head_dim, dtype)
    qkv[:, :, 0, :, 0], qkv[:, :, 1, :, 0] = 100, -128
    assert torch.logsumexp(attention_scores(qkv) * scale, -1).max() < -90
    assert_both_accurate(cuda, qkv, grad_out, scale)


def attention_scores(qkv):
    query, key, _ = qkv.double().permute(2, 0, 3, 1, 4)
    return query @ key.mT


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", (0, 1, 2), ids=("query", "key", "value"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")), ids=str)
@pytest.mark.parametrize("head_dim", (16, 32))
def test_nan_and_inf_come_out_where_the_formula_has_them(cuda, head_dim, part, value, dtype, warpgroups):
    cuda.warpgroups = warpgroups
    qkv, grad_out, scale = inputs(18, 2, head_dim, dtype)
    qkv[0, 5, part, 1, 3] = value
    out, expected = cuda.attention(qkv, scale), attention_formula(qkv.float(), scale)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert not out.isfinite().all()
    grad, expected = (
        cuda.attention_backward(grad_out, qkv, scale),
        attention_backward_formula(grad_out.float(), qkv.float(), scale),
    )
    assert not grad[:, :, :, 1][~expected[:, :, :, 1].isfinite()].isfinite().any()
    assert torch.equal(grad[:, :, :, 0].isfinite(), expected[:, :, :, 0].isfinite())


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (16, 32))
def test_a_key_that_nobody_looks_at_may_be_infinite(cuda, head_dim, dtype, warpgroups):
    """Its logits are -inf and its weights 0, but for the zeros that stand for queries past the last one: 0 * inf."""
    cuda.warpgroups = warpgroups
    qkv, grad_out, scale = inputs(18, 1, head_dim, dtype)
    qkv[:, :, 0, :, 3] = qkv[:, :, 0, :, 3].abs() + 0.1
    qkv[0, 5, 1, 0, 3] = -float("inf")
    expected = attention_backward_formula(grad_out.float(), qkv.float(), scale)[:, :, 1:]
    grad = cuda.attention_backward(grad_out, qkv, scale)[:, :, 1:]
    assert expected.isfinite().all()
    assert torch.allclose(grad.float(), expected, atol=0.05)
    assert torch.allclose(cuda.attention(qkv, scale).float(), attention_formula(qkv.float(), scale), atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, head_dim", ((19, 32), (19, 24), (35, 7)))
def test_layouts_change_no_bit(cuda, tokens, head_dim, dtype):
    """Strided, misaligned and expanded inputs, and a misaligned output, against contiguous ones.

    Misalignment changes how a head of a tuned width is computed: then the result is as accurate, but not the same.
    """
    qkv, grad_out, scale = inputs(tokens, 2, head_dim, dtype, batch=2)
    out, grad = cuda.attention(qkv, scale), cuda.attention_backward(grad_out, qkv, scale)

    def offset(tensor, elements):
        room = torch.full((tensor.numel() + elements,), float("nan"), dtype=dtype)
        return room[elements:].view(tensor.shape).copy_(tensor)

    layouts = {
        "odd offset": (offset(qkv, 1), offset(grad_out, 3)),
        "16-byte offset": (offset(qkv, 16), offset(grad_out, 8)),
        "transposed": (
            qkv.permute(2, 3, 0, 1, 4).contiguous().permute(2, 3, 0, 1, 4),
            grad_out.transpose(0, 1).contiguous().transpose(0, 1),
        ),
        "odd row stride": (padded(qkv, 5), padded(grad_out, 3)),
    }
    streamed = head_dim not in WHOLE or dtype is torch.float32
    for name, (qkv_, grad_out_) in layouts.items():
        assert torch.equal(qkv_, qkv) and torch.equal(grad_out_, grad_out)
        if streamed or not name.startswith("odd"):
            assert torch.equal(cuda.attention(qkv_, scale), out), name
            assert torch.equal(cuda.attention_backward(grad_out_, qkv_, scale), grad), name
        else:
            assert_both_accurate(cuda, qkv_, grad_out_, scale)
    unaligned = cuda.attention(qkv, scale, out_offset=1), cuda.attention_backward(grad_out, qkv, scale, out_offset=1)
    if streamed:
        assert torch.equal(unaligned[0], out) and torch.equal(unaligned[1], grad)
    else:
        layout = layouts["odd offset"]
        assert torch.equal(unaligned[0], cuda.attention(layout[0], scale))
        assert torch.equal(unaligned[1], cuda.attention_backward(layout[1], layout[0], scale))

    expanded = qkv[:1].expand(2, -1, -1, -1, -1)
    assert torch.equal(cuda.attention(expanded, scale), cuda.attention(expanded.contiguous(), scale))
    ones = torch.ones(1, 1, grad_out.shape[2], dtype=dtype).expand(grad_out.shape)
    assert torch.equal(
        cuda.attention_backward(ones, expanded, scale),
        cuda.attention_backward(ones.contiguous(), expanded.contiguous(), scale),
    )


def padded(tensor, extra):
    """The same tensor with room after each token."""
    room = torch.full((*tensor.shape[:2], tensor[0, 0].numel() + extra), float("nan"), dtype=tensor.dtype)
    return room[:, :, : tensor[0, 0].numel()].copy_(tensor.flatten(2)).unflatten(2, tensor.shape[2:])


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, heads, head_dim", ((130, 1, 24), (114, 5, 32), (50, 5, 64), (197, 3, 32)))
def test_the_order_in_which_threads_run_changes_no_bit(cuda, tokens, heads, head_dim, dtype, warpgroups):
    """A missing barrier, or a copy that is not waited for, would show: the schedules are each other's opposites.

    The emulated device runs two blocks at a time: of 3 and 5 heads, blocks go on to a second and a third.
    """
    cuda.warpgroups = warpgroups
    if dtype is torch.float32 and head_dim in WHOLE:
        pytest.skip("float32 is streamed at any width")
    qkv, grad_out, scale = inputs(tokens, heads, head_dim, dtype)
    results = []
    for cuda.schedule in host.SCHEDULES:
        results.append((cuda.attention(qkv, scale), cuda.attention_backward(grad_out, qkv, scale)))
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


@hypothesis.given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 40),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    extra=st.integers(0, 9),
)
@hypothesis.settings(max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_shape_and_row_stride(cuda, batch, tokens, heads, head_dim, dtype, extra):
    qkv, grad_out, scale = inputs(tokens, heads, head_dim, dtype, batch)
    assert_both_accurate(cuda, padded(qkv, extra), padded(grad_out, extra), scale)


def test_more_blocks_than_a_grid_has_is_said(cuda):
    qkv = torch.zeros(1, 1, 3, 1, 1)
    words = [host.DTYPES.index(torch.float32), 2**31, 1, 1, 1, 1.0, 0, *qkv.stride()[1:4]]
    with pytest.raises(ValueError, match="unsupported size"):
        cuda._ask("attention", words, [qkv], [((0,), torch.float32)], 0)


def test_empty_batch(cuda):
    qkv, grad_out, scale = inputs(4, 2, 16, torch.float32, batch=0)
    assert cuda.attention(qkv, scale).shape == (0, 4, 32)
    assert cuda.attention_backward(grad_out, qkv, scale).shape == qkv.shape


def test_unsupported_is_said(cuda):
    qkv, grad_out, scale = inputs(2, 1, 129, torch.float32)
    for call in (lambda: cuda.attention(qkv, scale), lambda: cuda.attention_backward(grad_out, qkv, scale)):
        with pytest.raises(ValueError, match="unsupported head_dim"):
            call()
    qkv, _, scale = inputs(2, 1, 16, torch.float64)
    with pytest.raises(ValueError, match="unsupported dtype"):
        cuda.attention(qkv, scale)
