"""The names of a detector's classes: transformers' detectors have them, and so have annotations."""

import re
from typing import Any

import torch
from torch import nn

from vitkd_fast.detection.objects import Objects
from vitkd_fast.detection.scenes import Scenes

GENERIC = re.compile(r"LABEL_\d+|N/?A|")  # what transformers calls a class that has no name, and COCO an id without one


def names_of(model: Any) -> list[str] | None:
    """Of label 0, 1, …; None where the model does not name its classes."""
    known = getattr(getattr(model, "config", None), "id2label", None) or {}
    if all(GENERIC.fullmatch(str(name)) for name in known.values()):
        return None
    return [str(known.get(label, "")) for label in range(max(map(int, known)) + 1)]


def name_classes(teacher: nn.Module, student: nn.Module) -> None:
    """Let a new student call its classes what the teacher calls them."""
    config: Any = getattr(student, "config", None)
    names = names_of(teacher)
    if names and hasattr(config, "id2label") and len(config.id2label) == len(names):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: label for label, name in enumerate(names)}


def as_named(scenes: Scenes, names: list[str] | None) -> tuple[Scenes, str | None]:
    """The scenes with the labels of a model that calls its classes `names`, and what to know about that.

    Classes are the same where their names are, but for case and underscores; objects of a class that the model does not
    know are left out. Where no name is known or none is the same, the i-th class is the i-th.
    """
    known = [(_plain(name), label) for label, name in enumerate(names or ()) if not GENERIC.fullmatch(name)]
    label_of = dict(reversed(known))  # the first of a name counts
    labels = [label_of.get(_plain(name)) for name in scenes.classes]
    if not labels:
        return scenes, None
    if all(label is None for label in labels):
        return scenes, f"evaluate: classes are taken in their order, label 0 is {scenes.classes[0]!r} and so on"
    objects = []
    for one in scenes.objects:
        new = [labels[label] for label in one.labels.tolist()]
        kept = one[torch.tensor([label is not None for label in new], dtype=torch.bool)]
        found = torch.tensor([label for label in new if label is not None], dtype=torch.int64)
        objects.append(Objects(kept.boxes, found, kept.scores))
    unknown = ", ".join([name for name, label in zip(scenes.classes, labels) if label is None][:5])
    note = f"evaluate: the teacher has no class {unknown}; objects of it are left out" if unknown else None
    return Scenes(scenes.pixels, objects, names or (), scenes.sizes), note


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")
