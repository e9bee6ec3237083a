"""Mean average precision, as COCO defines it."""

from collections.abc import Sequence

from torch import Tensor

from vitkd_fast.detection.extra import extra
from vitkd_fast.detection.objects import Objects

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
    predicted: Sequence[Objects], real: Sequence[Objects], sizes: Sequence[tuple[int, int]] | None = None
) -> dict[str, float]:
    """`map` (over overlaps of 0.50 to 0.95), `map50` and `map75`, in [0, 1]: means over the classes that are there.

    Also `map` of the small (below 32×32 pixels), medium and large (above 96×96) alone: NaN where there are none.

    Args:
        predicted: with scores; of each image the 100 highest count.
        real: of the same images.
        sizes: (height, width) of each in pixels; 640×640 where None.

    Raises:
        ValueError: sequences of different lengths, objects that are not sound, predicted ones without scores, or no
            real object at all.
    """
    sizes = [(640, 640)] * len(real) if sizes is None else sizes
    if not len(predicted) == len(real) == len(sizes):
        raise ValueError(
            f"objects were predicted in {len(predicted)} images, are real in {len(real)}, and {len(sizes)} sizes are "
            f"given; the three must be of the same images."
        )
    if not any(map(len, real)):
        raise ValueError(f"there is no real object in these {len(real)} images: no precision to measure.")
    with extra():
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(backend="pycocotools")
    for guess, truth, (height, width) in zip(predicted, real, sizes):
        guess, scores = _best(guess.checked().to("cpu"))
        truth = truth.checked().to("cpu")
        metric.update(
            [{"boxes": guess.corners(height, width), "scores": scores, "labels": guess.labels}],
            [{"boxes": truth.corners(height, width), "labels": truth.labels}],
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
