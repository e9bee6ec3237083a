"""The run folder: complete, readable by other tools, and never a finished run overwritten unasked."""

import contextlib
import json
import os
import shutil
import signal
import time
import warnings

import pytest
import torch
from tiny import TinyNet, failing_teacher, same, smooth_images, state, tiny_student, tiny_teacher
from torch import nn

from vitkd_fast.config import Config
from vitkd_fast.distill import distill
from vitkd_fast.run import FILES, SAVED, RunFolder, image_grid, unstoppable

QUICK = {"method": "adversarial", "batch_size": 16, "width": 16, "latent": 16, "log_every": 5, "progress": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "new" / "folder"
    teacher = tiny_teacher()
    images = smooth_images(100)
    with torch.no_grad():
        labels = teacher(images).argmax(1)
    labels[:25] = (labels[:25] + 1) % 4  # the teacher is right in three quarters
    result = distill(teacher, tiny_student(), steps=12, out=folder, evaluate=[(images, labels)], **QUICK)
    return folder, result


def test_the_folder_is_complete(run):
    folder, _ = run
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_config_is_resolved_and_repeats_the_run(run):
    folder, result = run
    config = json.loads((folder / "config.json").read_text())
    assert config["teacher"] == config["student"] == "TinyNet"
    settings = config["settings"]
    assert settings["image_size"] == [8, 8] and settings["mean"] == [0.5] and settings["std"] == [0.25]
    assert settings["channels"] == 1 and settings["device"] == "cpu" and settings["steps"] == 12
    assert None not in (value for name, value in settings.items() if name != "teacher_checkpoint")
    assert Config(**settings).to_dict() == result.report.settings
    again = distill(tiny_teacher(), tiny_student(), **{**settings, "out": None})
    assert same(state(again.student), state(result.student))


def test_a_pool_of_large_images_is_smaller_than_the_method_says(monkeypatch):
    monkeypatch.setattr("vitkd_fast.pair.POOL_BYTES", 70 * 8 * 8)
    quick = {"steps": 3, "batch_size": 16, "progress": False}
    report = distill(tiny_teacher(), tiny_student(), **quick).report
    assert report.settings["pool"] == 70 and any("pool is 70, not 20,480" in note for note in report.notes)
    report = distill(tiny_teacher(), tiny_student(), pool=100, **quick).report  # somebody's own number stays
    assert report.settings["pool"] == 100 and "pool is" not in str(report.notes)
    report = distill(tiny_teacher(), tiny_student(), method="noise", **quick).report  # which keeps none
    assert "pool is" not in str(report.notes)


def test_metrics_are_the_history_line_by_line(run):
    folder, result = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12] == [entry["step"] for entry in result.history]
    assert lines[0].keys() == {
        *("step", "disagreement", "one_hot", "balance", "generator_gradient", "logits", "tokens", "agreement"),
        *("student_gradient", "images_per_second", "skipped"),
    }


def test_the_student_can_be_loaded(run):
    from safetensors.torch import load_file

    folder, result = run
    student = TinyNet(8)
    student.load_state_dict(load_file(folder / "student.safetensors"))
    assert same(state(student), state(result.student))


def test_the_report_says_what_was_measured(run):
    folder, result = run
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "completed" and report["steps"] == 12 and report["seconds"] > 0
    assert report["teacher_accuracy"] == 0.75
    assert report["student_accuracy"] == result.report.student_accuracy
    assert 0 <= report["agreement"] <= 1
    assert report["teacher"]["parameters"] == sum(weight.numel() for weight in tiny_teacher().parameters())
    assert report["versions"]["torch"] == torch.__version__ and report["versions"]["device"]
    text = str(result.report)
    assert "75.0 %" in text and "completed: 12 steps" in text


def test_a_finished_run_is_kept_unless_told_otherwise(run):
    folder, _ = run
    before = (folder / "report.json").read_text()
    with pytest.raises(ValueError, match="is not a timm model"):  # found out before anything is cleared away
        distill(tiny_teacher(), "no_such_model", steps=3, out=folder, overwrite=True, **QUICK)
    with pytest.raises(FileExistsError, match="holds a finished run; choose another folder or pass overwrite=True"):
        distill(tiny_teacher(), tiny_student(), steps=3, out=folder, **QUICK)
    assert (folder / "report.json").read_text() == before


def test_an_unfinished_run_is_replaced(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("left over\n")
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path, overwrite=False)
    folder.start({"steps": 1})
    folder.log({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("count, columns, rows", [(1, 1, 1), (3, 3, 1), (64, 8, 8), (11, 8, 2)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_image_grid_holds_every_image(count, columns, rows, channels):
    pixels = (torch.arange(count) * 3 / 255).view(-1, 1, 1, 1).expand(-1, channels, 8, 8)
    grid = image_grid(pixels)
    assert grid.size == (columns * 50, rows * 50)  # 8×8 magnified six times, with a border
    for index in range(count):
        centre = grid.getpixel((index % 8 * 50 + 25, index // 8 * 50 + 25))
        assert centre == (3 * index,) * 3


def test_image_grid_keeps_colour_and_large_images():
    pixels = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1).expand(1, 3, 60, 64)
    grid = image_grid(pixels)
    assert grid.size == (66, 62) and grid.getpixel((30, 30)) == (255, 128, 0)


def test_metrics_are_valid_json_when_a_window_has_no_generator_step(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    distill(tiny_teacher(), tiny_student(), steps=6, out=tmp_path, **{**QUICK, "log_every": 2})
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["disagreement" in line for line in lines] == [True, False, True]


@pytest.mark.parametrize("name", ["config.json", "student.safetensors", "images.png"])
def test_files_that_are_no_runs_are_kept_unless_told_otherwise(tmp_path, name):
    (tmp_path / name).write_text("mine")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=f"holds {name}, which the run would replace"):
            distill(tiny_teacher(), tiny_student(), steps=3, out=tmp_path, resume=resume, **QUICK)
    assert (tmp_path / name).read_text() == "mine"
    distill(tiny_teacher(), tiny_student(), steps=3, out=tmp_path, overwrite=True, **QUICK)


@pytest.mark.parametrize("error", [ValueError("no data here"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_student_outlives_an_evaluation_that_fails_at_the_end(tmp_path, error):
    student = tiny_student()

    def evaluate(model):
        if model is student:
            raise error
        return 0.5

    expected = (
        contextlib.nullcontext() if isinstance(error, KeyboardInterrupt) else pytest.warns(match="is trained, but")
    )
    with expected:
        result = distill(tiny_teacher(), student, steps=3, evaluate=evaluate, out=tmp_path, **QUICK)
    assert result.report.status == "completed" and result.report.student_accuracy is None
    assert "the evaluation at the end" in result.report.notes[-1]
    load_file = pytest.importorskip("safetensors.torch").load_file
    assert same(load_file(tmp_path / "student.safetensors"), state(student))
    assert (tmp_path / "report.json").exists()


def test_a_folder_that_cannot_be_written_to_does_not_end_a_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(RunFolder, "_write_entry", full)
    monkeypatch.setattr(RunFolder, "_write_student", full)
    with pytest.warns(match="cannot be written to: no space left"):
        result = distill(tiny_teacher(), tiny_student(), steps=3, out=tmp_path, **QUICK)
    assert result.report.status == "completed" and len(result.history) == 1


def test_an_error_on_the_way_is_raised_and_the_run_saved(tmp_path):
    teacher = failing_teacher(LookupError("a stranger's bug"), at=8)
    with pytest.raises(LookupError, match="a stranger's bug"):
        distill(teacher, tiny_student(), steps=12, out=tmp_path, **QUICK)
    assert 0 < torch.load(tmp_path / "run.pt", weights_only=True)["state"]["log"]["steps"] < 12
    resumed = distill(teacher, tiny_student(), steps=12, out=tmp_path, resume=True, **QUICK)
    assert resumed.report.status == "completed" and resumed.report.steps == 12


def test_a_student_that_no_file_can_hold_is_returned_and_its_run_saved(tmp_path):
    class Remembers(TinyNet):
        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            pass

    with pytest.warns(match="cannot be written to: "):
        result = distill(tiny_teacher(), Remembers(8), steps=3, out=tmp_path, **QUICK)
    assert result.report.status == "completed" and (tmp_path / "run.pt").exists()


@pytest.mark.parametrize("kind", ["file", "below a file", "read-only"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_loaded(kind, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    if kind == "read-only":
        monkeypatch.setattr("os.access", lambda *_: False)
    out = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "read-only": tmp_path / "run"}[kind]
    with pytest.raises(OSError, match=r"out=.* cannot be (made|written to): .* Choose another folder"):
        distill("no such teacher", "nor student", out=out)
    assert (tmp_path / "file").read_text() == "mine"


def test_files_of_another_program_are_kept(tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    (tmp_path / "metrics.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds config\.json, which the run would replace"):
        distill(tiny_teacher(), tiny_student(), steps=1, out=tmp_path, **QUICK)
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    first = RunFolder(tmp_path, overwrite=False)
    second = RunFolder(tmp_path, overwrite=False)
    first.start({"teacher": "a", "student": "b", "settings": {}})
    with pytest.raises(FileExistsError, match="by a run that has not ended"):
        second.start({})
    first.close()
    assert json.loads((tmp_path / "config.json").read_text())["teacher"] == "a"
    second.start({"teacher": "c", "student": "b", "settings": {}})
    second.close()


def test_what_another_run_left_meanwhile_is_kept(tmp_path):
    asked = {"teacher": "a", "student": "b", "settings": {}}
    for left in ("report.json", SAVED):
        for resume in (False, True):
            waiting = RunFolder(tmp_path, overwrite=False, resume=resume)
            (tmp_path / left).write_text("mine")
            with pytest.raises(FileExistsError, match="holds a"):
                waiting.start(asked)
            waiting.close()
            assert (tmp_path / left).read_text() == "mine"
            (tmp_path / left).unlink()
    RunFolder(tmp_path, overwrite=False).start(asked)


def test_an_entry_that_cannot_be_written_leaves_the_folder_locked(tmp_path):
    asked = {"teacher": "a", "student": "b", "settings": {}}
    first = RunFolder(tmp_path, overwrite=False)
    first.start(asked)
    with pytest.warns(UserWarning, match="the run goes on"):
        first.log({"loss": object()})
    first.log({"loss": 1.0})
    with pytest.raises(FileExistsError, match="by a run that has not ended"):
        RunFolder(tmp_path, overwrite=True).start(asked)
    first.close()
    RunFolder(tmp_path, overwrite=True).start(asked)


def test_a_disk_that_is_full_at_the_start_leaves_nothing_that_is_in_the_way(tmp_path, monkeypatch):
    def cut_off(path, text, **_):
        with path.open("w") as file:
            file.write(text[:5])
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", cut_off)
    with pytest.raises(OSError, match="No space left"):
        distill(tiny_teacher(), tiny_student(), steps=3, out=tmp_path, **QUICK)
    monkeypatch.undo()
    assert distill(tiny_teacher(), tiny_student(), steps=3, out=tmp_path, **QUICK).saved


def test_a_folder_that_is_gone_is_made_again(tmp_path):
    out, asked = tmp_path / "run", []

    def gone(model):
        asked.append(model)
        if len(asked) == 2:  # in the middle of the run; the first is for the teacher's accuracy, before it
            shutil.rmtree(out)
        return 0.5

    distill(tiny_teacher(), tiny_student(), steps=5, out=out, evaluate=gone, evaluate_every=3, **QUICK)
    assert len(asked) == 3
    assert {"student.safetensors", "images.png", "report.json"} <= {path.name for path in out.iterdir()}


def test_without_its_student_a_run_is_not_called_finished(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(RunFolder, "_write_student", full)
    with pytest.warns(UserWarning, match="No space left"):
        result = distill(tiny_teacher(), tiny_student(), steps=5, out=tmp_path, **QUICK)
    assert result.report.status == "completed" and not (tmp_path / "report.json").exists() and not result.saved


def test_warnings_that_are_errors_end_no_run(tmp_path, monkeypatch):
    asked = []

    def failing(model):
        asked.append(model)
        if len(asked) > 1:
            raise RuntimeError("of a stranger's")
        return 0.5

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = distill(tiny_teacher(), tiny_student(), steps=5, out=tmp_path, evaluate=failing, **QUICK)
    assert any("of a stranger's" in note for note in result.report.notes)
    assert (tmp_path / "report.json").exists()


def test_ctrl_c_waits_for_what_is_being_saved():
    with unstoppable():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


class Armed(torch.utils.data.Dataset):
    """Images that a worker cannot read once it is told so."""

    def __init__(self) -> None:
        self.armed = torch.zeros(1).share_memory_()

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index):
        if self.armed.item() and index == 5:
            raise OSError("a hiccup")
        return torch.zeros(1, 8, 8), index % 4


def test_a_run_goes_on_though_an_earlier_ones_workers_have_not_ended(tmp_path):
    images = Armed()
    loader = torch.utils.data.DataLoader(images, batch_size=4, num_workers=1)
    options = {**QUICK, "steps": 12, "evaluate": loader, "evaluate_every": 6, "out": tmp_path / "run"}

    class Arming(TinyNet):
        def forward(self, given):
            images.armed += len(given) == QUICK["batch_size"]
            return super().forward(given)

    arming = Arming(16)
    with pytest.raises(OSError, match="a hiccup") as kept:  # with its traceback, which has the loader's iterator
        distill(arming, tiny_student(), **options)
    images.armed.zero_()
    calm = TinyNet(16)
    calm.load_state_dict(arming.state_dict())
    with pytest.raises(ValueError, match="is of a run whose teacher was"):  # and not: being written to
        distill(calm, tiny_student(), resume=True, **options)
    assert kept.value.args


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def measured(model):
        os.chdir(tmp_path / "elsewhere")
        return 0.5

    distill(tiny_teacher(), tiny_student(), steps=3, evaluate=measured, out="run", **QUICK)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(FILES)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_wrapped_student_is_saved_as_what_is_in_it(tmp_path):
    from safetensors.torch import load_model

    wrapped = nn.DataParallel(tiny_student())
    distill(tiny_teacher(), wrapped, steps=3, image_size=(8, 8), channels=1, out=tmp_path / "run", **QUICK)
    loaded = tiny_student()
    load_model(loaded, str(tmp_path / "run" / "student.safetensors"))
    assert same(state(loaded), state(wrapped.module))


def test_an_empty_path_is_no_folder():
    with pytest.raises(ValueError, match="out is ''; accepted: a path, None"):
        distill(tiny_teacher(), tiny_student(), steps=3, out="", **QUICK)


def test_an_exit_leaves_a_save_and_an_unlocked_folder(tmp_path):
    student = tiny_student()
    with pytest.raises(SystemExit) as held:  # which keeps the frames alive
        distill(failing_teacher(SystemExit(3), at=20), student, steps=100, out=tmp_path, **QUICK)
    assert held.value.code == 3 and (tmp_path / SAVED).exists() and not student.training
    assert distill(tiny_teacher(), tiny_student(), steps=3, out=tmp_path, overwrite=True, **QUICK).saved
