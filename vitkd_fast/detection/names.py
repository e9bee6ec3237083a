"""The names of a detector's classes: transformers' detectors have them, and so have annotations."""

import re
from typing import Any

import torch
from torch import nn

from vitkd_fast.detection.objects import Objects
from vitkd_fast.detection.scenes import Scenes
from vitkd_fast.models import unwrapped

GENERIC = re.compile(r"LABEL_\d+|N/?A|")  # what transformers calls a class that has no name, and COCO an id without one


def names_of(model: Any) -> list[str] | None:
    """Of label 0, 1, …; None where the model does not name its classes."""
    known = getattr(getattr(unwrapped(model), "config", None), "id2label", None) or {}
    if all(GENERIC.fullmatch(str(name)) for name in known.values()):
        return None
    return [str(known.get(label, "")) for label in range(max(map(int, known)) + 1)]


def name_classes(teacher: nn.Module, student: nn.Module) -> str | None:
    """Let a student call its classes what the teacher calls them, whose order it answers in; and what to know of it."""
    config: Any = getattr(unwrapped(student), "config", None)
    names, own = names_of(teacher), names_of(student)
    if not names or own == names or not hasattr(config, "id2label") or len(config.id2label) != len(names):
        return None
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}
    return "student: its config calls the classes what the teacher's does, in the teacher's order" if own else None


def as_named(scenes: Scenes, names: list[str] | None) -> tuple[Scenes, str | None]:
    """The scenes with the labels of a model that calls its classes `names`, and what to know about that.

    Classes are the same where their names are, but for case and underscores; objects of a class that the model does not
    know are left out. Where one side has no names, the i-th class is the i-th.

    Raises:
        ValueError: both have names, and none is the same.
    """
    known = [(_plain(name), label) for label, name in enumerate(names or ()) if not GENERIC.fullmatch(name)]
    label_of = dict(reversed(known))  # the first of a name counts
    labels = [label_of.get(_plain(name)) for name in scenes.classes]
    if not labels:
        return scenes, None
    if all(label is None for label in labels):
        if known and not all(GENERIC.fullmatch(name) for name in scenes.classes):
            theirs, ours = ", ".join(scenes.classes[:5]), ", ".join((names or [])[:5])
            raise ValueError(
                f"evaluate has classes {theirs}, and the teacher {ours}: none is the same. Give what is the same one "
                f"name, in the annotations or in the teacher's config.id2label."
            )
        return scenes, f"evaluate: classes are taken in their order, label 0 is {scenes.classes[0]!r} and so on"

    def renamed(one: Objects) -> Objects:
        new = [labels[label] for label in one.labels.tolist()]
        kept = one[torch.tensor([label is not None for label in new], dtype=torch.bool)]
        found = torch.tensor([label for label in new if label is not None], dtype=torch.int64)
        return Objects(kept.boxes, found, kept.scores)

    objects, crowds = list(map(renamed, scenes.objects)), list(map(renamed, scenes.crowds))
    unknown = ", ".join([name for name, label in zip(scenes.classes, labels) if label is None][:5])
    note = f"evaluate: the teacher has no class {unknown}; objects of it are left out" if unknown else None
    return Scenes(scenes.pixels, objects, names or (), scenes.sizes, crowds), note


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")
