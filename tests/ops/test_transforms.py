"""Derivatives of derivatives, forward mode, torch.func and torch.fx: each the formula's, whatever kernel the op has."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from vitkd_fast.ops import attention, attention_kd, gelu, kd_loss
from vitkd_fast.ops._precise import reduced
from vitkd_fast.ops.attention import attention_formula
from vitkd_fast.ops.attention_kd import attention_scores
from vitkd_fast.ops.kd_loss import KINDS, kd_rows_formula


def packed(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def logits():
    return packed(2, 9, 10).unbind(0)


@pytest.mark.parametrize("way", ["jvp", "dual numbers"])
@pytest.mark.parametrize("op", ["attention", "kd_loss", "kd_loss rows", "gelu"])
def test_forward_mode_is_the_formulas(op, way):
    function, formula, x = {
        "attention": (attention, lambda x: attention_formula(x, 16**-0.5), packed(1, 5, 3, 1, 16)),
        "kd_loss": (lambda x: kd_loss(*x), lambda x: kd_rows_formula(*x, "kl", 1.0).mean(), packed(2, 9, 10)),
        "kd_loss rows": (
            lambda x: kd_loss(*x, reduction="none"),
            lambda x: kd_rows_formula(*x, "kl", 1.0),
            packed(2, 9, 10),
        ),
        "gelu": (gelu, F.gelu, packed(4, 5)),
    }[op]
    direction = torch.linspace(-1, 1, x.numel()).view_as(x)
    expected = torch.func.jvp(formula, (x,), (direction,))[1]
    if way == "jvp":
        tangent = torch.func.jvp(function, (x,), (direction,))[1]
    else:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent
    assert expected.abs().max() > 0
    torch.testing.assert_close(tangent, expected)


SECOND = {
    "attention": (lambda x: attention(x[0]), lambda x: attention_formula(x[0], 16**-0.5), (1, 1, 5, 3, 1, 16)),
    **{
        f"kd_loss {kind} {reduction}": (
            lambda x, kind=kind, reduction=reduction: kd_loss(*x, kind=kind, reduction=reduction),
            lambda x, kind=kind, reduction=reduction: reduced(kd_rows_formula(*x, kind, 1.0), reduction),
            (2, 9, 10),
        )
        for kind in KINDS
        for reduction in ("batchmean", "none")
    },
}


@pytest.mark.parametrize("outer", [torch.square, torch.sum, lambda x: x.sum() * 2], ids=["square", "sum", "twice"])
@pytest.mark.parametrize("case", SECOND)
def test_second_derivatives_are_the_formulas(case, outer):
    """Where the loss goes on and where it ends, for then no factor of its gradient asks to be differentiated."""
    function, formula, shape = SECOND[case]

    def second(function):
        x = packed(*shape).requires_grad_()
        (grad,) = torch.autograd.grad(outer(function(x)).sum(), x, create_graph=True)
        direction = torch.arange(grad.numel()).sin().view_as(grad)
        return torch.autograd.grad((grad * direction).sum(), x)[0]

    expected = second(formula)
    most = expected.abs().max().item()
    torch.testing.assert_close(second(function), expected, rtol=1e-4, atol=max(1e-4 * most, 1e-8))
    assert most > 1e-5 or (case.startswith("kd_loss l1") and outer is not torch.square)


def test_the_weight_of_a_loss_has_a_gradient_of_its_gradient():
    student, teacher = logits()
    for weight in (1.0, 2.0):
        factor, x = torch.tensor(weight, requires_grad=True), student.clone().requires_grad_()
        (grad,) = torch.autograd.grad(factor * kd_loss(x, teacher), x, create_graph=True)
        expected = torch.autograd.grad(kd_loss(x, teacher), x)[0].square().sum() * 2 * weight
        torch.testing.assert_close(torch.autograd.grad(grad.square().sum(), factor)[0], expected)


FUNCTIONAL = {
    "attention": (attention, lambda x: attention_formula(x, 16**-0.5), (4, 5, 3, 1, 16)),
    "wide": (attention, lambda x: attention_formula(x, 160**-0.5), (2, 5, 3, 1, 160)),
    "gelu": (gelu, F.gelu, (4, 5)),
    "kd_loss": (
        lambda x: kd_loss(*x.unbind(-1)),
        lambda x: kd_rows_formula(*x.unbind(-1), "kl", 1.0).mean(),
        (4, 9, 2),
    ),
    "attention_kd": (
        lambda x: attention_kd(*x.unbind(1)),
        lambda x: attention_kd(*(attention_scores(side, side.shape[-1] ** -0.5).softmax(-1) for side in x.unbind(1))),
        (2, 2, 5, 3, 1, 8),
    ),
}


@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap of grad", "jvp", "jacrev"])
@pytest.mark.parametrize("case", FUNCTIONAL)
def test_torch_func_transforms_are_the_formulas(case, transform):
    function, formula, shape = FUNCTIONAL[case]

    def transformed(function):
        x = packed(3, *shape)
        if transform == "vmap":
            return torch.func.vmap(function)(x)
        if transform == "vmap of grad":
            return torch.func.vmap(torch.func.grad(lambda x: function(x).sin().sum()))(x)
        if transform == "jvp":
            return torch.func.jvp(function, (x[0],), (x[1],))[1]
        return getattr(torch.func, transform)(lambda x: function(x).sin().sum())(x[0])

    torch.testing.assert_close(transformed(function), transformed(formula), rtol=1e-4, atol=1e-6)


def test_gradients_of_single_samples_are_those_of_a_batch_of_one():
    model = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.Unflatten(-1, (3, 2, 4)))
    weights, x = dict(model.named_parameters()), packed(3, 5, 8)

    def loss(weights, x):
        return attention(torch.func.functional_call(model, weights, x[None])).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i in range(3):
        model.zero_grad()
        attention(model(x[i : i + 1])).square().sum().backward()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(found[name][i], weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["attention", "gelu", "kd_loss"])
def test_fx_keeps_an_op_as_a_call(op):
    function, given = {
        "attention": (lambda x: attention(x * 2, scale=0.3), (packed(1, 5, 3, 1, 16),)),
        "gelu": (lambda x: gelu(x * 2), (packed(4, 5),)),
        "kd_loss": (lambda s, t: kd_loss(s, t * 2, kind="js", temperature=2.0), logits()),
    }[op]
    traced = torch.fx.symbolic_trace(function)
    assert torch.equal(traced(*given), function(*given))
    assert any(getattr(node.target, "__name__", "") == op for node in traced.graph.nodes)


@pytest.mark.parametrize(("function", "name"), [(attention, "scale"), (kd_loss, "temperature")])
def test_a_scalar_that_waits_for_a_gradient_is_refused(function, name):
    given = logits() if function is kd_loss else (packed(1, 5, 3, 1, 16),)
    with pytest.raises(TypeError, match=f"{name} is a tensor that requires a gradient"):
        function(*given, **{name: torch.tensor(2.0, requires_grad=True)})
    function(*given, **{name: torch.tensor(2.0)})
