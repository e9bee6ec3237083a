"""The supervised training of small detectors, and what they learn from."""

import pytest
import torch

from vitkd_fast.detection.matching import match
from vitkd_fast.detection.objects import Objects, no_objects
from vitkd_fast.detection.set_losses import boxes_loss, classes_loss
from vitkd_fast.detection.training import real, small_yolos, train
from vitkd_fast.generator import ImageSpec
from vitkd_fast.objectives import View

SPEC = ImageSpec(16, 24, (0.5,), (0.5,))
ONE = Objects(torch.tensor([[0.5, 0.25, 0.6, 0.5]]), torch.tensor([3]))


def squares(count):
    """A bright square on each dark scene, of class 0 on the left half and of class 1 on the right."""
    scenes, objects = torch.zeros(count, 1, SPEC.height, SPEC.width), []
    for scene in scenes:
        top, left = int(torch.randint(0, 9, ())), int(torch.randint(0, 17, ()))
        scene[:, top : top + 8, left : left + 8] = 1
        box = torch.tensor([[(left + 4) / 24, (top + 4) / 16, 8 / 24, 8 / 16]])
        objects.append(Objects(box, torch.tensor([int(left > 8)])))
    return scenes, objects


def test_training_lowers_the_set_losses_and_ends_in_eval_mode():
    pytest.importorskip("transformers")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = small_yolos(SPEC, classes=2, patch=8, queries=4, width=16, depth=2, heads=2)
        scenes, objects = squares(64)

        def loss():
            with torch.no_grad():
                output = model(SPEC.normalised(scenes))
            pairs = match(View(output.logits, boxes=output.pred_boxes), real(objects, 2))
            return (classes_loss(pairs) + 5 * boxes_loss(pairs)).item()

        before = loss()
        train(model, squares, SPEC, steps=150, batch_size=16, lr=0.01)
        assert not model.training
        assert loss() < 0.6 * before


def test_real_objects_are_wanted_with_certainty_and_missing_ones_are_nothing():
    wanted = real([ONE, no_objects()], 10)
    assert wanted.sureness.tolist() == [[1.0], [0.0]]
    assert wanted.classes[0, 0].argmax() == 3
    assert real([no_objects()], 10).sureness.tolist() == [[0.0]]
