"""The command line: the Python call's names, tyro's errors for typing mistakes, one line for everything else."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from vitkd_fast import cli
from vitkd_fast.config import Config
from vitkd_fast.methods import DETECTION_METHODS, METHODS

timm = pytest.importorskip("timm")


def output_of(capsys, *arguments, code):
    with pytest.raises(SystemExit) as exit:
        cli.main(list(arguments))
    assert exit.value.code == code
    return capsys.readouterr()


def test_every_setting_is_a_flag(capsys):
    text = output_of(capsys, "distill", "--help", code=0).out
    for field in fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text, field.name
    text = output_of(capsys, "--help", code=0).out
    assert all(command in text for command in ("distill", "demo", "doctor", "methods"))


def words_of(help_text):
    """One line without tyro's frame, so that wrapping does not matter."""
    return " ".join(help_text.replace("│", " ").split())


@pytest.mark.parametrize("choice", [("--method", "dafl"), ("--method=dafl",), ("--method", "best", "--method", "dafl")])
def test_help_shows_the_methods_own_defaults(capsys, choice):
    text = words_of(output_of(capsys, "distill", *choice, "--help", code=0).out)
    config = Config(method="dafl")
    listed = text.partition("--method {")[2].partition("}")[0]
    assert listed.replace(" ", "").split(",") == list({**METHODS, **DETECTION_METHODS})
    assert "of which task. (default: dafl)" in text
    assert f"--student-steps INT Steps of the student in each round. (default: {config.student_steps})" in text
    weights = " ".join(f"{name}={weight:g}" for name, weight in config.generator_objectives.items())
    assert f"0 turns one off. (default: {weights})" in text
    plain = words_of(output_of(capsys, "distill", "--help", code=0).out)
    assert f"--student-steps INT Steps of the student in each round. (default: {Config().student_steps})" in plain
    assert "None" not in plain.partition("--generator STR")[2].partition("--optimizer")[0]


@pytest.mark.parametrize("module", ["vitkd_fast.demo", "vitkd_fast.detection.demo"])
def test_demo_hands_on_what_is_said(monkeypatch, module):
    given = {}
    monkeypatch.setattr(importlib.import_module(module), "demo", lambda **options: given.update(options))
    task = ["--detection"] if "detection" in module else []
    cli.main(["demo", *task, "--no-progress", "--seed", "3"])
    assert given == {"seed": 3, "json": None, "out": None, "progress": False}
    cli.main(["demo", *task, "--steps", "7"])
    assert (given["progress"], given["steps"]) == (True, 7)


def test_flags_are_the_fields_of_a_config(monkeypatch, tmp_path):
    given = {}

    def recorded(teacher, student, **options):
        given.update(options)
        return SimpleNamespace(report=SimpleNamespace(status="completed"), saved=True)

    # vitkd_fast.distill is the function; its module has the same name
    monkeypatch.setattr(importlib.import_module("vitkd_fast.distill"), "distill", recorded)
    names = ("distill", "--teacher", "a", "--student", "b", "--out", str(tmp_path))
    cli.main(
        [*names, "--method", "dafl", "--generator-objectives", "total-variation=0.1", "one_hot=0", "--shift", "0.25"]
    )
    assert given.pop("evaluate") is None
    weights = {"one_hot": 0, "total_variation": 0.1}
    assert Config(**given) == Config(method="dafl", shift=0.25, generator_objectives=weights, out=tmp_path)
    cli.main([*names, "--student-objectives", "tokens=0.5", "--learn-latent"])
    given.pop("evaluate")
    assert Config(**given) == Config(student_objectives={"tokens": 0.5}, learn_latent=True, out=tmp_path)


def test_methods_says_what_each_is(capsys):
    cli.main(["methods"])
    text = capsys.readouterr().out
    detecting = [f"{name}, with --task detection" for name in DETECTION_METHODS]
    assert [line for line in text.splitlines() if not line.startswith(" ")] == [*METHODS, *detecting]
    every = (*METHODS.values(), *DETECTION_METHODS.values())
    assert all(method.source in " ".join(text.split()) for method in every)
    assert max(map(len, text.splitlines())) <= 100


def test_mistyped_flags_and_values_are_tyros_errors(capsys):
    names = ("--teacher", "a", "--student", "b")
    assert "--stepz" in output_of(capsys, "distill", *names, "--stepz", "3", code=2).err
    assert "steps" in output_of(capsys, "distill", *names, "--steps", "many", code=2).err
    assert "student-loss" in output_of(capsys, "distill", *names, "--student-loss", "huber", code=2).err
    assert "--teacher" in output_of(capsys, "distill", code=2).err
    for word in ("tokens", "tokens=", "=1", "tokens=many"):
        error = words_of(output_of(capsys, "distill", *names, "--student-objectives", word, code=2).err)
        assert f"'{word}' is not NAME=WEIGHT, such as tokens=0.5" in error
    assert "--method" in output_of(capsys, "distill", *names, "--method", code=2).err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "without --out nothing would be left of the student"),
        (("--steps", "0"), "steps is 0; accepted: an integer of at least 1."),
        (("--teacher-checkpoint", "absent.pt"), "teacher_checkpoint absent.pt is not a file."),
        (("--evaluate", "absent"), "evaluate is 'absent', not a folder"),
        (("--method", "daf"), "method is 'daf'; did you mean dafl"),
        (("--generator", "convolution"), "generator is 'convolution'; did you mean convolutional?"),
        (("--generator-objectives", "onehot=1"), "generator_objectives has no 'onehot'; did you mean one_hot?"),
        (("--student-objectives", "tokens=-1"), "student_objectives is {'logits': 1.0, 'tokens': -1.0}; accepted: "),
    ],
)
def test_what_a_user_can_put_right_is_one_line(capsys, tmp_path, arguments, message):
    out = ("--out", str(tmp_path / "run")) if arguments else ()
    error = output_of(capsys, "distill", "--teacher", "test_vit", "--student", "test_vit", *out, *arguments, code=2).err
    assert error.startswith(f"vitkd: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--out", ""), ("--out=",), ("--evaluate", "")])
def test_nothing_is_no_path(capsys, arguments):
    error = output_of(capsys, "distill", "--teacher", "test_vit", "--student", "test_vit", *arguments, code=2).err
    assert error == f"vitkd: {arguments[0].rstrip('=')} is followed by nothing ('').\n"


def test_a_student_that_an_earlier_part_of_the_run_left_is_not_this_ones(monkeypatch, tmp_path, capsys):
    (tmp_path / "student.safetensors").write_text("half trained")
    result = SimpleNamespace(student=torch.nn.Linear(1, 1), saved=False, report=None)
    monkeypatch.setattr(importlib.import_module("vitkd_fast.distill"), "distill", lambda *_, **__: result)
    names = ("--teacher", "test_vit", "--student", "test_vit")
    error = output_of(capsys, "distill", *names, "--out", str(tmp_path), "--resume", code=2).err
    assert "the student could not be saved" in error and "it is in" in error


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise ValueError("not for users")

    monkeypatch.setattr("timm.is_model", broken)
    with pytest.raises(ValueError, match="not for users"):
        cli.main(["distill", "--teacher", "test_vit", "--student", "test_vit", "--out", str(tmp_path)])


def test_distill_by_names_and_checkpoint(tmp_path, capsys):
    torch.manual_seed(0)
    teacher = timm.create_model("test_vit", num_classes=3, in_chans=1, img_size=32)
    torch.save({"state_dict": teacher.state_dict()}, tmp_path / "teacher.pth")
    cli.main(
        [
            *("distill", "--teacher", "test_vit", "--teacher-checkpoint", str(tmp_path / "teacher.pth")),
            *("--student", "test_vit2", "--image-size", "32", "32", "--steps", "3", "--batch-size", "4"),
            *("--width", "8", "--latent", "8", "--out", str(tmp_path / "run")),
        ]
    )
    assert "completed: 3 steps" in capsys.readouterr().out
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert (report["teacher"]["name"], report["student"]["name"]) == ("test_vit", "test_vit2")
    assert report["settings"]["channels"] == 1 and report["settings"]["image_size"] == [32, 32]
    assert (tmp_path / "run/student.safetensors").exists()


def test_ctrl_c_saves_the_student_and_exits_with_130(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "teacher.pth")
    names = ("--teacher", "test_vit", "--teacher-checkpoint", str(tmp_path / "teacher.pth"), "--student", "test_vit2")
    options = ("--batch-size", "2", "--width", "8", "--log-every", "1", "--steps", "100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "vitkd_fast", "distill", *names, *options, "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted: " in output
    assert json.loads((tmp_path / "run/report.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "run/student.safetensors").exists()
    with pytest.raises(SystemExit, match="2"):  # what was saved is not replaced unasked
        cli.main(["distill", *names, *options, "--out", str(tmp_path / "run")])
    assert "go on with resume=True (--resume)" in capsys.readouterr().err


def test_python_m_and_doctor():
    result = subprocess.run(
        [sys.executable, "-m", "vitkd_fast", "doctor"], capture_output=True, text=True, timeout=120, check=True
    )
    assert torch.__version__ in result.stdout and "kd_loss" in result.stdout


def test_importing_the_package_and_the_command_line_does_not_import_timm():
    code = "import sys, vitkd_fast, vitkd_fast.cli, vitkd_fast.distill; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("command", ["methods", "doctor"])
def test_what_nobody_reads_ends_quietly(command):
    piped = f'"{sys.executable}" -m vitkd_fast {command} | true; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_terminal_of_few_characters():
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "vitkd_fast", "methods"], capture_output=True, env=environ)
    assert done.returncode == 0 and b"with --task detection" in done.stdout and b"?" in done.stdout


def test_what_the_system_refuses_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--steps", "1", "--json", str(tmp_path)])
    assert stop.value.code == 2 and "Is a directory" in capsys.readouterr().err
