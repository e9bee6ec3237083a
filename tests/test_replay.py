"""Replay: what goes in comes out, to a byte; the oldest go first."""

import pytest
import torch

from vitkd_fast.generator import Convolutional, GeneratorSettings, ImageSpec
from vitkd_fast.replay import ReplayPool


@pytest.fixture
def pool():
    spec = ImageSpec(2, 2, (0.5, 0.4), (0.2, 0.3))
    return ReplayPool(6, Convolutional(spec, GeneratorSettings(latent=2, width=2)))


def batch_of(pool, *levels):
    """Images of one grey level each, in bytes, normalised."""
    pixels = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 2, 2, 2) / 255
    return pool.generator.normalise(pixels)


def levels_in(pool, draws=400):
    return set((pool.generator.pixels(pool.sample(draws))[:, 0, 0, 0] * 255).round().int().tolist())


def test_only_what_was_put_in_is_drawn_and_all_of_it(pool):
    images = batch_of(pool, 3, 200)
    pool.add(images)
    assert levels_in(pool) == {3, 200}
    assert pool.sample(5).shape == (5, 2, 2, 2)
    torch.testing.assert_close(pool.generator.pixels(images) * 255, pool.bytes[:2].float(), atol=0.5, rtol=0)


def test_the_oldest_are_replaced(pool):
    for first in range(0, 100, 10):
        pool.add(batch_of(pool, first, first + 1))
    assert len(pool.bytes) == 6
    assert levels_in(pool) == {70, 71, 80, 81, 90, 91}


def test_capacity_is_rounded_up_to_whole_batches(pool):
    for first in (0, 10, 20):
        pool.add(batch_of(pool, *range(first, first + 4)))
    assert len(pool.bytes) == 8
    assert levels_in(pool) == {10, 11, 12, 13, 20, 21, 22, 23}


def test_a_pool_keeps_no_graph(pool):
    pool.add(pool.generator.sample(2))
    assert not pool.sample(2).requires_grad
