"""Everything a run can be told: the fields are the keyword names of `vitkd_fast.distill` and the flags of the CLI."""

import difflib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from vitkd_fast.ops.kd_loss import KINDS, Kind

# The paper (arXiv 2408.05952) gives the structure of the losses; these numbers are ours, tried on handwritten digits.


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one distillation. Checked when made; `distill` resolves what is None from the teacher."""

    steps: int = 5000
    """Student steps."""
    batch_size: int = 64
    """Images per step, generated or replayed."""
    seed: int = 0
    """Of the weights made here, the noise, the shifts and the replay; the caller's random state is not touched."""
    out: Path | None = None
    """Folder for config.json, metrics.jsonl, images.png, student.safetensors and report.json; None writes nothing."""
    overwrite: bool = False
    """Allow `out` to hold a finished run, and replace it."""

    teacher_checkpoint: Path | None = None
    """Weights of a teacher given by name: a safetensors file, or a state_dict that torch.save wrote."""
    image_size: tuple[int, int] | None = None
    """Height and width of the images; read from the teacher when None."""
    channels: int | None = None
    """Channels of the images; read from the teacher when None."""
    mean: tuple[float, ...] | None = None
    """Per channel, what the teacher's normalisation subtracts from [0, 1]; read from the teacher when None."""
    std: tuple[float, ...] | None = None
    """Per channel, what the teacher's normalisation divides by; read from the teacher when None."""

    student_steps: int = 5
    """Student steps for each generator step."""
    student_lr: float = 1e-3
    """Peak of the student's one-cycle learning rate."""
    generator_lr: float = 1e-3
    """Peak of the generator's one-cycle learning rate."""
    weight_decay: float = 0.01
    """Of the student (AdamW)."""
    clip: float = 1.0
    """Largest gradient norm of a step; 0 does not clip."""

    student_loss: Kind = "l1"
    """What the student minimises between its logits and the teacher's."""
    disagreement: Kind = "l1"
    """What the generator maximises between the same logits."""
    temperature: float = 1.0
    """Softens the logits in kl, reverse_kl and js; must stay 1 for l1 and mse."""
    tokens: float = 1.0
    """Weight of matching the student's last tokens to the teacher's through a learned projection; 0 is off."""
    adversarial: float = 0.3
    """Weight of the generator's disagreement term."""
    one_hot: float = 1.0
    """Weight of the generator's class prior: the teacher should be sure of each image."""
    balance: float = 5.0
    """Weight of the generator's class balance: a batch should hold every class."""

    latent: int = 128
    """Noise values per image."""
    width: int = 128
    """Channels of the generator's first, coarsest feature map; halved at each doubling of the size."""
    replay: float = 0.5
    """Share of the student's steps on replayed batches."""
    pool: int = 8192
    """Images kept for replay, on the device, as bytes."""
    shift: int = 2
    """Images are shifted by up to this many pixels, each by its own, before both networks see them."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the three networks under autocast; weights, optimisers and losses stay float32."""
    accelerate: bool = True
    """Switch the attention of teacher and student to vitkd_fast.ops.attention, in place."""
    device: str | None = None
    """Where to run; None is where the given modules are, for names CUDA when there is one."""
    log_every: int = 50
    """Steps between the points where the host reads from the device: metrics, progress bar, non-finite count."""
    max_skipped: int = 20
    """Steps with a non-finite loss or gradient are skipped; one more than this many stops the run."""
    progress: bool = True
    """Show a progress bar when standard error is a terminal."""

    def __post_init__(self) -> None:
        for name in ("out", "teacher_checkpoint"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        if isinstance(self.device, torch.device):
            object.__setattr__(self, "device", str(self.device))
        for name in ("image_size", "mean", "std"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for names, accepts, accepted in _ACCEPTED:
            for name in names.split():
                if not accepts(getattr(self, name)):
                    raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {accepted}.")
        if self.student_loss in ("l1", "mse") and self.disagreement in ("l1", "mse") and self.temperature != 1:
            raise ValueError(
                f"temperature is {self.temperature}, but l1 and mse compare raw logits: leave it at 1, or set "
                f"student_loss or disagreement to kl, reverse_kl or js."
            )

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Config":
        """A Config of these keyword arguments; an unknown name is an error that suggests the nearest one."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"accepted: {', '.join(known)}."
                raise TypeError(f"distill() has no argument {name!r}; {hint}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them; `Config(**settings)` reads them back."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(map(_number, value))


_ACCEPTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "steps batch_size student_steps latent width pool log_every",
        lambda value: _integer(value) and value >= 1,
        "an integer of at least 1",
    ),
    ("seed shift max_skipped", lambda value: _integer(value) and value >= 0, "an integer of at least 0"),
    (
        "weight_decay clip tokens adversarial one_hot balance",
        lambda value: _number(value) and value >= 0,
        "a number of at least 0",
    ),
    ("student_lr generator_lr temperature", lambda value: _number(value) and value > 0, "a number above 0"),
    ("replay", lambda value: _number(value) and 0 <= value < 1, "a share from 0 up to, not including, 1"),
    ("student_loss disagreement", KINDS.__contains__, ", ".join(KINDS)),
    ("precision", ("float32", "bfloat16").__contains__, "float32, bfloat16"),
    ("overwrite accelerate progress", lambda value: isinstance(value, bool), "True, False"),
    ("out teacher_checkpoint", lambda value: value is None or isinstance(value, Path), "a path, None"),
    ("device", lambda value: value is None or isinstance(value, str), "None, or a name such as cpu, cuda, cuda:0"),
    (
        "image_size",
        lambda value: value is None or (_numbers(value) and len(value) == 2 and all(map(_integer, value))),
        "None, or (height, width)",
    ),
    ("channels", lambda value: value is None or (_integer(value) and value >= 1), "None, or an integer of at least 1"),
    ("mean", lambda value: value is None or _numbers(value), "None, or a number for each channel"),
    (
        "std",
        lambda value: value is None or (_numbers(value) and min(value) > 0),
        "None, or a number above 0 for each channel",
    ),
)
