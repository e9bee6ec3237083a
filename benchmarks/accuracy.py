"""How good is a student made without data? Every method with the same student, start, batch and budget, side by side.

For each seed a teacher is trained; then the student learns from real labels and by KD on real images (the upper
bounds), from noise (the lower bound), and by each data-free method, which gets teacher and student and nothing else.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from _common import ROOT
from accuracy_bench import Bench, say
from accuracy_data import read
from accuracy_learning import REAL
from accuracy_models import TASKS
from accuracy_pair import Teacher, new_student, teacher_of
from accuracy_report import report
from accuracy_runs import Run, progress_of, run_or_kept

from vitkd_fast.methods import METHODS


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


if __name__ == "__main__":
    sys.exit(main())
