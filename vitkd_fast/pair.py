"""Teacher and student brought together: loaded, measured, checked against each other, accelerated."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitkd_fast.config import Config
from vitkd_fast.conversion import Conversion
from vitkd_fast.generator import ImageSpec
from vitkd_fast.layout import Layout, why_not_aligned
from vitkd_fast.methods import settings_of
from vitkd_fast.models import frozen, image_spec, normalisation_note, student_image_spec
from vitkd_fast.objectives import View
from vitkd_fast.report import ModelFacts, model_facts
from vitkd_fast.taps import What, layer_map, taps
from vitkd_fast.tasks import Classification, task_of

Role = Literal["teacher", "student"]
TAPPED: dict[str, What] = {"blocks": "tokens", "attention": "qkv"}  # what an objective needs -> what taps record
POOL_BYTES = 4 << 30  # of images, where the method says how many
NO_WHOLE_PATCHES = "the teacher's images are not a whole number of patches"
NO_GRID = "the teacher does not say its grid of patches, as timm's ViTs do in patch_embed.grid_size"


@dataclass
class Pair:
    """Two networks that see the same images and know the same classes."""

    teacher: nn.Module
    student: nn.Module
    spec: ImageSpec
    """Of the images as the teacher takes them."""
    convert: Conversion
    """From those to the student's."""
    classes: int
    device: torch.device
    teacher_facts: ModelFacts
    student_facts: ModelFacts
    teacher_tokens: torch.Size | None
    """Of two images' last tokens, (2, N, D); None: it has none that are known."""
    student_tokens: torch.Size | None
    notes: list[str] = field(default_factory=list)
    task: Classification = field(default_factory=Classification)
    overwriting: Collection[Role] = ()
    """Whose forward changes the images that it is given."""
    _untappable: dict[tuple[Role, What], str | None] = field(default_factory=dict, init=False, repr=False)

    @property
    def prefix_tokens(self) -> int:
        """Tokens of the teacher that come before its patches."""
        return getattr(self.teacher, "num_prefix_tokens", 0)

    @property
    def grid(self) -> tuple[int, int]:
        """The teacher's patches, rows and columns.

        Raises:
            ValueError: they are not known; `missing` says so of objectives that need its attention.
        """
        layout = self.layouts["teacher"]
        if layout is None or layout.grid is None:
            raise ValueError(NO_GRID)
        return layout.grid

    @property
    def whole_patches(self) -> bool:
        """Whether the teacher's patches cover its images, with nothing left at the edges."""
        sides = self.spec.height, self.spec.width
        patch_embed = getattr(self.teacher, "patch_embed", None)
        # of a hybrid ViT patch_size counts what its convolutions leave
        size = getattr(patch_embed, "feat_ratio", lambda **_: getattr(patch_embed, "patch_size", None))(as_scalar=False)
        if size is None:
            return all(side % patches == 0 for side, patches in zip(sides, self.grid))
        size = (size, size) if isinstance(size, int) else size
        return all(side == patches * of for side, patches, of in zip(sides, self.grid, size))

    @cached_property
    def layouts(self) -> dict[Role, Layout | None]:
        """Of the last tokens."""
        teacher, student = self.teacher_tokens, self.student_tokens
        return {
            "teacher": None if teacher is None else self.task.layout(self.teacher, teacher[1], self.spec),
            "student": None if student is None else self.task.layout(self.student, student[1], self.convert.student),
        }

    @cached_property
    def followed(self) -> tuple[int, ...]:
        """For each block of the student the teacher's block that it follows; all of these if the student has none."""
        if self._why_untappable("student", "tokens"):
            return tuple(range(depth(self.teacher)))
        return layer_map(depth(self.student), depth(self.teacher))

    @property
    def student_of_teachers_images(self) -> nn.Module:
        """The student, made to take images as the teacher takes them."""
        converts = self.convert.resizes or self.convert.renormalises
        return nn.Sequential(self.convert, self.student) if converts else self.student

    def missing(self, needs: Collection[str], *, student: bool) -> str | None:
        """Why an objective of these needs cannot be had: from the teacher, and from the student too if `student`."""
        detects = self.task.name == "detection"
        if "classes" in needs and detects:
            return "it is for classifiers, and these are detectors"
        if "boxes" in needs and not detects:
            return "it is for detectors, with task='detection'"
        if not {"tokens", "blocks", "attention"} & set(needs):
            return None
        roles: tuple[Role, ...] = ("student", "teacher") if student else ("teacher",)
        for role in roles:
            if self.layouts[role] is None:
                return f"the {role} has no {self.task.tokens}"
        own, followed = self.layouts["student"], self.layouts["teacher"]
        assert followed is not None
        if student and own and (reason := why_not_aligned(own, followed, resize="attention" not in needs)):
            return reason
        if student and getattr(getattr(self.student, "patch_drop", None), "prob", None):
            return "the student drops patches while it trains (patch_drop_rate)"
        for need, what in TAPPED.items():
            for role in roles:
                if need in needs and (reason := self._why_untappable(role, what)):
                    return f"the {role} cannot be tapped: {reason}"
        return NO_GRID if "attention" in needs and not student and followed.grid is None else None

    def look(self, model: nn.Module, images: Tensor, needs: Collection[str] = (), *, paired: bool = True) -> View:
        """What teacher or student makes of (B, C, H, W) images, with as much of its inside as `needs` asks for.

        The images are as the teacher takes them, for both. The blocks of the teacher are, if `paired`, those that the
        student's follow, one for each; else all.
        """
        if model is self.student:
            images = self.convert(images)
        if ("student" if model is self.student else "teacher") in self.overwriting:
            images = images.clone()
        what = [tapped for need, tapped in TAPPED.items() if need in needs]
        if not what:
            return self.task.look(model, images)
        chosen = self.followed if paired and model is self.teacher else range(depth(model))
        with taps(model, sorted(set(chosen)), what) as tapped:
            seen = self.task.look(model, images)
        return replace(
            seen,
            blocks=[tapped.tokens[block] for block in chosen] if "tokens" in what else (),
            attention=[tapped.qkv[block] for block in chosen] if "qkv" in what else (),
        )

    def _why_untappable(self, role: Role, what: What) -> str | None:
        """Found out by trying, once: some models have `blocks` that give no tokens."""
        if (role, what) not in self._untappable:
            model, spec = (self.student, self.convert.student) if role == "student" else (self.teacher, self.spec)
            self._untappable[role, what] = None
            try:
                with frozen(model), torch.no_grad(), taps(model, what=[what]) as tapped:
                    self.task.look(model, _blank(spec, self.device))
                records = tapped.tokens if what == "tokens" else tapped.qkv
                [records[block] for block in range(depth(model))]
            except (ValueError, TypeError, KeyError) as error:
                self._untappable[role, what] = str(error).partition(";")[0].rstrip(".")
        return self._untappable[role, what]


def make_pair(teacher: nn.Module, student: nn.Module | str, config: Config, device: torch.device) -> Pair:
    """Fit a student to a teacher that is frozen and on its device.

    Raises:
        ValueError: one of them does not take its images or give (B, classes) logits, or the classes differ.
    """
    task = task_of(config)
    spec = image_spec(teacher, config)
    classes, teacher_tokens, teacher_writes = probe(teacher, spec, device, "teacher", task)
    if isinstance(student, str):
        name, own_spec = student, spec
        student = task.create_student(student, spec, classes)
    elif not isinstance(student, nn.Module):
        raise TypeError(f"student is a {type(student).__name__}; accepted: an nn.Module, or the name of a model.")
    else:
        name, own_spec = type(student).__name__, student_image_spec(student, teacher, spec)
    check_apart(teacher, student)
    student = student.to(device)
    student_classes, student_tokens, student_writes = probe(student, own_spec, device, "student", task)
    if student_classes != classes:
        raise ValueError(f"student knows {student_classes} classes and teacher {classes}; they must be the same.")

    if not any(weight.requires_grad for weight in student.parameters()):
        raise ValueError(f"student {name} has no weight with requires_grad=True, so it cannot learn.")

    if made_under_inference := [weight for weight, value in student.named_parameters() if value.is_inference()]:
        raise ValueError(
            f"the student's {made_under_inference[0]} was made under torch.inference_mode(), so it cannot learn; make "
            f"the student outside."
        )

    convert = Conversion(spec, own_spec).to(device)
    facts = model_facts(teacher, spec, teacher_name(teacher)), model_facts(student, own_spec, name)
    named = task.name_classes(teacher, student)
    notes = [note for note in [normalisation_note(teacher, config), convert.note(), named] if note]
    if getattr(teacher, "num_classes", None) == 0:
        notes.append("teacher: it has no classifier (num_classes is 0); its features are taken for logits of classes")
    if config.accelerate:
        from vitkd_fast.accelerate import accelerate

        accelerated = {"teacher": accelerate(teacher), "student": accelerate(student)}
        notes += [f"{role}: {result}" for role, result in accelerated.items() if result.switched or result.kept]
    writing: list[Role] = ["teacher"] if teacher_writes else []
    writing += ["student"] if student_writes else []
    return Pair(
        teacher,
        student,
        spec,
        convert,
        classes,
        device,
        *facts,
        teacher_tokens=teacher_tokens,
        student_tokens=student_tokens,
        notes=notes,
        task=task,
        overwriting=writing,
    )


def check_apart(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse a student with a part of the teacher in it, which would be frozen and in train mode at once.

    Raises:
        ValueError: they share a weight or a buffer.
    """
    of_teacher = {id(part) for part in (*teacher.parameters(), *teacher.buffers())}
    for name, part in (*student.named_parameters(), *student.named_buffers()):
        if id(part) in of_teacher:
            raise ValueError(f"the student's {name} is the teacher's own; give it a copy, of copy.deepcopy(…).")


def resolved(config: Config, pair: Pair, device: torch.device) -> Config:
    """The configuration with nothing left to find out."""
    spec = pair.spec
    pool, room = config.pool, max(POOL_BYTES // (spec.channels * spec.height * spec.width), config.batch_size)
    if (config.images == "pool" or config.replay) and room < pool == settings_of(config.method, config.task)["pool"]:
        pair.notes.append(f"pool is {room:,}, not {pool:,}: of images of this size that is {POOL_BYTES >> 30} GiB")
        pool = room
    return replace(
        config,
        image_size=(spec.height, spec.width),
        channels=spec.channels,
        mean=spec.mean,
        std=spec.std,
        device=str(device),
        pool=pool,
        student_lr=config.student_lr or student_lr(pair.student_tokens),
    )


def student_lr(tokens: torch.Size | None) -> float:
    """Narrow networks like a high rate (Yang et al. 2022, arXiv 2203.03466); `tokens` are the student's, (…, D)."""
    return 0.001 if tokens is None else min(0.25 / tokens[-1], 0.01)


def depth(model: nn.Module) -> int:
    """Blocks of a model that can be tapped."""
    return len(model.blocks)  # type: ignore[arg-type]


def teacher_name(teacher: nn.Module) -> str:
    cfg: Any = getattr(teacher, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(teacher).__name__


def _blank(spec: ImageSpec, device: torch.device) -> Tensor:
    return torch.zeros(2, spec.channels, spec.height, spec.width, device=device)


def probe(
    model: nn.Module, spec: ImageSpec, device: torch.device, role: Role, task: Classification
) -> tuple[int, torch.Size | None, bool]:
    """How many classes it knows, the shape of two blank images' last tokens, whether its forward changes the images
    that it is given; it stays as it was.

    Raises:
        ValueError: it does not take such images, or does not give for them what the task needs.
    """
    images = _blank(spec, device)
    before = images._version
    try:
        with frozen(model), torch.no_grad():
            seen = task.look(model, images)
    except Exception as error:  # whatever a stranger's forward raises
        hint = {
            "teacher": "If they are not its images, pass image_size= and channels=.",
            "student": "Give it pretrained_cfg = dict(input_size=(channels, height, width)) if it takes another size; "
            "it is to take as many channels as the teacher.",
        }
        dtypes = {weight.dtype for weight in model.parameters()} - {torch.float32}
        if dtypes:
            found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            hint[role] = f"Its weights are {found}, and images float32: give it as {role}.float()."
        raise ValueError(
            f"{role} {type(model).__name__} cannot take images of shape {tuple(images.shape)}: "
            f"{str(error).rstrip('.')}. {hint[role]}"
        ) from error
    try:
        classes = task.classes(seen)
    except ValueError as error:
        raise ValueError(f"{role} {error}") from error
    return classes, None if seen.tokens is None else seen.tokens.shape, images._version != before
