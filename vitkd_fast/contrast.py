"""Instance discrimination: a generated image is to be told from all others, those of earlier rounds too."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_fast.augment import warped
from vitkd_fast.objectives import Scene, generator_objective
from vitkd_fast.ops._precise import without_autocast
from vitkd_fast.pair import Pair

TEMPERATURE = 0.2
WIDTH = 128  # of the learned space in which images are compared
REMEMBERED = 1024  # images of earlier rounds; their pass through the head costs less than the teacher's on one batch
LEAST = 0.6  # of an image's sides that a crop keeps


@generator_objective("tokens")
class contrast(nn.Module):
    """Cross-entropy, in nats, of finding an image by a crop of it, among its batch and images of earlier rounds.

    Features are the teacher's last tokens, their mean, through a perceptron that learns with the generator; similarity
    is their cosine, divided by a temperature of 0.2. 0 when all images are different to the teacher.

    Fang et al. 2021 (CMI, arXiv 2105.08584), L_cr. Ours: of the two views, one is the image as the other objectives
    see it, so that the teacher runs once more, not twice; crops keep at least 0.6 of the sides and are not mirrored.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        assert pair.teacher_tokens is not None
        features = pair.teacher_tokens[-1]
        self.head = nn.Sequential(nn.Linear(features, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))
        # Not buffers: the guard copies those at every step, and these change once in a round.
        self.bank = torch.zeros(REMEMBERED, features, device=pair.device)
        self.latest: Tensor | None = None
        self.count = self.cursor = 0

    def forward(self, scene: Scene) -> Tensor:
        assert scene.teacher.tokens is not None
        pair = scene.pair
        seen = pair.look(pair.teacher, cropped(scene.images), frozenset({"tokens"}))
        assert seen.tokens is not None
        whole, crop = scene.teacher.tokens.mean(1).float(), seen.tokens.mean(1).float()  # (B, D)
        self.latest = whole.detach()
        rows = torch.cat((crop, whole, self.bank[: self.count]))
        compared = F.normalize(self.head(rows).float(), dim=1)
        crop, others = compared[: len(crop)], compared[len(crop) :]
        return info_nce(crop, others)

    def end_round(self) -> None:
        """Remember the round's images, in place of the oldest, but for those whose features are not finite."""
        if self.latest is None:
            return
        latest = self.latest[:REMEMBERED]
        if self.cursor + len(latest) > REMEMBERED:
            self.cursor = 0
        slot = self.bank[self.cursor : self.cursor + len(latest)]
        slot.copy_(torch.where(latest.isfinite().all(1, keepdim=True), latest, slot))
        self.cursor += len(latest)
        self.count = max(self.count, self.cursor)
        self.latest = None

    def get_extra_state(self) -> dict[str, Any]:
        return {"bank": self.bank, "count": self.count, "cursor": self.cursor}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.bank, self.count, self.cursor = state["bank"], state["count"], state["cursor"]


def info_nce(queries: Tensor, keys: Tensor) -> Tensor:
    """Mean cross-entropy of unit queries (B, D) with unit keys (B or more, D), of which query i should find key i.

    −log exp(q_i·k_i / τ) / Σ_j exp(q_i·k_j / τ), van den Oord et al. 2018.
    """
    target = torch.arange(len(queries), device=queries.device)
    with without_autocast(queries.device):
        return F.cross_entropy(queries @ keys.mT / TEMPERATURE, target)


def cropped(images: Tensor) -> Tensor:
    """A random part of each (C, H, W) image, enlarged to the whole size; the gradient reaches the image."""
    batch = len(images)
    side = LEAST + (1 - LEAST) * torch.rand(batch, device=images.device)
    offset = (2 * torch.rand(2, batch, device=images.device) - 1) * (1 - side)
    return warped(images, torch.zeros_like(side), side, offset[0], offset[1])
