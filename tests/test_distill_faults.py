"""What goes wrong in a run and how it ends: losses that are not finite, interrupts, errors of others."""

import importlib
import itertools
import json
import math

import pytest
import torch
from tiny import QUICK, agreement_of, held_images, same, state, tiny_student, tiny_teacher
from torch import nn

from vitkd_fast.distill import distill
from vitkd_fast.guard import NonFiniteError
from vitkd_fast.objectives import STUDENT_OBJECTIVES, Objective


class Poisonous(nn.Module):
    """A teacher whose logits are NaN from one call to another."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.inner, self.calls, self.first, self.last = tiny_teacher(), 0, first, last
        self.pretrained_cfg = self.inner.pretrained_cfg

    def forward(self, images):
        self.calls += 1
        return self.inner(images) * (math.nan if self.first <= self.calls <= self.last else 1.0)


def test_steps_with_a_non_finite_loss_are_skipped_and_counted():
    result = distill(Poisonous(9, 13), tiny_student(), steps=40, **QUICK)
    assert result.report.status == "completed"
    assert all(tensor.isfinite().all() for tensor in result.student.state_dict().values())
    assert all(tensor.isfinite().all() for tensor in result.generator.state_dict().values())
    assert result.report.skipped["logits"] == 4
    assert result.report.skipped["disagreement"] == 1
    assert math.isfinite(result.history[-1]["logits"])
    assert "not finite, so skipped: " in str(result.report)


def test_too_many_skipped_steps_stop_the_run_with_the_terms_name(tmp_path):
    student = tiny_student()
    with pytest.raises(NonFiniteError, match=r"Not finite by step 10: .*logits \(10 times\)"):
        distill(Poisonous(4, 10**6), student, steps=1000, max_skipped=5, out=tmp_path, **QUICK)
    weights = {name: weight for name, weight in tiny_student().named_parameters()}
    assert all(torch.equal(weight, weights[name]) for name, weight in student.named_parameters())
    assert json.loads((tmp_path / "report.json").read_text())["status"] == "failed"


def test_steps_are_counted_whichever_term_is_bad(monkeypatch):
    steps = itertools.count()
    for name, bad in (("odd", 1), ("even", 0)):

        def term(scene, bad=bad):
            return scene.student.logits.mean() + (math.inf if next(steps) // 2 % 2 == bad else 0.0)

        monkeypatch.setitem(STUDENT_OBJECTIVES, name, Objective(name, term, frozenset()))
    with pytest.raises(NonFiniteError, match="Not finite by step 21"):
        options = QUICK | {"student_objectives": {"odd": 1.0, "even": 1.0}, "log_every": 1}
        distill(tiny_teacher(), tiny_student(), steps=100, max_skipped=20, **options)


def test_the_callers_autocast_and_gradients_are_none_of_the_runs():
    plain = distill(tiny_teacher(), tiny_student(), steps=5, **QUICK)
    teacher, student = tiny_teacher(), tiny_student()
    with torch.autocast("cpu", torch.bfloat16):
        inside = distill(teacher, student, steps=5, **QUICK)
        assert torch.is_autocast_enabled("cpu")
    for result in (plain, inside):
        assert all(weight.grad is None for part in (result.student, result.generator) for weight in part.parameters())
    assert same(state(inside.student), state(plain.student))


def test_ctrl_c_leaves_a_usable_student_and_report(tmp_path):
    student = tiny_student()
    calls = []

    def interrupt(module, args, output):
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt  # what Python makes of SIGINT

    handle = student.head.register_forward_hook(interrupt)
    teacher = tiny_teacher().train()
    batches = [(held_images(), torch.zeros(512, dtype=torch.long))]
    result = distill(teacher, student, steps=100_000, out=tmp_path, evaluate=batches, **QUICK)
    handle.remove()
    assert result.report.status == "interrupted" and 30 < result.report.steps < 60
    assert result.history[-1]["step"] == result.report.steps
    assert result.report.agreement == pytest.approx(agreement_of(student, teacher.eval()))
    assert not student.training and all(weight.requires_grad for weight in student.parameters())
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["status"] == "interrupted" and (tmp_path / "student.safetensors").exists()


def test_an_interrupt_in_the_generator_step_thaws_the_student():
    teacher, student, calls = tiny_teacher(), tiny_student(), []

    def interrupt(module, args, output):
        calls.append(1)
        if len(calls) == 3 and not torch.is_inference_mode_enabled() and args[0].requires_grad:
            raise KeyboardInterrupt

    student.head.register_forward_hook(interrupt)
    result = distill(teacher, student, steps=50, **QUICK)
    assert result.report.status == "interrupted" and result.report.steps == 0
    assert all(weight.requires_grad for weight in student.parameters())


def test_a_generator_that_makes_no_picture_loses_no_report(tmp_path, monkeypatch):
    def only_batches(images):
        raise RuntimeError("it makes 32 at a time")

    monkeypatch.setattr(importlib.import_module("vitkd_fast.tasks"), "image_grid", only_batches)
    with pytest.warns(UserWarning, match="it makes 32 at a time"):
        result = distill(tiny_teacher(), tiny_student(), steps=3, out=tmp_path, **QUICK)
    assert result.report.status == "completed"
    assert {"report.json", "student.safetensors"} <= {path.name for path in tmp_path.iterdir()}


def test_after_an_error_the_student_is_in_eval_mode(monkeypatch):
    from vitkd_fast.run import Log

    def failing(self, evaluated):
        raise RuntimeError("of a stranger's")

    monkeypatch.setattr(Log, "step", failing)
    student = tiny_student()
    with pytest.raises(RuntimeError, match="of a stranger's"):
        distill(tiny_teacher(), student, steps=3, **QUICK)
    assert not student.training


def test_a_report_that_nobody_reads_loses_nothing(monkeypatch):
    import builtins

    def broken(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(builtins, "print", broken)
    assert distill(tiny_teacher(), tiny_student(), steps=2, **{**QUICK, "progress": True}).report.steps == 2
