"""Data-free distillation: a generator makes images, the teacher labels them, the student learns from the teacher.

A generator that learns plays against the student (Fang et al. 2019; Habib et al. 2024): it looks for images on which
the student still disagrees with the teacher, the student learns to agree on them. One that only draws learns nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitkd_fast import generator_objectives, student_objectives  # noqa: F401  they register themselves
from vitkd_fast.config import Config
from vitkd_fast.generator import GENERATORS, Generator
from vitkd_fast.guard import GuardedOptimizer, NonFiniteError
from vitkd_fast.memory import kept_between_steps
from vitkd_fast.models import default_device, frozen
from vitkd_fast.muon import hidden_matrices
from vitkd_fast.objectives import GENERATOR_OBJECTIVES, STUDENT_OBJECTIVES, Scene, Terms, check_names
from vitkd_fast.ops._precise import without_autocast
from vitkd_fast.pair import Pair, make_pair, resolved
from vitkd_fast.report import Report, versions
from vitkd_fast.resume import Saves
from vitkd_fast.run import Log, RunFolder, unstoppable, warn
from vitkd_fast.suggest import suggestion
from vitkd_fast.synthesis import Synthesis
from vitkd_fast.tasks import task_of

History = list[dict[str, Any]]


@dataclass
class Result:
    """What `distill` returns."""

    student: nn.Module
    """In eval mode, on the run's device; the module that was passed, if one was."""
    generator: Generator
    """In eval mode; `generator.sample(n)` makes images, `generator.pixels(images)` brings them to [0, 1]."""
    history: History
    """One entry per log point: step, the mean of each loss term, agreement, images_per_second, skipped; and evaluated,
    the report's figures so far, where `evaluate_every` asks for them."""
    report: Report
    saved: bool = False
    """Whether the student is in `out`."""


def distill(teacher: nn.Module | str, student: nn.Module | str, *, evaluate: Any = None, **options: Any) -> Result:
    """Train `student` to decide as `teacher` does, without any of the data that the teacher was trained on.

    Args:
        teacher: a classifier of images, (B, channels, height, width) to (B, classes); or a timm name, then with
            `teacher_checkpoint=` or timm's own pretrained weights. It is used frozen, in eval mode. With
            `task="detection"` a detector of transformers, a folder that it was saved to or its name on the hub, or a
            module with an adaptor (`vitkd_fast.detection.adaptors`).
        student: a model of the same classes, trained in place; or a name, then made anew for the teacher's images. A
            module that says another image size or normalisation of itself gets such images.
        evaluate: real images to measure both on at the end, never to train on: batches of (images, labels), a
            function from a model to its accuracy, or a folder with one subfolder of images per class. Images are
            normalised for the teacher; for a student that wants others they are converted. Of detectors: a sequence
            of ((C, H, W) pixels in [0, 1], `vitkd_fast.detection.objects.Objects`), an annotation file of COCO, or a
            folder as COCO or YOLO lay it out.
        **options: the fields of `vitkd_fast.Config`: steps=, batch_size=, out=, seed=, …

    Returns:
        A `Result`: student, generator, history and report. After Ctrl-C too; report.status is then "interrupted".

    Raises:
        TypeError, ValueError: an argument that does not exist or is out of range, networks that do not fit.
        FileNotFoundError, FileExistsError: a checkpoint that is not there, a run folder that is already used.
            A run that was stopped goes on with `resume=True`.
        OSError: `out` cannot be written to.
        RuntimeError: a teacher by name whose weights cannot be had.
        NonFiniteError: more than `max_skipped` steps had a non-finite loss; the message names the term.

    The same seed gives the same student, bit for bit on the CPU with as many threads, unless other threads draw random
    numbers meanwhile. The caller's random state is left as it was. On the CPU, memory that a step frees stays with the
    process until the run is over (`vitkd_fast/memory.py`).
    """
    config = Config.of(options)
    task = task_of(config)
    _check_names(config)
    task.check_evaluation(evaluate)
    if config.evaluate_every and evaluate is None:
        raise ValueError(
            f"evaluate_every is {config.evaluate_every}, but there is nothing to measure on; give evaluate=."
        )
    if config.evaluate_every and isinstance(evaluate, Iterator):
        raise ValueError(
            f"evaluate_every is {config.evaluate_every}, but evaluate is a {type(evaluate).__name__}, which can be "
            f"gone through once; give a list or a DataLoader."
        )
    if teacher is student and isinstance(teacher, nn.Module):
        raise ValueError("teacher and student are the same module; the student is to be another, or a copy of it.")
    if torch.get_default_dtype() is not torch.float32:
        raise ValueError(f"the default dtype is {torch.get_default_dtype()}; set_default_dtype(torch.float32) first.")
    folder = RunFolder(config.out, config.overwrite, config.resume)
    device = default_device(config.device, teacher, student)
    memory = kept_between_steps() if device.type == "cpu" else contextlib.nullcontext()
    with memory, _random_kept(device), torch.inference_mode(False), torch.enable_grad(), without_autocast(device):
        _seed(config.seed, device)
        loaded = task.load_teacher(teacher, config).to(device)
        with frozen(loaded), contextlib.closing(folder):
            return _distill(loaded, student, evaluate, config, device, folder)


def _seed(seed: int, device: torch.device) -> None:
    """Of what `_random_kept` restores; torch.manual_seed seeds every GPU."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _random_kept(device: torch.device):
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _check_names(config: Config) -> None:
    if config.generator not in GENERATORS:
        raise ValueError(f"generator is {config.generator!r}; {suggestion(config.generator, GENERATORS)}")
    check_names(config.generator_objectives, GENERATOR_OBJECTIVES, "generator_objectives")
    check_names(config.student_objectives, STUDENT_OBJECTIVES, "student_objectives")


def _distill(
    teacher: nn.Module,
    student: nn.Module | str,
    evaluate: Any,
    config: Config,
    device: torch.device,
    folder: RunFolder,
) -> Result:
    pair = make_pair(teacher, student, config, device)
    student = pair.student
    with _random_kept(device):
        evaluate = pair.task.read_evaluation(pair, evaluate)
    config = resolved(config, pair, device)
    student_terms = Terms.of(config.student_objectives, STUDENT_OBJECTIVES, pair)
    generator_terms = Terms.of(config.generator_objectives, GENERATOR_OBJECTIVES, pair, labels=config.conditional)
    if not student_terms.names:
        raise ValueError(f"the student has nothing to minimise; give student_objectives. {'; '.join(pair.notes)}")

    def evaluated() -> dict[str, Any]:
        """The report's figures so far. What the data draw at random, such as their order, changes nothing."""
        if evaluate is None:
            return {}
        with _random_kept(device), frozen(student, teacher):
            return pair.task.evaluate(pair, config, evaluate)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")

    synthesis = Synthesis(pair, generator_terms, config, autocast)
    assert config.student_lr is not None  # resolved
    outputs = pair.task.outputs(pair.classes)
    muon = config.optimizer == "muon"
    learner = GuardedOptimizer(
        "student",
        nn.ModuleList([student, student_terms.modules]),
        config.student_lr,
        [*student_terms.names, "agreement"],
        weight_decay=config.weight_decay,
        clip=config.clip,
        matrices=hidden_matrices(student, pair.convert.student.channels, outputs) if muon else (),
    )
    log = Log(config, folder, [part.ledger for part in (synthesis.learner, learner) if part])
    saves = Saves(config, pair, {"synthesis": synthesis, "learner": learner, "log": log})
    asked = {"teacher": pair.teacher_facts.name, "student": pair.student_facts.name, "settings": config.to_dict()}
    folder.start(asked, log.history if saves.restore() else None)

    student.train()
    status, failure = "completed", None
    labelled: Tensor | None = None
    try:
        for step in range(log.steps, config.steps):
            progress = step / config.steps
            if step % config.student_steps == 0:
                synthesis.round(progress)
            # The teacher labels images, once where a batch is used again; it has no graph.
            with torch.no_grad(), autocast():
                images = synthesis.batch(step)
                if images is not labelled:
                    labelled, by_teacher = images, pair.look(teacher, images, student_terms.needs)
            # The student learns to agree.
            with autocast():
                by_student = pair.look(student, images, student_terms.needs)
                if not by_student.logits.requires_grad:
                    raise ValueError(
                        "the student's output has no gradient: its forward runs under torch.no_grad() or detaches it, "
                        "or no weight with requires_grad=True has a part in it."
                    )
                scene = Scene(images, by_teacher, by_student, pair, config)
                loss, values = student_terms(scene)
            learner.step(loss, values | {"agreement": pair.task.agreement(scene)}, progress)

            log.step(evaluated)
            saves.step()
    except KeyboardInterrupt:
        status = "interrupted"
        with unstoppable():
            saved = saves.save()
        if saved:
            pair.notes.append(f"stopped; resume=True (--resume) goes on from {saves.path}")
    except NonFiniteError as error:
        status, failure = "failed", error
    except BaseException as error:  # SystemExit, too, as of a handler of signals
        log.bar.close()
        student.eval()
        # An earlier save is exact, one in the middle of a step is not.
        if (saves.there() or saves.save()) and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"The run is saved; resume=True (--resume) goes on from {saves.path}")
        raise

    log.close()
    for part in (synthesis.learner, learner):
        if part:
            part.finish()

    student.eval()
    with unstoppable():
        kept = folder.keep(student)  # before anything else can go wrong
        if not kept:
            saves.save()
    figures = _at_last(evaluated, pair)
    generator = synthesis.generator.eval()
    report = Report(
        status=status,
        steps=log.steps,
        seconds=log.seconds,
        images_per_second=log.steps * config.batch_size / max(log.seconds, 1e-9),
        teacher=pair.teacher_facts,
        student=pair.student_facts,
        generated_agreement=log.history[-1].get("agreement") if log.history else None,
        skipped=log.skipped,
        notes=pair.notes,
        settings=config.to_dict(),
        versions=versions(device),
        **figures,
    )
    # A report is the mark of a finished run, which has a student.
    if kept and folder.finish(lambda: _picture(pair, config, generator), report) and status == "completed":
        saves.discard()
    if config.progress:
        with contextlib.suppress(OSError, UnicodeError):  # nobody reads, or no such characters
            print(report, flush=True)
    if failure:
        raise failure
    return Result(student, generator, log.history, report, kept)


@torch.no_grad()
def _picture(pair: Pair, config: Config, generator: Generator):
    """A PIL image of what it makes."""
    return pair.task.picture(pair, config, generator.sample(64))


def _at_last(evaluated: Callable[[], dict[str, Any]], pair: Pair) -> dict[str, Any]:
    """The figures at the end of a run, which is not lost if they cannot be had: a note and a warning say why."""
    try:
        return evaluated()
    except KeyboardInterrupt:
        pair.notes.append("the evaluation at the end was interrupted")
    except Exception as error:
        pair.notes.append(f"the evaluation at the end failed: {type(error).__name__}: {error}")
        warn(f"The student is trained, but {pair.notes[-1]}")
    return {}
