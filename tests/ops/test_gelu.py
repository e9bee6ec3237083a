"""GELU and its gradient, against the formula in exact arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from testing_rules import assert_follows_rule, needs_native

from vitkd_fast import backends
from vitkd_fast.ops import gelu
from vitkd_fast.ops.gelu import DTYPES, gelu_backward_formula, gelu_formula

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [(0,), (1,), (7,), (8,), (9,), (3, 5, 17), (2, 65, 192), (70001,)]


@pytest.fixture
def asked(monkeypatch):
    """Which of our ops `gelu` called, in order."""
    calls = []
    for name in ("gelu", "gelu_backward"):
        op = getattr(torch.ops.vitkd, name)
        monkeypatch.setattr(torch.ops.vitkd, name, lambda *args, op=op, name=name: calls.append(name) or op(*args))
    return calls


def both(function, x, grad):
    x = x.detach().requires_grad_()
    out = function(x)
    return out.detach(), *torch.autograd.grad(out, x, grad)


def draw(shape, dtype):
    return (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


def test_formula_is_torchs():
    x, grad = draw((1000,), torch.float64)
    assert torch.autograd.gradcheck(gelu_formula, x[:50].requires_grad_())
    for ours, torchs in zip(both(gelu_formula, x, grad), both(F.gelu, x, grad), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gelu_backward_formula(grad, x), both(F.gelu, x, grad)[1], rtol=1e-12, atol=1e-14)


@needs_native
def test_the_kernel_is_there():
    assert backends.libraries()["_C_cpu"] is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key("vitkd::gelu", "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("vitkd::gelu_backward", "CPU")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_follows_the_rule(shape, dtype, asked):
    x, grad = draw(shape, dtype)
    out, slope = both(gelu, x, grad)
    assert asked == ["gelu", "gelu_backward"]
    exact = gelu_formula(x.double()), gelu_backward_formula(grad.double(), x.double())
    assert_follows_rule(out, exact[0], F.gelu(x), "gelu", correlated=1)
    assert_follows_rule(slope, exact[1], both(F.gelu, x, grad)[1], "gradient", correlated=1)


def test_the_tail_keeps_its_digits():
    x = torch.linspace(-9, -2, 7001)
    torch.testing.assert_close(gelu(x).double(), gelu_formula(x.double()), rtol=1e-5, atol=0)
    large = torch.linspace(2, 40, 7001)
    torch.testing.assert_close(gelu(large).double(), gelu_formula(large.double()), rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype):
    highest = torch.finfo(dtype).max
    x = torch.tensor([0.0, -0.0, torch.inf, highest, -highest, 200, -200, torch.nan, -torch.inf], dtype=dtype)
    out, slope = both(gelu, x, torch.ones_like(x))
    assert torch.equal(out[:7], torch.tensor([0, 0, torch.inf, highest, 0, 200, 0], dtype=dtype))
    assert torch.equal(slope[:2], torch.tensor([0.5, 0.5], dtype=dtype))
    assert torch.equal(slope[3:7], torch.tensor([1, 0, 1, 0], dtype=dtype))
    assert out[7].isnan() and slope[7].isnan()
    assert out[8].isnan() == F.gelu(x[8]).isnan()


@needs_native
def test_thread_count_does_not_change_a_bit():
    x, grad = draw((100003,), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(both(gelu, x, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.double,
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x.as_subclass(type("Mine", (torch.Tensor,), {})),
    ],
    ids=["float64", "transposed", "strided", "subclass"],
)
def test_everything_else_is_torchs(change, asked):
    x = change(draw((8, 6), torch.float32)[0])
    assert torch.equal(gelu(x), F.gelu(x))
    assert asked == []


def test_a_gradient_of_another_layout(asked):
    x, grad = draw((8, 8), torch.float32)
    assert torch.equal(both(gelu, x, grad.T.contiguous().T)[1], both(gelu, x, grad)[1])
    assert asked == ["gelu", "gelu_backward"] * 2


def test_second_derivatives_are_torchs():
    x = torch.randn(20, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def second(function):
        (first,) = torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(gelu), second(F.gelu), rtol=1e-5, atol=1e-6)


def test_no_gradient_no_graph(asked):
    x = torch.randn(10, requires_grad=True)
    with torch.no_grad():
        assert not gelu(x).requires_grad
    assert not gelu(x.detach()).requires_grad
    assert asked == ["gelu"] * 2


def test_autocast_leaves_it_alone():
    x = torch.randn(10)
    with torch.autocast("cpu", torch.bfloat16):
        assert gelu(x).dtype is torch.float32
        assert gelu(x.bfloat16()).dtype is torch.bfloat16


def test_compiles_and_transforms_as_torchs(asked):
    x = torch.randn(3, 10)
    compiled = torch.compile(gelu, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), F.gelu(x))
    assert torch.equal(torch.func.vmap(gelu)(x), F.gelu(x))
    torch.testing.assert_close(torch.func.grad(lambda x: gelu(x).sum())(x), both(F.gelu, x, torch.ones_like(x))[1])
    assert asked == []


def test_bad_arguments_of_the_op():
    x = torch.randn(4, 6)
    for arguments in ((x.T,), (x.double(),)):
        with pytest.raises(RuntimeError, match="x must"):
            torch.ops.vitkd.gelu(*arguments)
    for grad in (x[:3], x.half(), x.T):
        with pytest.raises(RuntimeError, match="grad must"):
            torch.ops.vitkd.gelu_backward(grad, x)


def test_strided_nested_tensors_are_torchs():
    x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)])
    for mine, torchs in zip(gelu(x).unbind(), F.gelu(x).unbind(), strict=True):
        assert torch.equal(mine, torchs)
