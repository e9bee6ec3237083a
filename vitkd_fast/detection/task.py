"""Detection as a task: teacher and student give a set of boxes with classes for each image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitkd_fast.class_names import names_of
from vitkd_fast.config import Config
from vitkd_fast.detection import adaptors
from vitkd_fast.detection.data import Scenes, read_scenes
from vitkd_fast.detection.extra import extra
from vitkd_fast.detection.matching import iou
from vitkd_fast.detection.metrics import MOST, mean_average_precision
from vitkd_fast.detection.models import create_student, load_teacher
from vitkd_fast.detection.names import as_named
from vitkd_fast.detection.objectives import matched
from vitkd_fast.detection.objects import Objects
from vitkd_fast.detection.pictures import side_by_side
from vitkd_fast.generator import ImageSpec
from vitkd_fast.layout import Layout
from vitkd_fast.models import unwrapped
from vitkd_fast.objectives import Scene, View
from vitkd_fast.pair import Pair
from vitkd_fast.tasks import Classification, of_likeliest

SURE = 0.5  # a probability from which an object counts as found
OVERLAP = 0.5  # IoU from which two boxes are of the same object
FURTHEST = 2.0  # a number above it cannot be a share of a side, even of a box that reaches out of the image
SHOWN = 16  # images in the picture of a run
BATCH = 32  # images looked at together when measuring


class Detection(Classification):
    """Objects in images: (B, queries, classes + 1) logits, the last of there being nothing, and boxes."""

    name = "detection"
    tokens = "(B, N, D) tokens of patches in its output"
    load_teacher = staticmethod(load_teacher)
    create_student = staticmethod(create_student)

    def look(self, model: Any, images: Tensor) -> View:
        return adaptors.look(model, images)

    def classes(self, seen: View) -> int:
        assert seen.boxes is not None
        if problem := _not_shares(seen.boxes):
            raise ValueError(f"gives {problem}")
        return seen.logits.shape[-1] - 1

    def found(self, seen: View) -> Tensor:
        """(B, classes) objects that a model finds in each image: its queries, each for its likeliest class as far as it
        is sure of it."""
        return of_likeliest(seen.logits.float().softmax(-1)[..., :-1]).sum(1)

    def outputs(self, classes: int) -> tuple[int, ...]:
        return classes, classes + 1, 4

    def layout(self, model: nn.Module, count: int, spec: ImageSpec) -> Layout:
        """Patches alone, on the grid that they make with the sides that the model says, or with one whole side in both
        directions; tokens of several scales are on none."""
        patch = getattr(getattr(unwrapped(model), "config", None), "patch_size", None)
        for side in [patch] if patch else range(1, max(spec.height, spec.width) + 1):
            down, across = (side, side) if isinstance(side, int) else side
            for grid in (
                (spec.height // down, spec.width // across),
                (-(-spec.height // down), -(-spec.width // across)),  # of convolutions, which pad
            ):
                if grid[0] * grid[1] == count:
                    return Layout(count, grid=grid)
        return Layout(count)

    def agreement(self, scene: Scene) -> Tensor:
        """Of the objects that either is sure of, how many both see alike: 2 · both / (teacher's + student's), in
        [0, 1]; 1 where neither sees any."""
        both, total = _seen_alike(scene)
        return torch.where(total > 0, 2 * both / total.clamp_min(1), 1.0)

    def check_evaluation(self, data: Any) -> None:
        """Refuse what `evaluate` cannot use, before the run rather than after it."""
        if isinstance(data, str | Path):
            if not str(data):
                raise ValueError(f"evaluate is ''; {ACCEPTED}.")
            if not Path(data).exists():
                raise FileNotFoundError(f"evaluate is {str(data)!r}, which is not there; {ACCEPTED}.")
        elif data is not None and not isinstance(data, Scenes | Sequence):
            raise TypeError(f"evaluate is a {type(data).__name__}; {ACCEPTED}.")
        if data is not None:
            with extra():
                import pycocotools.mask  # noqa: F401
                import torchmetrics.detection  # noqa: F401

    def read_evaluation(self, pair: Pair, data: Any) -> Any:
        """Scenes, or the sequence as given.

        Raises:
            TypeError: something in it is not pixels and Objects.
            ValueError: there is nothing in it, its images are not the teacher's, or objects are not sound.
        """
        spec = pair.spec
        note = None
        if data is None:
            return None
        if isinstance(data, str | Path):
            data = read_scenes(Path(data), (spec.height, spec.width), spec.channels)
        if isinstance(data, Scenes):
            data, note = as_named(data, names_of(pair.teacher))
            pair.notes += [note] if note else []
        count, shape = 0, (spec.channels, spec.height, spec.width)
        for index in range(len(data)):
            scene = data[index]
            sound = isinstance(scene, Sequence) and len(scene) == 2
            if not (sound and isinstance(scene[0], Tensor) and isinstance(scene[1], Objects)):
                raise TypeError(f"evaluate has a {type(scene).__name__} as number {index}; {ACCEPTED}.")
            if scene[0].shape != shape:
                raise ValueError(
                    f"evaluate has an image of shape {tuple(scene[0].shape)} as number {index}; accepted: the "
                    f"teacher's, {shape}."
                )
            # a thousandth more or less is what resizing can make of 0 and 1
            if not scene[0].is_floating_point() or not -1e-3 <= scene[0].min() <= scene[0].max() <= 1 + 1e-3:
                raise ValueError(
                    f"evaluate has pixels of dtype {str(scene[0].dtype).removeprefix('torch.')} from "
                    f"{scene[0].min():.4g} to {scene[0].max():.4g} as number {index}; accepted: floats from 0 to 1."
                )
            try:
                objects = scene[1].checked(pair.classes)
            except ValueError as error:
                raise ValueError(f"evaluate, image number {index}: {error}") from None
            count += len(objects)
            if problem := _not_shares(objects.boxes):
                raise ValueError(f"evaluate, image number {index}: {problem}")
        if not count:
            raise ValueError(
                f"evaluate has no object in its {len(data)} images, so there is no precision to measure."
                + (f" ({note})" if note else "")
            )
        return data

    def evaluate(self, pair: Pair, config: Config, data: Any) -> dict[str, Any]:
        spec = pair.spec
        real = [data[index][1] for index in range(len(data))]
        found: dict[str, list[Objects]] = {"teacher": [], "student": []}
        counts = torch.zeros(2, dtype=torch.int64)
        with torch.no_grad():
            for start in range(0, len(data), BATCH):
                pixels = torch.stack([data[index][0].float() for index in range(start, min(start + BATCH, len(data)))])
                images = spec.normalised(pixels.to(pair.device))
                scene = self._scene(pair, config, images)
                assert scene.student is not None
                found["teacher"] += objects_of(scene.teacher)
                found["student"] += objects_of(scene.student)
                counts += torch.stack(_seen_alike(scene)).cpu()
        sizes, crowds = (data.sizes, data.crowds) if isinstance(data, Scenes) else (None, None)
        both, total = counts.tolist()
        figures: dict[str, Any] = {"agreement": 2 * both / total if total else 1.0}
        for role, objects in found.items():
            precision = mean_average_precision(objects, real, sizes, crowds)
            figures |= {f"{role}_{name}": precision[name] for name in ("map", "map50")}
        return figures

    def picture(self, pair: Pair, config: Config, images: Tensor):
        """Images with the teacher's boxes on the left and the student's on the right."""
        images = images[:SHOWN]
        with torch.no_grad():
            scene = self._scene(pair, config, images)
        assert scene.student is not None
        return side_by_side(pair.spec.pixels(images), objects_of(scene.teacher), objects_of(scene.student))

    def _scene(self, pair: Pair, config: Config, images: Tensor) -> Scene:
        return Scene(images, pair.look(pair.teacher, images), pair.look(pair.student, images), pair, config)


ACCEPTED = (
    "accepted: Scenes (vitkd_fast.detection.data), a sequence of ((C, H, W) pixels in [0, 1], Objects), an annotation "
    "file of COCO, or a folder as COCO or YOLO lay it out"
)


def _not_shares(boxes: Tensor) -> str | None:
    """What is wrong with boxes that are not in shares of the image's sides, and what to do."""
    largest = boxes.abs().amax().item() if boxes.numel() else 0.0
    if largest > FURTHEST:
        return (
            f"boxes with {largest:.4g} in them; accepted: centres and sizes in [0, 1] of the image's sides, see "
            f"from_corners in vitkd_fast.detection.adaptors."
        )
    return None


def _seen_alike(scene: Scene) -> tuple[Tensor, Tensor]:
    """How many objects both see alike, and how many the two see in sum."""
    pairs = matched(scene)
    wanted, student = pairs.wanted, pairs.log_p.exp()
    theirs = wanted.sureness > SURE
    ours = 1 - student[..., -1] > SURE
    alike = pairs.of_queries(student)[..., :-1].argmax(-1) == wanted.classes[..., :-1].argmax(-1)
    alike &= iou(pairs.of_queries(pairs.boxes), wanted.boxes) > OVERLAP
    both = theirs & pairs.found & alike & ours.gather(1, pairs.queries)
    return both.sum(), theirs.sum() + ours.sum()


def objects_of(view: View, least: float = 0.0) -> list[Objects]:
    """What a detector found in each image and scores `least` or more: one object of every query; or, where the classes
    have scores of their own, as many of all queries and classes, the highest, of which one query may have several."""
    assert view.boxes is not None
    boxes = view.boxes.float()
    if view.scores is None:
        scores, labels = view.logits.float().softmax(-1)[..., :-1].max(-1)
    else:
        classes, most = view.scores.shape[-1], max(boxes.shape[1], MOST)
        flat = view.scores.float().flatten(1)
        scores, at = flat.topk(min(most, flat.shape[1]))  # (B, most)
        labels = at % classes
        boxes = boxes.gather(1, (at // classes)[..., None].expand(-1, -1, 4))
    sound = (scores >= least) & boxes.isfinite().all(-1) & (boxes[..., 2:] >= 0).all(-1)
    return [Objects(*rows)[there] for *rows, there in zip(boxes, labels, scores, sound, strict=True)]
