"""Triton's attention against the formula in exact arithmetic: on CUDA, or under Triton's interpreter."""

import importlib
import os

import numpy as np
import pytest
import torch
from testing_rules import assert_follows_rule

from vitkd_fast.ops.attention import attention_backward_formula, attention_formula

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no CUDA device; test_triton_interpreter.py runs this file interpreted", allow_module_level=True)

from vitkd_fast.triton._launch import capability  # noqa: E402
from vitkd_fast.triton._tiles import Tile, backward_tiles, forward_tiles, padded_head_dim  # noqa: E402
from vitkd_fast.triton.attention import attention, attention_backward  # noqa: E402

module_under_test = importlib.import_module("vitkd_fast.triton.attention")  # the package's attribute is the function

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter computes bfloat16 products wrongly (errors of 1e8), so bfloat16 waits for a GPU.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)

pytestmark = [pytest.mark.usefixtures("poisoned_memory")] + ([] if INTERPRETED else [pytest.mark.gpu])
gpu_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no such thing")

TOKENS = (1, 2, 15, 16, 17, 49, 50, 65, 127, 129, 197)
HEAD_DIMS = (7, 16, 24, 32, 48, 64, 80, 96, 128)
if INTERPRETED:  # a long head costs seconds: beyond 17 tokens each length meets three widths
    SIZES = [(n, d) for i, n in enumerate(TOKENS) for j, d in enumerate(HEAD_DIMS) if n <= 17 or (i + j) % 3 == 0]
    SIZES += [(300, 32)]
else:  # a width costs compilations, lengths share them
    SIZES = [(n, 64) for n in (*TOKENS, 64, 96, 128, 198, 256, 257, 300, 577, 1025)]
    SIZES += [(n, d) for d in HEAD_DIMS if d != 64 for n in (16, 17, 65, 129, 197, 300)]


if INTERPRETED:

    @pytest.fixture(autouse=True)
    def sums_in_one_order(monkeypatch):
        """A product is a chain of fused multiply-adds, in one order whichever operand comes first, as float32's is on a
        GPU. Numpy's order depends on CPU and shapes, so that two kernels would see two gradients of one weight."""
        interpreter = importlib.import_module("triton.runtime.interpreter")

        def dot(self, a, b, accumulator, *_):
            left, right = (each.data.astype(np.float64) for each in (a, b))  # in which a product of two is exact
            total = np.zeros_like(accumulator.data)
            for column, row in zip(left.T, right):
                total = (total + column[:, None] * row).astype(total.dtype)
            return interpreter.TensorHandle(total + accumulator.data, accumulator.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def draw(batch, tokens, heads, head_dim, dtype, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator) * spread
    grad_out = torch.randn(batch, tokens, heads * head_dim, generator=generator)
    return qkv.to(DEVICE, dtype), grad_out.to(DEVICE, dtype)


def check(qkv, grad_out, scale=None):
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    exact = attention_formula(qkv.double(), scale)
    assert_follows_rule(attention(qkv, scale), exact, attention_formula(qkv, scale), "out")
    grad = attention_backward(grad_out, qkv, scale)
    assert grad.is_contiguous()
    exact = attention_backward_formula(grad_out.double(), qkv.double(), scale)
    formula = attention_backward_formula(grad_out, qkv, scale)
    assert_follows_rule(grad, exact, formula, "grad_qkv")
    if qkv.shape[1] > 1:  # one token's softmax is 1: its query and key gradients are rounding alone
        for i, name in enumerate(("grad_query", "grad_key", "grad_value")):
            assert_follows_rule(grad[:, :, i], exact[:, :, i], formula[:, :, i], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "N{}_D{}".format(*size))
def test_every_size(size, dtype):
    tokens, head_dim = size
    heads = 1 if INTERPRETED and tokens > 100 else 2
    # Enough numbers that the largest error is a property of the arithmetic; of a few hundred it is luck.
    batch = max(1, min(12, 3000 // (tokens * heads * head_dim))) if INTERPRETED else 16
    check(*draw(batch if tokens > 2 else 2, tokens, heads, head_dim, dtype))


def test_the_sizes_reach_every_backward():
    """Both ways of splitting a head are in the list above, at every padded width."""
    chip = capability(torch.empty(0, device=DEVICE))
    for dtype in DTYPES:
        kinds = {(padded_head_dim(d), type(backward_tiles(n, padded_head_dim(d), dtype, chip)[0])) for n, d in SIZES}
        whole_heads = {width for width, kind in kinds if kind is Tile}
        split_heads = {width for width, kind in kinds if kind is not Tile}
        assert whole_heads == {16, 32, 64, 128}
        assert split_heads >= ({128} if INTERPRETED and dtype is not torch.float32 else {16, 32, 64, 128})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(15, 16), (23, 24), (50, 32), (65, 16), (130, 32)], ids="N{0[0]}_D{0[1]}".format)
def test_every_tile_that_tuning_may_choose(size, dtype, monkeypatch):
    tokens, head_dim = size
    qkv, grad_out = draw(3, tokens, 1, head_dim, dtype)
    width = padded_head_dim(head_dim)
    forward, backward = forward_tiles(tokens, width, dtype), backward_tiles(tokens, width, dtype, capability(qkv))
    assert len(forward) > 1 and len(backward) > 1
    for i in range(max(len(forward), len(backward))):
        monkeypatch.setattr(module_under_test, "best", lambda kind, tiles, *_, i=i: tiles[min(i, len(tiles) - 1)])
        check(qkv, grad_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_any_scale(scale, dtype):
    check(*draw(1, 33, 2, 32, dtype), scale=scale)


def heads_first(qkv):
    return qkv.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)


def tokens_first(qkv):
    return qkv.transpose(0, 1).contiguous().transpose(0, 1)


def odd_offset(qkv):
    return torch.cat([qkv.new_full((1,), float("nan")), qkv.flatten()])[1:].view(qkv.shape)


def every_other_head(qkv):
    return qkv.repeat_interleave(2, dim=3)[:, :, :, ::2]


def padded_channels(qkv):
    return torch.cat([qkv, torch.full_like(qkv, float("nan"))], dim=-1)[..., : qkv.shape[-1]]


def channels_apart(qkv):
    return qkv.repeat_interleave(2, dim=4)[..., ::2]


def one_image(qkv):
    return qkv[:1].expand_as(qkv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "layout",
    [heads_first, tokens_first, odd_offset, every_other_head, padded_channels, channels_apart, one_image],
    ids=lambda layout: layout.__name__,
)
@pytest.mark.parametrize("tokens", [17, 50])
def test_any_strides(layout, tokens, dtype):
    qkv, grad_out = draw(2, tokens, 2, 32, dtype)
    check(layout(qkv), grad_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_grad_strides(dtype):
    qkv, grad_out = draw(2, 50, 2, 32, dtype)
    check(qkv, torch.ones((), device=DEVICE, dtype=dtype).expand_as(grad_out))
    check(qkv, grad_out.transpose(0, 1).contiguous().transpose(0, 1))
    check(qkv, odd_offset(grad_out))
    check(qkv, grad_out[:, :1].expand_as(grad_out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [17, 65, 150])
def test_scores_of_ten_thousand(tokens, dtype):
    """One-hot softmaxes: scores to ±1e4 and beyond, exactly representable so that every dtype sees the same ones."""
    qkv, grad_out = draw(1, tokens, 1, 16, dtype)
    qkv[:, :, :2] = (qkv[:, :, :2] * 8).round() * 4
    assert attention_scores(qkv).abs().max() > 1e4
    check(qkv, grad_out, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [17, 65, 150])
def test_close_scores_of_ten_thousand(tokens, dtype):
    """Scores of ten thousand that differ by a few: rounding them anew after scaling would cost the weights 5e-4."""
    qkv, grad_out = draw(1, tokens, 1, 16, dtype)
    qkv[:, :, :2] = (qkv[:, :, :2] / 2).round()
    qkv[:, :, :2, :, 0] = 96
    check(qkv, grad_out, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [15, 50, 65, 150])
def test_log_sum_exp_below_minus_90(tokens, dtype):
    """Padded keys score 0 where every real one scores -200 or less: weighing them would overflow, not just err.

    Steps of 1/32, in float32 1/128, make every score exact in float32, in whatever order it is summed: of sums that
    large, the order alone would decide how far from the formula's the weights are. The finer ones also keep weights
    from being nearly 0 and 1, where whether delta is one rounding off or two decides. A query's gradients err together,
    by what its weights' gradients miss 0 by in sum; so it takes hundreds of queries for the largest not to be luck.
    """
    qkv, grad_out = draw(600 // tokens if INTERPRETED else 16, tokens, 1, 32, dtype)
    steps = (qkv[:, :, :2] * 2).round() / (128 if dtype is torch.float32 else 32)
    qkv[:, :, 0], qkv[:, :, 1] = 4 + steps[:, :, 0], -4 + steps[:, :, 1]
    assert torch.logsumexp(attention_scores(qkv), -1).max() < -90
    check(qkv, grad_out, scale=1.0)


def attention_scores(qkv):
    query, key, _ = qkv.double().permute(2, 0, 3, 1, 4)
    return query @ key.mT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("tokens", [17, 50])
def test_nan_in_nan_out(tokens, part, dtype):
    """And only in the head that it is in."""
    qkv, grad_out = draw(1, tokens, 2, 16, dtype)
    qkv[0, 3, part, 1, 5] = float("nan")
    check(qkv, grad_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [17, 50])
def test_nan_gradient(tokens, dtype):
    qkv, grad_out = draw(1, tokens, 2, 16, dtype)
    grad_out[0, 3, 5] = float("nan")
    check(qkv, grad_out)


def test_a_masked_first_block_does_not_spoil_the_row():
    """Keys that score -inf weigh nothing, also when they fill the first block that a row meets."""
    qkv, _ = draw(1, 50, 1, 16, torch.float32)
    qkv[:, :, 0, :, 0], qkv[:, :, 1, :, 0] = 1.0, 0.0
    qkv[:, :40, 1, :, 0] = float("-inf")
    exact = attention_formula(qkv.double(), 1.0)
    assert exact.isfinite().all()
    assert_follows_rule(attention(qkv, 1.0), exact, attention_formula(qkv, 1.0), "out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [18, 300])
def test_a_key_that_nobody_looks_at_may_be_infinite(tokens, dtype):
    """Its logits are -inf and its weights 0, but for the zeros that stand for queries past the last one: 0 * inf."""
    qkv, grad_out = draw(1, tokens, 1, 16, dtype)
    qkv[:, :, 0, :, 3] = qkv[:, :, 0, :, 3].abs() + 0.1
    qkv[0, 5, 1, 0, 3] = -float("inf")
    expected = attention_backward_formula(grad_out.float(), qkv.float(), 0.25)[:, :, 1:]
    assert expected.isfinite().all()
    torch.testing.assert_close(
        attention_backward(grad_out, qkv, 0.25)[:, :, 1:].float(), expected, atol=0.05, rtol=0.05
    )


def test_no_images():
    qkv, grad_out = draw(0, 17, 2, 16, torch.float32)
    assert attention(qkv, 1.0).shape == (0, 17, 32)
    assert attention_backward(grad_out, qkv, 1.0).shape == qkv.shape


def test_wrong_dtypes():
    qkv, grad_out = draw(1, 2, 1, 16, torch.float64)
    with pytest.raises(TypeError, match="qkv has dtype float64"):
        attention(qkv, 1.0)
    with pytest.raises(TypeError, match="grad_out has dtype float64; the Triton kernel takes float32"):
        attention_backward(grad_out, qkv.float(), 1.0)


@gpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [17, 65, 197, 577])
def test_repeats_bit_by_bit(tokens, dtype):
    qkv, grad_out = draw(64, tokens, 2, 64, dtype)
    first = attention(qkv, 0.125), attention_backward(grad_out, qkv, 0.125)
    for _ in range(50):
        again = attention(qkv, 0.125), attention_backward(grad_out, qkv, 0.125)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@gpu_only
def test_more_heads_than_a_grid_axis_allows():
    check(*draw(22_000, 2, 3, 16, torch.bfloat16))


@gpu_only
@pytest.mark.parametrize("tokens", [17, 300])
def test_offsets_beyond_31_bits(tokens):
    """The last images of a batch of more than 2³¹ elements, and of one whose tokens lie 2³¹ elements apart."""
    heads, head_dim = 4, 64
    batch = 2**31 // (tokens * 3 * heads * head_dim) + 64
    if torch.cuda.mem_get_info()[0] < 2 * 2 * 2**31 * 1.6:
        pytest.skip("needs 14 GB of GPU memory")
    qkv = torch.zeros(batch, tokens, 3, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    grad_out = torch.zeros(batch, tokens, heads * head_dim, device="cuda", dtype=torch.bfloat16)
    qkv[-2:], grad_out[-2:] = draw(2, tokens, heads, head_dim, torch.bfloat16)
    scale = head_dim**-0.5
    tail, grad_tail = qkv[-2:], grad_out[-2:]
    for layout in (lambda whole: whole, lambda whole: whole.transpose(0, 1).contiguous().transpose(0, 1)):
        laid_out = layout(qkv)
        out = attention(laid_out, scale)[-2:].clone()
        assert_follows_rule(out, attention_formula(tail.double(), scale), attention_formula(tail, scale), "out")
        grad = attention_backward(grad_out, laid_out, scale)[-2:].clone()
        exact = attention_backward_formula(grad_tail.double(), tail.double(), scale)
        assert_follows_rule(grad, exact, attention_backward_formula(grad_tail, tail, scale), "grad_qkv")


@gpu_only
def test_one_compilation_for_all_batch_sizes(monkeypatch):
    """In any layout, also those whose strides grow with the batch, and at a width that divides nothing."""
    import triton

    compiled = []
    for batch in (3, 2, 1, 16, 64, 1000):
        for head_dim in (24, 64):
            qkv, grad_out = draw(batch, 23, 3, head_dim, torch.bfloat16)
            for layout in (torch.clone, tokens_first, heads_first):
                attention(layout(qkv), 0.125), attention_backward(grad_out, layout(qkv), 0.125)
        if batch == 3:
            hook = lambda **about: compiled.append(about)  # noqa: E731
            monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    assert compiled == []


@gpu_only
def test_tuning_measures_once_and_never_while_a_graph_is_captured(monkeypatch):
    tune = importlib.import_module("vitkd_fast.triton._tune")
    for name, value in (("TUNE", True), ("_best", {}), ("_measured", [])):
        monkeypatch.setattr(tune, name, value)
    qkv, grad_out = draw(8, 197, 3, 64, torch.bfloat16)
    attention(qkv, 0.125), attention_backward(grad_out, qkv, 0.125)  # compiles, outside the graph
    found, tune._best, tune._measured = tune.measured(), {}, []
    assert [each["kind"] for each in found] == ["forward", "backward"]
    assert all(min(each["times"]) > 0 for each in found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(qkv, 0.125)
    graph.replay()
    assert tune._measured == [] and tune._best == {}
    exact = attention_formula(qkv.double(), 0.125)
    assert_follows_rule(out, exact, attention_formula(qkv, 0.125), "out")
    for _ in range(2):
        check(*draw(4, 200, 2, 64, torch.bfloat16))  # the same step of 16 tokens
    assert len(tune._measured) == 2


@gpu_only
def test_graph_capture_and_another_stream():
    qkv, grad_out = draw(4, 65, 3, 64, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attention(qkv, 0.125), attention_backward(grad_out, qkv, 0.125)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad = attention(qkv, 0.125), attention_backward(grad_out, qkv, 0.125)
    for seed in (1, 2, 3):
        qkv.copy_(draw(4, 65, 3, 64, torch.bfloat16, seed)[0])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, attention(qkv, 0.125))
        assert torch.equal(grad, attention_backward(grad_out, qkv, 0.125))
