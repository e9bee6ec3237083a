"""Data-free distillation: a generator makes images, the teacher labels them, the student learns from the teacher.

Generator and student play against each other (Fang et al. 2019; Habib et al. 2024): the generator looks for images on
which the student still disagrees with the teacher, the student learns to agree on them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitkd_fast import evaluate as evaluation
from vitkd_fast.config import Config
from vitkd_fast.generator import Generator
from vitkd_fast.guard import GuardedAdamW, NonFiniteError
from vitkd_fast.models import default_device, forward, frozen, load_teacher
from vitkd_fast.objectives import (
    GENERATOR_TERMS,
    STUDENT_TERMS,
    agreement,
    generator_losses,
    student_losses,
    weighed_sum,
)
from vitkd_fast.pair import make_pair, resolved
from vitkd_fast.replay import ReplayPool, shifted
from vitkd_fast.report import Report, versions
from vitkd_fast.run import Log, RunFolder

History = list[dict[str, Any]]


@dataclass
class Result:
    """What `distill` returns."""

    student: nn.Module
    """In eval mode, on the run's device; the module that was passed, if one was."""
    generator: Generator
    """In eval mode; `generator.sample(n)` makes images, `generator.pixels(images)` brings them to [0, 1]."""
    history: History
    """One entry per log point: step, the mean of each loss term, agreement, images_per_second, skipped."""
    report: Report


def distill(
    teacher: nn.Module | str, student: nn.Module | str, *, evaluate: evaluation.Evaluation | None = None, **options: Any
) -> Result:
    """Train `student` to decide as `teacher` does, without any of the data that the teacher was trained on.

    Args:
        teacher: a classifier of images, (B, channels, height, width) to (B, classes); or a timm name, then with
            `teacher_checkpoint=` or timm's own pretrained weights. It is used frozen, in eval mode.
        student: a classifier of the same images and classes, trained in place; or a timm name, then made anew.
        evaluate: real images to measure both on at the end, never to train on: batches of (images, labels), a
            function from a model to its accuracy, or a folder with one subfolder of images per class.
        **options: the fields of `vitkd_fast.Config`: steps=, batch_size=, out=, seed=, …

    Returns:
        A `Result`: student, generator, history and report. After Ctrl-C too; report.status is then "interrupted".

    Raises:
        TypeError, ValueError: an argument that does not exist or is out of range, networks that do not fit.
        FileNotFoundError, FileExistsError: a checkpoint that is not there, a run folder that is already used.
        RuntimeError: a teacher by name whose weights cannot be had.
        NonFiniteError: more than `max_skipped` steps had a non-finite loss; the message names the term.

    The same seed gives the same student, bit for bit on the CPU. The caller's random state is left as it was.
    """
    config = Config.of(options)
    evaluation.check(evaluate)
    device = default_device(config.device, teacher, student)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        loaded = load_teacher(teacher, config).to(device)
        with frozen(loaded):
            return _distill(loaded, student, evaluate, config, device)


def _distill(
    teacher: nn.Module,
    student: nn.Module | str,
    evaluate: evaluation.Evaluation | None,
    config: Config,
    device: torch.device,
) -> Result:
    folder = RunFolder(config.out, config.overwrite)
    pair = make_pair(teacher, student, config, device)
    student, project = pair.student, pair.project
    config = resolved(config, pair, device)
    folder.start({"teacher": pair.teacher_facts.name, "student": pair.student_facts.name, "settings": config.to_dict()})

    generator = Generator(pair.spec, config.latent, config.width).to(device)
    pool = ReplayPool(config.pool, generator)
    learn_generator = GuardedAdamW(
        "generator", generator, config.generator_lr, GENERATOR_TERMS, betas=(0.5, 0.999), clip=config.clip
    )
    learn_student = GuardedAdamW(
        "student",
        nn.ModuleList([student, *([project] if project else [])]),
        config.student_lr,
        [*(STUDENT_TERMS if project else STUDENT_TERMS[:1]), "agreement"],
        weight_decay=config.weight_decay,
        clip=config.clip,
    )
    log = Log(config, folder, [learn_generator.ledger, learn_student.ledger])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")

    student.train()
    status, failure = "completed", None
    try:
        for step in range(config.steps):
            progress = step / config.steps

            # The generator looks for images on which the student is wrong; no weight but its own has a gradient.
            if step % config.student_steps == 0:
                with frozen(student), autocast:
                    images = generator.sample(config.batch_size)  # (B, C, H, W)
                    student_logits, _ = forward(student, images)  # (B, classes)
                    teacher_logits, _ = forward(teacher, images)
                    losses = generator_losses(student_logits, teacher_logits, config)
                learn_generator.step(weighed_sum(losses, config), losses, progress)

            # The teacher labels images, fresh or replayed, each shifted by its own few pixels.
            with torch.no_grad(), autocast:
                if is_replay(step, config.replay):
                    images = pool.sample(config.batch_size)
                else:
                    images = generator.sample(config.batch_size)
                    pool.add(images)
                images = shifted(images, config.shift)
                teacher_logits, teacher_tokens = forward(teacher, images)  # (B, classes), (B, N, D)
            # The student learns to agree.
            with autocast:
                student_logits, student_tokens = forward(student, images)
                matched = project(student_tokens) if project else None
                losses = student_losses(student_logits, teacher_logits, matched, teacher_tokens, config)
            values = losses | {"agreement": agreement(student_logits, teacher_logits)}
            learn_student.step(weighed_sum(losses, config), values, progress)

            log.step()
    except KeyboardInterrupt:
        status = "interrupted"
    except NonFiniteError as error:
        status, failure = "failed", error

    log.close()

    student.eval()
    generator.eval()
    with torch.no_grad():
        pixels = generator.pixels(generator.sample(64))
    accuracies = evaluation.evaluate_pair(teacher, student, evaluate, pair.spec) if evaluate is not None else {}
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
        **accuracies,
    )
    folder.finish(student, pixels, report)
    if config.progress:
        print(report)
    if failure:
        raise failure
    return Result(student, generator, log.history, report)


def is_replay(step: int, share: float) -> bool:
    """Whether this step is a replayed one: evenly spread, `share` of all, never the first."""
    return int((step + 1) * share) > int(step * share)
