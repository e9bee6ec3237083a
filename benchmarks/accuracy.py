"""How good is a student made without data? Every method with the same student, start, batch and budget, side by side.

For each seed a teacher is trained; then the student learns from real labels and by KD on real images (the upper
bounds), from noise (the lower bound), and by each data-free method, which gets teacher and student and nothing else.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, Limits, _cpu_name, _git, record
from accuracy_data import Data, Labelled, read
from accuracy_models import (
    TASKS,
    ResNet,
    Task,
    digest,
    given_teacher,
    normalised,
    parameters,
    real_images,
    train_on_labels,
    vit,
)
from torch import Tensor, nn

from vitkd_fast.checkpoint import load_into, read_state_dict
from vitkd_fast.config import Config
from vitkd_fast.distill import distill
from vitkd_fast.generator import ImageSpec
from vitkd_fast.methods import BASE, METHODS, settings_of
from vitkd_fast.models import image_spec
from vitkd_fast.muon import hidden_matrices
from vitkd_fast.pair import probe, student_lr

REAL = ("real_labels", "real_kd")  # the contenders that see real images
OURS = ("best", "adversarial")
STUDENTS = ("student_objectives", "student_loss", "student_steps", "temperature")  # what a method decides of it
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


@dataclass(frozen=True)
class Teacher:
    model: nn.Module
    spec: ImageSpec
    predictions: Tensor
    """(N,) its decisions on the test images."""
    accuracy: float
    digest: str
    seconds: float | None
    """Of its training; None where it was given."""


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    arguments: argparse.Namespace
    task: Task
    data: Data
    fingerprint: str
    device: torch.device

    @property
    def machine(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _cpu_name()
        return {"device": name, "threads": self.arguments.threads, "precision": self.arguments.precision}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not in the cache yet, report everything; the exit status: 1 if a run failed."""
    bench = setup(argv)
    arguments = bench.arguments
    names = contenders(arguments)
    teachers: list[Teacher] = []
    runs: list[Run] = []
    total = arguments.seeds * len(names)
    for seed in range(arguments.seeds):
        try:
            teacher = teacher_of(bench, seed)
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(f"accuracy.py: {error}") from error
        teachers.append(teacher)
        for name in names:
            student = new_student(bench, teacher.spec, seed)
            run, kept = run_or_kept(bench, teacher, student, name, seed)
            runs.append(run)
            say(f"[{len(runs)}/{total}] {progress_of(run)}{' (kept)' if kept else ''}")
    return report(bench, teachers, student, runs)


def setup(argv: Sequence[str] | None) -> Bench:
    options = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = options.add_argument
    add("--data", choices=list(TASKS), default="digits")
    add("--data-dir", type=Path, metavar="DIR", help="files of MNIST or CIFAR-10")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--skip", nargs="+", choices=[*REAL, "noise"], default=[], metavar="BOUND", help="bounds to leave out")
    add("--seeds", type=_positive, default=3, help="0, 1, … of teacher, student and images")
    budget = options.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=_positive, help="student steps of every run; by default the data set's")
    budget.add_argument("--seconds", "--equal-time", type=float, metavar="S", help="of every run, instead of steps")
    add("--teacher-checkpoint", type=Path, metavar="FILE", help="weights of a teacher that is trained already")
    add("--teacher-json", type=Path, metavar="FILE", help="a teacher of another make; its weights beside it")
    add("--teacher-size", nargs="+", type=_size, default=[], metavar="KEY=VALUE", help="as in embed_dim=48 depth=3")
    add("--teacher-steps", type=_positive, metavar="N", help="of training it; by default the data set's")
    add("--student", choices=["vit", "resnet20"], default="vit")
    add("--student-size", nargs="+", type=_size, default=[], metavar="KEY=VALUE")
    add("--batch-size", type=_positive, help="by default the data set's")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=["float32", "bfloat16"], default="float32")
    add("--threads", type=_positive, default=torch.get_num_threads())
    add("--out", type=Path, default=Path("runs/accuracy"), help="table, plot, sample images")
    add("--cache", type=Path, help="finished teachers and runs; by default OUT/cache")
    add("--fresh", action="store_true", help="repeat what is in the cache")
    add("--results", type=Path, default=ROOT / "benchmarks/results", help="where the record goes")
    arguments = options.parse_args(argv)
    if arguments.seconds is not None and not (arguments.seconds > 0 and math.isfinite(arguments.seconds)):
        options.error(f"--seconds is {arguments.seconds}; accepted: a number above 0.")
    if arguments.teacher_json and arguments.teacher_size:
        options.error("--teacher-json says the teacher's size; leave --teacher-size out.")
    arguments.cache = arguments.cache or arguments.out / "cache"
    torch.set_num_threads(arguments.threads)
    task = TASKS[arguments.data]
    steps = None if arguments.seconds else arguments.steps or task.steps
    arguments.steps = steps
    task = replace(
        task,
        teacher={**task.teacher, **dict(arguments.teacher_size)},
        student={**task.student, **dict(arguments.student_size)},
        batch_size=arguments.batch_size or task.batch_size,
        recipe=replace(task.recipe, steps=arguments.teacher_steps or task.recipe.steps),
    )
    try:
        data = read(arguments.data, arguments.data_dir)
    except (FileNotFoundError, ValueError) as error:
        options.error(str(error))
    device = torch.device(arguments.device)
    return Bench(arguments, task, data.to(device), data.fingerprint(), device)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; accepted: an integer of at least 1")
    return int(text)


def _size(text: str) -> tuple[str, int | float]:
    key, _, value = text.partition("=")
    try:
        return key, float(value) if "." in value else int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: KEY=NUMBER, such as embed_dim=48") from None


def contenders(arguments: argparse.Namespace) -> list[str]:
    """The bounds first, then the methods in the order asked for, each once."""
    bounds = [name for name in (*REAL, "noise") if name not in arguments.skip]
    return list(dict.fromkeys([*bounds, *arguments.methods]))


def teacher_of(bench: Bench, seed: int) -> Teacher:
    """The teacher of this seed: given, kept from an earlier time, or trained now."""
    arguments, task = bench.arguments, bench.task
    seconds = None
    if arguments.teacher_json:
        model = given_teacher(arguments.teacher_json, arguments.teacher_checkpoint).to(bench.device)
    else:
        with _seeded(bench.device, seed):
            model = vit(task.side, task.channels, task.teacher).to(bench.device).eval()
        if arguments.teacher_checkpoint:
            load_into(model, read_state_dict(arguments.teacher_checkpoint), "teacher", arguments.teacher_checkpoint)
        else:
            seconds = _trained(bench, model, seed)
    spec = image_spec(model, Config())
    if (spec.channels, spec.height, spec.width) != tuple(bench.data.test.images.shape[1:]):
        raise ValueError(
            f"the teacher takes {spec.channels} × {spec.height} × {spec.width} images; those of {arguments.data} are "
            f"{' × '.join(map(str, bench.data.test.images.shape[1:]))}."
        )
    found = predictions(model, bench.data.test, spec)
    accuracy = (found == bench.data.test.labels).float().mean().item()
    say(f"seed {seed}: teacher {100 * accuracy:.2f} %, {parameters(model):,} parameters")
    return Teacher(model, spec, found, accuracy, digest(model), seconds)


def _trained(bench: Bench, model: nn.Module, seed: int) -> float:
    from safetensors.torch import load_file, save_file

    task, arguments = bench.task, bench.arguments
    asked = {"data": bench.fingerprint, "sizes": task.teacher, "recipe": asdict(task.recipe), "seed": seed}
    place = arguments.cache / f"{arguments.data}-teacher-seed{seed}-{_hash({**asked, **bench.machine})}"
    if (place / "run.json").exists() and not arguments.fresh:
        model.load_state_dict(load_file(place / "teacher.safetensors"))
        return json.loads((place / "run.json").read_text())["seconds"]
    say(f"seed {seed}: training the teacher, {task.recipe.steps:,} steps …")
    seconds = train_on_labels(
        model,
        bench.data.train,
        image_spec(model, Config()),
        task.recipe,
        seed=seed,
        precision=arguments.precision,
        say=lambda text: say(f"  teacher: {text}"),
    )
    place.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, place / "teacher.safetensors")
    _write(place / "run.json", {"seconds": seconds, **asked, **bench.machine, **_when()})
    return seconds


def new_student(bench: Bench, spec: ImageSpec, seed: int) -> nn.Module:
    """The student of this seed, untrained: the same one for every contender."""
    with _seeded(bench.device, seed):
        if bench.arguments.student == "resnet20":
            student: nn.Module = ResNet(20, spec.channels, side=spec.height)
        else:
            student = vit(spec.height, spec.channels, bench.task.student, spec.mean, spec.std)
    return student.to(bench.device)


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random state from a seed inside, the caller's again outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def predictions(model: nn.Module, data: Labelled, spec: ImageSpec) -> Tensor:
    """(N,) the class that the model gives each image."""
    model.eval()
    parts = (slice(start, start + 250) for start in range(0, len(data), 250))
    with torch.no_grad():
        return torch.cat([model(normalised(data.pixels(part), spec)).argmax(-1) for part in parts])


@dataclass
class Learning:
    """What learning took, whoever did it."""

    seconds: float
    images_per_second: float
    notes: list[str]
    settings: dict[str, Any]


def data_free(teacher: nn.Module, student: nn.Module, method: str, options: dict[str, Any]) -> Learning:
    """A method at work. These arguments are all it gets: two networks and settings; no image, no loader."""
    result = distill(teacher, student, method=method, progress=False, **options)
    if result.report.status == "interrupted":
        raise KeyboardInterrupt
    told = result.report
    notes = [note for note in told.notes if "attention blocks switched" not in note]
    notes += [f"{name} was not finite {count} times" for name, count in told.skipped.items()]
    own = {"out", "overwrite", "progress", "teacher_checkpoint", "seed", "steps"}
    settings = {name: value for name, value in told.settings.items() if name not in own}
    return Learning(told.seconds, told.images_per_second, notes, settings)


def kd_on_real_images(bench: Bench, teacher: nn.Module, student: nn.Module, options: dict[str, Any]) -> Learning:
    """The student's side of `best` on real images, augmented as for the teacher."""
    with real_images(bench.data.train, bench.task.recipe.augmentation) as generator:
        return data_free(teacher, student, "best", options | _instead_of_synthesis(generator))


def _instead_of_synthesis(generator: str) -> dict[str, Any]:
    off = dict.fromkeys(settings_of("best")["generator_objectives"], 0.0)
    plain = {name: value for name, value in BASE.items() if name not in STUDENTS}
    return plain | {"generator": generator, "generator_objectives": off, "shift": 0.0}


def learning_from_labels(bench: Bench, teacher: Teacher, student: nn.Module, seed: int, steps: int) -> Learning:
    """With the optimiser and the learning rate that `distill` would use."""
    task, spec = bench.task, teacher.spec
    classes, tokens = probe(student, spec, bench.device, "student")
    recipe = replace(
        task.recipe,
        steps=steps,
        batch_size=task.batch_size,
        lr=student_lr(tokens),
        weight_decay=Config().weight_decay,
    )
    seconds = train_on_labels(
        student,
        bench.data.train,
        spec,
        recipe,
        seed=seed,
        precision=bench.arguments.precision,
        matrices=hidden_matrices(student, spec.channels, classes),
    )
    return Learning(seconds, steps * task.batch_size / seconds, [], asdict(recipe))


def _method(name: str) -> str:
    """Whose student objectives a contender has."""
    return "best" if name in REAL else name


def options_of(bench: Bench, name: str, seed: int, steps: int) -> dict[str, Any]:
    """What `distill` is told beside the method's own settings: the same for all."""
    task = bench.task
    options: dict[str, Any] = {
        "steps": steps,
        "batch_size": task.batch_size,
        "width": task.width,
        "precision": bench.arguments.precision,
        "seed": seed,
    }
    if "pool" not in METHODS[_method(name)].settings:
        # Half the images of a run: with the last 8,192 one student in four ended at 93 % on the digits.
        options["pool"] = max(1, task.batch_size * steps // 2)
    return options


def run_or_kept(bench: Bench, teacher: Teacher, student: nn.Module, name: str, seed: int) -> tuple[Run, bool]:
    """The run of this contender and seed, and whether it was done before with the same settings."""
    arguments, task = bench.arguments, bench.task
    settings = Config(method=_method(name), **options_of(bench, name, seed, arguments.steps or 1)).to_dict()
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
    place = arguments.cache / f"{arguments.data}-{name}-seed{seed}-{_hash(asked)}"
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
    run = Run(name, seed, **_when())
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
    _write(place / "run.json", asdict(run))
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


def _hash(asked: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _when() -> dict[str, Any]:
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": _git("rev-parse", "HEAD")}


def _write(path: Path, content: dict[str, Any]) -> None:
    """All of it or none, so that an interrupted run is not taken for a finished one."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(draft, path)


def say(text: str) -> None:
    print(text, flush=True)


def progress_of(run: Run) -> str:
    if run.error:
        return f"{run.method}, seed {run.seed}: FAILED, {run.error}"
    assert run.accuracy is not None and run.agreement is not None
    return (
        f"{run.method}, seed {run.seed}: {100 * run.accuracy:.2f} %, agreement {100 * run.agreement:.2f} %, "
        f"{run.steps:,} steps in {run.seconds:.1f} s, {run.images_per_second:,.0f} images/s"
    )


@dataclass(frozen=True)
class Outcome:
    """All seeds of one contender; accuracy and agreement in percent."""

    method: str
    accuracy: list[float]
    agreement: list[float]
    seconds: list[float]
    images_per_second: list[float]


def outcomes(runs: list[Run]) -> dict[str, Outcome]:
    """By contender, of those whose every seed succeeded: a mean of the lucky ones would flatter."""
    found = {}
    for name in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == name]
        if not any(run.error for run in own):
            columns = ([getattr(run, what) for run in own] for what in ("seconds", "images_per_second"))
            shares = ([100 * getattr(run, what) for run in own] for what in ("accuracy", "agreement"))
            found[name] = Outcome(name, *shares, *columns)
    return found


def table(teachers: list[Teacher], found: dict[str, Outcome], runs: list[Run]) -> list[str]:
    """Markdown that reads well in a terminal, too."""
    rows = [("", "accuracy, %", "agreement, %", "seconds", "images/s")]
    rows.append(("teacher", spread([100 * teacher.accuracy for teacher in teachers]), "", "", ""))
    for name in dict.fromkeys(run.method for run in runs):
        if name not in found:
            failed = next(run for run in runs if run.method == name and run.error)
            rows.append((name, f"failed with seed {failed.seed}", "", "", ""))
            continue
        one = found[name]
        speed = f"{statistics.mean(one.seconds):.1f}", f"{statistics.mean(one.images_per_second):,.0f}"
        rows.append((name, spread(one.accuracy), spread(one.agreement), *speed))
    widths = [max(map(len, column)) for column in zip(*rows)]
    ruler = tuple("-" * (width - 1) + ("-" if first else ":") for width, first in zip(widths, [True] + [False] * 4))
    return [_line(row, widths) for row in (rows[0], ruler, *rows[1:])]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths))
    )
    return f"| {' | '.join((first, *others))} |"


def spread(values: list[float]) -> str:
    """Mean and, of more than one, the sample's standard deviation."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


@dataclass(frozen=True)
class Result:
    """What the floors judge: means over seeds, in percent."""

    seeds: int
    teacher: float
    methods: dict[str, float]
    seconds: float | None
    """Of the slowest run of `best`."""
    ratio: float
    """Weights of the teacher over those of the student."""


Verdict = tuple[bool, str]


class NotJudgedError(Exception):
    """What a floor compares was not run."""


def _mean(result: Result, method: str) -> float:
    if method not in result.methods:
        raise NotJudgedError(f"{method} was not run, or failed")
    return result.methods[method]


def teacher_reaches(result: Result, figure: float) -> Verdict:
    return result.teacher >= figure, f"teacher {result.teacher:.2f} % of {figure} %"


def best_reaches(result: Result, figure: float) -> Verdict:
    best = _mean(result, "best")
    return best >= figure, f"best {best:.2f} % of {figure} %"


def within_of_teacher(result: Result, figure: float) -> Verdict:
    below = result.teacher - _mean(result, "best")
    return below <= figure + 1e-9, f"best {below:.2f} points below the teacher, {figure} allowed"


def within_of_real_kd(result: Result, figure: float) -> Verdict:
    below = _mean(result, "real_kd") - _mean(result, "best")
    return below <= figure + 1e-9, f"best {below:.2f} points below KD on real images, {figure} allowed"


def ahead_of_peers(result: Result, figure: float) -> Verdict:
    best, peers = _mean(result, "best"), {name: _mean(result, name) for name in METHODS if name not in OURS}
    name = max(peers, key=lambda peer: peers[peer])
    ahead = best - peers[name]
    met = ahead >= figure - 1e-9 if figure else ahead > 0
    return met, f"best {ahead:+.2f} points from {name}, the best of {len(peers)} others; {figure or 'any'} asked"


def minutes(result: Result, figure: float) -> Verdict:
    _mean(result, "best")
    assert result.seconds is not None
    return result.seconds <= 60 * figure, f"best took {result.seconds / 60:.1f} of {figure} minutes"


def times_smaller(result: Result, figure: float) -> Verdict:
    return result.ratio >= figure, f"student {result.ratio:.2f} times smaller, {figure} asked"


# What `best` is meant to reach with three seeds; times on two CPU cores, CIFAR-10's on a GPU.
FLOORS: dict[str, tuple[tuple[Callable[[Result, float], Verdict], float], ...]] = {
    "digits": ((times_smaller, 6), (within_of_teacher, 0.8), (within_of_real_kd, 0.5), (minutes, 4)),
    "mnist": (
        (teacher_reaches, 99.0),
        (times_smaller, 6),
        (best_reaches, 98.4),
        (within_of_teacher, 0.6),
        (minutes, 45),
    ),
    "cifar10": (
        *((teacher_reaches, 90.0), (times_smaller, 4), (within_of_real_kd, 5.0), (ahead_of_peers, 3.0)),
        (minutes, 20),
    ),
    "digits, equal time": ((ahead_of_peers, 0.0),),
    "mnist, equal time": ((ahead_of_peers, 0.0),),
    "digits, another teacher": ((within_of_real_kd, 3.0),),
    "mnist, a given ViT": ((times_smaller, 1), (best_reaches, 97.0), (minutes, 45)),
    "cifar10, a given CNN to ResNet-20": ((best_reaches, 88.0),),
}


def settings_judged(arguments: argparse.Namespace, teacher: nn.Module) -> list[str]:
    """Which rows of FLOORS this run belongs to."""
    setting = arguments.data
    if arguments.teacher_json:
        setting += ", a given CNN" if isinstance(teacher, ResNet) else ", a given ViT"
    elif arguments.teacher_size:
        setting += ", another teacher"
    if arguments.student == "resnet20":
        setting += " to ResNet-20"
    return [setting] + ([f"{arguments.data}, equal time"] if arguments.seconds else [])


def verdicts(settings: list[str], result: Result) -> list[str]:
    """One line for each floor of these settings: what was reached, and whether that is enough."""
    found = []
    for setting in settings:
        for judge, figure in FLOORS.get(setting, ()):
            try:
                met, told = judge(result, figure)
            except NotJudgedError as error:
                found.append(f"floor {setting:<20} not judged: {error}")
                continue
            verdict = "met" if met else "NOT MET"
            if result.seeds < 3:
                verdict = f"not judged ({result.seeds} of 3 seeds)"
            found.append(f"floor {setting:<20} {verdict}: {told}")
    return found


def report(bench: Bench, teachers: list[Teacher], student: nn.Module, runs: list[Run]) -> int:
    """Table, plot, floors and record; the exit status: 1 if a run failed."""
    arguments = bench.arguments
    found = outcomes(runs)
    facts = {"teacher": parameters(teachers[0].model), "student": parameters(student)}
    seconds = max(found["best"].seconds) if "best" in found else None
    means = {name: statistics.mean(one.accuracy) for name, one in found.items()}
    teacher_mean = 100 * statistics.mean(teacher.accuracy for teacher in teachers)
    result = Result(len(teachers), teacher_mean, means, seconds, facts["teacher"] / facts["student"])
    budget = f"{arguments.seconds:g} s" if arguments.seconds else f"{arguments.steps:,} steps"
    machine = bench.machine
    head = (
        f"{arguments.data}: teacher {facts['teacher']:,} weights, student {facts['student']:,}; {budget} of "
        f"{bench.task.batch_size} images; seeds: {arguments.seeds}; {machine['device']}, {machine['threads']} threads, "
        f"{machine['precision']}"
    )
    lines = table(teachers, found, runs)
    judged = verdicts(settings_judged(arguments, teachers[0].model), result)
    notes = list(dict.fromkeys(f"{run.method}: {note}" for run in runs for note in run.notes))
    arguments.out.mkdir(parents=True, exist_ok=True)
    page = arguments.out / f"accuracy-{arguments.data}.md"
    page.write_text(
        "\n".join([head, "", *lines, "", *(f"- {line}" for line in judged + notes)]) + "\n", encoding="utf-8"
    )
    say("\n".join(["", head, "", *lines, "", *judged, *(f"note {note}" for note in notes)]))
    say(f"table: {page}; samples: {arguments.out / 'samples'}; {plot(arguments, teacher_mean, found)}")
    say(f"record: {_recorded(bench, teachers, runs, facts, lines, judged)}")
    return int(any(run.error for run in runs))


def plot(arguments: argparse.Namespace, teacher: float, found: dict[str, Outcome]) -> str:
    """Accuracy against wall time, one point with its spreads for each contender; says where it is, or why it is not."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: that needs matplotlib (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.axhline(teacher, color="grey", linestyle="--", label="teacher")
    for index, one in enumerate(found.values()):
        spreads = (statistics.stdev(values) if len(values) > 1 else 0.0 for values in (one.accuracy, one.seconds))
        up, across = spreads
        axes.errorbar(
            statistics.mean(one.seconds),
            statistics.mean(one.accuracy),
            up,
            across,
            "os^Dv*PX"[index % 8],
            capsize=3,
            label=one.method,
        )
    axes.set(xlabel="wall time of learning, s", ylabel="test accuracy, %", title=f"{arguments.data}, mean ± sd")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", bbox_to_anchor=(1, 1), loc="upper left")
    path = arguments.out / f"accuracy-{arguments.data}.png"
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return f"plot: {path}"


def _recorded(
    bench: Bench, teachers: list[Teacher], runs: list[Run], facts: dict[str, int], lines: list[str], judged: list[str]
) -> Path:
    """In the form of the other benchmarks' records; settings once for each contender, and no folder of this machine."""
    local = {"out", "cache", "results", "data_dir"}
    asked = {
        key: value.name if isinstance(value, Path) else value
        for key, value in vars(bench.arguments).items()
        if key not in local
    }
    rows: Any = [replace(run, settings={}) for run in runs]
    where = argparse.Namespace(**asked, out=bench.arguments.results, graph=False)
    return record(
        f"accuracy-{bench.arguments.data}",
        where,
        Limits(),
        rows,
        data=bench.fingerprint,
        task=asdict(bench.task),
        parameters=facts,
        teachers=[{"accuracy": one.accuracy, "seconds": one.seconds, "digest": one.digest} for one in teachers],
        settings={run.method: run.settings for run in runs if run.settings},
        table=lines,
        floors=judged,
    )


if __name__ == "__main__":
    sys.exit(main())
