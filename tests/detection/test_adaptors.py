"""Adaptors: detectors of several makes seen alike, and what is not understood said plainly."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("scipy")
pytest.importorskip("transformers")

from tiny_detectors import CLASSES, QUERIES, QUICK, detr, student, teacher, yolos

from vitkd_fast.detection import adaptors
from vitkd_fast.detection.adaptors import adaptor, from_corners, from_sigmoid, look
from vitkd_fast.detection.task import Detection, objects_of
from vitkd_fast.distill import distill
from vitkd_fast.generator import ImageSpec
from vitkd_fast.objectives import View


class Plain(nn.Module):
    """Class scores before a sigmoid, and corners in pixels."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(64, 6 * CLASSES)

    def forward(self, images):
        scores = self.scores(images.flatten(1)).unflatten(1, (6, CLASSES))
        boxes = images.new_tensor([2.0, 0.0, 6.0, 4.0]).expand(len(images), 6, 4)
        return scores, boxes


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


class Derived(Plain):
    pass


class Another(Plain):
    pass


class Says(nn.Module):
    """A model that gives what it is told to, and says how many classes it knows."""

    def __init__(self, output, classes=CLASSES):
        super().__init__()
        self.output, self.config = output, SimpleNamespace(num_labels=classes)

    def forward(self, images):
        return self.output


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(adaptors, "ADAPTORS", {})

    @adaptor(Plain)
    def plain(model, images):
        scores, boxes = model(images)
        return View(from_sigmoid(scores), boxes=from_corners(boxes, *images.shape[-2:]))

    return plain


def test_yolos_is_seen_as_it_answers_with_its_patches_alone():
    model, images = yolos(width=8), torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        view, output = look(model, images), model(images)
    assert torch.equal(view.logits, output.logits) and torch.equal(view.boxes, output.pred_boxes)
    assert view.logits.shape == (2, QUERIES, CLASSES + 1)
    assert view.tokens.shape == (2, 16, 8)
    assert torch.equal(view.tokens, output.last_hidden_state[:, 1:17])


def test_detr_is_seen_with_its_encoders_tokens():
    model, images = detr(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        view, output = look(model, images), model(images)
    assert torch.equal(view.logits, output.logits) and torch.equal(view.boxes, output.pred_boxes)
    assert view.logits.shape == (2, QUERIES, CLASSES + 1)
    assert torch.equal(view.tokens, output.encoder_last_hidden_state) and view.tokens.shape == (2, 16, 16)


def test_a_detector_with_a_sigmoid_gets_a_class_of_nothing():
    model, images = detr(kind="ConditionalDetr"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        view, output = look(model, images), model(images)
    assert output.logits.shape == (2, QUERIES, CLASSES) and view.logits.shape == (2, QUERIES, CLASSES + 1)
    classes = view.logits.softmax(-1)
    torch.testing.assert_close(1 - classes[..., -1], output.logits.sigmoid().amax(-1))
    assert torch.equal(classes[..., :-1].argmax(-1), output.logits.argmax(-1))
    assert view.tokens.shape == (2, 16, 16)


def test_a_module_of_ones_own_is_seen_through_its_function(registered):
    model, images = Plain(), torch.randn(2, 1, 8, 8)
    view = look(model, images)
    assert view.logits.shape == (2, 6, CLASSES + 1) and view.tokens is None
    assert view.boxes[0, 0].tolist() == [0.5, 0.25, 0.5, 0.5]
    view.logits.sum().backward()
    assert model.scores.weight.grad.any()


def test_subclasses_are_seen_as_their_nearest_registered_base(registered):
    @adaptor(Another)
    def another(model, images):
        return View(torch.zeros(len(images), 1, 2), boxes=torch.ones(len(images), 1, 4))

    images = torch.randn(2, 1, 8, 8)
    assert look(Derived(), images).logits.shape == (2, 6, CLASSES + 1)
    assert look(Another(), images).logits.shape == (2, 1, 2)
    assert look(type("Deeper", (Another,), {})(), images).logits.shape == (2, 1, 2)
    assert another.__name__ == "another"


def test_without_its_function_the_module_is_not_understood(monkeypatch):
    monkeypatch.setattr(adaptors, "ADAPTORS", {})
    with pytest.raises(ValueError, match=r"Plain gives tuple, not an output with logits .*register a function"):
        look(Plain(), torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(2, 5, 4), "Says gives Tensor, not an output with logits and pred_boxes"),
        ({"scores": torch.zeros(2, 5, 4), "boxes": torch.zeros(2, 5, 4)}, "Says gives a dict of scores, boxes, not"),
        ({"logits": torch.zeros(2, 5, 4)}, "Says gives a dict of logits, not"),
        (
            {"logits": torch.zeros(2, 5, 6), "pred_boxes": torch.zeros(2, 5, 4)},
            "6 logits per query and its config says 3 classes",
        ),
        (
            {"logits": torch.zeros(2, 5, 4), "pred_boxes": torch.zeros(2, 7, 4)},
            r"shapes \(2, 5, 4\) and \(2, 7, 4\); accepted: \(batch, queries, classes \+ 1\)",
        ),
        ({"logits": torch.zeros(2, 4), "pred_boxes": torch.zeros(2, 4)}, r"shapes \(2, 4\) and \(2, 4\); accepted"),
        ({"logits": torch.zeros(2, 5, 4), "pred_boxes": torch.zeros(2, 5, 5)}, r"\(2, 5, 5\); accepted"),
    ],
)
def test_outputs_in_another_form_are_refused_with_a_way_out(output, message):
    with pytest.raises(ValueError, match=message) as error:
        look(Says(output), torch.zeros(2, 1, 8, 8))
    assert "vitkd_fast.detection.adaptors" in str(error.value)


def test_a_model_that_does_not_say_its_classes_is_refused():
    output = {"logits": torch.zeros(2, 5, 4), "pred_boxes": torch.zeros(2, 5, 4)}
    with pytest.raises(ValueError, match="its config says None classes"):
        look(Says(output, classes=None), torch.zeros(2, 1, 8, 8))


def test_a_function_that_gives_no_boxes_is_refused(monkeypatch):
    monkeypatch.setattr(adaptors, "ADAPTORS", {Plain: lambda model, images: View(torch.zeros(2, 5, 4))})
    with pytest.raises(ValueError, match=r"shapes \(2, 5, 4\) and None"):
        look(Plain(), torch.zeros(2, 1, 8, 8))


def test_from_sigmoid_sums_to_one_and_keeps_the_surest_class():
    logits = 4 * torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0))
    classes = from_sigmoid(logits).exp()
    assert classes.shape == (3, 50, 7)
    torch.testing.assert_close(classes.sum(-1), torch.ones(3, 50))
    p = logits.sigmoid()
    torch.testing.assert_close(1 - classes[..., -1], p.amax(-1))
    torch.testing.assert_close(classes[..., :-1], p * p.amax(-1, keepdim=True) / p.sum(-1, keepdim=True))


def test_from_sigmoid_of_one_class_is_its_probability():
    logits = torch.linspace(-5, 5, 11)[None, :, None]
    torch.testing.assert_close(from_sigmoid(logits).exp()[0, :, 0], logits[0, :, 0].sigmoid())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_sigmoid_is_finite_where_the_sigmoid_is_not(dtype):
    logits = torch.tensor([[[100.0, -100, -100], [-100, -100, -100], [100, 100, 100], [0, 0, 100]]], dtype=dtype)
    logits.requires_grad_()
    log_p = from_sigmoid(logits)
    assert log_p.isfinite().all()
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(1, 4))
    for scale in (log_p.exp().square().sum(), -log_p[..., 0].sum()):
        (gradient,) = torch.autograd.grad(scale, logits, retain_graph=True)
        assert gradient.isfinite().all()


def test_corners_become_shares_of_the_right_sides():
    boxes = from_corners(torch.tensor([[10.0, 5.0, 30.0, 15.0]]), height=20, width=40)
    assert boxes.tolist() == [[0.5, 0.5, 0.5, 0.5]]
    assert from_corners(torch.tensor([[0.0, 0.0, 40.0, 10.0]]), 20, 40).tolist() == [[0.5, 0.25, 1.0, 0.5]]


class Grouped(nn.Module):
    """As LW-DETR and RF-DETR: in training several groups of queries, the first of which is left afterwards."""

    def __init__(self, groups):
        super().__init__()
        self.config = SimpleNamespace(num_labels=CLASSES, num_queries=QUERIES, group_detr=groups)
        self.head = nn.Linear(16, groups * QUERIES * (CLASSES + 4))

    def forward(self, images):
        found = self.head(images.flatten(1)).unflatten(1, (-1, CLASSES + 4))
        found = found if self.training else found[:, :QUERIES]
        return {"logits": found[..., :CLASSES], "pred_boxes": found[..., CLASSES:].sigmoid()}


def test_of_groups_of_queries_the_one_that_is_left_learns():
    model, images = Grouped(3), torch.randn(2, 1, 4, 4)
    training, afterwards = look(model.train(), images), look(model.eval(), images)
    assert afterwards.logits.shape == (2, QUERIES, CLASSES + 1)
    for mine, theirs in ((training.logits, afterwards.logits), (training.boxes, afterwards.boxes)):
        assert torch.equal(mine, theirs)


def test_classes_of_their_own_rank_objects_by_their_own_scores():
    """Of all queries and classes the best, as such detectors' own post-processing picks them."""
    model, images = Grouped(1).eval(), torch.randn(2, 1, 4, 4)
    view = look(model, images)
    raw = model(images)
    torch.testing.assert_close(view.scores, raw["logits"].sigmoid())
    for image, found in enumerate(objects_of(view)):
        scores = raw["logits"][image].sigmoid()
        assert len(found) == QUERIES * CLASSES
        torch.testing.assert_close(found.scores, scores.flatten().sort(descending=True).values)
        for box, label, score in zip(found.boxes, found.labels, found.scores):
            query = (scores[:, label] == score).nonzero()[0, 0]
            assert torch.equal(box, raw["pred_boxes"][image, query])
    assert all((found.scores >= 0.6).all() for found in objects_of(view, 0.6))
    assert look(yolos(), torch.randn(2, 1, 16, 16)).scores is None


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_is_wrapped_is_seen_as_it_is(wrap, registered):
    for model, images in ((yolos(), torch.rand(2, 1, 16, 16)), (Plain(), torch.rand(2, 1, 8, 8))):
        expected, found = look(model, images), look(wrap(model), images)
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(found.boxes, expected.boxes)


def test_a_wrapped_student_learns():
    settings = {**QUICK, "steps": 2}
    assert distill(teacher(), nn.DataParallel(student()), **settings).report.status == "completed"


@pytest.mark.parametrize(
    ("count", "size", "patch", "grid"),
    [
        (12, (50, 20), 8, (6, 2)),  # of a YOLOS, which leaves out what is no whole patch
        (2, (32, 30), 16, (2, 1)),
        (12, (50, 20), None, (6, 2)),
        (28, (50, 100), None, (4, 7)),  # of convolutions, which pad: 16 pixels a side
        (6, (24, 32), (12, 10), (2, 3)),
        (1, (16, 16), None, (1, 1)),
        (8888, (704, 608), None, None),  # of several scales
        (340, (128, 128), None, None),
        (13, (50, 20), 8, None),
    ],
)
def test_tokens_lie_on_the_grid_of_the_models_patches(count, size, patch, grid):
    model = nn.Identity()
    if patch is not None:
        model.config = SimpleNamespace(patch_size=patch)
    layout = Detection().layout(model, count, ImageSpec(*size, (0.5,), (0.5,)))
    assert (layout.count, layout.grid) == (count, grid)
