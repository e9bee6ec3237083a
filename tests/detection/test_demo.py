"""The detection demo, shortened. The real figures need its real number of steps."""

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("torchmetrics")
module = pytest.importorskip("vitkd_fast.detection.demo")


def test_the_demo_trains_four_models_and_writes_down_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "TEACHER_STEPS", 8)
    monkeypatch.setattr(module, "HELD", 12)
    monkeypatch.setattr(module, "BATCH_SIZE", 8)
    state = torch.get_rng_state()
    figures = module.demo(seed=3, steps=6, json=tmp_path / "new/demo.json", out=tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    assert json.loads((tmp_path / "new/demo.json").read_text())["student_map50"] == figures.student_map50
    assert figures.teacher_params >= 3 * figures.student_params
    assert (figures.seed, figures.steps) == (3, 6)
    assert all(0 <= value <= 1 for value in (figures.teacher_map50, figures.noise_map50, figures.agreement))
    assert (tmp_path / "run/images.png").exists() and (tmp_path / "run/student.safetensors").exists()
    assert f"same student on noise         mAP50 {100 * figures.noise_map50:>5.1f} %" in capsys.readouterr().out
