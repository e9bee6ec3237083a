"""What a student can minimise; see `vitkd_fast.objectives` for adding to it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_fast import ops
from vitkd_fast.layout import align
from vitkd_fast.objectives import Scene, student_objective
from vitkd_fast.ops.kd_loss import Kind
from vitkd_fast.pair import Pair


def discrepancy(scene: Scene, kind: Kind) -> Tensor:
    """`ops.kd_loss` of the scene's logits."""
    assert scene.student is not None
    temperature = 1.0 if kind in ("l1", "mse") else scene.config.temperature
    return ops.kd_loss(scene.student.logits, scene.teacher.logits, kind=kind, temperature=temperature)


def projection(pair: Pair) -> nn.Linear:
    """A layer to learn, from the width of the student's tokens to that of the teacher's."""
    assert pair.student_tokens is not None and pair.teacher_tokens is not None
    return nn.Linear(pair.student_tokens[-1], pair.teacher_tokens[-1])


def aligned(scene: Scene, student: Tensor | None, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens that both networks have, (B, N, …), the student's patches on the teacher's grid."""
    layouts = scene.pair.layouts
    assert student is not None and teacher is not None
    assert layouts["student"] is not None and layouts["teacher"] is not None
    return align(student, teacher, layouts["student"], layouts["teacher"])


def projected_distance(scene: Scene, project: nn.Module, student: Tensor | None, teacher: Tensor | None) -> Tensor:
    """Smooth L1 distance of the tokens that both have, the student's projected."""
    student, teacher = aligned(scene, student, teacher)
    return F.smooth_l1_loss(project(student).float(), teacher.float())


@student_objective("classes")
def logits(scene: Scene) -> Tensor:
    """Distance of the student's logits from the teacher's, of the kind in `student_loss`."""
    return discrepancy(scene, scene.config.student_loss)


@student_objective("classes")
def hard(scene: Scene) -> Tensor:
    """Cross-entropy with the teacher's decision, in nats (Touvron et al. 2021, DeiT)."""
    assert scene.student is not None
    return F.cross_entropy(scene.student.logits.float(), scene.teacher.logits.argmax(-1))


@student_objective("tokens")
class tokens(nn.Module):
    """Smooth L1 distance of the last tokens, the student's through a learned projection (Romero et al. 2015)."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.project = projection(pair)

    def forward(self, scene: Scene) -> Tensor:
        assert scene.student is not None
        return projected_distance(scene, self.project, scene.student.tokens, scene.teacher.tokens)


@student_objective("blocks")
class blocks(nn.Module):
    """The same after every block of the student but the last, each against the teacher's block that it follows."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.project = nn.ModuleList(projection(pair) for _ in pair.followed[:-1])
        self.off = None if self.project else "the student has one block, and the last is left to `tokens`"

    def forward(self, scene: Scene) -> Tensor:
        assert scene.student is not None
        triples = zip(self.project, scene.student.blocks, scene.teacher.blocks)  # the last blocks have no projection
        return torch.stack([projected_distance(scene, *triple) for triple in triples]).mean()


@student_objective("attention")
def attention(scene: Scene) -> Tensor:
    """KL of the student's attention maps from the teacher's, mean over blocks: L_patch of Habib et al. 2024."""
    assert scene.student is not None
    pairs = zip(scene.student.attention, scene.teacher.attention, strict=True)
    return torch.stack([ops.attention_kd(*aligned(scene, *pair)) for pair in pairs]).mean()


@student_objective("tokens")
def relations(scene: Scene) -> Tensor:
    """Difference of the similarities between all pairs of last tokens (Tung and Mori 2019)."""
    assert scene.student is not None
    return ops.token_relation_kd(*aligned(scene, scene.student.tokens, scene.teacher.tokens))
