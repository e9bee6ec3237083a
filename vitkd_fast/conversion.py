"""A teacher's images made a student's, where the two want another size or normalisation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_fast.generator import ImageSpec


class Conversion(nn.Module):
    """(B, C, H, W) images normalised for the teacher to images sized and normalised for the student.

    Resizing is bilinear, and averages where images become smaller (antialias). Differentiable; where the two want the
    same, the images pass as they are.
    """

    gain: Tensor
    offset: Tensor

    def __init__(self, teacher: ImageSpec, student: ImageSpec) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student
        self.resizes = (teacher.height, teacher.width) != (student.height, student.width)
        self.renormalises = (teacher.mean, teacher.std) != (student.mean, student.std)
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
            for values in (teacher.mean, teacher.std, student.mean, student.std)
        )
        self.register_buffer("gain", (std / own_std).float())
        self.register_buffer("offset", ((mean - own_mean) / own_std).float())

    def forward(self, images: Tensor) -> Tensor:
        if self.renormalises:
            images = images * self.gain + self.offset
        if self.resizes:
            size = self.student.height, self.student.width
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        return images

    def note(self) -> str | None:
        """What it does, for the report; None if nothing."""
        done = []
        if self.resizes:
            sizes = (self.teacher.height, self.teacher.width, self.student.height, self.student.width)
            done.append("resized from the teacher's {}×{} to its own {}×{}".format(*sizes))
        if self.renormalises:
            done.append(
                f"normalised with mean {_shown(self.student.mean)} and std {_shown(self.student.std)}, as its "
                f"pretrained_cfg says, where the teacher has {_shown(self.teacher.mean)} and {_shown(self.teacher.std)}"
            )
        if not done:
            return None
        return (
            f"student: images are {' and '.join(done)}; give it such images from now on, or set its pretrained_cfg to "
            f"the teacher's before the run"
        )


def _shown(values: tuple[float, ...]) -> str:
    values = values[:1] if len(set(values)) == 1 else values
    return " ".join(f"{value:.4g}" for value in values)
