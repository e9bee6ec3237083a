"""Mean average precision, as COCO defines it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vitkd_fast.detection.extra import extra
from vitkd_fast.detection.objects import Objects, no_objects

MOST = 100  # objects per image that COCO counts
KEYS = {  # ours: torchmetrics'
    "map": "map",
    "map50": "map_50",
    "map75": "map_75",
    "map_small": "map_small",
    "map_medium": "map_medium",
    "map_large": "map_large",
}


def mean_average_precision(
    predicted: Sequence[Objects],
    real: Sequence[Objects],
    sizes: Sequence[tuple[int, int]] | None = None,
    crowds: Sequence[Objects] | None = None,
) -> dict[str, float]:
    """`map` (over overlaps of 0.50 to 0.95), `map50` and `map75`, in [0, 1]: means over the classes that are there.

    Also `map` of the small (below 32×32 pixels), medium and large (above 96×96) alone: NaN where there are none.

    Args:
        predicted: with scores; of each image the 100 highest count.
        real: of the same images.
        sizes: (height, width) of each in pixels; 640×640 where None.
        crowds: places of the same images with too many objects to count: what is found there is neither right nor
            wrong (COCO's iscrowd).

    Raises:
        ValueError: sequences of different lengths, objects that are not sound, predicted ones without scores, or no
            real object at all.
    """
    sizes = [(640, 640)] * len(real) if sizes is None else sizes
    crowds = [no_objects()] * len(real) if crowds is None else crowds
    if not len(predicted) == len(real) == len(sizes) == len(crowds):
        raise ValueError(
            f"objects were predicted in {len(predicted)} images, are real in {len(real)}, and {len(sizes)} sizes and "
            f"{len(crowds)} images' crowds are given; all must be of the same images."
        )
    if not any(map(len, real)):
        raise ValueError(f"there is no real object in these {len(real)} images: no precision to measure.")
    with extra():
        from torchmetrics.detection import MeanAveragePrecision

        # torchmetrics' own thresholds are float32: recalls and overlaps right at one would fall short of it.
        overlaps, recalls = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()
        metric = MeanAveragePrecision(iou_thresholds=overlaps, rec_thresholds=recalls, backend="pycocotools")
    for guess, truth, crowd, (height, width) in zip(predicted, real, crowds, sizes):
        guess, scores = _best(guess.checked().to("cpu"))
        truth, crowd = truth.checked().to("cpu"), crowd.checked().to("cpu")
        metric.update(
            [{"boxes": guess.corners(height, width), "scores": scores, "labels": guess.labels}],
            [
                {
                    "boxes": torch.cat((truth.corners(height, width), crowd.corners(height, width))),
                    "labels": torch.cat((truth.labels, crowd.labels)),
                    "iscrowd": torch.arange(len(truth) + len(crowd)).ge(len(truth)).long(),
                }
            ],
        )
    found = metric.compute()
    values = {ours: float(found[theirs]) for ours, theirs in KEYS.items()}
    return {name: value if value >= 0 else float("nan") for name, value in values.items()}


def _best(objects: Objects) -> tuple[Objects, Tensor]:
    """The objects that count, and their scores."""
    if objects.scores is None:
        raise ValueError("predicted objects have no scores, by which precision ranks them; give Objects.scores.")
    best = objects.scores.argsort(descending=True, stable=True)[:MOST]
    return objects[best], objects.scores[best].float()
