"""Replay: what goes in comes out, to a byte; the oldest go first."""

import pytest
import torch

from vitkd_fast.generator import Convolutional, GeneratorSettings, ImageSpec
from vitkd_fast.replay import ReplayPool


@pytest.fixture
def pool():
    spec = ImageSpec(2, 2, (0.5, 0.4), (0.2, 0.3))
    return ReplayPool(6, Convolutional(spec, GeneratorSettings(latent=2, width=2)))


@pytest.fixture
def balanced(pool):
    return ReplayPool(8, pool.generator, classes=4)


def batch_of(pool, *levels):
    """Images of one grey level each, in bytes, normalised."""
    pixels = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 2, 2, 2) / 255
    return pool.generator.normalise(pixels)


def drawn_levels(pool, draws):
    return (pool.generator.pixels(pool.sample(draws))[:, 0, 0, 0] * 255).round().int()


def levels_in(pool, draws=400):
    return set(drawn_levels(pool, draws).tolist())


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


@pytest.mark.parametrize("before, saved", [(1, 3), (2, 6), (3, 6)])
def test_it_goes_on_from_what_was_saved(before, saved, pool, tmp_path):
    batches = [batch_of(pool, first, first + 1, first + 2) for first in range(0, 40, 10)]
    for batch in batches[:before]:
        pool.add(batch)
    torch.save(pool.state_dict(), tmp_path / "pool.pt")
    state = torch.load(tmp_path / "pool.pt")
    assert state["bytes"].untyped_storage().nbytes() == saved * 8  # no room that is still empty
    other = ReplayPool(6, pool.generator)
    other.load_state_dict(state)
    for batch in batches[before:]:
        assert levels_in(pool) == levels_in(other)
        pool.add(batch), other.add(batch)
    assert torch.equal(pool.bytes, other.bytes)


def test_a_pool_keeps_no_graph(pool):
    pool.add(pool.generator.sample(2))
    assert not pool.sample(2).requires_grad


def shares(pool, *levels, draws=20_000):
    found = drawn_levels(pool, draws)
    return [(found == level).float().mean().item() for level in levels]


def test_classes_are_drawn_equally_often(balanced):
    balanced.add(batch_of(balanced, 1, 2, 3, 4), torch.tensor([0, 0, 0, 2]))
    assert shares(balanced, 1, 2, 3, 4) == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2], abs=0.02)
    balanced.add(batch_of(balanced, 5, 6, 7, 8), torch.tensor([1, 1, 3, 0]))
    expected = [1 / 16, 1 / 16, 1 / 16, 1 / 4, 1 / 8, 1 / 8, 1 / 4, 1 / 16]
    assert shares(balanced, *range(1, 9)) == pytest.approx(expected, abs=0.02)


def test_images_that_go_are_no_longer_counted(balanced):
    generator = torch.Generator().manual_seed(0)
    for start in range(0, 40, 4):
        balanced.add(batch_of(balanced, *range(start, start + 4)), torch.randint(4, (4,), generator=generator))
        kept = balanced.classes[: balanced.count]
        assert balanced.members.tolist() == torch.bincount(kept, minlength=4).tolist()
    assert balanced.count == 8


def test_a_single_image_of_a_class_is_not_drawn_without_end(pool):
    """Of 200 images in 2 classes one alone would be every second; it counts as a fiftieth of an equal share, as 2."""
    many = ReplayPool(200, pool.generator, classes=2)
    many.add(batch_of(many, *range(200)), torch.tensor([1] + [0] * 199))
    assert shares(many, 0) == pytest.approx([0.5 / 1.5], abs=0.02)
