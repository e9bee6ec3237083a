"""`vitkd demo`: the main job in minutes on a CPU, with the 1,797 real handwritten digits (8×8) of scikit-learn."""

import json as jsonlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_fast.augment import warped
from vitkd_fast.config import Config
from vitkd_fast.distill import distill
from vitkd_fast.evaluate import accuracy
from vitkd_fast.guard import GuardedOptimizer
from vitkd_fast.report import percent
from vitkd_fast.run import RunFolder

TEACHER = {"embed_dim": 64, "depth": 5, "num_heads": 4}  # 252 thousand weights
STUDENT = {"embed_dim": 28, "depth": 4, "num_heads": 4}  # 40 thousand
TEACHER_STEPS = 2000
BATCH_SIZE = 128  # of both students


@dataclass(frozen=True)
class Figures:
    """What the demo measured; accuracies in [0, 1] on the held 30 % of the digits."""

    teacher_accuracy: float
    student_accuracy: float
    noise_accuracy: float
    """Of the same student, trained as long on Gaussian noise that the teacher labelled."""
    teacher_params: int
    student_params: int
    seconds: float
    """Of everything: training the teacher, distilling, the noise student."""
    seed: int
    steps: int

    def __str__(self) -> str:
        ratio = self.teacher_params / self.student_params
        return "\n".join(
            (
                f"teacher                {percent(self.teacher_accuracy)}  {self.teacher_params:>9,} parameters",
                f"student, no data       {percent(self.student_accuracy)}  {self.student_params:>9,} parameters, "
                f"{ratio:.1f}× fewer",
                f"same student on noise  {percent(self.noise_accuracy)}",
                f"{self.steps:,} steps each; {self.seconds:.0f} s for everything; seed {self.seed}",
            )
        )


def demo(
    *, seed: int = 0, steps: int = 5000, json: Path | None = None, out: Path | None = None, progress: bool = True
) -> Figures:
    """Train a small ViT on handwritten digits, drop the digits, and distil a ViT a sixth its size from it alone.

    Args:
        seed: of the weights and the distillation; the split is always the same.
        steps: student steps, of the distillation and of the noise student each.
        json: file for the figures.
        out: run folder of the distillation; a finished one in it is replaced.
        progress: say what is happening.
    """
    start = time.perf_counter()
    say = print if progress else lambda *_: None
    replaces = ready(steps, seed, json, out)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        (images, labels), held = digits()
        say(f"Training the teacher on {len(labels):,} handwritten digits …")
        teacher = train_teacher(images, labels)
        del images, labels
        say(f"The digits are gone. Distilling a student from the teacher alone, {steps:,} steps …")
        student, noise_student = small_vit(**STUDENT), small_vit(**STUDENT)
        noise_student.load_state_dict(student.state_dict())
        result = distill(
            teacher,
            student,
            steps=steps,
            batch_size=BATCH_SIZE,
            seed=seed,
            evaluate=[held],
            out=out,
            overwrite=replaces,
            progress=progress,
        )
        if result.report.status == "interrupted":
            raise KeyboardInterrupt
        say(f"The same student on Gaussian noise, {steps:,} steps …")
        noise = distill(
            teacher, noise_student, method="noise", steps=steps, batch_size=BATCH_SIZE, seed=seed, progress=progress
        )
        if noise.report.status == "interrupted":
            raise KeyboardInterrupt
    figures = Figures(
        teacher_accuracy=accuracy(teacher, *held),
        student_accuracy=accuracy(result.student, *held),
        noise_accuracy=accuracy(noise_student, *held),
        teacher_params=result.report.teacher.parameters,
        student_params=result.report.student.parameters,
        seconds=time.perf_counter() - start,
        seed=seed,
        steps=steps,
    )
    say(f"\n{figures}")
    if json is not None:
        json.write_text(jsonlib.dumps(asdict(figures), indent=2) + "\n", encoding="utf-8")
    return figures


def ready(steps: int, seed: int, json: Path | None, out: Path | None) -> bool:
    """Refuse, before anything is trained, what would be refused after; whether `out` has a finished run to replace."""
    Config(steps=steps, seed=seed)
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.open("a", encoding="utf-8").close()
    finished = out is not None and (out / "report.json").exists()
    try:
        RunFolder(out, overwrite=finished)
    except FileExistsError as error:  # which speaks of what a demo cannot be told
        raise FileExistsError(f"out={out} holds more than a finished demo; choose another folder.") from error
    return finished


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """70 % and 30 % of the digits, the classes equally shared: ((B, 1, 8, 8) images in [-1, 1], labels) each.

    The same split for every seed, so that seeds differ by training alone.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    known, held = train_test_split(range(len(labels)), test_size=0.3, stratify=data.target, random_state=0)
    return (images[known], labels[known]), (images[held], labels[held])


def small_vit(**sizes: Any) -> nn.Module:
    """A timm ViT for the digits: four patches of 4×4 and a class token. With 2×2 patches it learns slower and worse."""
    from timm.models.vision_transformer import VisionTransformer

    model: Any = VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=10, weight_init="moco", **sizes)
    model.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
    return model


def train_teacher(images: Tensor, labels: Tensor, batch_size: int = 64) -> nn.Module:
    """Supervised, on real images turned, scaled and moved a little.

    Labels are not smoothed: that would take from the logits what a student learns from (Müller et al. 2019).
    """
    teacher = small_vit(**TEACHER)
    optimizer = GuardedOptimizer("teacher", teacher, 3e-3, ["loss"], weight_decay=0.05, clip=1.0)
    for step in range(TEACHER_STEPS):
        batch = torch.randint(len(labels), (batch_size,))
        loss = F.cross_entropy(teacher(jittered(images[batch])), labels[batch])
        optimizer.step(loss, {"loss": loss}, step / TEACHER_STEPS)
    return teacher.eval()


def jittered(images: Tensor) -> Tensor:
    """Each (1, 8, 8) image turned by up to 0.15 rad, scaled by up to 10 % and moved by up to 0.6 pixels."""
    angle, scale, *offset = (2 * torch.rand(4, len(images)) - 1) * torch.tensor([[0.15], [0.1], [0.15], [0.15]])
    return warped(images + 1, angle, 1 + scale, offset[0], offset[1], padding="zeros") - 1  # the paper is at -1
