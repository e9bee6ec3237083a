"""The whole loop on one device, without having it: every tensor of a run is fake and lies on "meta", or it is an error.

FakeTensorMode compares the devices of all that an op takes, as a GPU does, and refuses to hand a value to the host;
copies from the host, for which a GPU is waited for, are counted here. Meta stands for the GPU because torch
differentiates there without one.
"""

import contextlib
import importlib

import pytest
import torch
import torch._functorch.config
from test_methods import QUICK, ROUND, vits
from tiny import tiny_student, tiny_teacher
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitkd_fast.distill import distill
from vitkd_fast.generator import GENERATORS
from vitkd_fast.guard import Ledger
from vitkd_fast.methods import METHODS

DEVICE = torch.device("meta")


@pytest.fixture
def pretend(monkeypatch):
    """A context in which meta is a device like others: what it lacks of one, and modules lack of fake tensors."""

    def move(module, device):
        """nn.Module.to, which cannot put a fake weight in place of one that has a weak reference."""
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None and weight.device != device:
                    part._parameters[name] = nn.Parameter(weight.detach().to(device), weight.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer.to(device)
        return module

    @contextlib.contextmanager
    def context():
        tensor = torch.tensor
        with monkeypatch.context() as patch:
            patch.setattr(torch, "tensor", lambda data, device=None, **options: tensor(data, **options).to(device))
            patch.setattr(nn.Module, "to", move)
            patch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
            patch.setattr(torch, "is_autocast_enabled", lambda *args: False)
            optimizer = importlib.import_module("torch.optim.optimizer")
            patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [DEVICE.type])
            patch.setattr(Ledger, "read", lambda self: (dict.fromkeys(self.names, 0.0), {}, 0))
            with torch._functorch.config.patch(fake_tensor_allow_meta=True), FakeTensorMode():
                yield

    return context


def away(module: nn.Module) -> nn.Module:
    """With fake weights on the device instead of what it held."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(torch.empty(weight.shape, device=DEVICE))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
    return module


def tiny() -> tuple[nn.Module, nn.Module]:
    return tiny_teacher(), tiny_student()


class Copies(TorchDispatchMode):
    """Counts tensors that come from the host while `on`."""

    def __init__(self):
        super().__init__()
        self.on, self.found = False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.on and func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            if source.device != result.device:
                self.found.append(f"{func} of {tuple(source.shape)}")
        return result


def assert_stays(pretend, networks, **options):
    with pretend(), Copies() as copies:
        teacher, student = (away(network) for network in networks)

        def from_the_first_step_on(module, _):
            copies.on |= module.training

        student.head.register_forward_pre_hook(from_the_first_step_on)
        result = distill(teacher, student, steps=9, **ROUND, **QUICK, **options)
        held = [*result.student.state_dict().values(), *result.generator.state_dict().values()]
    assert result.report.status == "completed"
    assert copies.on and copies.found == []
    assert {tensor.device for tensor in held} == {DEVICE}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("networks", [vits, tiny], ids=["vits", "batchnorm"])
def test_every_method_stays_on_the_device(pretend, networks, method):
    assert_stays(pretend, networks(), method=method)


@pytest.mark.parametrize("generators", [1, 3])
@pytest.mark.parametrize("generator", sorted(GENERATORS))
def test_every_generator_stays_on_the_device(pretend, generator, generators):
    if generator in ("noise", "procedural", "scenes"):
        learns, generators = {"disagreement": 0.0}, 1
    else:
        learns = {"disagreement": 1.0}
    options = {"generator": generator, "generators": generators, "generator_objectives": learns}
    assert_stays(pretend, tiny(), method="dfad", conditional=True, replay=0.5, **options)


def test_what_is_left_behind_is_found(pretend):
    with pretend(), pytest.raises(RuntimeError, match=r"different devices|same device"):
        nn.BatchNorm2d(2)(torch.ones(2, 2, 1, 1, device=DEVICE))


def test_what_the_host_reads_is_found(pretend):
    with pretend(), pytest.raises(Exception, match="_local_scalar_dense"):
        torch.ones((), device=DEVICE).item()
