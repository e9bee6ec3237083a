"""The loop: it learns, it leaves alone what is not its own, it never waits for the device, it stops as it should."""

import importlib
import json
import math
import random
from collections import Counter

import pytest
import torch
from tiny import CLASSES, SIZE, TinyNet, same, smooth_images, state, tiny_student, tiny_teacher
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitkd_fast.config import Config
from vitkd_fast.distill import distill
from vitkd_fast.guard import NonFiniteError
from vitkd_fast.synthesis import is_due

QUICK = {"method": "adversarial", "batch_size": 32, "width": 16, "latent": 16, "log_every": 10, "progress": False}


def held_images(count=512):
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return smooth_images(count)


def agreement_of(student, teacher):
    with torch.no_grad():
        return (student(held_images()).argmax(1) == teacher(held_images()).argmax(1)).float().mean().item()


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


def test_bfloat16_learns_too():
    teacher, student = tiny_teacher(), tiny_student()
    before = agreement_of(student.eval(), teacher)
    distill(teacher, student.train(), steps=300, student_lr=0.03, precision="bfloat16", **QUICK)
    assert agreement_of(student, teacher) > before + 0.25
    assert all(weight.dtype is torch.float32 for weight in student.parameters())


def test_networks_without_tokens_distil_with_a_note():
    def plain(width):
        network = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, width), nn.ReLU(), nn.Linear(width, CLASSES))
        network.default_cfg = {"input_size": (1, SIZE, SIZE)}
        return network

    result = distill(plain(16), plain(8), steps=12, **QUICK)
    assert "tokens" not in result.history[-1]
    assert result.report.notes[1:] == ["tokens is off: the student has no forward_features that gives (B, N, D) tokens"]
    assert result.report.settings["student_objectives"] == {"logits": 1.0, "tokens": 1.0}  # what was asked


def test_timm_vits_of_other_sizes_share_tokens_and_are_accelerated():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    def vit(dim, patch_size):
        return VisionTransformer(
            img_size=SIZE, patch_size=patch_size, in_chans=1, num_classes=3, embed_dim=dim, depth=2, num_heads=1
        )

    result = distill(vit(32, 4), vit(16, 4), steps=6, **QUICK)
    assert "tokens" in result.history[-1]
    assert any(note.startswith("teacher: 2 of 2 attention blocks") for note in result.report.notes)
    asked = {"attention": 1.0, "blocks": 1.0}
    result = distill(vit(32, 4), vit(16, 2), steps=6, accelerate=False, student_objectives=asked, **QUICK)
    assert {"tokens", "blocks"} < result.history[-1].keys()
    assert result.report.notes[1:] == ["attention is off: the student has 4×4 patches and the teacher 2×2"]


def test_networks_that_do_not_fit_are_refused_before_the_run(tmp_path):
    wrong_classes = tiny_student()
    wrong_classes.head = nn.Linear(8, CLASSES + 1)
    with pytest.raises(ValueError, match="student knows 5 classes and teacher 4"):
        distill(tiny_teacher(), wrong_classes, steps=5, **QUICK)
    with pytest.raises(ValueError, match=r"teacher TinyNet cannot take images of shape \(2, 3, 8, 8\)"):
        distill(tiny_teacher(), tiny_student(), steps=5, channels=3, **QUICK)
    with pytest.raises(ValueError, match="teacher gives shape"):
        distill(nn.Flatten(2), tiny_student(), image_size=(8, 8), channels=1, **QUICK)
    with pytest.raises(ValueError, match="no weight with requires_grad=True"):
        distill(tiny_teacher(), tiny_student().requires_grad_(False), steps=5, **QUICK)
    with pytest.raises(TypeError, match="did you mean steps"):
        distill(tiny_teacher(), tiny_student(), step=5)
    with pytest.raises(TypeError, match="evaluate is a int; accepted: batches"):
        distill(tiny_teacher(), tiny_student(), evaluate=3)


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


def test_a_student_that_recomputes_its_activations_learns_under_every_objective():
    vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    sizes = {"img_size": SIZE, "patch_size": 4, "in_chans": 1, "num_classes": CLASSES, "depth": 1, "num_heads": 1}
    students = [vit(**sizes, embed_dim=16) for _ in range(2)]
    students[1].load_state_dict(students[0].state_dict())
    students[1].set_grad_checkpointing(True)
    for student in students:
        distill(tiny_teacher(), student, steps=6, generator_steps=2, **QUICK)
    assert same(state(students[0]), state(students[1]))


def test_a_convolution_of_one_pixel_in_two_learns():
    """Of RepVGG, MobileOne and FastViT: on images that are not contiguous torch's own gradient of it crashes."""

    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(1, 48, 3, 2, 1), nn.Conv2d(1, 48, 1, 2)
            self.head = nn.Linear(48, CLASSES)

        def forward(self, images):
            assert images.is_contiguous()
            return self.head((self.wide(images) + self.narrow(images)).relu().mean((2, 3)))

    for shift in (0.0, 0.25):
        distill(tiny_teacher(), Strided(), steps=4, shift=shift, **{**QUICK, "method": "best"})


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (lambda: tiny_teacher().bfloat16(), tiny_student, r"weights are bfloat16, .* teacher.float\(\)"),
        (tiny_teacher, lambda: tiny_student().double(), r"weights are float64, .* student.float\(\)"),
        (lambda: nn.Sequential(tiny_teacher(), nn.Linear(CLASSES, 1)), tiny_student, "teacher gives one logit"),
    ],
)
def test_networks_that_cannot_be_used_as_they_are_say_what_to_do(teacher, student, message):
    with pytest.raises(ValueError, match=message):
        distill(teacher(), student(), steps=3, image_size=(SIZE, SIZE), **QUICK)


@pytest.mark.parametrize("student", [None, len])
def test_a_student_is_a_module_or_a_name(student):
    with pytest.raises(TypeError, match=r"student is a .*; accepted: an nn\.Module, or the name of a model"):
        distill(tiny_teacher(), student, steps=3, **QUICK)


def test_a_student_made_of_the_teachers_parts_is_refused():
    teacher, student = tiny_teacher(), tiny_student()
    student.head = teacher.head
    with pytest.raises(ValueError, match=r"student's head\.weight is the teacher's own; give it a copy"):
        distill(teacher, student, steps=5, **QUICK)


def test_what_can_be_gone_through_once_is_not_evaluated_every_few_steps():
    batches = [(held_images(8), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(ValueError, match="evaluate is a list_iterator, which can be gone through once"):
        distill(tiny_teacher(), tiny_student(), evaluate=iter(batches), evaluate_every=3, steps=5, **QUICK)


def test_the_gpus_of_others_keep_their_random_state(monkeypatch):
    seeded, networks = [], (tiny_teacher(), tiny_student())
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    distill(*networks, steps=1, **QUICK)
    assert seeded == []


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


def test_a_student_that_drops_patches_is_not_compared_by_tokens():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": SIZE, "patch_size": 2, "in_chans": 1, "num_classes": 3, "num_heads": 1, "depth": 2}
    teacher, student = (
        VisionTransformer(embed_dim=32, **sizes),
        VisionTransformer(embed_dim=16, patch_drop_rate=0.5, **sizes),
    )
    result = distill(teacher, student, steps=3, **QUICK)
    assert "tokens is off: the student drops patches while it trains (patch_drop_rate)" in result.report.notes


def test_a_student_of_one_block_has_no_blocks_to_compare():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": SIZE, "patch_size": 2, "in_chans": 1, "num_classes": 3, "num_heads": 1}
    teacher, student = (VisionTransformer(embed_dim=dim, depth=depth, **sizes) for dim, depth in ((32, 3), (16, 1)))
    asked = {"blocks": 1.0, "tokens": 0.0, "logits": 0.0}
    with pytest.raises(ValueError, match=r"nothing to minimise.*blocks is off: the student has one block"):
        distill(teacher, student, steps=3, student_objectives=asked, **QUICK)


def test_gradients_that_the_caller_has_switched_off():
    for without in (torch.no_grad, torch.inference_mode):
        teacher, student = tiny_teacher(), tiny_student()
        with without():
            assert distill(teacher, student, steps=2, **QUICK).report.status == "completed"


def test_a_teacher_is_not_its_own_student():
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match="teacher and student are the same module"):
        distill(teacher, teacher, steps=2, **QUICK)


def test_another_default_dtype_is_refused():
    teacher, student = tiny_teacher(), tiny_student()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match="set_default_dtype"):
            distill(teacher, student, steps=2, **QUICK)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_report_that_nobody_reads_loses_nothing(monkeypatch):
    import builtins

    def broken(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(builtins, "print", broken)
    assert distill(tiny_teacher(), tiny_student(), steps=2, **{**QUICK, "progress": True}).report.steps == 2


def test_a_traced_student_is_a_student():
    student = torch.jit.trace(tiny_student().eval(), torch.zeros(2, 1, SIZE, SIZE))
    result = distill(tiny_teacher(), student, steps=2, accelerate=False, **QUICK)
    assert result.report.status == "completed"
