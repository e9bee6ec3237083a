"""Average precision against cases worked out by hand; COCO reads precision at 101 recalls, 0.00 to 1.00."""

import math
import sys
import warnings

import pytest
import torch

from vitkd_fast.detection.metrics import mean_average_precision
from vitkd_fast.detection.objects import Objects, no_objects

pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")

LEFT, RIGHT = (0.2, 0.5, 0.2, 0.2), (0.8, 0.5, 0.2, 0.2)
ELSEWHERE = (0.5, 0.1, 0.1, 0.1)


def objects(*boxes, labels=None, scores=None):
    labels = [0] * len(boxes) if labels is None else labels
    scores = None if scores is None else torch.tensor(scores)
    return Objects(torch.tensor(boxes).view(-1, 4), torch.tensor(labels, dtype=torch.int64), scores)


def nothing():
    return Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))


def test_perfect_is_one():
    real = [objects(LEFT, RIGHT, labels=[0, 3]), no_objects()]
    found = mean_average_precision([objects(RIGHT, LEFT, labels=[3, 0], scores=[0.9, 0.1]), nothing()], real)
    assert found["map"] == found["map50"] == found["map75"] == 1


@pytest.mark.parametrize(
    "predicted",
    [
        objects(ELSEWHERE, scores=[0.9]),  # in the wrong place
        objects(LEFT, labels=[1], scores=[0.9]),  # of the wrong class
        nothing(),
    ],
)
def test_all_wrong_is_zero(predicted):
    found = mean_average_precision([predicted], [objects(LEFT)])
    assert found["map"] == found["map50"] == found["map75"] == 0


def test_one_of_two_found():
    """The recalls from 0.00 to 0.50 have a precision of 1, the others 0."""
    found = mean_average_precision([objects(LEFT, scores=[0.9])], [objects(LEFT, RIGHT)])
    assert found["map"] == found["map50"] == pytest.approx(51 / 101)


def test_a_false_one_counts_by_its_score():
    real = [objects(LEFT)]
    assert mean_average_precision([objects(LEFT, ELSEWHERE, scores=[0.9, 0.1])], real)["map"] == 1
    assert mean_average_precision([objects(LEFT, ELSEWHERE, scores=[0.1, 0.9])], real)["map"] == pytest.approx(0.5)
    assert mean_average_precision([objects(LEFT, LEFT, scores=[0.9, 0.8])], real)["map"] == 1  # a double


def test_a_false_one_in_another_image_counts_too():
    predicted = [objects(LEFT, scores=[0.1]), objects(LEFT, scores=[0.9])]
    assert mean_average_precision(predicted, [objects(LEFT), no_objects()])["map"] == pytest.approx(0.5)


def test_overlap_decides_at_which_thresholds_it_is_found():
    """Shifted by a sixth of its width, a box overlaps 5/7 = 0.714 of both: found at 0.50 to 0.70, five of ten."""
    x, y, width, height = LEFT
    found = mean_average_precision([objects((x + width / 6, y, width, height), scores=[0.9])], [objects(LEFT)])
    assert found["map50"] == 1 and found["map75"] == 0 and found["map"] == pytest.approx(0.5)


def test_classes_count_equally():
    real = [objects(LEFT, RIGHT, ELSEWHERE, labels=[0, 0, 1])]
    assert mean_average_precision([objects(LEFT, RIGHT, scores=[0.9, 0.9])], real)["map"] == pytest.approx(0.5)


def test_sizes_are_of_the_original_image():
    """A box of a fifth of the sides: 20 pixels in 100×100, 64 in 320×320, 128 in the default."""
    predicted, real = [objects(LEFT, scores=[0.9])], [objects(LEFT)]
    for sizes, which in (([(100, 100)], "map_small"), ([(320, 320)], "map_medium"), (None, "map_large")):
        found = mean_average_precision(predicted, real, sizes)
        assert found[which] == 1
        others = {"map_small", "map_medium", "map_large"} - {which}
        assert all(math.isnan(found[name]) for name in others)
    assert mean_average_precision(predicted, real, [(50, 200)])["map_small"] == 1  # 10 by 40
    assert mean_average_precision(predicted, real, [(50, 600)])["map_medium"] == 1  # 10 by 120


def test_the_hundred_highest_scores_count_without_a_warning():
    predicted = objects(*[ELSEWHERE] * 100, LEFT, scores=[0.5] * 100 + [0.4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mean_average_precision([predicted], [objects(LEFT)])["map"] == 0
        predicted.scores[-1] = 0.6
        assert mean_average_precision([predicted], [objects(LEFT)])["map"] == 1


def scattered(images=40, seed=0):
    """(predicted, real, crowds) as a detector finds them: most objects, a bit beside them, and some that are not."""
    torch.manual_seed(seed)
    every = []
    for _ in range(images):
        count = int(torch.randint(1, 8, ()))
        sides = 0.02 + 0.4 * torch.rand(count, 2).square()
        boxes = torch.cat((sides / 2 + (1 - sides) * torch.rand(count, 2), sides), 1)
        labels, crowd = torch.randint(3, (count,)), torch.rand(count) < 0.2
        again = torch.randint(count, (2 * count,))
        moved = boxes[again] * (1 + 0.03 * torch.randn(2 * count, 4))
        wrong = torch.where(torch.rand(2 * count) < 0.8, labels[again], torch.randint(3, (2 * count,)))
        found = Objects(moved, wrong, torch.rand(2 * count))
        every.append((found, Objects(boxes[~crowd], labels[~crowd]), Objects(boxes[crowd], labels[crowd])))
    return list(zip(*every))


@pytest.mark.parametrize("crowded", [False, True])
def test_figures_are_those_of_pycocotools(crowded, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    predicted, real, crowds = scattered()
    crowds = crowds if crowded else [no_objects()] * len(real)
    boxes, results = [], []
    for image, (found, truth, crowd) in enumerate(zip(predicted, real, crowds)):
        for some, is_crowd in ((truth, 0), (crowd, 1)):
            for (left, top, right, bottom), label in zip(some.corners(640, 640).tolist(), some.labels.tolist()):
                box, area = [left, top, right - left, bottom - top], (right - left) * (bottom - top)
                which = {"id": len(boxes) + 1, "image_id": image, "category_id": label}
                boxes.append({**which, "bbox": box, "area": area, "iscrowd": is_crowd})
        for corners, label, score in zip(
            found.corners(640, 640).tolist(), found.labels.tolist(), found.scores.tolist()
        ):
            box = [corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1]]
            results.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    coco = COCO()
    images, categories = [{"id": image} for image in range(len(real))], [{"id": label} for label in range(3)]
    coco.dataset = {"images": images, "categories": categories, "annotations": boxes}
    coco.createIndex()
    evaluated = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluated.evaluate()
    evaluated.accumulate()
    evaluated.summarize()
    found = mean_average_precision(predicted, real, crowds=crowds)
    assert list(found.values()) == pytest.approx(evaluated.stats[:6].tolist(), abs=1e-7)  # float32
    assert 0.05 < found["map"] < 0.95
    capsys.readouterr()


def test_what_is_found_in_a_crowd_does_not_count():
    predicted = [objects(LEFT, RIGHT, RIGHT, scores=[0.5, 0.9, 0.8])]
    assert mean_average_precision(predicted, [objects(LEFT)])["map"] == pytest.approx(1 / 3)
    assert mean_average_precision(predicted, [objects(LEFT)], crowds=[objects(RIGHT)])["map"] == 1


def test_half_precision_is_measured_too():
    predicted = objects((0.25, 0.5, 0.25, 0.25), scores=[0.5])
    predicted = Objects(predicted.boxes.bfloat16(), predicted.labels, predicted.scores.bfloat16())
    assert mean_average_precision([predicted], [objects((0.25, 0.5, 0.25, 0.25))])["map"] == 1


def test_what_cannot_be_measured_is_refused():
    sound = objects(LEFT, scores=[0.9])
    with pytest.raises(ValueError, match="predicted in 1 images, are real in 2, and 2 sizes"):
        mean_average_precision([sound], [objects(LEFT)] * 2)
    with pytest.raises(ValueError, match="real in 1, and 2 sizes"):
        mean_average_precision([sound], [objects(LEFT)], [(10, 10)] * 2)
    with pytest.raises(ValueError, match="no real object in these 1 images"):
        mean_average_precision([sound], [no_objects()])
    with pytest.raises(ValueError, match="no scores"):
        mean_average_precision([objects(LEFT)], [objects(LEFT)])
    with pytest.raises(ValueError, match="accepted: finite numbers"):
        mean_average_precision([objects((0.5, 0.5, 0.1, math.nan), scores=[0.9])], [objects(LEFT)])


def test_a_missing_library_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.detection", None)
    with pytest.raises(ImportError, match=r'torchmetrics.*pip install "vitkd_fast\[detection\]"'):
        mean_average_precision([objects(LEFT, scores=[0.9])], [objects(LEFT)])
