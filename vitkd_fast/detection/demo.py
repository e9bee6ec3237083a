"""`vitkd demo --detection`: a detector of handwritten digits, distilled without a scene in minutes on a CPU."""

import json as jsonlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vitkd_fast.demo import ready
from vitkd_fast.detection.digit_scenes import composers
from vitkd_fast.detection.training import small_yolos, train
from vitkd_fast.distill import Result, distill
from vitkd_fast.generator import ImageSpec, supplied
from vitkd_fast.report import percent

SPEC = ImageSpec(64, 64, (0.5,), (0.5,))  # of a scene
SIZES = {"classes": 10, "patch": 8, "queries": 10}  # of both networks
TEACHER = {"width": 96, "depth": 5, "heads": 3}  # 613 thousand weights
STUDENT = {"width": 56, "depth": 4, "heads": 2}  # 176 thousand
TEACHER_STEPS = 2000
TEACHER_LR = 1.2e-3  # 92 % mAP50; 72 % at 2.6e-3, which a student of this width would get
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
    replaces = ready(steps, seed, json, out)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        known, held = composers(SPEC.height)
        evaluate = list(zip(*held(HELD)))
        say(f"Training the teacher on scenes of handwritten digits, {TEACHER_STEPS:,} steps …")
        teacher = small_yolos(SPEC, **SIZES, **TEACHER)
        train(teacher, known, SPEC, steps=TEACHER_STEPS, batch_size=BATCH_SIZE, lr=TEACHER_LR)
        student = small_yolos(SPEC, **SIZES, **STUDENT)
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

        free = distilled("drawn scenes: no digit is left", out=out, overwrite=replaces).report
        noise = distilled("Gaussian noise", method="noise").report
        with supplied(lambda count: known(count)[0]) as generator:
            real = distilled("real scenes", generator=generator, candidates=1).report
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
    say(f"\n{figures}")
    if json is not None:
        json.write_text(jsonlib.dumps(asdict(figures), indent=2) + "\n", encoding="utf-8")
    return figures
