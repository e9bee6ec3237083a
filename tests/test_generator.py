"""Generator: any image size and channel count, in the teacher's normalisation, with gradients to its weights."""

import pytest
import torch
from tiny import same, state, tiny_student, tiny_teacher
from torch import nn

from vitkd_fast.distill import distill
from vitkd_fast.generator import (
    GENERATORS,
    Convolutional,
    Generator,
    GeneratorSettings,
    ImageSpec,
    Noise,
    register,
)

RGB = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
SMALL = GeneratorSettings(latent=4, width=8)


@pytest.mark.parametrize("height, width", [(1, 1), (4, 4), (7, 5), (8, 8), (28, 28), (32, 48), (65, 33), (224, 224)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_makes_images_of_the_teachers_shape(height, width, channels):
    generator = Convolutional(ImageSpec(height, width, (0.5,) * channels, (0.5,) * channels), SMALL)
    assert generator.sample(2).shape == (2, channels, height, width)


def test_grids_double_up_to_the_image():
    sizes = [Convolutional(ImageSpec(side, side, (0.5,), (0.5,)), SMALL).sizes for side in (8, 224)]
    assert sizes[0] == [(4, 4), (8, 8)]
    assert sizes[1] == [(7, 7), (14, 14), (28, 28), (56, 56), (112, 112), (224, 224)]


def test_images_are_normalised_pixels():
    generator = Convolutional(ImageSpec(8, 8, **RGB), SMALL)
    images = generator.sample(64)
    pixels = generator.pixels(images)
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    torch.testing.assert_close(generator.normalise(pixels), images)
    torch.testing.assert_close(images[:, 1], (pixels[:, 1] - 0.4) / 0.3)


def test_images_differ_and_every_weight_learns():
    generator = Convolutional(ImageSpec(16, 16, **RGB), SMALL)
    images = generator.sample(8)
    assert (images[0] - images[1]).abs().max() > 0.01
    images.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in generator.parameters())
    assert sum(weight.grad.abs().max() > 0 for weight in generator.parameters()) >= 0.8 * len([*generator.parameters()])


def test_eval_mode_makes_the_same_images():
    generator = Convolutional(ImageSpec(8, 8, **RGB), SMALL)
    noise = torch.randn(8, 4)
    assert torch.equal(generator(noise), generator.eval()(noise))


def test_a_label_changes_the_image():
    settings = GeneratorSettings(latent=4, width=8, classes=3)
    generator = Convolutional(ImageSpec(8, 8, **RGB), settings)
    noise = torch.randn(6, 4)
    first, second = (generator(noise, torch.full((6,), label)) for label in (0, 1))
    assert (first - second).abs().max() > 0.01
    drawn, labels = generator.draw(300)
    assert drawn.shape == (300, 4) and set(labels.tolist()) == {0, 1, 2}
    assert Convolutional(ImageSpec(8, 8, **RGB), SMALL).draw(5)[1] is None


def test_restart_begins_with_other_weights():
    generator = Convolutional(ImageSpec(8, 8, **RGB), SMALL)
    before = state(generator)
    generator.restart()
    after = state(generator)
    assert not torch.equal(before["seed.0.weight"], after["seed.0.weight"])
    assert not torch.equal(before["to_pixels.weight"], after["to_pixels.weight"])
    generator.restart_noise()
    assert same(state(generator), after)


def test_noise_is_gaussian_and_has_nothing_to_learn():
    images = Noise(ImageSpec(8, 6, **RGB), SMALL).sample(500)
    assert images.shape == (500, 3, 8, 6)
    assert images.mean().abs() < 0.02 and abs(images.std() - 1) < 0.02
    assert not list(Noise(ImageSpec(8, 6, **RGB), SMALL).parameters())


def test_a_generator_of_your_own_is_one_registered_class():
    known = dict(GENERATORS)

    @register("grey")
    class Grey(Generator):
        """One brightness per image."""

        def __init__(self, spec, settings):
            super().__init__(spec, settings)
            self.size = spec.channels, spec.height, spec.width
            self.level = nn.Linear(settings.latent, 1)

        def forward(self, noise, labels=None):
            return self.normalise(self.level(noise).sigmoid().view(-1, 1, 1, 1).expand(-1, *self.size))

    try:
        with pytest.raises(ValueError, match="there is a generator 'grey' already"):
            register("grey")(Grey)
        options = {"method": "dfad", "batch_size": 8, "latent": 4, "progress": False, "generator_lr": 0.1}
        result = distill(tiny_teacher(), tiny_student(), generator="grey", steps=20, **options)
    finally:
        GENERATORS.clear()
        GENERATORS.update(known)
    assert isinstance(result.generator, Grey)
    pixels = result.generator.pixels(result.generator.sample(4))
    assert pixels.flatten(1).std(1).max() < 1e-6 and 0 <= pixels.min() and pixels.max() <= 1
