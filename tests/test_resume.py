"""A run that was stopped goes on as if it had not been, and nothing of it is thrown away unasked."""

import json

import pytest
import torch
from tiny import TinyNet, failing_teacher, same, state, tiny_student, tiny_teacher

from vitkd_fast.distill import distill
from vitkd_fast.methods import METHODS
from vitkd_fast.run import SAVED

QUICK = {
    **{"batch_size": 16, "width": 16, "latent": 16, "log_every": 4, "progress": False, "steps": 13},
    **{"generator_steps": 2, "student_steps": 3, "pool": 64},
}
OFTEN = {"save_minutes": 1e-9}  # after every step


class Killed(BaseException):
    """What no run is prepared for."""


def killed(*, at, folder, teacher=tiny_teacher, student=tiny_student, **options):
    """A run that ends in its step `at`, without a report."""

    asked = []

    def stop(model):
        asked.append(model)
        if len(asked) > 1:  # the first is for the teacher's accuracy, before the run
            raise Killed
        return 0.5

    with pytest.raises(Killed):
        distill(teacher(), student(), out=folder, evaluate=stop, evaluate_every=at, **QUICK | OFTEN | options)
    assert not (folder / "report.json").exists()


def without_times(history):
    return [{name: value for name, value in entry.items() if name != "images_per_second"} for entry in history]


@pytest.mark.parametrize(
    "options",
    [{"method": name} for name in METHODS] + [{"method": "nayer", "life": 3}],
    ids=lambda o: "-".join(map(str, o.values())),
)
@pytest.mark.parametrize("at", [5, 7])  # inside a round and after its end
def test_it_ends_as_it_would_have(options, at, tmp_path):
    options = QUICK | options
    whole = distill(tiny_teacher(), tiny_student(), **options)
    killed(at=at, folder=tmp_path, **options)
    student = tiny_student(seed=9)  # whatever it holds: the save is what counts
    resumed = distill(tiny_teacher(), student, out=tmp_path, resume=True, **options)
    assert resumed.student is student and resumed.report.steps == 13
    assert same(state(resumed.student), state(whole.student))
    assert same(state(resumed.generator), state(whole.generator))
    assert without_times(resumed.history) == without_times(whole.history)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == resumed.history
    assert not (tmp_path / SAVED).exists()


def test_the_time_before_counts(tmp_path):
    killed(at=8, folder=tmp_path)
    saved = torch.load(tmp_path / SAVED, weights_only=True)
    saved["state"]["log"]["seconds"] += 1000
    torch.save(saved, tmp_path / SAVED)
    report = distill(tiny_teacher(), tiny_student(), out=tmp_path, resume=True, **QUICK).report
    assert 1000 < report.seconds < 1100
    assert report.images_per_second == pytest.approx(13 * 16 / report.seconds)


def test_after_ctrl_c(tmp_path):
    """It has saved a student and a report already; both give way to those of the end."""
    options = {**QUICK, "out": tmp_path, "method": "dfad"}

    teacher = failing_teacher(KeyboardInterrupt(), at=15)
    stopped = distill(teacher, tiny_student(), **options).report
    assert stopped.status == "interrupted" and 0 < stopped.steps < 13
    assert any("resume=True" in note and str(tmp_path) in note for note in stopped.notes)
    assert {"report.json", "student.safetensors", SAVED} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="was stopped; go on with resume=True"):
        distill(teacher, tiny_student(), **options)
    finished = distill(teacher, tiny_student(), resume=True, **options)
    assert finished.report.status == "completed" and finished.report.steps == 13
    assert [entry["step"] for entry in finished.history] == [4, 8, 12, 13]
    assert json.loads((tmp_path / "report.json").read_text())["status"] == "completed"
    with pytest.raises(FileExistsError, match="holds a finished run"):
        distill(teacher, tiny_student(), resume=True, **options)


def test_without_a_run_to_go_on_with_it_begins(tmp_path):
    fresh = distill(tiny_teacher(), tiny_student(), **QUICK)
    resumed = distill(tiny_teacher(), tiny_student(), out=tmp_path / "new", resume=True, **QUICK)
    assert same(state(fresh.student), state(resumed.student))


def test_it_is_replaced_only_when_told(tmp_path):
    killed(at=8, folder=tmp_path)
    with pytest.raises(FileExistsError, match=r"was stopped; go on with resume=True \(--resume\)"):
        distill(tiny_teacher(), tiny_student(), out=tmp_path, **QUICK)
    assert (tmp_path / SAVED).exists()
    again = distill(tiny_teacher(), tiny_student(), out=tmp_path, overwrite=True, **QUICK)
    assert [entry["step"] for entry in again.history] == [4, 8, 12, 13]
    assert not (tmp_path / SAVED).exists()


def wrong_teacher():
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.head.bias[0] += 1e-3
    return teacher


@pytest.mark.parametrize(
    "change, told",
    [
        ({"steps": 14}, "steps was 13, and now it is 14"),
        ({"student_objectives": {"tokens": 0.5}}, "student_objectives was .*1.0.* now it is .*0.5"),
        ({"teacher": wrong_teacher}, "teacher was TinyNet with weights"),
        ({"student": lambda: TinyNet(9)}, r"student was TinyNet with \d+ parameters, and now it is TinyNet with"),
    ],
)
def test_another_run_is_refused(change, told, tmp_path):
    killed(at=8, folder=tmp_path)
    before = (tmp_path / SAVED).read_bytes()
    options = {"teacher": tiny_teacher, "student": tiny_student, **QUICK, "out": tmp_path, "resume": True, **change}
    with pytest.raises(ValueError, match=told):
        distill(options.pop("teacher")(), options.pop("student")(), **options)
    assert (tmp_path / SAVED).read_bytes() == before


def test_what_no_step_depends_on_may_change(tmp_path):
    whole = distill(tiny_teacher(), tiny_student(), **QUICK)
    killed(at=8, folder=tmp_path)
    options = {**QUICK, "log_every": 3, "max_skipped": 1, "save_minutes": 0.0}
    resumed = distill(tiny_teacher(), tiny_student(), out=tmp_path, resume=True, **options)
    assert same(state(whole.student), state(resumed.student))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    killed(at=8, folder=tmp_path)
    (tmp_path / SAVED).write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"run\.pt cannot be read .* pass overwrite=True"):
        distill(tiny_teacher(), tiny_student(), out=tmp_path, resume=True, **QUICK)
    assert (tmp_path / SAVED).exists()


@pytest.mark.parametrize("error", [OSError, RuntimeError])  # torch's writer turns the one into the other
def test_a_save_that_fails_does_not_end_the_run(error, tmp_path, monkeypatch):
    def full(content, path):
        path.write_bytes(b"half of it")
        raise error("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    report = distill(tiny_teacher(), tiny_student(), out=tmp_path, **QUICK | OFTEN).report
    assert report.status == "completed" and report.steps == 13
    assert report.notes.count("the run could not be saved: No space left on device") == 1
    assert not list(tmp_path.glob("run.*"))


def test_saving_changes_nothing_and_can_be_turned_off(tmp_path):
    often = distill(tiny_teacher(), tiny_student(), out=tmp_path / "a", **QUICK | OFTEN)
    never = distill(tiny_teacher(), tiny_student(), **QUICK)
    assert same(state(often.student), state(never.student))
    killed(at=8, folder=tmp_path / "b", save_minutes=0.0)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", "metrics.jsonl"]


@pytest.mark.parametrize("options, told", [({}, "there is no out"), ({"out": "x", "overwrite": True}, "overwrite is")])
def test_resume_wants_a_folder_to_itself(options, told):
    with pytest.raises(ValueError, match=f"resume is True, but {told}"):
        distill(tiny_teacher(), tiny_student(), resume=True, **options)


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    number = pytest.importorskip("numpy").float64(0.01)
    options = {"student_lr": number, "student_objectives": {"logits": number * 100}}
    killed(at=5, folder=tmp_path, **options)
    assert distill(tiny_teacher(), tiny_student(), out=tmp_path, resume=True, **QUICK | options).report.steps == 13


def test_what_could_not_be_read_back_is_not_called_saved(tmp_path, monkeypatch):
    from vitkd_fast.run import Log

    remembers = Log.state_dict
    monkeypatch.setattr(Log, "state_dict", lambda self: {**remembers(self), "of_its_own": Killed})
    report = distill(tiny_teacher(), tiny_student(), out=tmp_path, **QUICK | OFTEN).report
    assert any(note.startswith("the run could not be saved: ") for note in report.notes)
    assert not (tmp_path / SAVED).exists()


def test_an_error_leaves_an_exact_save_as_it_is(tmp_path):
    teacher = failing_teacher(LookupError("a stranger's bug"), at=15)
    options = {**QUICK, "method": "dfad"}
    whole = distill(tiny_teacher(), tiny_student(), **options)
    with pytest.raises(LookupError):
        distill(teacher, tiny_student(), out=tmp_path, **options | OFTEN)
    with pytest.raises(LookupError):  # in a run that has gone on, and has made no save of its own
        again = failing_teacher(LookupError("again"), at=8)
        distill(again, tiny_student(seed=8), out=tmp_path, resume=True, **options)
    resumed = distill(teacher, tiny_student(seed=9), out=tmp_path, resume=True, **options)
    assert same(state(resumed.student), state(whole.student))


def test_a_part_of_the_users_own_that_cannot_be_saved_is_noted(tmp_path):
    from torch import nn

    from vitkd_fast.objectives import STUDENT_OBJECTIVES, Objective

    class Remembering(nn.Module):
        def __init__(self, pair):
            super().__init__()

        def forward(self, scene):
            return (scene.student.logits - scene.teacher.logits).abs().mean()

        def get_extra_state(self):
            return {"key": lambda x: x}

    STUDENT_OBJECTIVES["remembering"] = Objective("remembering", Remembering, frozenset())
    try:
        options = QUICK | OFTEN | {"student_objectives": {"remembering": 1.0}}
        report = distill(tiny_teacher(), tiny_student(), out=tmp_path, **options).report
    finally:
        del STUDENT_OBJECTIVES["remembering"]
    assert report.status == "completed"
    assert [note for note in report.notes if note.startswith("the run could not be saved: ")]
    assert not (tmp_path / SAVED).exists() and not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("difference, told", [("normalisation", "student's images"), ("frozen", "weights that learn")])
def test_another_student_of_the_same_size_is_refused(difference, told, tmp_path):
    def other():
        student = tiny_student()
        if difference == "frozen":
            next(student.parameters()).requires_grad_(False)
        else:
            student.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.1,), "std": (0.9,)}
        return student

    killed(at=8, folder=tmp_path)
    with pytest.raises(ValueError, match=f"is of a run whose {told} was"):
        distill(tiny_teacher(), other(), out=tmp_path, resume=True, **QUICK)
