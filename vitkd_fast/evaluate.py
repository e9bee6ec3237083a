"""Accuracy of teacher and student on real images, where the user has any to check with."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from vitkd_fast.generator import ImageSpec

Evaluation = Iterable[tuple[Tensor, Tensor]] | Callable[[nn.Module], float] | str | Path


def evaluate_pair(teacher: nn.Module, student: nn.Module, data: Evaluation, spec: ImageSpec) -> dict[str, float | None]:
    """`teacher_accuracy`, `student_accuracy` and `agreement` (the share on which both decide alike), in [0, 1].

    Args:
        teacher, student: in eval mode.
        data: batches of (images, labels), normalised as the teacher wants them; or a function from a model to its
            accuracy, which leaves the agreement None; or a folder of images with one subfolder per class.
    """
    if callable(data):
        return {"teacher_accuracy": float(data(teacher)), "student_accuracy": float(data(student)), "agreement": None}
    batches = image_folder(Path(data), spec) if isinstance(data, str | Path) else data
    device = next(student.parameters()).device
    right_teacher = right_student = alike = torch.zeros((), device=device)
    total = 0
    with torch.no_grad():
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            by_teacher, by_student = teacher(images).argmax(-1), student(images).argmax(-1)
            right_teacher = right_teacher + (by_teacher == labels).sum()
            right_student = right_student + (by_student == labels).sum()
            alike = alike + (by_teacher == by_student).sum()
            total += len(labels)
    if total == 0:
        raise ValueError("evaluate yielded no images; give batches of (images, labels) that can be iterated again.")
    return {
        "teacher_accuracy": right_teacher.item() / total,
        "student_accuracy": right_student.item() / total,
        "agreement": alike.item() / total,
    }


def check(data: object) -> None:
    """Refuse what `evaluate_pair` cannot use, before the run rather than after it."""
    if isinstance(data, str | Path):
        if not Path(data).is_dir():
            raise FileNotFoundError(
                f"evaluate is {str(data)!r}, not a folder; it needs one subfolder of images per class."
            )
    elif data is not None and not callable(data) and not isinstance(data, Iterable):
        raise TypeError(
            f"evaluate is a {type(data).__name__}; accepted: batches of (images, labels) such as a DataLoader, "
            f"a function from a model to its accuracy, or a folder of images."
        )


def image_folder(folder: Path, spec: ImageSpec) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches from a folder with one subfolder per class, sorted by name as torchvision's ImageFolder sorts them."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            *([transforms.Grayscale()] if spec.channels == 1 else []),
            transforms.Resize(min(spec.height, spec.width), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop((spec.height, spec.width)),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    return torch.utils.data.DataLoader(datasets.ImageFolder(str(folder), transform), batch_size=64)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images, in [0, 1], that the model classifies as labelled."""
    with torch.no_grad():
        return (model(images).argmax(-1) == labels).sum().item() / len(labels)
