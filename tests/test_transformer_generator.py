"""The transformer generator: any image, patches that fit it, tokens that attend to each other, no seams."""

import pytest
import torch

from vitkd_fast import ops, transformer_generator
from vitkd_fast.generator import GENERATORS, GeneratorSettings, ImageSpec
from vitkd_fast.methods import settings_of
from vitkd_fast.transformer_generator import Attention, Transformer, patch_size

GREY = ImageSpec(8, 8, (0.5,), (0.25,))


pytestmark = pytest.mark.usefixtures("seeded")


def test_it_is_the_generator_of_vitkd():
    assert GENERATORS[settings_of("vitkd")["generator"]] is Transformer


@pytest.mark.parametrize("height, width", [(1, 1), (7, 5), (8, 8), (28, 28), (32, 48), (65, 33), (224, 224)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_makes_images_of_the_teachers_shape(height, width, channels):
    spec = ImageSpec(height, width, (0.4,) * channels, (0.2,) * channels)
    generator = Transformer(spec, GeneratorSettings(latent=4, width=8))
    pixels = generator.pixels(generator.sample(2))
    assert pixels.shape == (2, channels, height, width)
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6


@pytest.mark.parametrize(
    "width, dim, heads", [(1, 1, 1), (16, 16, 1), (48, 48, 1), (64, 64, 2), (100, 99, 3), (128, 128, 4)]
)
def test_takes_any_width(width, dim, heads):
    generator = Transformer(GREY, GeneratorSettings(latent=4, width=width))
    assert generator.blocks[0].attention.heads == heads
    assert generator.blocks[0].attention.qkv.in_features == dim
    assert generator.sample(3).isfinite().all()


def test_patches_grow_with_the_image():
    assert [patch_size(side) for side in (1, 8, 28, 32, 64, 224, 384)] == [2, 2, 4, 4, 8, 16, 16]


def test_attention_is_softmax_of_queries_and_keys_on_values():
    attention = Attention(12, 3)
    x = torch.randn(2, 5, 12)
    query, key, value = attention.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (query @ key.mT / 2).softmax(-1)
    expected = attention.proj((weights @ value).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(attention(x), expected)


def test_attention_is_ours(monkeypatch):
    calls, attention = [], ops.attention
    monkeypatch.setattr(ops, "attention", lambda qkv: calls.append(qkv.shape) or attention(qkv))
    Transformer(GREY, GeneratorSettings(latent=4, width=64)).sample(2)
    assert calls == [(2, 16, 3, 2, 32)] * transformer_generator.DEPTH


def test_every_patch_depends_on_every_token_and_blends_with_its_neighbours():
    generator = Transformer(ImageSpec(32, 32, (0.5,), (0.5,)), GeneratorSettings(latent=4, width=32)).eval()
    tokens = torch.randn(2, 64, 32, requires_grad=True)
    x = generator.blocks(tokens)
    (gradient,) = torch.autograd.grad(x[0, 0].square().sum(), tokens)
    assert (gradient[0].abs().sum(1) > 0).all() and gradient[1].abs().max() == 0
    patches = torch.randn(2, 16, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(generator.to_pixels[2](patches)[0, 0, 3, 3], patches)
    assert gradient[0, :, 4, 4].abs().max() > 0  # of the patch that begins at row 4, column 4


def test_images_differ_and_every_weight_learns():
    generator = Transformer(GREY, GeneratorSettings(latent=8, width=32))
    images = generator.sample(16)
    assert (images[0] - images[1]).abs().mean() > 0.1
    (images - 0.3).square().mean().backward()
    for name, weight in generator.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        if name != "seed.0.bias":  # part of it is the batch's mean, which BatchNorm takes out
            assert weight.grad.abs().max() > 0, name


def test_labels_matter_and_restart_forgets():
    generator = Transformer(GREY, GeneratorSettings(latent=8, width=16, classes=3))
    noise, labels = generator.draw(6)
    assert labels.shape == (6,) and labels.max() < 3
    images = generator(noise, labels)
    assert not torch.allclose(images, generator(noise, (labels + 1) % 3))
    before = {name: weight.clone() for name, weight in generator.named_parameters()}
    generator.restart()
    changed = {name for name, weight in generator.named_parameters() if not torch.equal(weight, before[name])}
    assert {name for name in before if name.endswith("weight") and before[name].dim() > 1} <= changed


def test_eval_mode_makes_the_same_images():
    generator = Transformer(GREY, GeneratorSettings(latent=8, width=16))
    noise = torch.randn(8, 8)
    assert torch.equal(generator(noise), generator.eval()(noise))
