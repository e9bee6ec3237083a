"""Pictures: boxes where the objects are, in their colour, and nothing else changed."""

import warnings

import pytest
import torch

from vitkd_fast.detection.objects import Objects, no_objects
from vitkd_fast.detection.pictures import side_by_side, with_boxes

pytest.importorskip("torchvision")

RED = (255, 0, 0)


def objects(*boxes, labels=None, scores=None):
    labels = [0] * len(boxes) if labels is None else labels
    scores = None if scores is None else torch.tensor(scores)
    return Objects(torch.tensor(boxes).view(-1, 4), torch.tensor(labels), scores)


def is_red(image):
    return (image[0] == 1) & (image[1] == 0) & (image[2] == 0)


def test_a_box_is_drawn_where_it_is():
    (image,) = with_boxes(torch.zeros(1, 3, 200, 400), [objects((0.5, 0.5, 0.5, 0.8))], [""], RED)
    assert image.shape == (3, 200, 400) and image.dtype == torch.float32
    red = is_red(image)
    assert red[20, 100:300].all() and red[20:180, 100].all() and red[180, 100:300].all() and red[20:180, 300].all()
    rows, columns = red.nonzero().unbind(1)
    assert rows.min() >= 19 and rows.max() <= 181 and columns.min() >= 99 and columns.max() <= 301
    assert not red[60:170, 110:290].any() and (image[1:] == 0).all()


def test_names_and_scores_are_written():
    box = (0.5, 0.5, 0.8, 0.8)
    pictures = [
        with_boxes(torch.zeros(1, 3, 200, 200), [some], classes)
        for some, classes in (
            (objects(box), [""]),
            (objects(box), ["drone"]),
            (objects(box, scores=[0.5]), ["drone"]),
            (objects(box), None),
        )
    ]
    for index, one in enumerate(pictures):
        assert not any(one.equal(other) for other in pictures[:index])


def test_small_and_grey_images_are_magnified_to_colour():
    pixels = torch.rand(2, 1, 10, 20)
    images = with_boxes(pixels, [no_objects(), objects((0.5, 0.5, 0.5, 0.5))], None, RED)
    assert images.shape == (2, 3, 200, 400)
    expected = pixels[0].repeat_interleave(20, -1).repeat_interleave(20, -2).expand(3, -1, -1)
    torch.testing.assert_close(images[0], expected, atol=0.5 / 255 + 1e-6, rtol=0)
    assert is_red(images[1])[50, 100:300].all()


def test_low_scores_are_left_out():
    some = objects((0.5, 0.5, 0.5, 0.5), scores=[0.29])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_boxes(torch.zeros(1, 3, 200, 200), [some]).max() == 0
    assert with_boxes(torch.zeros(1, 3, 200, 200), [some], least_score=0.2).max() == 1


def test_boxes_partly_outside_or_tiny_are_drawn():
    some = objects((1.0, 1.0, 0.5, 0.5), (0.5, 0.5, 0.001, 0.001), (3.0, 3.0, 0.1, 0.1), labels=[0, 1, 2])
    (image,) = with_boxes(torch.zeros(1, 3, 200, 200), [some], ["", "", "never drawn"], RED)
    red = is_red(image)
    assert red[150, 150:].all() and red[150:, 150].all() and red[199, 150:].all() and red[100, 100]


def test_teacher_is_left_and_student_right():
    pixels = torch.zeros(5, 3, 200, 200)
    box = objects((0.5, 0.5, 0.5, 0.5), scores=[0.9])
    none = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    picture = side_by_side(pixels, [box] * 5, [none] * 5, ["drone"])
    width, height = 200 + 2 + 200 + 2, 200 + 2
    assert picture.size == (4 * width, 2 * height)
    pair = picture.crop((0, height, width, 2 * height))  # the fifth, in the second row
    left, right = pair.crop((1, 1, 201, 201)), pair.crop((203, 1, 403, 201))
    assert left.getextrema() == ((0, 0), (0, 255), (0, 0)) and right.getextrema() == ((0, 0),) * 3


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="1 images' objects are given with 2 images"):
        with_boxes(torch.zeros(2, 3, 8, 8), [no_objects()])
    with pytest.raises(ValueError, match=r"labels .*accepted: 0 to 0"):
        with_boxes(torch.zeros(1, 3, 8, 8), [objects((0.5, 0.5, 0.5, 0.5), labels=[1])], ["drone"])
