"""Which query of a student answers for which object: the assignment of least cost (Carion et al. 2020, DETR)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from vitkd_fast.detection.objects import corners_of
from vitkd_fast.objectives import View
from vitkd_fast.ops._precise import without_autocast

CLASS, L1, GIOU = 1.0, 5.0, 2.0  # what a wrong class, a distance of boxes and a lack of overlap cost (Carion et al.)
SEEN = 0.05  # a query of the teacher that is less sure of an object than this is not looked for


@dataclass(frozen=True)
class Wanted:
    """What a student should find in each of B images, at most M things."""

    classes: Tensor
    """(B, M, classes + 1) probabilities; the last is of there being nothing."""
    boxes: Tensor
    """(B, M, 4) centre x, centre y, width and height, in [0, 1] of the image's sides."""

    @property
    def sureness(self) -> Tensor:
        """(B, M) probability that there is an object."""
        return 1 - self.classes[..., -1]

    def of_any_class(self) -> "Wanted":
        """The same with one class: an object."""
        return Wanted(torch.stack((self.sureness, self.classes[..., -1]), -1), self.boxes)


def wanted_by(teacher: View, most: int) -> Wanted:
    """The `most` queries of a teacher that are surest of an object, as soft labels."""
    assert teacher.boxes is not None
    classes = teacher.logits.float().softmax(-1)
    most = min(most, classes.shape[1])
    chosen = classes[..., -1].topk(most, dim=1, largest=False).indices[..., None]  # (B, M, 1)
    return Wanted(
        classes.gather(1, chosen.expand(-1, -1, classes.shape[-1])),
        teacher.boxes.float().gather(1, chosen.expand(-1, -1, 4)),
    )


@dataclass(frozen=True)
class Matched:
    """Student and objects brought together, each object with a query of its own."""

    wanted: Wanted
    queries: Tensor
    """(B, M) the student's query for each object; 0 where `found` says that there is none."""
    found: Tensor
    """(B, M) whether the object is looked for and has a query."""
    log_p: Tensor
    """(B, Q, classes + 1) of the student."""
    boxes: Tensor
    """(B, Q, 4) of the student."""

    def of_queries(self, values: Tensor) -> Tensor:
        """(B, Q, D) values of the student's queries as (B, M, D), of the queries that were matched."""
        return values.gather(1, self.queries[..., None].expand(-1, -1, values.shape[-1]))


def match(student: View, wanted: Wanted) -> Matched:
    """The student's queries assigned to what is wanted, the surest if it is more than they are; the choice itself has
    no gradient."""
    assert student.boxes is not None
    log_p, boxes = student.logits.float().log_softmax(-1), student.boxes.float()
    # What is hardly there must not take a query from what surely is: the cost does not know one from the other.
    surest = wanted.sureness.topk(min(boxes.shape[1], wanted.boxes.shape[1])).indices
    sought = torch.zeros_like(wanted.sureness, dtype=torch.bool).scatter(1, surest, True) & (wanted.sureness > SEEN)
    queries, found = assign(costs(log_p.detach().exp(), boxes.detach(), wanted), sought)
    return Matched(wanted, queries, found, log_p, boxes)


def costs(classes: Tensor, boxes: Tensor, wanted: Wanted) -> Tensor:
    """(B, Q, M) what it costs to let a query of these (B, Q, …) probabilities and boxes answer for an object."""
    with without_autocast(classes.device):
        of_class = -torch.einsum("bqc,bmc->bqm", classes[..., :-1], wanted.classes[..., :-1])
    of_place = torch.cdist(boxes, wanted.boxes, p=1)
    of_overlap = 1 - pairwise_giou(boxes, wanted.boxes)
    return CLASS * of_class + L1 * of_place + GIOU * of_overlap


def assign(cost: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """For each valid one of M objects the query that answers for it, at least total cost.

    Args:
        cost: (B, Q, M)
        valid: (B, M) bool

    Returns:
        (B, M) queries and (B, M) bool, whether there is one: where objects outnumber queries, some have none.

    One copy to the host and one back; scipy's solver (Crouse 2016) takes each image in turn.
    """
    from scipy.optimize import linear_sum_assignment

    batch, _, objects = cost.shape
    # (B, Q + 1, M): one copy instead of two
    packed = torch.cat((cost.detach(), valid[:, None].to(cost.dtype)), 1).cpu()
    # A student that is no longer finite is the guard's to deal with; the solver would raise.
    table = torch.nan_to_num(packed[:, :-1], nan=0.0, posinf=1e9, neginf=-1e9).numpy()
    looked_for = packed[:, -1].numpy() > 0
    answer = torch.zeros(2, batch, objects, dtype=torch.int64, device="cpu")
    queries, found = answer.numpy()
    for image in range(batch):
        columns = looked_for[image].nonzero()[0]
        rows, chosen = linear_sum_assignment(table[image][:, columns])
        queries[image, columns[chosen]] = rows
        found[image, columns[chosen]] = 1
    queries_there, found_there = answer.to(cost.device, non_blocking=True)
    return queries_there, found_there.bool()


def pairwise_giou(first: Tensor, second: Tensor) -> Tensor:
    """(B, Q, M) generalised IoU (Rezatofighi et al. 2019) of (B, Q, 4) with (B, M, 4) boxes, in [-1, 1]."""
    one, other = torch.broadcast_tensors(corners_of(first)[:, :, None], corners_of(second)[:, None])
    return 1 - generalized_box_iou_loss(one, other)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """(…) IoU of (…, 4) boxes, each with its counterpart, in [0, 1]."""
    one, other = corners_of(first), corners_of(second)
    sides = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp_min(0)
    both = sides.prod(-1)
    return both / (first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - both).clamp_min(1e-9)
