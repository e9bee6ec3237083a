"""What counts as seen alike by two detectors, and which queries are objects."""

import math

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("scipy")
pytest.importorskip("transformers")


from vitkd_fast.detection.task import Detection, objects_of
from vitkd_fast.objectives import Scene, View


def views(mine, its):
    """Of one image: (probability, class, box) of each query, of two classes."""

    def view(queries):
        logits = torch.full((1, len(queries), 3), -20.0)
        for index, (p, label, _) in enumerate(queries):
            logits[0, index, label] = math.log(p)
            logits[0, index, 2] = math.log(1 - p)
        return View(logits, boxes=torch.tensor([[box for *_, box in queries]]))

    return Scene(torch.zeros(1, 1, 8, 8), view(its), view(mine), None, None)


LEFT, RIGHT = (0.25, 0.5, 0.2, 0.2), (0.75, 0.5, 0.2, 0.2)


@pytest.mark.parametrize(
    ("mine", "its", "expected"),
    [
        ([(0.9, 0, LEFT), (0.9, 1, RIGHT)], [(0.9, 1, RIGHT), (0.9, 0, LEFT)], 1),
        ([(0.9, 0, LEFT), (0.1, 1, RIGHT)], [(0.9, 1, RIGHT), (0.9, 0, LEFT)], 2 / 3),
        ([(0.9, 0, LEFT), (0.9, 1, RIGHT)], [(0.1, 1, RIGHT), (0.9, 0, LEFT)], 2 / 3),
        ([(0.9, 1, LEFT)], [(0.9, 0, LEFT)], 0),
        ([(0.9, 0, RIGHT)], [(0.9, 0, LEFT)], 0),
        ([(0.9, 0, LEFT)], [(0.9, 0, LEFT), (0.9, 1, RIGHT)], 2 / 3),
        ([(0.1, 0, LEFT)], [(0.1, 0, LEFT)], 1),
        ([(0.9, 0, LEFT)], [(0.01, 0, LEFT)], 0),
    ],
)
def test_agreement_counts_what_both_see_alike(mine, its, expected):
    assert Detection().agreement(views(mine, its)).item() == pytest.approx(expected)


def test_objects_are_taken_from_what_scores_enough():
    scene = views([(0.9, 0, LEFT), (0.2, 1, RIGHT)], [(0.9, 0, LEFT)])
    (all_of_them,), (sure,) = objects_of(scene.student), objects_of(scene.student, least=0.5)
    torch.testing.assert_close(all_of_them.scores, torch.tensor([0.9, 0.2]))
    assert all_of_them.labels.tolist() == [0, 1] and sure.labels.tolist() == [0]
    torch.testing.assert_close(sure.boxes, torch.tensor([LEFT]))


def test_a_query_without_a_sound_box_is_no_object():
    view = views(
        [(0.9, 0, LEFT), (0.8, 0, (0.5, 0.5, -0.1, 0.2)), (0.7, 1, (0.5, math.nan, 0.1, 0.2))], [(0.9, 0, LEFT)]
    )
    (found,) = objects_of(view.student)
    torch.testing.assert_close(found.scores, torch.tensor([0.9]))
