"""The detection demo, shortened. The real figures need its real number of steps."""

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("torchmetrics")
module = pytest.importorskip("vitkd_fast.detection.demo")
from vitkd_fast.detection.objects import Objects  # noqa: E402


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


def test_a_few_steps_of_the_teacher_lower_its_loss():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        known, _ = module.composers(module.SIDE)
        teacher = module.small_yolos(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        scenes, objects = known(32)

        def loss():
            with torch.no_grad():
                output = teacher((scenes - 0.5) / 0.5)
            pairs = module.match(module.View(output.logits, boxes=output.pred_boxes), module.real(objects))
            return (module.classes_loss(pairs) + module.boxes_loss(pairs)).item()

        before = loss()
        module.train(teacher, known, 100)
        assert loss() < 0.9 * before and not teacher.training


def test_real_objects_are_wanted_with_certainty_and_missing_ones_are_nothing():
    one = Objects(torch.tensor([[0.5, 0.25, 0.6, 0.5]]), torch.tensor([3]))
    none = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    wanted = module.real([one, none])
    assert wanted.sureness.tolist() == [[1.0], [0.0]]
    assert wanted.classes[0, 0].argmax() == 3
    labels = module.covering([one, none], 4)
    assert (labels[0] == 3).nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    assert (labels[1] == module.CLASSES).all()
