"""Sparse inversion: patches that the teacher hardly attends to are dropped while images are learned.

Hu et al. 2024 (SMI, arXiv 2510.27186): a ViT takes any number of tokens, so a patch without importance costs nothing
once it is dropped, and no background is made up in it. Ours: four droppings, at 10, 20, 30 and 40 % of the round's
steps (theirs at steps 50, 100, 200 and 300 of 4,000), and a dropped patch is shown in the colour that the teacher's
normalisation calls 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_fast.ops._precise import without_autocast
from vitkd_fast.pair import NO_WHOLE_PATCHES, Pair

DROPPINGS = 4
LEAST = 4  # patches: of fewer, an image has no parts left that could be seen together


class LivePatches:
    """Which of the teacher's patches are still there, for each image of a round.

    Args:
        pair: with a teacher for which `missing` is None.
        share: of the patches that the round ends with; at least four of them.
    """

    def __init__(self, pair: Pair, share: float) -> None:
        self.pair = pair
        rows, columns = pair.grid
        patches = rows * columns
        self.counts = [max(LEAST, round(patches * share ** (k / DROPPINGS))) for k in range(DROPPINGS + 1)]
        self.stage = 0
        self.live: Tensor | None = None  # (B, patches), their numbers; None: all

    @staticmethod
    def missing(pair: Pair) -> str | None:
        """Why the teacher's patches cannot be dropped."""
        if not hasattr(pair.teacher, "patch_drop"):
            return "the teacher is not a ViT of timm, with patch_drop after its position embedding"
        reason = pair.missing(frozenset({"attention"}), student=False)
        if reason is not None:
            return reason
        rows, columns = pair.grid
        if rows * columns <= LEAST:
            return f"the teacher's images have {rows * columns} patches, and {LEAST} are always kept"
        return None if pair.whole_patches else NO_WHOLE_PATCHES

    def begin(self) -> None:
        """All patches of the next round's images are live."""
        self.stage, self.live = 0, None

    def shown(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images without their dropped patches, to which no gradient goes either."""
        if self.live is None:
            return images
        rows, columns = self.pair.grid
        mask = images.new_zeros(len(images), rows * columns).scatter_(1, self.live, 1)
        mask = F.interpolate(mask.view(-1, 1, rows, columns), images.shape[-2:], mode="nearest")
        return torch.where(mask > 0, images, 0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the teacher computes with the live patches only."""
        teacher: Any = self.pair.teacher
        handle = teacher.patch_drop.register_forward_hook(self._gather)
        try:
            yield
        finally:
            handle.remove()

    def _gather(self, _module: Any, _inputs: Any, tokens: Tensor) -> Tensor:
        if self.live is None:
            return tokens
        prefix, patches = tokens.split((self.pair.prefix_tokens, tokens.shape[1] - self.pair.prefix_tokens), dim=1)
        index = self.live.unsqueeze(2).expand(-1, -1, tokens.shape[2])
        return torch.cat((prefix, patches.gather(1, index)), dim=1)

    def due(self, step: int, steps: int) -> bool:
        """Whether patches are to be dropped after this step of a round."""
        return self._stage_of(step, steps) > self.stage

    def drop(self, qkv: Tensor, step: int, steps: int) -> None:
        """Keep the most attended of the live patches; qkv (B, N, 3, H, D) is the teacher's last, of the same step."""
        self.stage = self._stage_of(step, steps)
        layout = self.pair.layouts["teacher"]
        assert layout is not None
        attended = class_attention(qkv, layout.prefix, layout.has_class)  # (B, live)
        kept = attended.topk(min(self.counts[self.stage], attended.shape[1]), dim=1).indices
        self.live = kept if self.live is None else self.live.gather(1, kept)

    def _stage_of(self, step: int, steps: int) -> int:
        return sum(step >= steps * k // 10 for k in range(1, DROPPINGS + 1))


@torch.no_grad()
def class_attention(qkv: Tensor, prefix_tokens: int, has_class: bool) -> Tensor:
    """Share of the class token's attention that each patch gets, mean over the heads, (B, patches).

    Without a class token, the mean over all tokens' attention.
    """
    queries, keys = qkv[:, : 1 if has_class else None, 0].float(), qkv[:, :, 1].float()
    with without_autocast(qkv.device):
        scores = queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1) * qkv.shape[-1] ** -0.5  # (B, H, queries, N)
    return scores.softmax(-1).mean((1, 2))[:, prefix_tokens:]
