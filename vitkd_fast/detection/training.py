"""Teachers for the demo and the benchmark: a YOLOS made small, and supervised training of it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_fast.detection.extra import extra
from vitkd_fast.detection.matching import Wanted, match
from vitkd_fast.detection.models import tell_apart
from vitkd_fast.detection.objects import Objects
from vitkd_fast.detection.set_losses import boxes_loss, classes_loss, covering, covering_loss, giou_loss
from vitkd_fast.generator import ImageSpec
from vitkd_fast.guard import GuardedOptimizer
from vitkd_fast.muon import hidden_matrices
from vitkd_fast.objectives import View

TERMS = ("classes", "boxes", "giou", "patches")
Compose = Callable[[int], tuple[Tensor, list[Objects]]]
"""From a count to (count, C, H, W) pixels in [0, 1] and what is on each."""


def small_yolos(
    spec: ImageSpec, classes: int, patch: int, queries: int, width: int, depth: int, heads: int
) -> nn.Module:
    """A YOLOS of transformers (Fang et al. 2021, arXiv 2106.00666) with random weights, that says its images."""
    with extra():
        from transformers import YolosConfig, YolosForObjectDetection
    config: Any = YolosConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=[spec.height, spec.width],
        patch_size=patch,
        num_channels=spec.channels,
        num_detection_tokens=queries,
        use_mid_position_embeddings=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = classes
    model: Any = YolosForObjectDetection(config)
    tell_apart(model)
    model.pretrained_cfg = {"mean": spec.mean, "std": spec.std}
    return model


def train(model: Any, compose: Compose, spec: ImageSpec, *, steps: int, batch_size: int, lr: float) -> None:
    """Supervised, by DETR's set losses; and each patch learns what covers it, without which a YOLOS this small needs
    many times as long. `lr` is the one cycle's peak."""
    config, device = model.config, model.device
    classes, grid = config.num_labels, (spec.height // config.patch_size, spec.width // config.patch_size)
    patches = nn.Linear(config.hidden_size, classes + 1, device=device)
    optimizer = GuardedOptimizer(
        "teacher",
        nn.ModuleList([model, patches]),
        lr,
        TERMS,
        weight_decay=0.01,
        clip=1.0,
        matrices=hidden_matrices(model, spec.channels, (classes + 1, 4)),
    )
    model.train()
    for step in range(steps):
        scenes, objects = compose(batch_size)
        output = model(spec.normalised(scenes.to(device)))
        wanted = real(objects, classes, device)
        pairs = match(View(output.logits, boxes=output.pred_boxes), wanted)
        covered = patches(output.last_hidden_state[:, 1 : 1 + grid[0] * grid[1]])
        losses = (
            classes_loss(pairs),
            5 * boxes_loss(pairs),
            2 * giou_loss(pairs),
            covering_loss(covered, covering(wanted, grid)),
        )
        optimizer.step(torch.stack(losses).sum(), dict(zip(TERMS, losses)), step / steps)
    model.eval()


def real(objects: list[Objects], classes: int, device: torch.device | str = "cpu") -> Wanted:
    """Real objects as what should be found, with certainty; scenes with fewer than the most wait for nothing."""
    most = max(1, *map(len, objects))
    labels = torch.full((len(objects), most), classes)
    boxes = torch.full((len(objects), most, 4), 0.5)
    for scene, some in enumerate(objects):
        labels[scene, : len(some)], boxes[scene, : len(some)] = some.labels, some.boxes
    return Wanted(F.one_hot(labels.to(device), classes + 1).float(), boxes.to(device))
