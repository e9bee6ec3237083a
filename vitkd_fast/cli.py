"""The `vitkd` command: `distill`, `demo` and `doctor` are the Python calls of those names; `methods` lists methods."""

import functools
import io
import re
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from vitkd_fast.config import OF_METHOD, Config
from vitkd_fast.methods import DETECTION_METHODS, METHODS


def _weights(words: list[str]) -> dict[str, float]:
    """NAME=WEIGHT words by name; hyphens in names are underscores."""
    weights = {}
    for word in words:
        name, equals, weight = word.partition("=")
        try:
            weights[name.replace("-", "_")] = float(weight)
        except ValueError:
            equals = ""
        if not name or not equals:
            raise ValueError(f"{word!r} is not NAME=WEIGHT, such as tokens=0.5")
    return weights


Weights = Annotated[
    Mapping[str, float],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=WEIGHT …]",
        instance_from_str=_weights,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda weights: [f"{name}={weight:g}" for name, weight in weights.items()],
    ),
]


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """`Config` as words on a command line."""

    method: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join({**METHODS, **DETECTION_METHODS})}}}")] = "best"
    """Which method decides what follows, where it is not given; `vitkd methods` says what each is, of which task."""
    generator_objectives: Weights = OF_METHOD
    """Weights of what the generator minimises, beside the method's or in place of them; 0 turns one off."""
    student_objectives: Weights = OF_METHOD
    """Weights of what the student minimises, beside the method's or in place of them; 0 turns one off."""


def distill(
    teacher: str,
    student: str,
    settings: Annotated[Settings, tyro.conf.arg(name="")],
    evaluate: Path | None = None,
) -> None:
    """Compress a model without its data; the student and the report go to --out.

    Args:
        teacher: Name of a timm model; its weights come from --teacher-checkpoint, else from timm. With --task
            detection a detector of transformers: a folder that save_pretrained wrote, or a name on the hub.
        student: Name of a model, made anew for the teacher's images and classes.
        settings: Everything else.
        evaluate: Folder of images, one subfolder per class, to measure both models on at the end; for detectors an
            annotation file of COCO, or a folder as COCO or YOLO lay it out.
    """
    if settings.out is None:
        raise ValueError("without --out nothing would be left of the student: give a folder for it and the report.")
    from vitkd_fast.distill import distill

    result = distill(teacher, student, evaluate=evaluate, **vars(settings))
    if not result.saved:
        raise RuntimeError(f"the student could not be saved to {settings.out}: {_rescued(result.student)}")
    if result.report.status == "interrupted":
        raise KeyboardInterrupt


def _rescued(student: Any) -> str:
    """Where a student went whose folder cannot be written to."""
    from safetensors.torch import save_model

    try:
        folder = Path(tempfile.mkdtemp(prefix="vitkd-"))
        save_model(student, str(folder / "student.safetensors"))
    except Exception as error:
        return f"nor to {tempfile.gettempdir()}: {error}"
    return f"it is in {folder}."


def demo(
    seed: int = 0,
    steps: int | None = None,
    json: Path | None = None,
    out: Path | None = None,
    detection: bool = False,
    progress: bool = True,
) -> None:
    """Train a small ViT on real handwritten digits, drop the digits, and distil a ViT a sixth its size from it.

    Args:
        seed: Of the weights and the distillation; the split is always the same.
        steps: Student steps of each student; None: 5,000, of detectors 1,500.
        json: File for the figures.
        out: Run folder of the distillation; a finished one in it is replaced.
        detection: Detect digits in scenes of several, with a YOLOS and one a third its size.
        progress: Say what is happening, and the figures at the end; --json has them too.
    """
    given: dict[str, Any] = {"seed": seed, "json": json, "out": out, "progress": progress}
    given |= {} if steps is None else {"steps": steps}
    if detection:
        from vitkd_fast.detection import demo as detecting

        detecting.demo(**given)
    else:
        from vitkd_fast import demo as classifying

        classifying.demo(**given)


def doctor() -> None:
    """Say what this machine offers, and which implementation each op will use on it and why."""
    from vitkd_fast.doctor import doctor

    print(doctor())


def methods() -> None:
    """Say what each method is, and what it takes from where."""
    width = min(shutil.get_terminal_size().columns, 100)
    wrapper = textwrap.TextWrapper(width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    for method in METHODS.values():
        print(method.name, wrapper.fill(method.source), sep="\n")
    for method in DETECTION_METHODS.values():
        print(f"{method.name}, with --task detection", wrapper.fill(method.source), sep="\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user can put right is one line on standard error and exit code 2.

    Ctrl-C exits with 130, after `distill` has saved what it has.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    _refuse_empty(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of few characters is no reason to stop halfway
    try:
        # The method's own settings become the defaults, which --help shows.
        settings = Settings(method=_last(arguments, "method"), task=_last(arguments, "task"))
        tyro.extras.subcommand_cli_from_dict(
            {
                "distill": functools.partial(distill, settings=settings),
                "demo": demo,
                "doctor": doctor,
                "methods": methods,
            },
            prog="vitkd",
            description="Compress a Vision Transformer without its training data.",
            args=arguments,
        )
    except BrokenPipeError:  # as of `| head`: nobody reads any more
        sys.stdout = None  # type: ignore[assignment]  # nor is the rest to be written at the end
        raise SystemExit(141) from None
    except Exception as error:
        if not _is_ours(error):
            raise
        print(f"vitkd: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _refuse_empty(arguments: list[str]) -> None:
    """A shell variable that is not set, most likely; as a path it would be the folder one is in."""
    for before, word in zip(["", *arguments], arguments):
        if not word or re.fullmatch("--[a-z-]+=", word):
            print(f"vitkd: {(word or before or 'vitkd').rstrip('=')} is followed by nothing ('').", file=sys.stderr)
            raise SystemExit(2)


def _last(arguments: list[str], setting: str) -> Any:
    """The value of the last --setting, which is the one that counts; its default where there is none."""
    found, flag = getattr(Settings, setting), f"--{setting}"
    for word, following in zip(arguments, [*arguments[1:], ""]):
        if word == flag and following and not following.startswith("-"):
            found = following
        elif word.startswith(f"{flag}="):
            found = word.removeprefix(f"{flag}=")
    return found


def _is_ours(error: Exception) -> bool:
    """Whether this package raised it, to say what the user can put right; any other error keeps its traceback."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    python = Path(traceback.__file__).parent  # whose modules pass on what the system says of the user's files
    while isinstance(error, OSError) and len(files) > 1 and files[-1].parent in (python, python / "json"):
        files.pop()
    return Path(__file__).parent in files[-1].parents
