"""The loop on detectors: every method runs, the student learns, and what is refused."""

import copy
import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import same, state
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("scipy")
pytest.importorskip("transformers")

from tiny_detectors import CLASSES, QUICK, SIZE, detr, real, student, teacher
from transformers import AutoModelForObjectDetection

from vitkd_fast.config import Config
from vitkd_fast.detection import adaptors
from vitkd_fast.detection.adaptors import adaptor, from_corners, from_sigmoid
from vitkd_fast.detection.task import Detection
from vitkd_fast.distill import distill
from vitkd_fast.guard import NonFiniteError
from vitkd_fast.methods import DETECTION_METHODS
from vitkd_fast.objectives import View
from vitkd_fast.run import FILES, SAVED
from vitkd_fast.tasks import Classification

TERMS = {"found", "placed", "overlap"}


def finite(history):
    return all(math.isfinite(value) for entry in history for value in entry.values())


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(SIZE * SIZE, CLASSES)
        self.pretrained_cfg = {"input_size": (1, SIZE, SIZE)}

    def forward(self, images):
        return self.head(images.flatten(1))


class Own(nn.Module):
    """Class scores before a sigmoid and corners in pixels, both learned."""

    def __init__(self, queries=5):
        super().__init__()
        self.queries = queries
        self.body = nn.Linear(SIZE * SIZE, queries * (CLASSES + 4))
        self.pretrained_cfg = {"input_size": (1, SIZE, SIZE), "mean": (0.5,), "std": (0.25,)}

    def forward(self, images):
        out = self.body(images.flatten(1)).unflatten(1, (self.queries, CLASSES + 4))
        middle, half = SIZE * out[..., -4:-2].sigmoid(), SIZE * out[..., -2:].sigmoid() / 2
        return out[..., :CLASSES], torch.cat((middle - half, middle + half), -1)


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setattr(adaptors, "ADAPTORS", dict(adaptors.ADAPTORS))

    @adaptor(Own)
    def see(model, images):
        scores, boxes = model(images)
        return View(from_sigmoid(scores), boxes=from_corners(boxes, *images.shape[-2:]))


@pytest.mark.parametrize("method", DETECTION_METHODS)
def test_every_method_runs_and_changes_the_student_alone(method):
    big, small = teacher().train(), student()
    before, at_first = state(big), state(small)
    fewer = {"generator_steps": 3, "student_steps": 3} if method == "inversion" else {}
    result = distill(big, small, method=method, **QUICK, **fewer)
    assert result.report.status == "completed" and result.report.skipped == {}
    assert [entry["step"] for entry in result.history] == [3, 6] and finite(result.history)
    asked = {name for name, weight in Config(task="detection", method=method).generator_objectives.items() if weight}
    assert TERMS | {"tokens", "agreement", "student_gradient"} | asked <= result.history[-1].keys()
    assert not [note for note in result.report.notes if " is off" in note]
    assert same(state(big), before) and all(weight.grad is None for weight in big.parameters())
    assert all(weight.requires_grad for weight in big.parameters()) and big.training
    assert result.student is small and not small.training and not same(state(small), at_first)


def test_the_student_comes_to_see_what_the_teacher_sees():
    data = real()
    small = student()
    at_first = distill(teacher(), copy.deepcopy(small), evaluate=data, **{**QUICK, "steps": 1, "student_lr": 1e-9})
    longer = {**QUICK, "steps": 120, "batch_size": 8, "pool": 256, "log_every": 20}
    result = distill(teacher(), small, evaluate=data, **longer)
    first, last = result.history[0], result.history[-1]
    for name in (*TERMS, "tokens"):
        assert last[name] < first[name] / 2, name
    assert last["agreement"] > first["agreement"] + 0.2
    assert result.report.agreement > at_first.report.agreement + 0.3
    assert result.report.student_map50 > at_first.report.student_map50 + 0.3
    assert result.report.teacher_map50 > 0.99


@pytest.mark.parametrize("method", ["best", "adversarial"])
def test_same_seed_same_student(method):
    runs = [distill(teacher(), student(), method=method, seed=seed, **QUICK).student for seed in (3, 3, 4)]
    assert same(state(runs[0]), state(runs[1]))
    assert not same(state(runs[0]), state(runs[2]))


def test_evaluation_does_not_change_the_student():
    plain = distill(teacher(), student(), **QUICK)
    evaluated = distill(teacher(), student(), evaluate=real(8), **QUICK)
    assert same(state(plain.student), state(evaluated.student))
    assert plain.report.agreement is plain.report.student_map50 is None


def test_the_run_folder_holds_the_run(tmp_path):
    result = distill(teacher(), student(), out=tmp_path, evaluate=real(8), **QUICK)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "student"}
    whole = AutoModelForObjectDetection.from_pretrained(tmp_path / "student")
    assert same(state(whole), state(result.student)) and whole.config.id2label == result.student.config.id2label
    fresh = student()
    fresh.load_state_dict(load_file(tmp_path / "student.safetensors"))
    assert same(state(fresh), state(result.student))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["task"] == "detection" and report["student_map50"] == result.report.student_map50
    assert Config(**report["settings"]).to_dict() == result.report.settings
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    with Image.open(tmp_path / "images.png") as picture:
        assert picture.mode == "RGB" and picture.width > 4 * 2 * 192 and picture.height > 4 * 192


def test_a_report_shows_the_precision_of_both():
    text = str(distill(teacher(), student(), evaluate=real(8), **QUICK).report)
    assert "mAP50" in text and "accuracy" not in text
    assert "100.0 %" in next(line for line in text.splitlines() if line.strip().startswith("teacher"))
    assert "on the evaluation data" in text


def test_ctrl_c_leaves_a_usable_student_and_report_and_the_run_goes_on(tmp_path):
    small, calls = student(), []
    options = {**QUICK, "steps": 14, "out": tmp_path, "evaluate": real(8)}

    def interrupt(module, args, output):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt

    handle = small.register_forward_hook(interrupt)
    result = distill(teacher(), small, **options)
    handle.remove()
    assert result.report.status == "interrupted" and 5 < result.report.steps < 12
    assert result.report.student_map50 is not None
    assert json.loads((tmp_path / "report.json").read_text())["status"] == "interrupted"
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, SAVED, "student"}
    report = distill(teacher(), small, resume=True, **options).report
    assert (report.status, report.steps) == ("completed", 14)


def test_bfloat16_runs_too():
    result = distill(teacher(), student(), method="adversarial", precision="bfloat16", evaluate=real(8), **QUICK)
    assert finite(result.history) and result.report.skipped == {}


@pytest.mark.parametrize("method", ["best", "adversarial"])
def test_detr_teaches_a_yolos_that_takes_other_images(method):
    small = student(channels=3)
    small.pretrained_cfg = {"mean": (0.2,), "std": (0.4,)}
    seen = []
    handle = small.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    result = distill(detr(), small, method=method, **QUICK)
    handle.remove()
    assert finite(result.history) and TERMS | {"tokens"} <= result.history[-1].keys()
    assert {images.shape[1:] for images in seen} == {(3, SIZE, SIZE)}
    lowest, highest = (0 - 0.2) / 0.4, (1 - 0.2) / 0.4
    batches = torch.cat([images for images in seen if len(images) == QUICK["batch_size"]])
    assert lowest - 1e-4 <= batches.min() < -0.2 and 1.5 < batches.max() <= highest + 1e-4
    assert any(note.startswith("student: images are resized from the teacher's 32×32") for note in result.report.notes)


def test_evaluation_converts_the_images_for_the_student():
    """A student with the teacher's weights and another normalisation sees the same."""
    other = teacher()
    other.pretrained_cfg = {"mean": (0.2,), "std": (0.4,)}
    kernel = other.vit.embeddings.patch_embeddings.projection
    with torch.no_grad():
        kernel.bias += kernel.weight.sum((1, 2, 3)) * (0.2 - 0.5) / 0.25
        kernel.weight *= 0.4 / 0.25
    result = distill(teacher(), other, evaluate=real(), **{**QUICK, "steps": 1, "student_lr": 1e-12, "shift": 0.0})
    assert result.report.agreement > 0.99 and result.report.student_map50 > 0.99


def test_a_teacher_and_a_student_of_ones_own_are_distilled_without_tokens(own):
    torch.manual_seed(0)
    result = distill(Own(), Own(queries=7), evaluate=real(8), **QUICK)
    assert finite(result.history) and "tokens" not in result.history[-1]
    assert "tokens is off: the student has no (B, N, D) tokens of patches in its output" in result.report.notes
    result = distill(Own(), Own(), method="adversarial", **QUICK)
    assert finite(result.history)


def test_patches_of_the_student_learn_what_a_teacher_without_tokens_finds_there(own):
    torch.manual_seed(0)
    longer = {**QUICK, "steps": 60, "batch_size": 8, "log_every": 20, "student_objectives": {"covered": 1.0}}
    result = distill(Own(), student(), **longer)
    assert result.history[-1]["covered"] < result.history[0]["covered"] - 0.05
    assert "classify.weight" not in result.student.state_dict()
    result = distill(Own(), Own(), **{**longer, "steps": 2})
    assert (
        "covered is off: the student has no (B, N, D) tokens of patches in its output, or not on a grid"
        in result.report.notes
    )


def test_what_a_model_finds_is_counted_by_class():
    p = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.1, 0.4]], [[0.0, 0.0, 1.0]] * 3])
    found = Detection().found(View(p.log(), boxes=torch.zeros(2, 3, 4)))
    torch.testing.assert_close(found, torch.tensor([[1.2, 0.3], [0.0, 0.0]]))
    torch.testing.assert_close(Classification().found(View(p[0].log())), p[0] * torch.eye(3)[[0, 2, 0]])


@pytest.mark.parametrize("queries", [2, 9])
def test_a_student_may_have_fewer_or_more_queries(queries):
    result = distill(teacher(), student(queries=queries), evaluate=real(8), **QUICK)
    assert finite(result.history)


def test_networks_that_do_not_fit_are_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="student knows 2 classes and teacher 3; they must be the same"):
        distill(teacher(), student(classes=2), out=tmp_path, **QUICK)
    with pytest.raises(
        ValueError, match=r"teacher Classifier .*gives Tensor, not an output with logits and pred_boxes"
    ):
        distill(Classifier(), student(), out=tmp_path, **QUICK)
    with pytest.raises(ValueError, match=r"student Classifier .*gives Tensor.*vitkd_fast\.detection\.adaptors\. Give"):
        distill(teacher(), Classifier(), out=tmp_path, **QUICK)
    with pytest.raises(ValueError, match=r'teacher gives shape \(2, 5, 4\) .* pass task="detection"'):
        distill(teacher(), student(), out=tmp_path, **{**QUICK, "task": "classification"})
    with pytest.raises(
        ValueError, match=r"teacher YolosForObjectDetection cannot take images of shape \(2, 3, 16, 16\)"
    ):
        distill(teacher(), student(), out=tmp_path, channels=3, **QUICK)
    assert not list(tmp_path.iterdir())


def test_boxes_in_pixels_are_refused_with_a_way_out(monkeypatch):
    def see(model, images):
        scores, boxes = model(images)
        return View(from_sigmoid(scores), boxes=boxes)

    monkeypatch.setattr(adaptors, "ADAPTORS", {Own: see})
    with pytest.raises(
        ValueError, match=r"teacher gives boxes with .*accepted: centres and sizes in \[0, 1\].*from_corn"
    ):
        distill(Own(), Own(), **QUICK)


class Poisonous(nn.Module):
    """A teacher whose boxes are NaN from a call on."""

    def __init__(self, first):
        super().__init__()
        self.inner, self.calls, self.first = teacher(), 0, first
        self.config, self.pretrained_cfg = self.inner.config, self.inner.pretrained_cfg

    def forward(self, images):
        self.calls += 1
        output = self.inner(images)
        if self.calls >= self.first:
            output["pred_boxes"] = output["pred_boxes"] * math.nan
        return output


def test_too_many_skipped_steps_stop_the_run_and_leave_its_report(tmp_path):
    small = student()
    with pytest.raises(NonFiniteError, match=r"placed \(\d+ times\)"):
        distill(Poisonous(6), small, max_skipped=4, out=tmp_path, evaluate=real(8), **{**QUICK, "steps": 100})
    assert json.loads((tmp_path / "report.json").read_text())["status"] == "failed"
    assert all(weight.isfinite().all() for weight in small.parameters())


def test_objectives_of_the_other_task_are_off_with_a_note():
    result = distill(teacher(), student(), student_objectives={"logits": 1.0}, **QUICK)
    assert "logits is off: it is for classifiers, and these are detectors" in result.report.notes
    assert "logits" not in result.history[-1]
    nothing = dict.fromkeys((*TERMS, "tokens", "covered"), 0.0)
    with pytest.raises(ValueError, match=r"nothing to minimise.*logits is off: it is for classifiers"):
        distill(teacher(), student(), student_objectives={**nothing, "logits": 1.0}, **QUICK)
    of_boxes = {"student_objectives": {"found": 1.0}, "task": "classification", "accelerate": False}
    result = distill(Classifier(), Classifier(), **{**QUICK, **of_boxes})
    assert "found is off: it is for detectors, with task='detection'" in result.report.notes


def test_relations_of_tokens_can_be_asked_for_too():
    result = distill(teacher(), student(), student_objectives={"relations": 1.0}, **QUICK)
    assert result.history[-1]["relations"] > 0


def test_settings_that_are_not_for_detectors_are_refused():
    with pytest.raises(ValueError, match="task is 'x'; accepted: classification, detection"):
        Config(task="x")
    with pytest.raises(ValueError, match=r"method is 'dafl' and task 'detection'; known: best, adversarial"):
        Config(task="detection", method="dafl")
    with pytest.raises(ValueError, match="method is 'inversion'"):
        Config(method="inversion")
    with pytest.raises(ValueError, match="balanced is True, which is for classifiers"):
        distill(teacher(), student(), balanced=True, **QUICK)
    with pytest.raises(ValueError, match="teacher_checkpoint goes with timm's classifiers"):
        distill(teacher(), student(), teacher_checkpoint="x.safetensors", **QUICK)


def test_detectors_are_loaded_by_folder(tmp_path):
    (model := teacher()).save_pretrained(tmp_path)
    settings = {"mean": (0.5,), "std": (0.25,), "evaluate": real(8)}
    result = distill(str(tmp_path), str(tmp_path), **QUICK, **settings)
    assert result.report.teacher_map50 > 0.99
    assert result.student.config.num_labels == CLASSES and not same(state(result.student), state(model))
    for given in ((str(tmp_path / "none"), student()), (teacher(), str(tmp_path / "none"))):
        with pytest.raises(RuntimeError, match=r"No detector .*none.*Give an nn\.Module, a folder"):
            distill(*given, **QUICK)
