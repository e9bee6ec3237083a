"""`vitkd demo --detection`: a detector of handwritten digits, distilled without a scene in minutes on a CPU."""

import json as jsonlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_fast.detection.digit_scenes import Composer, composers
from vitkd_fast.detection.extra import extra
from vitkd_fast.detection.matching import Wanted, match
from vitkd_fast.detection.objects import Objects
from vitkd_fast.detection.set_losses import boxes_loss, classes_loss, giou_loss
from vitkd_fast.distill import Result, distill
from vitkd_fast.generator import Generator, register
from vitkd_fast.guard import GuardedOptimizer
from vitkd_fast.muon import hidden_matrices
from vitkd_fast.objectives import View
from vitkd_fast.report import percent

CLASSES = 10
SIDE = 64  # pixels of a scene
TEACHER = {"hidden_size": 96, "num_hidden_layers": 5, "num_attention_heads": 3}  # 613 thousand weights
STUDENT = {"hidden_size": 56, "num_hidden_layers": 4, "num_attention_heads": 2}  # 176 thousand
TEACHER_STEPS = 3000
STEPS = 1500
BATCH_SIZE = 32
HELD = 500  # scenes to measure on, of digits that no model has learned from


@dataclass(frozen=True)
class Figures:
    """What the demo measured: mAP50 on scenes of the held 30 % of the digits, in [0, 1]."""

    teacher_map50: float
    student_map50: float
    real_map50: float
    """Of the same student, trained as long on real scenes that the teacher labelled."""
    noise_map50: float
    """Of the same student, trained as long on Gaussian noise that the teacher labelled."""
    agreement: float
    """Of the objects that teacher or student see on those scenes, the share that both see alike."""
    teacher_params: int
    student_params: int
    seconds: float
    """Of everything."""
    seed: int
    steps: int

    def __str__(self) -> str:
        ratio = self.teacher_params / self.student_params
        rows = (
            ("teacher", self.teacher_map50, f"{self.teacher_params:,} parameters"),
            ("student, no data", self.student_map50, f"{self.student_params:,} parameters, {ratio:.1f}× fewer"),
            ("same student on real scenes", self.real_map50, ""),
            ("same student on noise", self.noise_map50, ""),
        )
        lines = [f"{name:<30}mAP50 {percent(value):>7}  {size}".rstrip() for name, value, size in rows]
        return "\n".join([*lines, f"{self.steps:,} steps each; {self.seconds:.0f} s for everything; seed {self.seed}"])


def demo(
    *, seed: int = 0, steps: int = STEPS, json: Path | None = None, out: Path | None = None, progress: bool = True
) -> Figures:
    """Train a small YOLOS on scenes of handwritten digits, drop them, and distil a YOLOS a third its size from it.

    Args:
        seed: of the weights, the scenes and the distillation; which digits are held is always the same.
        steps: student steps, of the three students each.
        json: file for the figures.
        out: run folder of the distillation, with a picture of both detectors' boxes; a finished one is replaced.
        progress: say what is happening.
    """
    start = time.perf_counter()
    say: Callable[..., None] = print if progress else lambda *_: None
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        known, held = composers(SIDE)
        evaluate = list(zip(*held(HELD)))
        say(f"Training the teacher on scenes of handwritten digits, {TEACHER_STEPS:,} steps …")
        teacher = small_yolos(**TEACHER)
        train(teacher, known, TEACHER_STEPS)
        student = small_yolos(**STUDENT)
        weights = {name: weight.clone() for name, weight in student.state_dict().items()}

        def distilled(what: str, **options: Any) -> Result:
            say(f"Distilling on {what}, {steps:,} steps …")
            student.load_state_dict(weights)
            settings = {
                "task": "detection",
                "steps": steps,
                "batch_size": BATCH_SIZE,
                "seed": seed,
                "progress": progress,
            }
            result = distill(teacher, student, evaluate=evaluate, **(settings | options))
            if result.report.status == "interrupted":
                raise KeyboardInterrupt
            return result

        free = distilled("drawn scenes: no digit is left", out=out, overwrite=True).report
        noise = distilled("Gaussian noise", method="noise").report
        RealScenes.compose = known
        real = distilled("real scenes", generator="digit_scenes").report
    assert free.agreement is not None
    figures = Figures(
        teacher_map50=free.teacher_map50 or 0.0,
        student_map50=free.student_map50 or 0.0,
        real_map50=real.student_map50 or 0.0,
        noise_map50=noise.student_map50 or 0.0,
        agreement=free.agreement,
        teacher_params=free.teacher.parameters,
        student_params=free.student.parameters,
        seconds=time.perf_counter() - start,
        seed=seed,
        steps=steps,
    )
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(jsonlib.dumps(asdict(figures), indent=2) + "\n", encoding="utf-8")
    say(f"\n{figures}")
    return figures


@register("digit_scenes")
class RealScenes(Generator):
    """Real scenes in a generator's place: for the upper bound, never for the student that has no data."""

    compose: ClassVar[Composer | None] = None

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        assert RealScenes.compose is not None
        return self.normalise(RealScenes.compose(len(noise))[0])


def small_yolos(**sizes: Any) -> nn.Module:
    """A YOLOS (Fang et al. 2021) for the scenes: patches of 8×8, ten queries."""
    with extra():
        from transformers import YolosConfig, YolosForObjectDetection
    config: Any = YolosConfig(
        **sizes,
        intermediate_size=4 * sizes["hidden_size"],
        image_size=[SIDE, SIDE],
        patch_size=8,
        num_channels=1,
        num_detection_tokens=10,
        use_mid_position_embeddings=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = CLASSES
    model: Any = YolosForObjectDetection(config)
    # Queries that start alike, as transformers makes them, would stay alike for long.
    nn.init.normal_(model.vit.embeddings.detection_tokens)
    nn.init.normal_(model.vit.embeddings.position_embeddings, std=0.02)
    model.pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}
    return model


def train(model: Any, compose: Composer, steps: int) -> None:
    """Supervised, by DETR's set losses; and each patch learns which digit covers it, without which a YOLOS this small
    needs many times as long."""
    patches = nn.Linear(model.config.hidden_size, CLASSES + 1)
    terms = ["classes", "boxes", "giou", "patches"]
    optimizer = GuardedOptimizer(
        "teacher",
        nn.ModuleList([model, patches]),
        2.5e-3,
        terms,
        weight_decay=0.01,
        clip=1.0,
        matrices=hidden_matrices(model, 1, (CLASSES + 1, 4)),
    )
    model.train()
    grid = SIDE // model.config.patch_size
    for step in range(steps):
        scenes, objects = compose(BATCH_SIZE)
        output = model((scenes - 0.5) / 0.5)
        pairs = match(View(output.logits, boxes=output.pred_boxes), real(objects))
        covered = patches(output.last_hidden_state[:, 1 : 1 + grid * grid]).flatten(0, 1)
        losses = (
            classes_loss(pairs),
            5 * boxes_loss(pairs),
            2 * giou_loss(pairs),
            F.cross_entropy(covered, covering(objects, grid).flatten()),
        )
        optimizer.step(torch.stack(losses).sum(), dict(zip(terms, losses)), step / steps)
    model.eval()


def real(objects: list[Objects]) -> Wanted:
    """Real objects as what should be found, with certainty; scenes with fewer than the most wait for nothing."""
    most = max(map(len, objects))
    labels = torch.full((len(objects), most), CLASSES)
    boxes = torch.full((len(objects), most, 4), 0.5)
    for scene, some in enumerate(objects):
        labels[scene, : len(some)], boxes[scene, : len(some)] = some.labels, some.boxes
    return Wanted(F.one_hot(labels, CLASSES + 1).float(), boxes)


def covering(objects: list[Objects], grid: int) -> Tensor:
    """(B, grid, grid) the label whose box covers the middle of each patch; `CLASSES` where none does."""
    place = (torch.arange(grid) + 0.5) / grid
    labels = torch.full((len(objects), grid, grid), CLASSES)
    for scene, some in enumerate(objects):
        for (x, y, width, height), label in zip(some.boxes, some.labels):
            inside = ((place - y).abs() < height / 2)[:, None] & ((place - x).abs() < width / 2)
            labels[scene][inside] = label
    return labels
