"""Muon: directions have equal singular values, steps are torch's where torch has them, and a bad step is none."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitkd_fast import muon
from vitkd_fast.guard import PEAK, GuardedOptimizer
from vitkd_fast.muon import ROOT_MEAN_SQUARE, Muon, hidden_matrices, orthogonalised

GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


@pytest.mark.parametrize("shape", [(7, 7), (40, 160), (160, 40), (5, 30, 12), (2, 3, 16, 16), (1, 9)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_singular_values_become_alike_and_vectors_stay(shape, size):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.05, 1, min(shape[-2:]))
    inside = left.mT @ orthogonalised(size * left @ torch.diag(values) @ right) @ right.mT
    found = inside.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < found.min() and found.max() < 1.3
    assert (inside - torch.diag_embed(found)).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(64, 64), (3, 192, 96), (2, 3, 96, 96), (63, 200)])
def test_bfloat16_where_a_cpu_gains_by_it(shape, monkeypatch):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    monkeypatch.setattr(muon, "has_bfloat16_products", lambda: False)
    exact = orthogonalised(matrices)
    monkeypatch.setattr(muon, "has_bfloat16_products", lambda: True)
    found = orthogonalised(matrices)
    assert found.dtype is torch.float32
    assert torch.equal(found, exact) is (min(shape[-2:]) < 64)
    assert (found - exact).norm() < 0.02 * exact.norm()


def test_nothing_stays_nothing():
    assert torch.equal(orthogonalised(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_steps_are_those_of_torchs_muon():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(24, 48)), nn.Parameter(torch.randn(24, 48)), nn.Parameter(torch.randn(40, 16))]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    start = [weight.detach().clone() for weight in ours]
    optimizer = Muon(ours)
    reference = torch.optim.Muon(
        theirs, lr=0.01 * ROOT_MEAN_SQUARE / 0.2, weight_decay=0, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(10):
        for left, right in zip(ours, theirs, strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        optimizer.step(0.01, GOOD)
        reference.step()
    for before, left, right in zip(start, ours, theirs, strict=True):
        assert (left - right).norm() < 0.02 * (before - right).norm()  # theirs is computed in bfloat16


def test_queries_keys_and_values_in_one_matrix_are_three():
    torch.manual_seed(0)
    packed = nn.Parameter(torch.zeros(36, 12))
    packed.grad = torch.cat([torch.randn(12, 12) * size for size in (1.0, 100.0, 1e-3)])
    Muon([packed]).step(1.0, GOOD)
    for part, gradient in zip(packed.detach().chunk(3), packed.grad.chunk(3), strict=True):
        torch.testing.assert_close(part, -ROOT_MEAN_SQUARE * math.sqrt(12) * orthogonalised(gradient))


def test_weights_decay_by_the_rate():
    weight = nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.zeros(4, 6)
    Muon([weight], weight_decay=0.5).step(0.1, GOOD)
    torch.testing.assert_close(weight.detach(), torch.full((4, 6), 0.95))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
def test_a_bad_step_changes_nothing(value):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 6))
    optimizer = Muon([weight], weight_decay=0.5)
    weight.grad = torch.randn(4, 6)
    optimizer.step(0.1, GOOD)
    before, momentum = weight.detach().clone(), optimizer.momenta[0].clone()
    weight.grad = torch.full((4, 6), value)
    optimizer.step(0.1, BAD)
    assert torch.equal(weight, before) and torch.equal(optimizer.momenta[0], momentum)


def test_matrices_between_images_and_logits():
    vit = VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=2, num_heads=2)
    names = {weight: name for name, weight in vit.named_parameters()}
    found = [names[weight] for weight in hidden_matrices(vit, channels=1, outputs=(10,))]
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert found == [f"blocks.{block}.{layer}.weight" for block in range(2) for layer in layers]
    vit.blocks[0].requires_grad_(False)
    assert len(hidden_matrices(vit, channels=1, outputs=(10,))) == 4


def test_convolutions_but_the_first_and_grouped_ones():
    shared = nn.Conv2d(8, 8, 3)
    cnn = nn.Sequential(
        nn.Conv2d(3, 8, 3), shared, nn.Conv2d(8, 8, 3, groups=8), shared, nn.Flatten(), nn.Linear(8 * 16, 10)
    )
    assert hidden_matrices(cnn, channels=3, outputs=(10,)) == [shared.weight]
    cnn(torch.randn(2, 3, 12, 12)).square().mean().backward()
    before = shared.weight.detach().clone()
    Muon([shared.weight]).step(0.01, GOOD)
    moved = (shared.weight - before).detach().flatten(1)
    assert torch.linalg.svdvals(moved).amax() < 1.3 * 0.01 * ROOT_MEAN_SQUARE * math.sqrt(72)
    assert moved.norm() > 0


def test_in_the_guard_it_takes_its_matrices_from_adamw():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3))
    start = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    matrices = hidden_matrices(net, channels=1, outputs=(3,))
    optimizer = GuardedOptimizer("student", net, 1e-2, ["loss"], clip=1.0, matrices=matrices)
    assert sum(len(group["params"]) for group in optimizer.optimizer.param_groups) == 4
    images = torch.randn(16, 4)
    for _ in range(2):
        loss = net(images).square().mean()
        optimizer.step(loss, {"loss": loss}, PEAK)
        alone = torch.autograd.grad(net(images).square().mean(), net[2].weight)[0]
    assert all(not torch.equal(weight, start[name]) for name, weight in net.named_parameters())
    loss = net(images).square().mean()
    optimizer.step(loss, {"loss": loss}, PEAK)
    torch.testing.assert_close(net[2].weight.grad, alone)  # of this step, not added to those before
    moved = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    loss = net(images).square().mean() * math.nan
    optimizer.step(loss, {"loss": loss}, PEAK)
    assert all(torch.equal(weight, moved[name]) for name, weight in net.named_parameters())


def test_it_may_have_all_the_weights():
    net = nn.Linear(6, 4, bias=False)
    optimizer = GuardedOptimizer("student", net, 1e-2, ["loss"], matrices=hidden_matrices(net, 1, (10,)))
    before = net.weight.detach().clone()
    loss = net(torch.randn(3, 6)).square().mean()
    optimizer.step(loss, {"loss": loss}, PEAK)
    assert not torch.equal(net.weight, before)


def test_a_weight_without_a_gradient_does_not_decay():
    weights = [nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    weights[0].grad = torch.randn(6, 4)
    before = [weight.detach().clone() for weight in weights]
    Muon(weights, weight_decay=0.5).step(0.01, GOOD)
    assert torch.equal(weights[1], before[1]) and not torch.equal(weights[0], before[0])
    weights[0].grad = None
    before = weights[0].detach().clone()
    Muon(weights, weight_decay=0.5).step(0.01, GOOD)
    assert torch.equal(weights[0], before)


def test_a_convolution_that_answers_is_not_muons():
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 10, 1))
    assert hidden_matrices(cnn, channels=3, outputs=(10,)) == [cnn[1].weight]


def test_weights_that_are_computed_from_others_are_not_muons():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), layer)
    assert [id(weight) for weight in hidden_matrices(model, 3, (4,))] == [id(model[0].weight)]
