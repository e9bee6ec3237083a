"""What a run achieved: sizes and accuracies of both models, agreement, time and versions."""

import contextlib
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitkd_fast._version import __version__
from vitkd_fast.generator import ImageSpec
from vitkd_fast.models import as_written, device_of, frozen, unwrapped


@dataclass(frozen=True)
class ModelFacts:
    """Of one model: weights, floating-point operations for one image (a multiply-add is two), bytes when saved."""

    name: str
    parameters: int
    flops: int | None
    bytes: int


@dataclass
class Report:
    """The outcome of `distill`; `str()` is the short text, `to_dict()` what report.json holds."""

    status: str
    """completed, interrupted or failed."""
    steps: int
    """Student steps made."""
    seconds: float
    """Wall time of the loop."""
    images_per_second: float
    """Images the student learnt from, per second."""
    teacher: ModelFacts
    student: ModelFacts
    generated_agreement: float | None
    """Share of generated images for which student and teacher decided alike, since the last log point but one."""
    teacher_accuracy: float | None = None
    student_accuracy: float | None = None
    agreement: float | None = None
    """On the evaluation data: share of images, or of the objects in them, that student and teacher see alike."""
    teacher_map: float | None = None
    teacher_map50: float | None = None
    student_map: float | None = None
    student_map50: float | None = None
    """Of detectors in place of the accuracies: mean average precision over overlaps of 0.50 to 0.95, and at 0.50."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Non-finite values by name of the loss term; each such step was skipped."""
    notes: list[str] = field(default_factory=list)
    """What was decided for the user, and why."""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        detects = self.settings.get("task") == "detection"
        rows = [("", "parameters", "FLOPs/image", "size", "mAP50" if detects else "accuracy")]
        for role, facts, accuracy in (
            ("teacher", self.teacher, self.teacher_map50 if detects else self.teacher_accuracy),
            ("student", self.student, self.student_map50 if detects else self.student_accuracy),
        ):
            flops = "-" if facts.flops is None else f"{facts.flops / 1e6:,.1f} M"
            sizes = f"{facts.parameters:,}", flops, f"{facts.bytes / 1e6:,.2f} MB"
            rows.append((role, *sizes, percent(accuracy)))
        lines = [
            "".join(f"{cell:>{width}}" for cell, width in zip(row, (7, 16, 16, 14, 11), strict=True)) for row in rows
        ]
        lines.append(
            f"agreement: {percent(self.agreement)} on the evaluation data, "
            f"{percent(self.generated_agreement)} on generated images"
        )
        lines.append(
            f"{self.status}: {self.steps:,} steps in {self.seconds:,.1f} s, {self.images_per_second:,.0f} images/s"
        )
        if self.skipped:
            lines.append("not finite, so skipped: " + ", ".join(f"{name} ×{n}" for name, n in self.skipped.items()))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def model_facts(model: nn.Module, spec: ImageSpec, name: str) -> ModelFacts:
    """Count a model's parameters, saved bytes, and the operations of its matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which takes a second

    images = torch.zeros(2, spec.channels, spec.height, spec.width, device=device_of(model))
    attention = dict.fromkeys((torch.ops.vitkd.attention, torch.ops.vitkd_triton.attention), _attention_flops)
    counter = FlopCounterMode(display=False, custom_mapping=attention | _convolution_flops())
    flops: int | None = None
    with contextlib.suppress(Exception):  # the counter looks at every operation, which not every model bears
        # MATH: products that it knows
        with frozen(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), as_written(model), counter:
            unwrapped(model)(images)
        flops = counter.get_total_flops() // 2
    weights: list[torch.Tensor] = [*model.parameters()]
    weights = weights or [one for one in model.buffers() if one.is_floating_point()]  # of an exported one
    held = [value for value in model.state_dict().values() if isinstance(value, torch.Tensor)]
    return ModelFacts(
        name=name,
        parameters=sum(weight.numel() for weight in weights),
        flops=flops,
        bytes=sum({_place(tensor): _size(tensor) for tensor in held}.values()),  # what is tied is saved once
    )


def _place(tensor: torch.Tensor) -> int:
    """Where it is in memory; of sparse ones and of those with others inside, where that is not known, itself."""
    with contextlib.suppress(RuntimeError):
        return tensor.data_ptr() or id(tensor)
    return id(tensor)


def _size(tensor: torch.Tensor) -> int:
    count = tensor.numel() if tensor.layout is torch.strided else tensor._nnz()
    return count * tensor.element_size()


def versions(device: torch.device) -> dict[str, str]:
    """Of everything that a figure may depend on, and the device by name."""
    found = {"python": platform.python_version(), "vitkd_fast": __version__, "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["timm"] = importlib.metadata.version("timm")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {**found, "device": name}


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _convolution_flops() -> dict[Any, Callable[..., int]]:
    """By op, of those that `vitkd_fast.ops.linear` asks and torch's counter does not know: 1×1, on (1, K, M, 1)."""
    found: dict[Any, Callable[..., int]] = {torch.ops.aten.mkldnn_convolution: _products}
    if hasattr(torch.ops.mkldnn, "_convolution_pointwise_"):
        found[torch.ops.mkldnn._convolution_pointwise_] = lambda out, *args, **kwargs: _products(*args)
    return found


def _products(images_shape, kernel_shape, *args, **kwargs) -> int:
    _, channels, rows, _ = images_shape
    return 2 * rows * channels * kernel_shape[0]


def _attention_flops(qkv_shape, scale, *args, out_shape=None, **kwargs) -> int:
    batch, tokens, _, heads, head_dim = qkv_shape
    return 4 * batch * heads * tokens * tokens * head_dim  # q k^T and weights·v
