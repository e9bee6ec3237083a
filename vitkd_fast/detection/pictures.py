"""Pictures of images with their boxes, and of what two detectors see in the same images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitkd_fast.detection.extra import extra
from vitkd_fast.detection.objects import Objects, clipped
from vitkd_fast.run import image_grid, magnified

Colour = str | tuple[int, int, int]
SMALLEST = 192  # pixels of the shorter side at which boxes and their names are legible
PAIRS = 4  # in one row


def with_boxes(
    pixels: Tensor,
    objects: Sequence[Objects],
    classes: Sequence[str] | None = None,
    colour: Colour = "lime",
    least_score: float = 0.3,
) -> Tensor:
    """(B, C, H, W) in [0, 1] as (B, 3, H', W') with each image's boxes; small images are magnified, none are shrunk.

    Args:
        objects: of each image; those that score below `least_score` are left out.
        classes: names to write on the boxes; None: the labels' numbers.
        colour: a name, "#rrggbb", or red, green and blue of 0 to 255.

    Raises:
        ValueError: not as many objects as images, or objects that are not sound.
    """
    if len(pixels) != len(objects):
        raise ValueError(f"{len(objects)} images' objects are given with {len(pixels)} images; accepted: one of each.")
    with extra():
        from torchvision.utils import draw_bounding_boxes
    images = magnified(pixels, SMALLEST).detach().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
    height, width = images.shape[-2:]
    last = torch.tensor([width - 1, height - 1] * 2)  # pixels that are still in the image
    drawn = []
    for image, some in zip(images, objects):
        some = clipped(some.checked(None if classes is None else len(classes)).to("cpu"))
        if some.scores is not None:
            some = some[some.scores >= least_score]
        if len(some):  # torchvision warns of none
            boxes = some.corners(height, width).round().minimum(last)
            image = draw_bounding_boxes(image, boxes, _captions(some, classes), colour, width=2)
        drawn.append(image)
    return torch.stack(drawn).float().div_(255)


def side_by_side(
    pixels: Tensor,
    teacher: Sequence[Objects],
    student: Sequence[Objects],
    classes: Sequence[str] | None = None,
    least_score: float = 0.3,
):
    """One PIL image, four pairs to a row: each of the (B, C, H, W) in [0, 1] with the teacher's boxes on the left and
    the student's on the right."""
    left, right = (with_boxes(pixels, objects, classes, least_score=least_score) for objects in (teacher, student))
    gap = nn.functional.pad(left, (0, 2), value=1.0)
    return image_grid(torch.cat([gap, right], -1), columns=PAIRS)


def _captions(objects: Objects, classes: Sequence[str] | None) -> list[str]:
    names = [classes[label] if classes else str(label) for label in objects.labels.tolist()]
    if objects.scores is None:
        return names
    return [f"{name} {score:.2f}" for name, score in zip(names, objects.scores.tolist())]
