"""The names of a model's classes, which models of transformers have."""

import re
from typing import Any

from torch import nn

from vitkd_fast.models import unwrapped

GENERIC = re.compile(r"LABEL_\d+|N/?A|")  # what transformers calls a class that has no name, and COCO an id without one


def names_of(model: Any) -> list[str] | None:
    """Of label 0, 1, …; None where the model does not name its classes."""
    known = getattr(getattr(unwrapped(model), "config", None), "id2label", None) or {}
    known = {int(label): name for label, name in known.items()}  # of a JSON read as it is the labels are text
    if all(GENERIC.fullmatch(str(name)) for name in known.values()):
        return None
    return [str(known.get(label, "")) for label in range(max(known) + 1)]


def name_classes(teacher: nn.Module, student: nn.Module) -> str | None:
    """Let a student call its classes what the teacher calls them, whose order it answers in; and what to know of it."""
    config: Any = getattr(unwrapped(student), "config", None)
    names, own = names_of(teacher), names_of(student)
    if not names or own == names or not hasattr(config, "id2label") or len(config.id2label) != len(names):
        return None
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}
    return "student: its config calls the classes what the teacher's does, in the teacher's order" if own else None
