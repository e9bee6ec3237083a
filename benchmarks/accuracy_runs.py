"""One contender's run: kept from an earlier time, or trained for its steps or its seconds, and measured."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accuracy_bench import Bench, date_and_commit, hash_of, say, write_whole
from accuracy_learning import (
    REAL,
    Learning,
    data_free,
    kd_on_real_images,
    learning_from_labels,
    method_of,
    options_of,
)
from accuracy_pair import Teacher, predictions
from torch import nn

from vitkd_fast.config import Config
from vitkd_fast.methods import settings_of
from vitkd_fast.models import digest

PROBE = 0.05  # share of an equal time's seconds that measuring the speed takes, two seconds at least
DRIFT = 0.1  # a run that missed its seconds by more than this share says so


@dataclass
class Run:
    """One student. Shares in [0, 1], measured on the test images."""

    method: str
    seed: int
    accuracy: float | None = None
    agreement: float | None = None
    """Share of test images on which it decides as its teacher does."""
    seconds: float | None = None
    """Wall time of learning, all of it: making images and learning from them."""
    images_per_second: float | None = None
    """That the student learnt from."""
    steps: int = 0
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    commit: str | None = None
    error: str | None = None


def run_or_kept(bench: Bench, teacher: Teacher, student: nn.Module, name: str, seed: int) -> tuple[Run, bool]:
    """The run of this contender and seed, and whether it was done before with the same settings."""
    arguments, task = bench.arguments, bench.task
    settings = Config(method=method_of(name), **options_of(bench, name, seed, arguments.steps or 1)).to_dict()
    asked = {
        "data": bench.fingerprint,
        "teacher": teacher.digest,
        "student": digest(student),
        "sizes": [arguments.student, task.student],
        "contender": name,
        "settings": settings,
        "seconds": arguments.seconds,
        "recipe": asdict(task.recipe) if name in REAL else None,
        **bench.machine,
    }
    place = arguments.cache / f"{arguments.data}-{name}-seed{seed}-{hash_of(asked)}"
    if (place / "run.json").exists() and not arguments.fresh:
        run, kept = Run(**json.loads((place / "run.json").read_text())), True
    else:
        say(f"{arguments.data}, seed {seed}: {name} …")
        run, kept = one_run(bench, teacher, student, name, seed, place), False
    if (place / "images.png").exists() and run.error is None:
        (arguments.out / "samples").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place / "images.png", arguments.out / f"samples/{arguments.data}-{name}-seed{seed}.png")
    return run, kept


def one_run(bench: Bench, teacher: Teacher, student: nn.Module, name: str, seed: int, place: Path) -> Run:
    """Train the student in place, measure it, and keep what was measured, unless it failed, in the folder `place`."""
    seconds = bench.arguments.seconds
    run = Run(name, seed, **date_and_commit())
    try:
        learning = _learn(bench, teacher, student, run, place)
    except Exception as error:  # one method that fails must not take the others' hours with it
        run.error = f"{type(error).__name__}: {error}"
        return run
    run.seconds, run.images_per_second = learning.seconds, learning.images_per_second
    run.settings, run.notes = learning.settings, learning.notes
    if seconds and abs(run.seconds / seconds - 1) > DRIFT:
        run.notes.append(f"took {run.seconds:.1f} s of {seconds:g} s")
    found = predictions(student, bench.data.test, teacher.spec)
    run.accuracy = (found == bench.data.test.labels).float().mean().item()
    run.agreement = (found == teacher.predictions).float().mean().item()
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / "run.json", asdict(run))
    return run


def _learn(bench: Bench, teacher: Teacher, student: nn.Module, run: Run, place: Path) -> Learning:
    def learn(pupil: nn.Module, steps: int, out: Path | None) -> Learning:
        if run.method == "real_labels":
            return learning_from_labels(bench, teacher, pupil, run.seed, steps)
        options = options_of(bench, run.method, run.seed, steps) | {"out": out, "overwrite": True}
        if run.method == "real_kd":
            return kd_on_real_images(bench, teacher.model, pupil, options)
        return data_free(teacher.model, pupil, run.method, options)

    run.steps = bench.arguments.steps or steps_in(
        bench.arguments.seconds,
        lambda steps: learn(copy.deepcopy(student), steps, None).seconds,
        1 if run.method in REAL else settings_of(run.method)["student_steps"],
    )
    return learn(student, run.steps, place)


def steps_in(seconds: float, seconds_of: Callable[[int], float], round_length: int) -> int:
    """How many student steps fit, by the speed of a short run: the learning rate's cycle must know its end beforehand.

    The short run is of whole rounds, and as long as PROBE says; those before it, each half as long, warm up.
    """
    steps = round_length * -(-10 // round_length)
    enough = min(max(PROBE * seconds, 2.0), seconds)
    while (taken := seconds_of(steps)) < enough:
        steps *= 2
    return max(1, round(seconds * steps / taken))


def progress_of(run: Run) -> str:
    if run.error:
        return f"{run.method}, seed {run.seed}: FAILED, {run.error}"
    assert run.accuracy is not None and run.agreement is not None
    return (
        f"{run.method}, seed {run.seed}: {100 * run.accuracy:.2f} %, agreement {100 * run.agreement:.2f} %, "
        f"{run.steps:,} steps in {run.seconds:.1f} s, {run.images_per_second:,.0f} images/s"
    )
