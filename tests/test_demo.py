"""The demo, shortened: its data, its models, its figures. The real figures need its real number of steps."""

import importlib
import json

import pytest
import torch

from vitkd_fast import demo as module

pytest.importorskip("timm")
pytest.importorskip("sklearn")


def test_digits_are_stratified_normalised_and_disjoint():
    (images, labels), (_, held_labels) = module.digits()
    assert len(labels) + len(held_labels) == 1797 and len(held_labels) == 540
    assert images.shape[1:] == (1, 8, 8) and images.min() == -1 and images.max() == 1
    shares = held_labels.bincount(minlength=10) / labels.bincount(minlength=10)
    assert shares.min() > 0.4 and shares.max() < 0.46
    assert torch.equal(module.digits()[1][1], held_labels)


def test_the_student_has_at_most_a_quarter_of_the_weights():
    teacher, student = module.small_vit(**module.TEACHER), module.small_vit(**module.STUDENT)
    count = [sum(weight.numel() for weight in model.parameters()) for model in (teacher, student)]
    assert 4 * count[1] <= count[0]


def test_jitter_is_small_and_keeps_the_paper():
    images = torch.full((200, 1, 8, 8), -1.0)
    assert torch.allclose(module.jittered(images), images)
    images[:, :, 2:6, 3:5] = 1
    moved = module.jittered(images)
    centre = (moved + 1).sum((1, 2, 3)).mean() / (images + 1).sum((1, 2, 3)).mean()
    assert 0.9 < centre < 1.1 and (moved - images).abs().amax((1, 2, 3)).min() > 0
    assert moved.min() >= -1 and moved.max() <= 1


def test_figures_are_measured_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "TEACHER_STEPS", 300)
    figures = module.demo(seed=3, steps=30, json=tmp_path / "new/demo.json", out=tmp_path / "run")
    written = json.loads((tmp_path / "new/demo.json").read_text())
    assert written.keys() == {
        *("teacher_accuracy", "student_accuracy", "noise_accuracy", "teacher_params", "student_params", "seconds"),
        *("seed", "steps"),
    }
    assert written["seed"] == 3 and written["steps"] == 30 and written["seconds"] > 0
    assert figures.teacher_accuracy > 0.7
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["student_accuracy"] == written["student_accuracy"]
    assert report["student"]["parameters"] == written["student_params"]
    text = capsys.readouterr().out
    assert f"{100 * figures.noise_accuracy:.1f} %" in text and "same student on noise" in text


@pytest.mark.parametrize("module", ["vitkd_fast.demo", "vitkd_fast.detection.demo"])
def test_what_would_be_refused_is_refused_before_anything_is_trained(module, tmp_path):
    demo = importlib.import_module(module).demo
    (tmp_path / "config.json").write_text('{"my": "settings"}')
    for options, message in (
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"out": tmp_path}, "holds more than a finished demo"),
        ({"json": tmp_path}, "directory"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            demo(progress=False, **options)
    assert (tmp_path / "config.json").read_text() == '{"my": "settings"}'


def test_ctrl_c_while_the_second_student_learns_leaves_no_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TEACHER_STEPS", 3)

    def stopped(*networks, method="best", **options):
        result = distill(*networks, method=method, **options)
        result.report.status = "interrupted" if method == "noise" else "completed"
        return result

    distill = module.distill
    monkeypatch.setattr(module, "distill", stopped)
    with pytest.raises(KeyboardInterrupt):
        module.demo(steps=2, json=tmp_path / "demo.json", progress=False)
    assert not (tmp_path / "demo.json").read_text()
