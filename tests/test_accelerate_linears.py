"""accelerate on a CPU whose linear layers gain by `vitkd_fast.ops.linear`, and on one where they do not."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

from vitkd_fast.accelerate import AccelerateReport, accelerate, decelerate
from vitkd_fast.doctor import doctor

accelerating = importlib.import_module("vitkd_fast.accelerate")  # as attributes these are functions
doctoring = importlib.import_module("vitkd_fast.doctor")
ops_linear = importlib.import_module("vitkd_fast.ops.linear")


@pytest.fixture
def gains(monkeypatch):
    for module in (accelerating, doctoring, ops_linear):
        monkeypatch.setattr(module, "faster_by_convolution", lambda: True)
    monkeypatch.setattr(ops_linear, "LEAST_WORK", 0)
    monkeypatch.setattr(ops_linear, "LEAST_ROWS", 0)


class Own(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4, bias=False), Own(4, 4))


def test_switches_torchs_layers_alone(gains, convolved):
    net = model()
    x = torch.randn(5, 8)
    before, names = net(x), list(net.state_dict())
    report = accelerate(net)
    assert report == AccelerateReport(0, {}, activations=1, linears=2)
    assert str(report).endswith(", and 1 GELUs and 2 linear layers")
    assert accelerate(net) == report
    assert [isinstance(each, nn.Linear) for each in net] == [True, False, True, True]
    assert list(net.state_dict()) == names
    torch.testing.assert_close(net(x), before)
    assert len(convolved) == 2
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x), before)
    assert len(convolved) == 6
    decelerate(net)
    assert [type(each) for each in net] == [nn.Linear, nn.GELU, nn.Linear, Own]
    torch.testing.assert_close(net(x), before)
    assert len(convolved) == 6


def test_a_replaced_forward_is_kept(gains):
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x
    assert accelerate(layer).linears == 0
    assert layer(1) == 1


def test_elsewhere_nothing_is_switched(monkeypatch):
    monkeypatch.setattr(accelerating, "faster_by_convolution", lambda: False)
    net = model()
    assert accelerate(net).linears == 0
    assert type(net[0]) is nn.Linear


def test_a_layer_parametrized_since_is_torchs_again(gains, convolved):
    net = model()
    accelerate(net)
    for layer in (net[0], net[2]):
        nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(5, 8)
    before = net(x)
    assert len(convolved) == 2
    decelerate(net)
    torch.testing.assert_close(net(x), before)
    assert len(convolved) == 2
    for layer in (net[0], net[2]):
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is nn.Linear
    torch.testing.assert_close(net(x), before)


def test_vectorised_jacobians(gains):
    """By autograd's own vmap, of which torch.func knows nothing."""
    net, x, seed = nn.Linear(8, 16), torch.randn(5, 8, requires_grad=True), torch.randn(3, 5, 16)
    (expected,) = torch.autograd.grad(net(x), x, seed, is_grads_batched=True)
    accelerate(net)
    (found,) = torch.autograd.grad(net(x), x, seed, is_grads_batched=True)
    torch.testing.assert_close(found, expected)


def test_the_doctor_knows(gains):
    assert doctor().ops["linear"]["cpu"].startswith("oneDNN")


def test_weights_of_other_kinds_are_asked_by_torchs_name():
    class Ones(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is nn.functional.linear:
                with torch._C.DisableTorchFunctionSubclass():
                    return function(args[0], torch.ones_like(args[1].as_subclass(torch.Tensor)), *args[2:])
            return super().__torch_function__(function, types, args, kwargs or {})

    layer = nn.Linear(256, 256)
    accelerate(layer)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Ones))
    images = torch.randn(512, 256)
    torch.testing.assert_close(layer(images), images.sum(1, keepdim=True) + layer.bias)
