"""How far a set of predictions is from what is wanted, once each wanted object has a query (Carion et al. 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from vitkd_fast.detection.matching import Matched, Wanted
from vitkd_fast.detection.objects import corners_of

BACKGROUND = 0.1  # what a query counts that should find nothing, where one that should find something counts 1


def classes_loss(matched: Matched) -> Tensor:
    """KL from the wanted classes to those of each matched query, in nats; from "nothing" for all other queries.

    A weighed mean over the queries: an object counts as much as the teacher is sure of it, nothing counts
    `BACKGROUND`.
    """
    log_p, wanted = matched.log_p, matched.wanted
    batch, queries, _ = log_p.shape
    found = matched.found.float()
    # Queries that look for nothing, then the found ones in their place.
    of_nothing = -log_p[..., -1]
    taken = torch.zeros(batch, queries, device=log_p.device).scatter_add_(1, matched.queries, found)
    nothing = BACKGROUND * (1 - taken)
    # xlogy's gradient is NaN at 0, where a sure teacher's softmax ends.
    log_wanted = wanted.classes.clamp_min(torch.finfo(wanted.classes.dtype).tiny).log()
    kl = wanted.classes * (log_wanted - matched.of_queries(log_p))
    weight = found * (BACKGROUND + (1 - BACKGROUND) * wanted.sureness)
    total = (nothing * of_nothing).sum() + (weight * kl.sum(-1)).sum()
    return total / (nothing.sum() + weight.sum())


def boxes_loss(matched: Matched) -> Tensor:
    """L1 distance of the four numbers of each found box, summed; a mean, weighed by the sureness of the objects."""
    distance = (matched.of_queries(matched.boxes) - matched.wanted.boxes).abs().sum(-1)
    return _mean(distance, matched)


def giou_loss(matched: Matched) -> Tensor:
    """1 - generalised IoU (Rezatofighi et al. 2019) of each found box; a mean, weighed by the sureness."""
    lost = generalized_box_iou_loss(corners_of(matched.of_queries(matched.boxes)), corners_of(matched.wanted.boxes))
    return _mean(lost, matched)


def covering(wanted: Wanted, grid: tuple[int, int]) -> Tensor:
    """(B, patches, classes + 1) what is at each patch of a grid of rows and columns: the classes of the surest object
    whose box reaches the patch's middle, "nothing" where there is none.

    A box between two middles has the patch in which its own middle is.
    """
    rows, columns = grid
    x, y, width, height = wanted.boxes[..., None].unbind(-2)  # (B, M, 1)
    device = wanted.boxes.device
    down, across = ((torch.arange(count, device=device) + 0.5) / count for count in grid)
    own_row = torch.arange(rows, device=device) == (y * rows).long().clamp(0, rows - 1)
    own_column = torch.arange(columns, device=device) == (x * columns).long().clamp(0, columns - 1)
    inside = ((down - y).abs() < height / 2)[..., None] & ((across - x).abs() < width / 2)[..., None, :]
    inside |= own_row[..., None] & own_column[..., None, :]
    sureness = (wanted.sureness[..., None] * inside.flatten(2)).max(1)  # (B, patches)
    there = wanted.classes.gather(1, sureness.indices[..., None].expand(-1, -1, wanted.classes.shape[-1]))
    nothing = torch.zeros_like(there)
    nothing[..., -1] = 1
    return torch.where((sureness.values > 0)[..., None], there, nothing)


def covering_loss(logits: Tensor, covered: Tensor) -> Tensor:
    """Cross-entropy of (B, patches, classes + 1) logits with what `covering` says, in nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), covered.flatten(0, 1))


def _mean(values: Tensor, matched: Matched) -> Tensor:
    weight = matched.found * matched.wanted.sureness
    return (weight * values).sum() / weight.sum().clamp_min(1.0)
