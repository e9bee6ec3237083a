"""The objects of one image: boxes and labels, and the scores of a detector's."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Objects:
    """None at all is legal: (0, 4) boxes and (0,) labels."""

    boxes: Tensor
    """(n, 4) float: centre x, centre y, width, height, in [0, 1] of the image's sides."""
    labels: Tensor
    """(n,) int64."""
    scores: Tensor | None = None
    """(n,) float; None: they are certain, as real ones are."""

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, which: Tensor) -> "Objects":
        """Those that a mask, or indices in any order, picks."""
        return Objects(self.boxes[which], self.labels[which], None if self.scores is None else self.scores[which])

    def to(self, device: torch.device | str) -> "Objects":
        scores = None if self.scores is None else self.scores.to(device)
        return Objects(self.boxes.to(device), self.labels.to(device), scores)

    def corners(self, height: int, width: int) -> Tensor:
        """(n, 4) float32: left, top, right, bottom, in pixels of an image of that size."""
        boxes = self.boxes.float()
        return corners_of(boxes) * boxes.new_tensor([width, height, width, height])

    def checked(self, classes: int | None = None) -> "Objects":
        """Itself, if shapes, boxes, labels and scores are sound; it reads the tensors, so a GPU is waited for.

        Args:
            classes: labels must be below it; None: any from 0 on.

        Raises:
            ValueError: says how many are not, the first of them, and what is accepted.
        """
        boxes, labels, scores = self.boxes, self.labels, self.scores
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise ValueError(f"boxes are {_kind(boxes)}; accepted: (n, 4), floating-point.")
        if labels.shape != boxes.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"labels are {_kind(labels)} beside {len(boxes)} boxes; accepted: ({len(boxes)},), int64.")
        if scores is not None and (scores.shape != boxes.shape[:1] or not scores.is_floating_point()):
            raise ValueError(
                f"scores are {_kind(scores)} beside {len(boxes)} boxes; accepted: ({len(boxes)},), floating-point."
            )
        _refuse(~boxes.isfinite().all(1), boxes, "boxes", "finite numbers")
        _refuse((boxes[:, 2:] < 0).any(1), boxes, "boxes", "centre x, centre y, width, height with no negative size")
        if classes is None:
            _refuse(labels < 0, labels, "labels", "0 or more")
        else:
            _refuse((labels < 0) | (labels >= classes), labels, "labels", f"0 to {classes - 1}")
        if scores is not None:
            _refuse(~scores.isfinite(), scores, "scores", "finite numbers")
        return self


def no_objects() -> Objects:
    return Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def clipped(objects: Objects) -> Objects:
    """The parts of the boxes that are inside the image; a box of which nothing is left is dropped."""
    left, top, right, bottom = corners_of(objects.boxes).clamp(0, 1).unbind(-1)
    boxes = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], -1)
    # Boxes inside stay as they are, to the last bit.
    inside = ((objects.boxes[:, :2] - 0.5).abs() + objects.boxes[:, 2:] / 2 <= 0.5).all(-1, keepdim=True)
    boxes = torch.where(inside, objects.boxes, boxes)
    return Objects(boxes, objects.labels, objects.scores)[(boxes[:, 2:] > 0).all(-1)]


def corners_of(boxes: Tensor) -> Tensor:
    """(…, 4) centres and sizes as left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"


def _refuse(bad: Tensor, values: Tensor, name: str, accepted: str) -> None:
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"{int(bad.sum())} of {len(bad)} {name} cannot be used, the first being number {first}, "
            f"{values[first].tolist()}; accepted: {accepted}."
        )
