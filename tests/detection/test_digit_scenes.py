"""Scenes of digits: boxes are where the ink is, and labels are the digits'."""

import pytest
import torch

pytest.importorskip("sklearn")

from vitkd_fast.detection.digit_scenes import Composer, composers


class Unscratched(Composer):
    def _scratches(self, count):
        return torch.zeros(count, 1, self.side, self.side)


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    return composers()[0](200)


def edges(boxes, side):
    """First and last pixels that a box reaches, one further out."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    corners = torch.cat(((centre - half) * side - 1.5, (centre + half) * side + 1.5), -1)
    return corners.round().clamp(0, side).long()


def test_scenes_are_images_with_one_to_four_sound_objects(made):
    pixels, objects = made
    assert pixels.shape == (200, 1, 64, 64) and pixels.min() >= 0 and pixels.max() <= 1
    assert {len(some) for some in objects} == {1, 2, 3, 4}
    labels = torch.cat([some.checked(10).labels for some in objects])
    assert set(labels.tolist()) == set(range(10))
    assert all(some.scores is None for some in objects)


def test_boxes_are_inside_the_image_and_of_many_sizes_and_places(made):
    boxes = torch.cat([some.boxes for some in made[1]])
    centre, sides = boxes.split(2, -1)
    assert (centre - sides / 2).min() >= -1e-6 and (centre + sides / 2).max() <= 1 + 1e-6
    assert 0 < sides.min() and sides[:, 1].max() <= 0.5 + 1e-6 and sides[:, 1].max() > 1.6 * sides[:, 1].min()
    assert centre.amin(0).max() < 0.25 and centre.amax(0).min() > 0.75


def test_a_box_is_full_to_its_sides_and_nothing_is_beyond():
    """Squares of full ink in the middle of the digits, without lines."""
    digit = torch.zeros(1, 1, 8, 8)
    digit[..., 2:7, 3:5] = 1
    composer = Unscratched(digit, torch.tensor([7]))
    torch.manual_seed(0)
    pixels, objects = composer(50)
    for image, some in zip(pixels[:, 0], objects):
        assert some.labels.tolist() == [7] * len(some)
        outside = torch.ones(64, 64, dtype=torch.bool)
        ground = image.median()
        for left, top, right, bottom in edges(some.boxes, 64).tolist():
            outside[top:bottom, left:right] = False
            inner = image[top + 3 : bottom - 3, left + 3 : right - 3]
            assert (inner > ground + 0.2).all()
        assert (image[outside] - ground).abs().max() < 0.3


def test_ink_is_in_the_boxes_of_real_digits():
    known = composers()[0]
    composer = Unscratched(known.images, known.labels)
    torch.manual_seed(1)
    pixels, objects = composer(100)
    for image, some in zip(pixels[:, 0], objects):
        outside = torch.ones(64, 64, dtype=torch.bool)
        for left, top, right, bottom in edges(some.boxes, 64).tolist():
            assert image[top:bottom, left:right].max() > image.median() + 0.3
            outside[top:bottom, left:right] = False
        assert (image[outside] > image.median() + 0.35).float().mean() < 0.01


def test_teacher_and_measurement_see_different_digits():
    known, held = composers()
    assert len(known.images) > 2 * len(held.images) > 100
    assert torch.cdist(known.images.flatten(1), held.images.flatten(1)).min() > 0
    assert known.images.min() == 0 and known.images.max() == 1


def test_the_same_seed_makes_the_same_scenes_of_any_side():
    composer = composers(side=40)[1]
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(composer(4))
    assert made[0][0].shape == (4, 1, 40, 40)
    assert torch.equal(made[0][0], made[1][0]) and not torch.equal(made[0][0], made[2][0])
    for first, second in zip(made[0][1], made[1][1]):
        assert torch.equal(first.boxes, second.boxes) and torch.equal(first.labels, second.labels)
