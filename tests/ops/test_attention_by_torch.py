"""Attention that the public function leaves to torch: the inputs that torch's own GPU kernels do not bear."""

import sys

import pytest
import torch
import torch.nn.functional as F

from vitkd_fast.ops import attention
from vitkd_fast.ops.attention import attention_formula

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [(2, 1, 2, 64), (2, 577, 2, 64), (2, 33, 2, 160)]  # one token, many tokens, wide heads

module = sys.modules["vitkd_fast.ops.attention"]  # as an attribute of the package it is the function


def draw(batch, tokens, heads, head_dim):
    return torch.randn(batch, tokens, 3, heads, head_dim, generator=torch.Generator().manual_seed(0))


def run(function, qkv, scale):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, scale)
    return out, *torch.autograd.grad(out, qkv, torch.ones_like(out))


def assert_errs_no_more_than_the_formula(qkv, scale):
    """By much: what computes here is torch's."""
    found, formula = (run(function, qkv, scale) for function in (attention, attention_formula))
    for result, plain, exact in zip(found, formula, run(attention_formula, qkv.double(), scale), strict=True):
        assert result.dtype is plain.dtype and result.isfinite().all()
        rounding = torch.finfo(qkv.dtype).eps * max(1, exact.abs().amax().item())
        # of one token the gradient of the scores is nothing, as the difference of two sums over the head's width
        allowed = 3 * (plain - exact).abs().amax().item() + 32 * rounding
        assert (result - exact).abs().amax().item() <= allowed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-42, 0.1])
@pytest.mark.parametrize("size", SIZES)
def test_any_scale(size, scale, dtype, device):
    assert_errs_no_more_than_the_formula(draw(*size).to(device, dtype), scale)


@pytest.mark.parametrize("scale", [-0.3, 0.0, -1e-42, 1e-42])
def test_torchs_kernels_get_a_positive_scale(scale, monkeypatch):
    """FlashAttention hides the columns beyond the last key by -inf, and only then multiplies by the scale."""
    scales, own = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, scale: scales.append(scale) or own(*args, scale=scale)
    )
    attention(draw(1, 5, 1, 160), scale)
    assert len(scales) == 1 and scales[0] >= torch.finfo(torch.float32).tiny


def test_more_images_than_torchs_kernels_take_go_in_parts(monkeypatch):
    qkv = draw(7, 5, 1, 160)
    whole = run(attention, qkv, 0.3)
    monkeypatch.setattr(module, "_most_images", lambda _: 3)
    for one, other in zip(run(attention, qkv, 0.3), whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(65_537, 1, 1, 64), (65_537, 2, 1, 136)])
def test_more_images_than_a_gpu_has_rows_of_blocks(size):
    qkv = torch.randn(size[0], size[1], 3, *size[2:], device="cuda", dtype=torch.bfloat16)
    out, grad = run(attention, qkv, 0.1)
    last_out, last_grad = run(attention, qkv[-3:], 0.1)
    torch.testing.assert_close(out[-3:], last_out)
    torch.testing.assert_close(grad[-3:], last_grad)


LAYOUTS = {  # of (2, 40, 3, 2, 160), and whether 16 bytes can be loaded at once from where its heads begin
    "plain": (lambda new: new(2, 40, 3, 2, 160), True),
    "offset by one": (lambda new: new(2 * 40 * 960 + 1)[1:].view(2, 40, 3, 2, 160), False),
    "of wider rows": (lambda new: new(2, 40, 3, 2, 163)[..., 1:161], False),
    "of a broadcast": (lambda new: new(1, 40, 3, 2, 160).expand(2, -1, -1, -1, -1), True),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, dtype, device):
    make, loads = LAYOUTS[layout]
    qkv = make(lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype))
    assert module._loads_by_16_bytes(qkv) is loads
    assert_errs_no_more_than_the_formula(qkv, 0.1)


def test_a_width_that_torch_pads_is_left_to_it():
    assert module._loads_by_16_bytes(torch.zeros(2, 40, 3, 2, 131))
