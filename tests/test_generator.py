"""Generator: any image size and channel count, in the teacher's normalisation, with gradients to its weights."""

import pytest
import torch

from vitkd_fast.generator import Generator, ImageSpec

RGB = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


@pytest.mark.parametrize("height, width", [(1, 1), (4, 4), (7, 5), (8, 8), (28, 28), (32, 48), (65, 33), (224, 224)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_makes_images_of_the_teachers_shape(height, width, channels):
    generator = Generator(ImageSpec(height, width, (0.5,) * channels, (0.5,) * channels), latent=4, width=8)
    assert generator.sample(2).shape == (2, channels, height, width)


def test_grids_double_up_to_the_image():
    sizes = [Generator(ImageSpec(side, side, (0.5,), (0.5,)), latent=2, width=2).sizes for side in (8, 224)]
    assert sizes[0] == [(4, 4), (8, 8)]
    assert sizes[1] == [(7, 7), (14, 14), (28, 28), (56, 56), (112, 112), (224, 224)]


def test_images_are_normalised_pixels():
    generator = Generator(ImageSpec(8, 8, **RGB), latent=4, width=8)
    images = generator.sample(64)
    pixels = generator.pixels(images)
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    torch.testing.assert_close(generator.normalise(pixels), images)
    torch.testing.assert_close(images[:, 1], (pixels[:, 1] - 0.4) / 0.3)


def test_images_differ_and_every_weight_learns():
    generator = Generator(ImageSpec(16, 16, **RGB), latent=4, width=8)
    images = generator.sample(8)
    assert (images[0] - images[1]).abs().max() > 0.01
    images.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in generator.parameters())
    assert sum(weight.grad.abs().max() > 0 for weight in generator.parameters()) >= 0.8 * len([*generator.parameters()])


def test_eval_mode_makes_the_same_images():
    generator = Generator(ImageSpec(8, 8, **RGB), latent=4, width=8)
    noise = torch.randn(8, 4)
    assert torch.equal(generator(noise), generator.eval()(noise))
