"""Everything a run can be told: the fields are the keyword names of `vitkd_fast.distill` and the flags of the CLI."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from vitkd_fast.detection import methods as _  # noqa: F401  it registers them
from vitkd_fast.methods import TaskName, settings_of
from vitkd_fast.ops.kd_loss import KINDS, Kind
from vitkd_fast.suggest import suggestion

OF_METHOD: Any = None  # replaced by the method's setting when the Config is made


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one distillation, checked when made.

    What the method decides and is not given is the method's; `distill` resolves what is still None from the teacher.
    """

    steps: int = 5000
    """Student steps."""
    batch_size: int = 64
    """Images per step, generated or replayed."""
    seed: int = 0
    """Of the weights made here, the noise, the shifts and the replay; the caller's random state is not touched."""
    out: Path | None = None
    """Folder for config.json, metrics.jsonl, images.png, student.safetensors and report.json, and of a student of
    transformers student/, which from_pretrained reads; None writes nothing."""
    overwrite: bool = False
    """Allow `out` to hold a run, and replace it."""
    resume: bool = False
    """Go on with the run in `out` that was stopped, if there is one, and otherwise begin. From a save it goes on as it
    would have, bit for bit on the CPU; after Ctrl-C, the step that was interrupted is made again."""
    save_minutes: float = 10.0
    """Minutes between saves of the whole run to run.pt in `out`, for `resume`; Ctrl-C saves too, and an error does
    before the first save; a run that comes to its end removes it. With the images of the pool it grows to 3 GB at
    3 × 224 × 224, to 4 with larger images. 0: no saves."""

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

    task: TaskName = "classification"
    """What the two networks are for: images as wholes, or the objects in them."""
    method: str = "best"
    """Which of `vitkd_fast.methods.METHODS` decides what follows, where it is not given."""

    # What the method decides
    generator: str = OF_METHOD
    """Which of `vitkd_fast.generator.GENERATORS` makes the images."""
    generators: int = OF_METHOD
    """How many of them take turns, a round each: they come to make different images."""
    generator_objectives: Mapping[str, float] = OF_METHOD
    """Weights of what the generator minimises, by name, beside the method's or in place of them; 0 turns one off."""
    student_objectives: Mapping[str, float] = OF_METHOD
    """Weights of what the student minimises, by name, beside the method's or in place of them; 0 turns one off."""
    generator_steps: int = OF_METHOD
    """Steps of the generator in each round."""
    student_steps: int = OF_METHOD
    """Steps of the student in each round."""
    restart: Literal["never", "round", "meta", "noise"] = OF_METHOD
    """What begins anew in each round: nothing, all, all from learned weights (meta), the noisy layer."""
    life: int = OF_METHOD
    """Rounds after which the generator begins anew; 0: never."""
    learn_latent: bool = OF_METHOD
    """Learn the noise of a round's batch together with the generator."""
    conditional: bool = OF_METHOD
    """Ask the generator for classes: it gets a label with the noise."""
    images: Literal["fresh", "round", "pool"] = OF_METHOD
    """What the student sees: images of the generator as it is; the batch that the round improved; the pool."""
    replay: float = OF_METHOD
    """Share of the student's steps on replayed batches, where images are fresh."""
    pool: int = OF_METHOD
    """Images kept for replay, on the device, as bytes; the method's number, but not above 4 GiB of them."""
    candidates: int = OF_METHOD
    """Images drawn for each one that comes into the pool: the one in which the teacher finds most."""
    balanced: bool = OF_METHOD
    """Draw from the pool as many images of each of the teacher's classes, as far as it has them."""
    shift: float = OF_METHOD
    """Images are shifted by up to this share of their sides, each by its own, before both networks see them."""
    turn: float = OF_METHOD
    """Images are also turned by up to this many radians, and scaled by up to 0.7 of it, each by its own."""
    robust: bool = OF_METHOD
    """The generator's steps judge images shifted and turned in the same way, not as they left it: what the teacher is
    sure of only at one exact place is noise to a person."""
    jitter: float = OF_METHOD
    """In the generator's steps, the batch is rolled by up to this share of its height and width before both networks
    see it."""
    keep_patches: float = OF_METHOD
    """Share of the teacher's patches that are still there at the end of a round, the most attended; 1 keeps all."""
    student_loss: Kind = OF_METHOD
    """What the student minimises between its logits and the teacher's."""
    disagreement: Kind = OF_METHOD
    """What the generator maximises between the same logits."""
    temperature: float = OF_METHOD
    """Softens the logits in kl, reverse_kl and js; l1 and mse compare raw logits."""
    generator_lr: float = OF_METHOD
    """Of the generator. One cycle's peak: over the run, or over each round if all of it starts anew there; constant
    where restart is meta or noise."""
    latent_lr: float = OF_METHOD
    """Learning rate of a learned noise."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """Of the student: Muon for the matrices between images and logits and AdamW for the rest, or AdamW for all."""
    student_lr: float | None = None
    """Peak of the student's one-cycle learning rate; if None, 0.25 over the width of its tokens, at most 0.01, and
    0.001 for a student without tokens."""
    weight_decay: float = 0.01
    """Of the student."""
    clip: float = 1.0
    """Largest gradient norm of a step; 0 does not clip."""
    latent: int = 128
    """Noise values per image."""
    width: int = 128
    """Channels of the generator's first, coarsest feature map; halved at each doubling of the size."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the three networks under autocast; weights, optimisers and losses stay float32."""
    accelerate: bool = True
    """Switch the attention of teacher and student to vitkd_fast.ops.attention, in place."""
    device: str | None = None
    """Where to run; None is where the given modules are, for names CUDA when there is one."""
    log_every: int = 50
    """Steps between the points where the host reads from the device: metrics, progress bar, non-finite count."""
    evaluate_every: int = 0
    """Steps between measurements of both models on the evaluation data in the course of the run; 0: at its end only."""
    max_skipped: int = 20
    """Steps with a non-finite loss or gradient are skipped; one more than this many stops the run."""
    progress: bool = True
    """Show a progress bar when standard error is a terminal."""

    def __post_init__(self) -> None:
        if self.task not in get_args(TaskName):
            raise ValueError(f"task is {self.task!r}; accepted: {', '.join(get_args(TaskName))}.")
        for name, value in settings_of(self.method, self.task).items():
            given = getattr(self, name)
            if isinstance(value, Mapping) and isinstance(given, Mapping):
                value = {**value, **given}
            elif given is not OF_METHOD:
                value = given
            object.__setattr__(self, name, dict(value) if isinstance(value, Mapping) else value)
        for name in ("out", "teacher_checkpoint"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is ''; accepted: a path, None.")
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        if isinstance(self.device, torch.device):
            object.__setattr__(self, "device", str(self.device))
        for name in ("image_size", "mean", "std"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        for names, accepts, accepted in _ACCEPTED:
            for name in names.split():
                if not accepts(getattr(self, name)):
                    raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {accepted}.")
        if self.resume and (self.out is None or self.overwrite):
            wrong = "there is no out" if self.out is None else "overwrite is, too"
            raise ValueError(f"resume is True, but {wrong}; give the folder of the run as out, without overwrite.")

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Config":
        """A Config of these keyword arguments; an unknown name is an error that suggests the nearest one."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"distill() has no argument {name!r}; {suggestion(name, known, 'accepted')}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them; `Config(**settings)` reads them back."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    """Numpy's numbers, where there is a numpy, as Python's, which every file can hold."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.item() if type(value).__module__ == "numpy" and value.shape == () else value


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(map(_number, value))


_ACCEPTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "steps batch_size generators generator_steps student_steps latent width candidates log_every",
        lambda value: _integer(value) and value >= 1,
        "an integer of at least 1",
    ),
    ("pool", lambda value: _integer(value) and 1 <= value <= 1 << 24, "an integer from 1 to 16777216"),
    ("life max_skipped evaluate_every", lambda value: _integer(value) and value >= 0, "an integer of at least 0"),
    ("seed", lambda value: _integer(value) and 0 <= value < 1 << 63, "an integer from 0 up to 2^63"),
    (
        "weight_decay clip save_minutes",
        lambda value: _number(value) and value >= 0,
        "a number of at least 0",
    ),
    (
        "generator_objectives student_objectives",
        lambda value: isinstance(value, Mapping) and all(_number(weight) and weight >= 0 for weight in value.values()),
        'weights of at least 0 by name, such as {"tokens": 1.0}',
    ),
    ("generator_lr latent_lr temperature", lambda value: _number(value) and value > 0, "a number above 0"),
    ("student_lr", lambda value: value is None or (_number(value) and value > 0), "None, or a number above 0"),
    (
        "keep_patches",
        lambda value: _number(value) and 0 < value <= 1,
        "a share above 0, up to 1",
    ),
    ("turn", lambda value: _number(value) and 0 <= value <= 1.4, "radians from 0 to 1.4"),
    ("replay shift jitter", lambda value: _number(value) and 0 <= value < 1, "a share from 0 up to, not including, 1"),
    ("student_loss disagreement", KINDS.__contains__, ", ".join(KINDS)),
    ("restart", ("never", "round", "meta", "noise").__contains__, "never, round, meta, noise"),
    ("optimizer", ("muon", "adamw").__contains__, "muon, adamw"),
    ("images", ("fresh", "round", "pool").__contains__, "fresh, round, pool"),
    ("generator", lambda value: isinstance(value, str), "the name of a generator"),
    ("precision", ("float32", "bfloat16").__contains__, "float32, bfloat16"),
    (
        "overwrite resume accelerate progress learn_latent conditional robust balanced",
        lambda value: isinstance(value, bool),
        "True, False",
    ),
    ("out teacher_checkpoint", lambda value: value is None or isinstance(value, Path), "a path, None"),
    ("device", lambda value: value is None or isinstance(value, str), "None, or a name such as cpu, cuda, cuda:0"),
    (
        "image_size",
        lambda value: (
            value is None or (_numbers(value) and len(value) == 2 and all(map(_integer, value)) and min(value) > 0)
        ),
        "None, or (height, width) above 0",
    ),
    ("channels", lambda value: value is None or (_integer(value) and value >= 1), "None, or an integer of at least 1"),
    ("mean", lambda value: value is None or _numbers(value), "None, or a number for each channel"),
    (
        "std",
        lambda value: value is None or (_numbers(value) and min(value) > 0),
        "None, or a number above 0 for each channel",
    ),
)
