"""Synthesis and its objectives, without the run that they are part of."""

import torch
from torch import nn

from vitkd_fast import generator_objectives as _registers  # noqa: F401
from vitkd_fast.config import Config
from vitkd_fast.models import frozen
from vitkd_fast.objectives import GENERATOR_OBJECTIVES, Scene, Terms
from vitkd_fast.pair import make_pair
from vitkd_fast.synthesis import Synthesis

SMALL = {"batch_size": 8, "width": 16, "latent": 8, "progress": False, "generator_steps": 3}
CPU = torch.device("cpu")


def make(teacher: nn.Module, student: nn.Module, **options) -> Synthesis:
    """The synthesis of a run, without the run."""
    config = Config(**{**SMALL, **options})
    pair = make_pair(teacher.eval().requires_grad_(False), student.train(), config, CPU)
    terms = Terms.of(config.generator_objectives, GENERATOR_OBJECTIVES, pair, labels=config.conditional)
    return Synthesis(pair, terms, config, lambda: torch.autocast("cpu", enabled=False))


def term(name: str, made: Synthesis, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """What a generator's objective says of images."""
    objective = GENERATOR_OBJECTIVES[name]
    pair = made.pair
    function = objective.function(pair) if isinstance(objective.function, type) else objective.function
    with frozen(pair.student):
        student = pair.look(pair.student, images) if "student" in objective.needs else None
        watching = getattr(function, "watching", None)
        if watching is None:
            teacher = pair.look(pair.teacher, images, objective.needs)
        else:
            with watching():
                teacher = pair.look(pair.teacher, images, objective.needs)
        return function(Scene(images, teacher, student, pair, made.config, labels))
