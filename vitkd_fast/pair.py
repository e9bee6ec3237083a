"""Teacher and student brought together: loaded, measured, checked against each other, accelerated."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitkd_fast.config import Config
from vitkd_fast.generator import ImageSpec
from vitkd_fast.models import create_student, forward, frozen, image_spec
from vitkd_fast.report import ModelFacts, model_facts


@dataclass
class Pair:
    """Two networks that take the same images and know the same classes."""

    teacher: nn.Module
    student: nn.Module
    project: nn.Linear | None
    """From the student's last tokens to the teacher's, (B, N, D_student) to (B, N, D_teacher); None: not matched."""
    spec: ImageSpec
    classes: int
    teacher_facts: ModelFacts
    student_facts: ModelFacts
    notes: list[str] = field(default_factory=list)


def make_pair(teacher: nn.Module, student: nn.Module | str, config: Config, device: torch.device) -> Pair:
    """Fit a student to a teacher that is frozen and on its device.

    Raises:
        ValueError: one of them does not take the teacher's images or give (B, classes) logits, or the classes differ.
    """
    spec = image_spec(teacher, config)
    teacher_logits, teacher_tokens = _probe(teacher, spec, device, "teacher")
    classes = teacher_logits.shape[1]
    name = student if isinstance(student, str) else type(student).__name__
    student = create_student(student, spec, classes).to(device)
    student_logits, student_tokens = _probe(student, spec, device, "student")
    if student_logits.shape[1] != classes:
        raise ValueError(
            f"student knows {student_logits.shape[1]} classes and teacher {classes}; they must be the same."
        )

    if not any(weight.requires_grad for weight in student.parameters()):
        raise ValueError(f"student {name} has no weight with requires_grad=True, so it cannot learn.")

    facts = model_facts(teacher, spec, teacher_name(teacher)), model_facts(student, spec, name)
    notes = []
    if config.accelerate:
        from vitkd_fast.accelerate import accelerate

        accelerated = {"teacher": accelerate(teacher), "student": accelerate(student)}
        notes += [f"{role}: {result}" for role, result in accelerated.items() if result.switched or result.kept]
    project = None
    if config.tokens > 0:
        if student_tokens is None or teacher_tokens is None:
            role = "student" if student_tokens is None else "teacher"
            notes.append(f"token matching is off: the {role} has no forward_features that gives (B, N, D) tokens")
        elif student_tokens.shape[1] != teacher_tokens.shape[1]:
            counts = f"the student has {student_tokens.shape[1]} tokens and the teacher {teacher_tokens.shape[1]}"
            notes.append(f"token matching is off: {counts}")
        else:
            project = nn.Linear(student_tokens.shape[2], teacher_tokens.shape[2], device=device)
    return Pair(teacher, student, project, spec, classes, *facts, notes)


def resolved(config: Config, pair: Pair, device: torch.device) -> Config:
    """The configuration with nothing left to find out."""
    spec = pair.spec
    return replace(
        config,
        image_size=(spec.height, spec.width),
        channels=spec.channels,
        mean=spec.mean,
        std=spec.std,
        tokens=config.tokens if pair.project else 0.0,
        device=str(device),
    )


def teacher_name(teacher: nn.Module) -> str:
    cfg: Any = getattr(teacher, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(teacher).__name__


def _probe(model: nn.Module, spec: ImageSpec, device: torch.device, role: str) -> tuple[Tensor, Tensor | None]:
    """Logits and tokens of two blank images."""
    shape = (2, spec.channels, spec.height, spec.width)
    try:
        with frozen(model), torch.no_grad():
            logits, tokens = forward(model, torch.zeros(shape, device=device))
    except Exception as error:  # whatever a stranger's forward raises
        raise ValueError(
            f"{role} {type(model).__name__} cannot take images of shape {shape}: {error}. If they are not its images, "
            f"pass image_size= and channels=."
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2:
        given = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{role} gives {given} for two images; accepted: logits of shape (batch, classes).")
    return logits, tokens
