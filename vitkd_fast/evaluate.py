"""Accuracy of teacher and student on real images, where the user has any to check with."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitkd_fast.generator import ImageSpec
from vitkd_fast.models import frozen, logits_of

NOTHING = "evaluate yielded no images; give batches of (images, labels) that can be iterated again."
Evaluation = Iterable[tuple[Tensor, Tensor]] | Callable[[nn.Module], float] | str | Path


def evaluate_pair(teacher: nn.Module, student: nn.Module, data: Evaluation, spec: ImageSpec) -> dict[str, float | None]:
    """`teacher_accuracy`, `student_accuracy` and `agreement` (the share on which both decide alike), in [0, 1].

    Args:
        teacher, student: in eval mode.
        data: batches of (images, labels), normalised as the teacher wants them; or a function from a model to its
            accuracy, which leaves the agreement None; or a folder of images with one subfolder per class.
    """
    if callable(data):
        shares = {"teacher_accuracy": _share(data(teacher)), "student_accuracy": _share(data(student))}
        return {**shares, "agreement": None}
    batches = image_folder(Path(data), spec) if isinstance(data, str | Path) else data
    device = next(student.parameters()).device
    right_teacher = right_student = alike = unknown = torch.zeros((), device=device)
    total = classes = 0
    with torch.no_grad():
        for batch in batches:
            images, labels = (part.to(device) for part in _images_and_labels(batch))
            logits = [logits_of(model(images.clone())) for model in (teacher, student)]  # one may write on its copy
            by_teacher, by_student = (each.argmax(-1) for each in logits)
            classes = logits[0].shape[-1]
            unknown = unknown + ((labels < 0) | (labels >= classes)).sum()
            right_teacher = right_teacher + (by_teacher == labels).sum()
            right_student = right_student + (by_student == labels).sum()
            alike = alike + (by_teacher == by_student).sum()
            total += len(labels)
    if total == 0:
        raise ValueError(NOTHING)
    if unknown:
        raise ValueError(f"evaluate has {int(unknown)} labels that are no class of the teacher's, 0 to {classes - 1}.")
    return {
        "teacher_accuracy": right_teacher.item() / total,
        "student_accuracy": right_student.item() / total,
        "agreement": alike.item() / total,
    }


def check(data: object) -> None:
    """Refuse what `evaluate_pair` cannot use, before the run rather than after it."""
    if isinstance(data, str | Path):
        if not str(data):
            raise ValueError("evaluate is ''; accepted: a folder of images, or None.")
        if not Path(data).is_dir():
            raise FileNotFoundError(
                f"evaluate is {str(data)!r}, not a folder; it needs one subfolder of images per class."
            )
        if not any(path.is_dir() for path in Path(data).iterdir()):
            raise FileNotFoundError(f"evaluate={str(data)!r} has no subfolders; it needs one of images per class.")
    elif data is not None and not callable(data) and not isinstance(data, Iterable):
        raise TypeError(
            f"evaluate is a {type(data).__name__}; accepted: batches of (images, labels) such as a DataLoader, "
            f"a function from a model to its accuracy, or a folder of images."
        )


class _Asked:
    """A function from a model to its accuracy, whose answer for the teacher is already known."""

    def __init__(self, function: Callable[[nn.Module], float], teacher: nn.Module) -> None:
        self.function, self.teacher = function, teacher
        with frozen(teacher):  # whatever mode the function leaves it in
            self.answer = _share(function(teacher))

    def __call__(self, model: nn.Module) -> float:
        return self.answer if model is self.teacher else self.function(model)


def tried(teacher: nn.Module, data: Any, spec: ImageSpec, device: torch.device) -> Any:
    """The data, of a folder its batches, after the teacher has answered to the first of them, or to all of a function.

    Raises:
        ValueError: they are not what `evaluate_pair` can use.
    """
    if data is None:
        return None
    if callable(data):
        return _Asked(data, teacher)
    batches: Any = image_folder(Path(data), spec) if isinstance(data, str | Path) else data
    streamed = isinstance(getattr(batches, "dataset", None), torch.utils.data.IterableDataset)
    if not streamed and (beginning := iter(batches)) is not batches:  # else they may be had only once
        first = next(beginning, None)
        if first is None and isinstance(data, str | Path):
            known = ", ".join(batches.dataset.extensions)
            raise ValueError(f"evaluate={str(data)!r} has no images in its subfolders; accepted: {known}.")
        if first is None:
            raise ValueError(NOTHING)
        images, labels = _images_and_labels(first)
        with torch.no_grad():
            classes = logits_of(teacher(images.to(device).clone())).shape[-1]
        if isinstance(data, str | Path) and len(folders := batches.dataset.classes) != classes:
            raise ValueError(
                f"evaluate={str(data)!r} has {len(folders)} subfolders, and the teacher knows {classes} classes; each "
                f"needs one, be it empty, and sorted by name they are to be in the order of its classes."
            )
        if len(labels) and (labels.min() < 0 or labels.max() >= classes):
            raise ValueError(
                f"evaluate has labels from {labels.min()} to {labels.max()}; accepted: the teacher's classes, 0 to "
                f"{classes - 1}."
            )
    return batches


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    parts = list(batch) if isinstance(batch, Sequence) else [batch]
    if len(parts) == 2 and all(isinstance(part, Tensor) for part in parts):
        images, labels = parts
        if images.dim() == 4 and images.is_floating_point() and labels.shape == images.shape[:1]:
            if not labels.is_floating_point():
                return images.float(), labels
    given = " and ".join(_named(part) for part in parts) or "nothing"
    raise ValueError(
        f"evaluate has a batch of {given}; accepted: images (B, channels, height, width), floats normalised for "
        f"the teacher, and labels (B,), which are numbers of classes."
    )


def _named(part: Any) -> str:
    kind = type(part).__name__
    return f"{kind} {str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}" if isinstance(part, Tensor) else kind


def _share(answer: Any) -> float:
    try:
        share = float(answer)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"evaluate answered {answer!r} for a model; accepted: its accuracy, from 0 to 1.")
    return share


def image_folder(folder: Path, spec: ImageSpec) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches from a folder with one subfolder per class, sorted by name as torchvision's ImageFolder sorts them."""
    from torchvision import datasets, transforms

    if spec.channels not in (1, 3):
        raise ValueError(f"channels is {spec.channels}; accepted with a folder of images: 1 (grey) or 3 (RGB).")
    transform = transforms.Compose(
        [
            *([transforms.Grayscale()] if spec.channels == 1 else []),
            transforms.Lambda(lambda image: _covering(image, spec)),
            transforms.CenterCrop((spec.height, spec.width)),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    images = datasets.ImageFolder(str(folder), transform, loader=_rgb, allow_empty=True)
    return torch.utils.data.DataLoader(images, batch_size=64)


def _rgb(path: str) -> Any:
    return read_image(path, path).convert("RGB")


def read_image(file: Any, name: str) -> Any:
    """The PIL image in a file, opened or by its path, that messages call `name`.

    Raises:
        ValueError: it is none, or of more than 8 bits, of which Pillow would make all above 255 white.
    """
    from PIL import Image

    try:
        image = Image.open(file)
        image.load()
    # Pillow's for unknown formats and cut-off files, broken PNGs, broken others, and what would fill the memory
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has more than 8 bits per channel; convert it to 8.")
    return image


def _covering(image: Any, spec: ImageSpec) -> Any:
    """A PIL image as small as it covers the teacher's, whatever the shapes of both."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    scale = max(spec.height / image.height, spec.width / image.width)
    size = max(spec.height, int(image.height * scale)), max(spec.width, int(image.width * scale))
    return resize(image, list(size), InterpolationMode.BICUBIC)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images, in [0, 1], that the model classifies as labelled."""
    with torch.no_grad():
        return (logits_of(model(images)).argmax(-1) == labels).sum().item() / len(labels)
