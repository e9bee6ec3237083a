"""How each contender learns: from labels, by KD on real images, or by a method that is given no data."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from accuracy_bench import Bench
from accuracy_models import real_images, train_on_labels
from accuracy_pair import Teacher
from torch import nn

from vitkd_fast.config import Config
from vitkd_fast.distill import distill
from vitkd_fast.methods import BASE, METHODS, settings_of
from vitkd_fast.muon import hidden_matrices
from vitkd_fast.pair import probe, student_lr
from vitkd_fast.tasks import Classification

REAL = ("real_labels", "real_kd")  # the contenders that see real images
STUDENTS = ("student_objectives", "student_loss", "student_steps", "temperature")  # what a method decides of it


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
    own = {"out", "overwrite", "resume", "save_minutes", "progress", "teacher_checkpoint", "seed", "steps"}
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
    classes, tokens, _ = probe(student, spec, bench.device, "student", Classification())
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
        matrices=hidden_matrices(student, spec.channels, (classes,)),
    )
    return Learning(seconds, steps * task.batch_size / seconds, [], asdict(recipe))


def method_of(name: str) -> str:
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
    if "pool" not in METHODS[method_of(name)].settings:
        # Half the images of a run: with the last 8,192 one student in four ended at 93 % on the digits.
        options["pool"] = max(1, task.batch_size * steps // 2)
    return options
