"""Guard: a bad step changes nothing at all, a good one is AdamW's; sums and counts are right when the host reads."""

import math

import pytest
import torch
from tiny import TinyNet, same, state
from torch import nn

from vitkd_fast.guard import PEAK, GuardedOptimizer, Ledger, one_cycle


def one_step(model, optimizer, images, factor=1.0, progress=0.3):
    loss = model(images).square().mean() * factor
    optimizer.step(loss, {"loss": loss}, progress)


def moments(optimizer):
    return {
        f"{index} {name}": value.clone()
        for index, entry in enumerate(optimizer.optimizer.state.values())
        for name, value in entry.items()
    }


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e38])  # 1e38: a finite loss whose gradient's norm is not
def test_a_bad_step_changes_neither_weights_nor_buffers_nor_moments(factor):
    torch.manual_seed(0)
    model, images = TinyNet(8).train(), torch.randn(16, 1, 8, 8)
    optimizer = GuardedOptimizer("student", model, 1e-2, ["loss"], clip=1.0)
    one_step(model, optimizer, images)
    before, moments_before = state(model), moments(optimizer)
    one_step(model, optimizer, images + 1, factor)
    assert same(state(model), before)
    assert same(moments(optimizer), moments_before)
    one_step(model, optimizer, images)
    after = state(model)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not torch.equal(after["head.weight"], before["head.weight"])
    _, bad, steps = optimizer.ledger.read()
    assert bad["student_gradient"] == steps == 1


def test_a_bad_step_leaves_what_was_loaded():
    torch.manual_seed(0)
    model, other = TinyNet(8).train(), TinyNet(8).train()
    optimizer, loaded = (GuardedOptimizer("student", one, 1e-2, ["loss"]) for one in (model, other))
    one_step(model, optimizer, torch.randn(4, 1, 8, 8))
    loaded.load_state_dict(optimizer.state_dict())
    one_step(other, loaded, torch.full((4, 1, 8, 8), math.nan))
    assert same(state(other), state(model))


def test_nan_images_do_not_pollute_batchnorm():
    torch.manual_seed(0)
    model = TinyNet(8).train()
    optimizer = GuardedOptimizer("student", model, 1e-2, ["loss"])
    before = state(model)
    one_step(model, optimizer, torch.full((4, 1, 8, 8), math.nan))
    assert same(state(model), before)


def test_a_good_step_is_torchs_adamw_with_clipping():
    torch.manual_seed(0)
    ours, theirs = TinyNet(8).eval(), TinyNet(8).eval()
    theirs.load_state_dict(ours.state_dict())
    optimizer = GuardedOptimizer("student", ours, 1e-2, ["loss"], weight_decay=0.1, clip=0.01)
    reference = torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(5):
        images = torch.randn(16, 1, 8, 8)
        one_step(ours, optimizer, images)  # at 0.3 of the run the one-cycle rate is at its peak
        reference.zero_grad()
        theirs(images).square().mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
        reference.step()
    for (name, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_frozen_weights_are_left_alone():
    model = TinyNet(8)
    model.stem.requires_grad_(False)
    before = state(model)
    optimizer = GuardedOptimizer("student", model, 1e-2, ["loss"], weight_decay=0.1)
    one_step(model, optimizer, torch.randn(4, 1, 8, 8))
    assert torch.equal(model.stem.weight, before["stem.weight"])
    with pytest.raises(ValueError, match="no weight with requires_grad=True"):
        GuardedOptimizer("student", model.requires_grad_(False), 1e-2, [])


def test_ledger_means_are_of_the_finite_values_since_the_last_read():
    ledger = Ledger(["a", "b"], torch.device("cpu"))
    values = [(1.0, 2.0), (3.0, math.nan), (math.inf, 4.0)]
    flags = [ledger.add({"a": torch.tensor(a), "b": torch.tensor(b)}).item() for a, b in values]
    assert flags == [0, 1, 1]
    assert ledger.read() == ({"a": 2.0, "b": 3.0}, {"a": 1, "b": 1}, 2)
    ledger.add({"a": torch.tensor(5.0), "b": torch.tensor(math.nan)})
    means, bad, steps = ledger.read()
    assert means == {"a": 5.0} and bad == {"a": 1, "b": 2} and steps == 3


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing():
    rates = [one_cycle(step / 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.08) and max(rates) == rates[300] == pytest.approx(2.0) and rates[-1] < 1e-4
    assert rates[:301] == sorted(rates[:301]) and rates[300:] == sorted(rates[300:], reverse=True)


def test_weights_may_have_a_rate_of_their_own():
    torch.manual_seed(0)
    model = TinyNet(8)
    before = state(model)
    optimizer = GuardedOptimizer(
        "generator", model, 1e-2, ["loss"], own_lr={model.head.bias: 0.5, model.head.weight: 1e-9}
    )
    for progress in (0.1, PEAK):
        one_step(model, optimizer, torch.randn(16, 1, 8, 8), progress=progress)
        rates = [group["lr"] for group in optimizer.optimizer.param_groups]
        assert rates == pytest.approx([one_cycle(progress, peak) for peak in (1e-2, 0.5, 1e-9)])
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in model.named_parameters()}
    assert moved["head.bias"] > 0.5  # Adam's first steps are as long as the rate
    assert 1e-3 < moved["stem.weight"] < 0.03
    assert moved["head.weight"] < 1e-6


def test_a_module_may_have_no_weights_but_those_with_their_own_rate():
    model = nn.Linear(2, 1, bias=False)
    optimizer = GuardedOptimizer("generator", model, 1e-2, ["loss"], own_lr={model.weight: 0.1})
    assert [group["peak"] for group in optimizer.optimizer.param_groups] == [0.1]


def test_a_buffer_that_a_forward_replaces_is_put_back_too():
    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("average", torch.zeros(3))
            self.register_buffer("nothing", None)

        def forward(self, images):
            self.average = 0.9 * self.average + 0.1 * images.detach().mean(0)
            return images * self.weight

    model = Averaging()
    optimizer = GuardedOptimizer("student", model, 1e-2, ["loss"])
    one_step(model, optimizer, torch.ones(2, 3))
    one_step(model, optimizer, torch.full((2, 3), math.nan))
    torch.testing.assert_close(model.average, torch.full((3,), 0.1))
    one_step(model, optimizer, torch.ones(2, 3))
    torch.testing.assert_close(model.average, torch.full((3,), 0.19))


def test_a_save_from_before_steps_were_counted_is_taken():
    optimizer = GuardedOptimizer("student", TinyNet(8), 1e-2, ["loss"])
    one_step(TinyNet(8), optimizer, torch.zeros(4, 1, 8, 8), math.nan)
    saved = optimizer.state_dict()
    del saved["skipped"]
    optimizer.load_state_dict(saved)
    assert optimizer.ledger.read()[2] == 1


def test_buffers_that_cannot_be_put_back_are_left_alone():
    model = TinyNet(8)
    model.register_buffer("spread", torch.zeros(1, 4).expand(3, 4))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    optimizer = GuardedOptimizer("student", model, 1e-2, ["loss"])
    one_step(model, optimizer, torch.randn(4, 1, 8, 8))
    one_step(model, optimizer, torch.full((4, 1, 8, 8), math.nan))
    assert model.norm.running_mean.isfinite().all()
