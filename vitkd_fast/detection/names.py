"""The names of classes in annotations, and those of the detector that is measured with them."""

import torch

from vitkd_fast.class_names import GENERIC
from vitkd_fast.detection.objects import Objects
from vitkd_fast.detection.scenes import Scenes


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
