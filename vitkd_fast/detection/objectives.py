"""What a detecting student can minimise, and a generator that makes images for it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitkd_fast.detection import set_losses
from vitkd_fast.detection.matching import Matched, Wanted, match, wanted_by
from vitkd_fast.objectives import Scene, generator_objective, student_objective
from vitkd_fast.pair import Pair

MOST = 100  # queries of a teacher that are looked at in one image, or more if the student has more
ASKED = 4  # objects that an image is asked to show, at most


def matched(scene: Scene) -> Matched:
    """The student's queries, each with what it should find of what the teacher finds; worked out once for a scene."""
    if "matched" not in scene.shared:
        assert scene.student is not None and scene.student.boxes is not None
        most = max(MOST, scene.student.boxes.shape[1])
        scene.shared["matched"] = match(scene.student, wanted_by(scene.teacher, most))
    return scene.shared["matched"]


def sets(scene: Scene) -> list[Matched]:
    """The student's predictions and those that it makes on the way to them, of which the same is asked."""
    if "sets" not in scene.shared:
        last = matched(scene)
        assert scene.student is not None
        of_any_class = last.wanted.of_any_class()
        scene.shared["sets"] = [last] + [
            match(view, last.wanted if view.logits.shape[-1] == last.log_p.shape[-1] else of_any_class)
            for view in scene.student.earlier
        ]
    return scene.shared["sets"]


@student_objective("boxes")
def found(scene: Scene) -> Tensor:
    """KL of the classes of matched queries, and of finding nothing for all others (Carion et al. 2020; Chang et al.
    2023, DETRDistill)."""
    return _sum(set_losses.classes_loss, scene)


@student_objective("boxes")
def placed(scene: Scene) -> Tensor:
    """L1 distance of matched boxes (Carion et al. 2020)."""
    return _sum(set_losses.boxes_loss, scene)


@student_objective("boxes")
def overlap(scene: Scene) -> Tensor:
    """1 − generalised IoU of matched boxes (Rezatofighi et al. 2019)."""
    return _sum(set_losses.giou_loss, scene)


def _sum(loss: Callable[[Matched], Tensor], scene: Scene) -> Tensor:
    return torch.stack([loss(each) for each in sets(scene)]).sum()


@student_objective("boxes")
class covered(nn.Module):
    """Cross-entropy, by a learned layer, of what each patch of the student shows with what the teacher finds there.

    Ours: a small YOLOS that learns from its queries alone needs many times as long to find anything.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        layout = pair.layouts["student"]
        self.grid = layout.grid if layout else None
        self.off = None if self.grid else f"the student has no {pair.task.tokens}, or not on a grid"
        if pair.student_tokens is not None:
            self.classify = nn.Linear(pair.student_tokens[-1], pair.classes + 1)

    def forward(self, scene: Scene) -> Tensor:
        assert scene.student is not None and scene.student.tokens is not None and self.grid is not None
        shown = set_losses.covering(matched(scene).wanted, self.grid)
        return set_losses.covering_loss(self.classify(scene.student.tokens), shown)


@generator_objective("boxes", "student")
def unlike(scene: Scene) -> Tensor:
    """Minus the student's distance from the teacher, of classes and boxes with DETR's weights."""
    pairs = matched(scene)
    distance = set_losses.classes_loss(pairs) + 5 * set_losses.boxes_loss(pairs) + 2 * set_losses.giou_loss(pairs)
    return -distance


@generator_objective("boxes")
def sure(scene: Scene) -> Tensor:
    """Minus the log of the likeliest class of what the teacher's surest queries find, in nats: that it sees things, and
    knows which."""
    wanted = wanted_by(scene.teacher, ASKED)
    surest = wanted.classes[..., :-1].amax(-1)
    return -torch.log(surest.clamp_min(torch.finfo(surest.dtype).tiny)).mean()


@generator_objective("boxes")
class objects(nn.Module):
    """The teacher's detection loss against boxes and classes that are drawn at random for each image of a round.

    Images are asked for with labels, as in zero-shot quantisation of detectors (arXiv 2507.16782).
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.classes = pair.classes
        self.asked: Wanted | None = None

    def forward(self, scene: Scene) -> Tensor:
        if self.asked is None or len(self.asked.boxes) != len(scene.images):
            self.asked = drawn(len(scene.images), self.classes, scene.images.device)
        pairs = match(scene.teacher, self.asked)
        return set_losses.classes_loss(pairs) + 5 * set_losses.boxes_loss(pairs) + 2 * set_losses.giou_loss(pairs)

    def end_round(self) -> None:
        self.asked = None


def drawn(count: int, classes: int, device: torch.device) -> Wanted:
    """One to `ASKED` objects for each image: any class, a tenth to half of the sides, wholly inside."""
    present = torch.arange(ASKED, device=device) < torch.randint(1, ASKED + 1, (count, 1), device=device)
    labels = torch.randint(classes, (count, ASKED), device=device).where(present, classes)
    sides = 0.1 + 0.4 * torch.rand(count, ASKED, 2, device=device)
    centres = sides / 2 + (1 - sides) * torch.rand(count, ASKED, 2, device=device)
    return Wanted(nn.functional.one_hot(labels, classes + 1).float(), torch.cat((centres, sides), -1))
