"""What generators minimise, against formulas."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rounds import make, term
from test_methods import vits
from tiny import SIZE, tiny_student, tiny_teacher

from vitkd_fast import generator_objectives as _registers  # noqa: F401
from vitkd_fast import ops
from vitkd_fast.generator import ImageSpec
from vitkd_fast.models import frozen
from vitkd_fast.objectives import GENERATOR_OBJECTIVES

pytestmark = pytest.mark.usefixtures("seeded")


def test_feature_statistics_follow_their_formula():
    made = make(tiny_teacher(), tiny_student(), method="deepinversion")
    images = torch.randn(16, 1, SIZE, SIZE, requires_grad=True)
    norm, teacher = made.pair.teacher.norm, made.pair.teacher
    seen = teacher.stem(images.detach().double().float()).double().transpose(0, 1).flatten(1)  # (C, B·H·W)
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    expected = (seen.mean(1) - mean).square().sum().sqrt() + (
        seen.var(1, correction=0) - variance
    ).square().sum().sqrt()
    value = term("feature_statistics", made, images)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    assert images.grad.abs().sum() > 0
    assert not norm._forward_pre_hooks and norm.running_mean.grad is None


def test_feature_statistics_are_of_the_training_images_at_best():
    made = make(tiny_teacher(), tiny_student(), method="deepinversion")
    norm = made.pair.teacher.norm
    images = torch.randn(64, 1, SIZE, SIZE)
    seen = made.pair.teacher.stem(images)
    norm.running_mean.copy_(seen.mean((0, 2, 3)))
    norm.running_var.copy_(seen.var((0, 2, 3), correction=0))
    assert term("feature_statistics", made, images).item() < 1e-5
    assert term("feature_statistics", made, images * 1.5).item() > 0.1


def test_patch_entropy_is_of_the_attentions_output():
    teacher, student = vits()
    made = make(teacher, student, method="psaq", accelerate=False)
    images = torch.randn(4, 1, SIZE, SIZE)
    outputs = []
    for block in teacher.blocks:
        block.attn.fused_attn = False
        block.attn.norm.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))  # (B, N, H·D)
    teacher(images)
    assert len(outputs) == 2
    heads = [output.unflatten(2, (2, -1)).mean(2)[:, 1:] for output in outputs[:2]]
    expected = -torch.stack([ops.patch_similarity_entropy(tokens) for tokens in heads]).mean()
    made.pair.followed = (0, 1)  # the student has one block, which follows the last
    assert term("patch_entropy", made, images).item() == pytest.approx(expected.item(), abs=1e-5)


def test_asked_total_variation_and_boundary_follow_their_formulas():
    made = make(tiny_teacher(), tiny_student(), method="fast")
    pair, images, labels = made.pair, torch.randn(6, 1, SIZE, SIZE), torch.randint(4, (6,))
    logits = pair.teacher(images).double()
    expected = -logits.log_softmax(1)[torch.arange(6), labels].mean()
    assert term("asked", made, images, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    pixels = images * 0.25 + 0.5
    varied = (pixels[:, :, 1:] - pixels[:, :, :-1]).square().mean() + (
        pixels[..., 1:] - pixels[..., :-1]
    ).square().mean()
    assert term("total_variation", made, images).item() == pytest.approx(varied.item(), rel=1e-5)
    with frozen(pair.student):
        by_student = pair.student(images).double()
    alike = by_student.argmax(1) == logits.argmax(1)
    assert 0 < alike.sum() < 6
    log_p, log_q = (logits / 4).log_softmax(1), (by_student / 4).log_softmax(1)
    rows = 16 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    assert term("boundary", made, images).item() == pytest.approx(-(rows * alike).mean().item(), rel=1e-4)


def test_total_variation_weighs_channels_by_their_normalisation():
    spec = ImageSpec(5, 6, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    images = torch.randn(4, 3, 5, 6)
    pixels = spec.pixels(images)
    expected = pixels.diff(dim=-2).square().mean() + pixels.diff(dim=-1).square().mean()
    scene = SimpleNamespace(images=images, pair=SimpleNamespace(spec=spec))
    torch.testing.assert_close(GENERATOR_OBJECTIVES["total_variation"].function(scene), expected)
