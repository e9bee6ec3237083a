"""NAYER's generator: images differ by class vector and noisy layer alone, and only the noisy layer begins anew."""

from itertools import pairwise

import pytest
import torch
from test_synthesis import make
from tiny import tiny_student, tiny_teacher

from vitkd_fast.generator import GeneratorSettings, ImageSpec
from vitkd_fast.noisy_generator import Noisy, NoisyLayers

GREY = ImageSpec(8, 8, (0.5,), (0.25,))
TEN = GeneratorSettings(latent=8, width=16, classes=10, batch_size=24)


pytestmark = pytest.mark.usefixtures("seeded")


def test_layers_are_linear_and_each_has_its_own_rows():
    layers = NoisyLayers(3, 5, 4)
    torch.nn.init.normal_(layers.bias)
    x = torch.randn(3, 2, 5)
    expected = torch.stack([x[i] @ layers.weight[i] / 5**0.5 + layers.bias[i] for i in range(3)])
    torch.testing.assert_close(layers(x), expected)


def test_noise_of_unit_variance_from_normalised_vectors():
    generator = Noisy(GREY, GeneratorSettings(latent=256, width=8, classes=10, batch_size=200))
    rows = generator._varied(generator.vectors[generator.draw(200)[1]])
    assert rows.std().item() == pytest.approx(1, abs=0.05) and rows.mean().abs() < 0.05
    assert generator.noisy.weight.std().item() == pytest.approx(1, abs=0.01)


def test_one_layer_serves_one_image_of_each_class():
    generator = Noisy(GREY, TEN)
    assert len(generator.noisy.weight) == 3
    _, labels = generator.draw(24)
    for share in labels.split(10):
        assert len(share.unique()) == len(share)
    rows = generator._varied(generator.vectors[labels])
    first, again = ((labels == 4).nonzero().flatten()[i] for i in (0, 1))
    assert not torch.allclose(rows[first], rows[again])  # one class, two layers
    expected = generator.vectors[labels[13]] @ generator.noisy.weight[1] / 8**0.5
    torch.testing.assert_close(rows[13], expected)


def test_more_classes_than_images_and_more_images_than_layers():
    generator = Noisy(GREY, GeneratorSettings(latent=8, width=16, classes=1000, batch_size=24))
    assert len(generator.noisy.weight) == 1
    assert len(generator.draw(24)[1].unique()) == 24
    assert generator.sample(24).shape == (24, 1, 8, 8)
    generator = Noisy(GREY, TEN)
    assert generator.sample(64).shape == (64, 1, 8, 8)
    assert generator.sample(1).shape == (1, 1, 8, 8)


def test_the_noise_given_is_not_looked_at():
    generator = Noisy(GREY, TEN)
    noise, labels = generator.draw(24)
    assert torch.equal(generator(noise, labels), generator(torch.zeros_like(noise), labels))


def test_the_noisy_layer_is_new_in_each_round_while_the_rest_persists():
    made = make(tiny_teacher(), tiny_student(), method="nayer", generator_steps=1, generator_lr=1e-9, latent=64)
    generator = made.generator
    rest = {name: tensor.clone() for name, tensor in generator.state_dict().items() if not name.startswith("noisy")}
    noisy = [generator.noisy.weight.detach().clone()]
    for _ in range(2):
        made.round(0.0)
        noisy.append(generator.noisy.weight.detach().clone())
    for before, after in pairwise(noisy):
        correlation = torch.corrcoef(torch.stack((before.flatten(), after.flatten())))[0, 1]
        assert correlation.abs() < 0.05  # of 8,192 weights
    for name, tensor in generator.state_dict().items():
        if name in rest:
            torch.testing.assert_close(tensor, rest[name], rtol=0, atol=1e-6)


def test_body_and_noisy_layer_both_learn_within_a_round():
    made = make(tiny_teacher(), tiny_student(), method="nayer", generator_steps=3)
    body = made.generator.body.seed[0].weight
    before = body.detach().clone()
    made.round(0.0)
    assert (body - before).abs().max() > 1e-3
    assert made.learner.optimizer.state[made.generator.noisy.weight]["step"].item() == 3


def test_class_vectors_of_ones_own():
    class Named(Noisy):
        def class_vectors(self, classes):
            return torch.eye(classes, 12) * 7

    generator = Named(GREY, TEN)
    assert generator.noisy.weight.shape == (3, 12, 8)
    torch.testing.assert_close(generator.vectors.mean(1), torch.zeros(10), rtol=0, atol=1e-6)
    assert generator.sample(24).isfinite().all()

    class Wrong(Noisy):
        def class_vectors(self, classes):
            return torch.zeros(3, 12)

    with pytest.raises(ValueError, match=r"class_vectors gives \(3, 12\); accepted: \(10, D\)"):
        Wrong(GREY, TEN)


def test_it_must_be_asked_for_classes():
    with pytest.raises(ValueError, match="set conditional=True"):
        Noisy(GREY, GeneratorSettings(latent=8, width=16))
