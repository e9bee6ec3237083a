"""Drawn scenes: what they are by shape and range, and that things are at all places and of all sizes."""

import pytest
import torch

from vitkd_fast.detection.scene_generator import DETAIL, placed, scenes, things
from vitkd_fast.generator import GENERATORS, GeneratorSettings, ImageSpec

CPU = torch.device("cpu")


def drawn(count=64, channels=3, height=32, width=32, seed=0):
    torch.manual_seed(seed)
    return scenes(count, channels, height, width, CPU)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (24, 80), (90, 20), (7, 9)])
def test_scenes_are_images_of_the_asked_size(channels, size):
    images = drawn(200, channels, *size)
    assert images.shape == (200, channels, *size) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert (images.flatten(1).std(1) > 0.001).float().mean() > 0.9


def test_the_same_seed_draws_the_same_and_another_does_not():
    assert torch.equal(drawn(8, seed=3), drawn(8, seed=3))
    assert not torch.equal(drawn(8, seed=3), drawn(8, seed=4))


def test_scenes_of_three_channels_have_colour_and_no_two_are_alike():
    images = drawn()
    assert (images.amax(1) - images.amin(1)).amax((1, 2)).gt(0.1).float().mean() > 0.5
    flat = images.flatten(1)
    apart = torch.cdist(flat, flat) + torch.eye(len(flat)) * 100
    assert apart.min() > 0.5


def test_grounds_are_bright_and_dark():
    means = drawn(256).mean((1, 2, 3))
    assert means.min() < 0.25 and means.max() > 0.75


@pytest.mark.parametrize("size", [(48, 48), (32, 96)])
def test_a_thing_is_put_at_any_place_and_in_many_sizes(size):
    torch.manual_seed(0)
    height, width = size
    cover = placed(torch.ones(500, 1, DETAIL, DETAIL), height, width)[:, 0]
    assert cover.shape == (500, *size) and cover.min() >= 0 and cover.max() <= 1
    there = cover > 0.5
    columns, rows = there.any(1), there.any(2)
    wide, high = columns.sum(1) / min(size), rows.sum(1) / min(size)
    assert (columns.sum(1) * rows.sum(1) - there.sum((1, 2))).amax() <= 4  # rectangles but for their corners
    assert wide.min() < 0.15 and 0.7 < wide.max() <= 1.02 and high.min() < 0.15 and 0.7 < high.max() <= 1.02
    assert (wide / high).min() < 0.6 and (wide / high).max() > 1.6
    places = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    for lines, place in zip((rows.float(), columns.float()), places):
        middle = lines @ place / lines.sum(1)
        assert middle.min() < 0.15 and middle.max() > 0.85 and middle.mean().item() == pytest.approx(0.5, abs=0.05)


def test_things_cover_little_and_much_of_their_square():
    torch.manual_seed(0)
    cover = things(500, CPU)
    assert cover.shape == (500, 1, DETAIL, DETAIL) and cover.min() >= 0 and cover.max() <= 1
    share = cover.mean((1, 2, 3))
    assert share.quantile(0.05) < 0.12 and share.quantile(0.95) > 0.4


def test_the_generator_normalises_what_is_drawn_and_has_nothing_to_learn():
    spec = ImageSpec(20, 28, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    generator = GENERATORS["scenes"](spec, GeneratorSettings(batch_size=8))
    torch.manual_seed(0)
    images = generator(torch.zeros(8, 4))
    torch.manual_seed(0)
    torch.testing.assert_close(images, spec.normalised(scenes(8, 3, 20, 28, CPU)))
    assert not [*generator.parameters()]
