"""Linear layers by convolution: torch's results within rounding, and torch itself wherever they are not for us."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from testing_rules import assert_follows_rule
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vitkd_fast.ops import linear

module = importlib.import_module("vitkd_fast.ops.linear")  # as an attribute it is the function

SHAPES = [((2, 65, 192), 768), ((1, 197, 768), 192), ((7, 33), 5), ((3, 2, 5, 17), 31), ((1, 1), 1), ((64, 192), 10)]


@pytest.fixture(autouse=True)
def this_cpu_gains(monkeypatch):
    monkeypatch.setattr(module, "faster_by_convolution", lambda: True)
    monkeypatch.setattr(module, "LEAST_WORK", 1)
    monkeypatch.setattr(module, "LEAST_ROWS", 1)


class Layer(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def draw(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def both(function, inputs, grad):
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, [each for each in inputs if each.requires_grad], grad)


def assert_near(ours, torchs):
    """Sums of a few squares, in another order."""
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5 * torchs.abs().max().item())


def error(result, exact):
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape, width", SHAPES, ids=str)
def test_is_torchs_within_rounding(shape, width, biased, convolved):
    inputs = draw(shape, (width, shape[-1]), (width,))[: 3 if biased else 2]
    (grad,) = draw((*shape[:-1], width))
    ours, torchs = both(linear, inputs, grad.detach()), both(F.linear, inputs, grad.detach())
    exact = both(F.linear, [each.detach().double().requires_grad_() for each in inputs], grad.detach().double())
    assert len(convolved) == 1
    terms = max(inputs[0].numel() // shape[-1], shape[-1], width)
    rounding = torch.finfo(torch.float32).eps * terms**0.5  # of one running sum, which oneDNN's may be
    for result, other, true in zip(ours, torchs, exact, strict=True):
        assert result.shape == other.shape and result.is_contiguous()
        assert error(result, true) <= max(2 * error(other, true), rounding)


@pytest.mark.parametrize("shape, width", [((130, 1500), 65), ((65, 520), 1040), ((33, 2000), 513)], ids=str)
def test_long_sums_are_nearly_as_exact_as_torchs(shape, width):
    inputs = draw(shape, (width, shape[-1]), (width,))
    (grad,) = (each.detach() for each in draw((*shape[:-1], width)))
    ours, torchs = both(linear, inputs, grad), both(F.linear, inputs, grad)
    exact = both(F.linear, [each.detach().double().requires_grad_() for each in inputs], grad.double())
    for name, result, other, true in zip(("output", "x", "weight", "bias"), ours, torchs, exact, strict=True):
        assert_follows_rule(result, true, other, name)


def test_the_gradient_of_weights_in_pieces(monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 50)
    inputs = draw((2, 65, 192), (192, 192), (192,))
    (grad,) = draw((2, 65, 192))
    for ours, torchs in zip(both(linear, inputs, grad.detach()), both(F.linear, inputs, grad.detach()), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-4)
        assert ours.is_contiguous()


def test_is_the_same_every_time():
    inputs = draw((4, 197, 192), (192, 192), (192,))
    (grad,) = draw((4, 197, 192))
    first = both(linear, inputs, grad.detach())
    for _ in range(3):
        for one, other in zip(first, both(linear, inputs, grad.detach()), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked_for(wanted, convolved):
    inputs = [each.detach().requires_grad_(want) for each, want in zip(draw((9, 8), (6, 8), (6,)), wanted, strict=True)]
    grad = torch.ones(9, 6)
    for ours, torchs in zip(both(linear, inputs, grad), both(F.linear, inputs, grad), strict=True):
        torch.testing.assert_close(ours, torchs)
    assert len(convolved) == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_onednn_that_multiplies(threads):
    before = torch.get_num_threads()
    inputs = draw((9, 8), (6, 8), (6,))
    try:
        torch.set_num_threads(threads)
        with torch.autograd.profiler.profile() as profile:
            linear(*inputs).sum().backward()
    finally:
        torch.set_num_threads(before)
    names = {event.name for event in profile.function_events}
    assert not [name for name in names if "slow_conv" in name], names
    assert any("mkldnn" in name for name in names)


def test_a_gradient_with_strides():
    inputs = draw((9, 8), (6, 8), (6,))
    grad = torch.randn(6, 9).t()
    for ours, torchs in zip(both(linear, inputs, grad), both(F.linear, inputs, grad), strict=True):
        torch.testing.assert_close(ours, torchs)


def test_second_derivatives():
    def penalty(function):
        x, weight, bias = draw((5, 8), (6, 8), (6,))
        (slope,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (x, weight, bias))

    for ours, torchs in zip(penalty(linear), penalty(F.linear), strict=True):
        assert_near(ours, torchs)


def test_torchs_where_it_is_not_for_us(convolved, monkeypatch):
    x, weight, bias = (each.detach() for each in draw((4, 8), (6, 8), (6,)))
    assert linear(x.double(), weight.double(), bias.double()).dtype is torch.float64
    torch.testing.assert_close(linear(x.t().contiguous().t(), weight, bias), F.linear(x, weight, bias))
    assert linear(x.to_sparse(), weight).shape == (4, 6)
    assert linear(torch.nested.nested_tensor([torch.ones(3, 8), torch.ones(2, 8)]), weight).is_nested
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype is torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight, bias)
    assert linear(torch.zeros(0, 8), weight, bias).shape == (0, 6)
    torch.testing.assert_close(torch.func.vmap(lambda row: linear(row, weight, bias))(x), F.linear(x, weight, bias))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[:, :7].contiguous(), weight, bias)
    monkeypatch.setattr(module, "LEAST_WORK", 4 * 8 * 6 + 1)
    linear(x, weight, bias)
    monkeypatch.setattr(module, "LEAST_WORK", 4 * 8 * 6)
    monkeypatch.setattr(module, "LEAST_ROWS", 5)
    linear(x, weight, bias)
    assert convolved == []
    monkeypatch.setattr(module, "LEAST_ROWS", 4)
    linear(x, weight, bias)
    assert len(convolved) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend, convolved):
    torch._dynamo.reset()  # it remembers of a function which sizes changed
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(linear, backend=counter, fullgraph=True)
    for rows in (9, 7, 5):
        inputs = draw((rows, 8), (6, 8), (6,))
        grad = torch.ones(rows, 6)
        for ours, torchs in zip(both(compiled, inputs, grad), both(F.linear, inputs, grad), strict=True):
            torch.testing.assert_close(ours, torchs)
    assert len(convolved) == 3
    assert counter.frame_count == 2  # for 9 rows, and for any


@pytest.mark.parametrize("rows, layout", [(9, "rows"), (4, "rows"), (9, "columns")])
def test_what_compiled_code_calls_is_an_op(rows, layout, monkeypatch):
    monkeypatch.setattr(module, "LEAST_ROWS", 5)
    x, weight, bias = draw((rows, 8), (6, 8), (6,))
    grad = torch.randn(rows, 6)
    if layout == "columns":
        x, grad = (each.detach().t().contiguous().t().requires_grad_() for each in (x, grad))
    torch.library.opcheck(torch.ops.vitkd.linear, (x, weight, bias))
    torch.library.opcheck(torch.ops.vitkd.linear, (x, weight, None))
    torch.library.opcheck(torch.ops.vitkd.linear_input_gradient, (grad.detach(), weight.detach()))
    torch.library.opcheck(torch.ops.vitkd.linear_weight_gradient, (grad.detach(), x.detach()))


@pytest.mark.parametrize("weight_shape, bias_shape", [((6, 8), (1, 6)), ((8,), None), ((6, 8), (1,)), ((6, 8), ())])
def test_compiled_with_shapes_that_no_layer_has(weight_shape, bias_shape):
    torch._dynamo.reset()
    inputs = draw((9, 8), weight_shape, *([bias_shape] if bias_shape is not None else []))
    grad = torch.ones_like(F.linear(*inputs))
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for ours, torchs in zip(both(compiled, inputs, grad), both(F.linear, inputs, grad), strict=True):
        torch.testing.assert_close(ours, torchs)


def test_compiled_under_autocast_it_is_torchs(convolved):
    x, weight, bias = (each.detach() for each in draw((4, 8), (6, 8), (6,)))
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x, weight, bias), F.linear(x, weight, bias))
    assert convolved == []


def test_traced_by_fx():
    model = Layer(8, 6)
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(4, 8)
    torch.testing.assert_close(graph(x), F.linear(x, model.weight, model.bias))


def test_any_bias_that_torch_takes(convolved):
    x, weight, bias = (each.detach() for each in draw((4, 8), (6, 8), (1,)))
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    assert convolved == []


def test_may_be_changed_in_place(convolved):
    for change in (torch.relu_, lambda y: y.add_(1), lambda y: y[:, :2].zero_(), lambda y: y.view(2, -1).mul_(2)):
        slopes = []
        for function in (linear, F.linear):
            inputs = draw((4, 8), (6, 8), (6,))
            y = function(*inputs)
            change(y)
            slopes.append(torch.autograd.grad(y.square().sum(), inputs))
        for ours, torchs in zip(*slopes, strict=True):
            assert_near(ours, torchs)
    assert len(convolved) == 4


def test_saves_what_the_gradients_need():
    def saved(function, *needed):
        shapes = []
        inputs = [
            each.detach().requires_grad_(need) for each, need in zip(draw((4, 8), (6, 8), (6,)), needed, strict=True)
        ]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(sorted(t.shape)), lambda _: None):
            function(*inputs)
        return sorted(shapes)

    for needed in ((True, True, True), (True, False, False), (False, True, True), (False, False, True)):
        assert saved(linear, *needed) == saved(F.linear, *needed)


def test_exported_for_any_batch():
    batch = torch.export.Dim("batch", min=2, max=1000)
    program = torch.export.export(Layer(8, 6), (torch.randn(4, 8),), dynamic_shapes=({0: batch},))
    assert program.module()(torch.randn(900, 8)).shape == (900, 6)
