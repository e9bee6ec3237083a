"""The `vitkd` command: `distill`, `demo` and `doctor`, each the Python call of that name with the same arguments."""

import sys
import traceback
from pathlib import Path
from typing import Annotated

import tyro

from vitkd_fast.config import Config


def distill(
    teacher: str,
    student: str,
    settings: Annotated[Config, tyro.conf.arg(name="")],
    evaluate: Path | None = None,
) -> None:
    """Compress a timm model without its data; the student and the report go to --out.

    Args:
        teacher: Name of a timm model; its weights come from --teacher-checkpoint, else from timm.
        student: Name of a timm model, made for the teacher's images and classes.
        settings: Everything else.
        evaluate: Folder of images, one subfolder per class, to measure both models on at the end.
    """
    from vitkd_fast.distill import distill

    result = distill(teacher, student, evaluate=evaluate, **vars(settings))
    if result.report.status == "interrupted":
        raise KeyboardInterrupt


def demo(seed: int = 0, steps: int = 5000, json: Path | None = None, out: Path | None = None) -> None:
    """Train a small ViT on real handwritten digits, drop the digits, and distil a ViT a quarter its size from it.

    Args:
        seed: Of the weights and the distillation; the split is always the same.
        steps: Student steps, of the distillation and of the student on noise each.
        json: File for the figures.
        out: Run folder of the distillation; a finished one in it is replaced.
    """
    from vitkd_fast.demo import demo

    demo(seed=seed, steps=steps, json=json, out=out)


def doctor() -> None:
    """Say what this machine offers, and which implementation each op will use on it and why."""
    from vitkd_fast.doctor import doctor

    print(doctor())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user can put right is one line on standard error and exit code 2.

    Ctrl-C exits with 130, after `distill` has saved what it has.
    """
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"distill": distill, "demo": demo, "doctor": doctor},
            prog="vitkd",
            description="Compress a Vision Transformer without its training data.",
            args=arguments,
        )
    except Exception as error:
        if not _is_ours(error):
            raise
        print(f"vitkd: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _is_ours(error: Exception) -> bool:
    """Whether this package raised it, to say what the user can put right; any other error keeps its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(__file__).parent in Path(frames[-1].filename).parents
