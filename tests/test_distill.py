"""The loop: it learns, it leaves alone what is not its own, it never waits for the device."""

import importlib
import json
import random
from collections import Counter

import pytest
import torch
from tiny import (
    QUICK,
    SIZE,
    TinyNet,
    agreement_of,
    held_images,
    same,
    state,
    tiny_student,
    tiny_teacher,
)
from torch.utils._python_dispatch import TorchDispatchMode

from vitkd_fast.config import Config
from vitkd_fast.distill import distill
from vitkd_fast.synthesis import is_due


def test_the_student_comes_to_agree_with_the_teacher():
    teacher, student = tiny_teacher(), tiny_student()
    before = agreement_of(student.eval(), teacher)
    result = distill(teacher, student.train(), steps=400, student_lr=0.03, **QUICK)
    assert result.student is student and not student.training
    first, last = result.history[0], result.history[-1]
    assert last["logits"] < first["logits"] / 2
    assert last["tokens"] < first["tokens"] / 3
    assert last["balance"] < -1.2 < first["balance"]  # four classes: -1.386 at best
    assert agreement_of(student, teacher) > before + 0.35  # on images that no generator made


def test_drawn_images_teach_too():
    teacher, student = tiny_teacher(), tiny_student()
    before = agreement_of(student.eval(), teacher)
    result = distill(teacher, student.train(), **{**QUICK, "method": "best"}, steps=400, student_lr=0.03)
    assert "generator_gradient" not in result.history[-1]
    assert agreement_of(student, teacher) > before + 0.35


def test_the_generator_looks_for_disagreement():
    """Against a student that hardly learns, on which it can only gain."""
    alone = {"generator_objectives": {"one_hot": 0.0, "balance": 0.0}, "robust": False}
    rates = {"student_steps": 1, "student_lr": 1e-9, "generator_lr": 0.01}
    result = distill(tiny_teacher(), tiny_student(), steps=60, **alone, **rates, **QUICK)
    assert {"one_hot", "balance"}.isdisjoint(result.history[-1])
    assert result.history[-1]["disagreement"] < 1.5 * result.history[0]["disagreement"] < 0


def test_same_seed_same_student_and_the_callers_random_state_is_untouched():
    torch.manual_seed(123)
    random.seed(123)
    before, python_before = torch.get_rng_state(), random.getstate()
    runs = [distill(tiny_teacher(), tiny_student(), steps=25, seed=seed, **QUICK) for seed in (5, 5, 6)]
    assert same(state(runs[0].student), state(runs[1].student))
    assert same(state(runs[0].generator), state(runs[1].generator))
    assert not same(state(runs[0].student), state(runs[2].student))
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python_before


def test_evaluation_does_not_change_the_student():
    def noisy(model):
        return torch.rand(()).item()

    plain = distill(tiny_teacher(), tiny_student(), steps=15, **QUICK)
    evaluated = distill(tiny_teacher(), tiny_student(), steps=15, evaluate=noisy, **QUICK)
    assert same(state(plain.student), state(evaluated.student))
    assert evaluated.report.agreement is None and 0 <= evaluated.report.teacher_accuracy <= 1


def test_evaluation_in_the_course_of_the_run(tmp_path):
    images = held_images(64)
    modes = []

    class Data:
        def __iter__(self):
            torch.rand(1)
            modes.append(student.training)
            with torch.no_grad():
                yield images, teacher(images).argmax(1)

    teacher, student = tiny_teacher(), tiny_teacher().train()
    fast = {**QUICK, "student_lr": 0.3}
    plain = distill(teacher, tiny_teacher(), steps=25, **fast)
    result = distill(teacher, student, steps=25, evaluate=Data(), evaluate_every=4, out=tmp_path, **fast)
    assert same(state(plain.student), state(student))
    assert modes == [True] + [False] * 7  # the first is a look at the data, before the run
    measured = {entry["step"]: entry["evaluated"] for entry in result.history if "evaluated" in entry}
    assert list(measured) == [4, 8, 12, 16, 20, 24]
    assert [entry["step"] for entry in result.history] == [4, 8, 10, 12, 16, 20, 24, 25]
    assert measured[4].keys() == {"teacher_accuracy", "student_accuracy", "agreement"}
    assert measured[24]["teacher_accuracy"] == 1
    assert measured[24]["student_accuracy"] == measured[24]["agreement"]
    assert len({figures["agreement"] for figures in measured.values()}) > 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    with pytest.raises(ValueError, match="evaluate_every is 4, but there is nothing to measure on; give evaluate="):
        distill(teacher, student, steps=5, evaluate_every=4, **QUICK)


def test_the_teacher_is_used_frozen_and_given_back_as_it_was():
    teacher = tiny_teacher().train()
    teacher.stem.weight.requires_grad_(False)
    before, seen = state(teacher), set()

    def watch(module, args, output):
        seen.add((module.training, any(weight.requires_grad for weight in module.parameters())))

    handle = teacher.head.register_forward_hook(watch)
    distill(teacher, tiny_student(), steps=12, **QUICK)
    handle.remove()
    assert seen == {(False, False)}
    assert same(state(teacher), before)
    assert all(weight.grad is None for weight in teacher.parameters())
    assert teacher.training and not teacher.stem.weight.requires_grad and teacher.head.weight.requires_grad


def test_the_generator_step_leaves_the_student_alone(monkeypatch):
    """Its weights, gradients and BatchNorm averages; and both networks are differentiated to the images only."""

    from vitkd_fast import distill as _  # noqa: F401

    loop = importlib.import_module("vitkd_fast.distill")
    student, checked = tiny_student(), []
    step = loop.GuardedOptimizer.step

    def watched_step(self, loss, values, progress):
        if "disagreement" not in values:
            assert all(weight.requires_grad for weight in student.parameters())
            assert all(module.training for module in student.modules())
            return step(self, loss, values, progress)
        for weight in student.parameters():
            weight.grad = None
        before = state(student)
        step(self, loss, values, progress)
        assert all(weight.grad is None for weight in student.parameters()) and same(state(student), before)
        checked.append(before["norm.num_batches_tracked"].item())
        return None

    monkeypatch.setattr(loop.GuardedOptimizer, "step", watched_step)
    distill(tiny_teacher(), student, steps=11, student_steps=5, **QUICK)
    assert checked == [0, 5, 10]  # BatchNorm has seen the student's own steps and nothing else


def test_no_weight_gradient_is_computed_for_frozen_networks():
    """A count of convolution_backward's wanted outputs: (input, weight, bias)."""
    wanted = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default and args[2].shape[-1] == 4:
                wanted[tuple(args[10])] += 1  # the 4×4 stems of teacher and student
            return func(*args, **(kwargs or {}))

    with Count():
        distill(tiny_teacher(), tiny_student(), steps=6, student_steps=3, **QUICK)
    # two generator steps through both stems to the images; six student steps to the student's weights
    assert wanted == {(True, False, False): 4, (False, True, True): 6}


SYNCS = ("aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default", "aten.nonzero.default")


@pytest.mark.parametrize("chosen", ["best", "adversarial"])
def test_the_host_reads_from_the_device_at_log_points_only(monkeypatch, chosen):
    steps, reads = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if str(func) in SYNCS:
                reads.append((len(steps), str(func)))
            return func(*args, **(kwargs or {}))

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)

        def watched(self, *args, _method=method, _name=name, **kwargs):
            reads.append((len(steps), _name))
            return _method(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)
    kd_loss = importlib.import_module("vitkd_fast.ops.kd_loss")  # vitkd_fast.ops.kd_loss is the function
    assert not kd_loss._is_one(torch.ones((), device="meta"))  # would raise if it looked; only on the CPU does it
    monkeypatch.setattr(kd_loss, "_is_one", lambda grad: False)
    student = tiny_student()
    student.norm.register_forward_hook(lambda module, args, output: steps.append(1) if module.training else None)
    with Watch():
        distill(tiny_teacher(), student, steps=25, **{**QUICK, "method": chosen})
    during = [read for read in reads if 0 < read[0] < 25]
    assert {step for step, _ in during} == {10, 20}
    ledgers = {"best": 1, "adversarial": 2}[chosen]  # the student's, and that of a generator that learns
    assert Counter(name for _, name in during) == {"tolist": 2 * ledgers}


@pytest.mark.gpu
def test_the_loop_never_synchronises_a_gpu_between_log_points():
    steps = []

    def hook(module, args, output):
        if module.training:
            steps.append(1)
            torch.cuda.set_sync_debug_mode("error" if 1 < len(steps) < 30 else "default")

    student = tiny_student().cuda()
    student.norm.register_forward_hook(hook)
    try:
        distill(tiny_teacher().cuda(), student, steps=40, **{**QUICK, "log_every": 40})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 40


def test_bfloat16_learns_too():
    teacher, student = tiny_teacher(), tiny_student()
    before = agreement_of(student.eval(), teacher)
    distill(teacher, student.train(), steps=300, student_lr=0.03, precision="bfloat16", **QUICK)
    assert agreement_of(student, teacher) > before + 0.25
    assert all(weight.dtype is torch.float32 for weight in student.parameters())


def test_is_due_spreads_its_share():
    for share in (0.0, 0.25, 0.5, 0.9):
        replayed = [is_due(step, share) for step in range(1000)]
        assert sum(replayed) == pytest.approx(1000 * share, abs=1) and not replayed[0]
    assert [is_due(step, 0.5) for step in range(4)] == [False, True, False, True]


def test_settings_in_the_report_repeat_the_run():
    first = distill(tiny_teacher(), tiny_student(), steps=7, **QUICK)
    again = distill(tiny_teacher(), tiny_student(), **json.loads(json.dumps(first.report.settings)))
    assert same(state(first.student), state(again.student))
    assert Config(**first.report.settings).image_size == (SIZE, SIZE)
    assert isinstance(first.student, TinyNet)


def test_what_can_be_gone_through_once_is_not_evaluated_every_few_steps():
    batches = [(held_images(8), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(ValueError, match="evaluate is a list_iterator, which can be gone through once"):
        distill(tiny_teacher(), tiny_student(), evaluate=iter(batches), evaluate_every=3, steps=5, **QUICK)


def test_the_gpus_of_others_keep_their_random_state(monkeypatch):
    seeded, networks = [], (tiny_teacher(), tiny_student())
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    distill(*networks, steps=1, **QUICK)
    assert seeded == []


def test_gradients_that_the_caller_has_switched_off():
    for without in (torch.no_grad, torch.inference_mode):
        teacher, student = tiny_teacher(), tiny_student()
        with without():
            assert distill(teacher, student, steps=2, **QUICK).report.status == "completed"


def test_another_default_dtype_is_refused():
    teacher, student = tiny_teacher(), tiny_student()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match="set_default_dtype"):
            distill(teacher, student, steps=2, **QUICK)
    finally:
        torch.set_default_dtype(torch.float32)
