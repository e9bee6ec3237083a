"""What generator and student minimise: terms by name, unweighted, and their weighed sum."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_fast.config import Config
from vitkd_fast.ops import kd_loss
from vitkd_fast.ops.kd_loss import Kind

GENERATOR_TERMS = ("adversarial", "one_hot", "balance")
STUDENT_TERMS = ("distillation", "tokens")


def generator_losses(student_logits: Tensor, teacher_logits: Tensor, config: Config) -> dict[str, Tensor]:
    """Images on which the two networks disagree, of which the teacher is sure, and of every class.

    Sources: disagreement, Fang et al. 2019 (DFAD); one-hot and balance, Chen et al. 2019 (DAFL, eqs. 2 and 4).
    """
    return {
        "adversarial": -discrepancy(student_logits, teacher_logits, config.disagreement, config),
        "one_hot": one_hot_prior(teacher_logits),
        "balance": class_imbalance(teacher_logits),
    }


def student_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_tokens: Tensor | None,
    teacher_tokens: Tensor | None,
    config: Config,
) -> dict[str, Tensor]:
    """The student's logits near the teacher's, and its last tokens too where they are given (already projected)."""
    losses = {"distillation": discrepancy(student_logits, teacher_logits, config.student_loss, config)}
    if student_tokens is not None and teacher_tokens is not None:
        losses["tokens"] = F.smooth_l1_loss(student_tokens.float(), teacher_tokens.float())
    return losses


def weighed_sum(losses: dict[str, Tensor], config: Config) -> Tensor:
    """The terms under their weights in the configuration; the student's distillation term has weight 1."""
    return torch.stack([getattr(config, name, 1.0) * loss for name, loss in losses.items()]).sum()


def discrepancy(student_logits: Tensor, teacher_logits: Tensor, kind: Kind, config: Config) -> Tensor:
    temperature = 1.0 if kind in ("l1", "mse") else config.temperature
    return kd_loss(student_logits, teacher_logits, kind=kind, temperature=temperature)


def one_hot_prior(teacher_logits: Tensor) -> Tensor:
    """Cross-entropy of the teacher with its own decision, in nats: 0 when it is sure of every image."""
    return -F.log_softmax(teacher_logits.float(), dim=-1).amax(-1).mean()


def class_imbalance(teacher_logits: Tensor) -> Tensor:
    """Minus the entropy of the batch's mean prediction, in nats: −log C when every class is equally frequent."""
    log_p = F.log_softmax(teacher_logits.float(), dim=-1)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # in logs, a class that underflows to 0 has no NaN gradient
    return (log_mean.exp() * log_mean).sum()


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Share of images, in [0, 1], for which student and teacher decide alike."""
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean()
