"""Scenes of scikit-learn's handwritten digits, to try detection on without any files."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_fast.demo import digits
from vitkd_fast.detection.objects import Objects

MOST = 4  # digits on a scene
SIZES = (0.25, 0.5)  # of a digit's square, in sides of the canvas
LAYOUTS = 16  # tried for each scene; the one whose digits overlap least is taken
SCRATCHES = 3  # lines across a scene, at most
INK = 0.25  # what counts as part of a digit when its box is measured


@dataclass(frozen=True)
class Composer:
    """Makes scenes of (N, 1, 8, 8) digits in [0, 1] with (N,) labels, on canvases of side × side pixels."""

    images: Tensor
    labels: Tensor
    side: int = 64

    def __call__(self, count: int) -> tuple[Tensor, list[Objects]]:
        """(count, 1, side, side) scenes in [0, 1] and what is on each: one to four digits, some lines, some noise."""
        chosen = torch.randint(len(self.images), (count, MOST))
        present = torch.arange(MOST) < torch.randint(1, MOST + 1, (count, 1))
        centre, size = self._layout(present)
        pasted = self._pasted(self.images[chosen.flatten()], centre.flatten(0, 1), size.flatten())
        ink = (pasted.unflatten(0, (count, MOST)) * present[:, :, None, None, None]).amax(1)
        ground, strength = 0.3 * torch.rand(count, 1, 1, 1), 0.6 + 0.4 * torch.rand(count, 1, 1, 1)
        scenes = torch.maximum(strength * ink, 0.5 * torch.rand(count, 1, 1, 1) * self._scratches(count))
        scenes = ground + (1 - ground) * scenes + 0.05 * torch.randn(count, 1, self.side, self.side)
        boxes = self._boxes(chosen, centre, size)
        found = [Objects(boxes[n, present[n]], self.labels[chosen[n, present[n]]]) for n in range(count)]
        return scenes.clamp_(0, 1), found

    def _layout(self, present: Tensor) -> tuple[Tensor, Tensor]:
        """Centres (B, MOST, 2) and sizes (B, MOST) in sides of the canvas, all of each square on it."""
        count = len(present)
        size = torch.empty(count, LAYOUTS, MOST).uniform_(*SIZES)
        centre = size[..., None] / 2 + torch.rand(count, LAYOUTS, MOST, 2) * (1 - size[..., None])
        apart = (centre[:, :, :, None] - centre[:, :, None]).abs().amax(-1)
        overlap = ((size[:, :, :, None] + size[:, :, None]) / 2 - apart).clamp_min(0)
        both = present[:, None, :, None] & present[:, None, None] & ~torch.eye(MOST, dtype=torch.bool)
        best = (overlap * both).sum((-1, -2)).argmin(1)
        rows = torch.arange(count)
        return centre[rows, best], size[rows, best]

    def _pasted(self, images: Tensor, centre: Tensor, size: Tensor) -> Tensor:
        """Each (1, 8, 8) image as a square of that size around that place on a canvas of its own."""
        zero = torch.zeros_like(size)
        across, down = (2 * centre - 1).unbind(-1)
        matrix = torch.stack((1 / size, zero, -across / size, zero, 1 / size, -down / size), 1).view(-1, 2, 3)
        grid = F.affine_grid(matrix, [len(images), 1, self.side, self.side], align_corners=False)
        return F.grid_sample(images, grid, mode="bicubic", align_corners=False).clamp_(0, 1)

    def _boxes(self, chosen: Tensor, centre: Tensor, size: Tensor) -> Tensor:
        """(B, MOST, 4) boxes around the ink of the digits."""
        dark = self.images > INK
        edges = []
        for dim in (-2, -1):  # columns, then rows
            line = dark.any(dim).flatten(1).float()
            first, last = line.argmax(1), line.shape[1] - line.flip(1).argmax(1)
            edges.append(torch.stack((first, last), 1) / line.shape[1])
        (left, right), (top, bottom) = (edge[chosen].unbind(-1) for edge in edges)
        middle = torch.stack(((left + right) / 2, (top + bottom) / 2), -1) - 0.5
        extent = torch.stack((right - left, bottom - top), -1)
        return torch.cat((centre + middle * size[..., None], extent * size[..., None]), -1)

    def _scratches(self, count: int) -> Tensor:
        """(count, 1, side, side) up to three thin lines across each scene, in [0, 1]."""
        place = torch.linspace(-1, 1, self.side)
        angle, offset = torch.rand(2, count, SCRATCHES, 1, 1)
        angle = angle * torch.pi
        distance = place * angle.cos() + place[:, None] * angle.sin() - (2 * offset - 1)
        lines = (1.5 - distance.abs() * self.side / 2).clamp_(0, 1)
        there = torch.rand(count, SCRATCHES, 1, 1) < 0.5
        return (lines * there).amax(1, keepdim=True)


def composers(side: int = 64) -> tuple[Composer, Composer]:
    """Of the digits that a teacher may learn from, and of those that are kept for measuring."""
    known, held = (((images + 1) / 2, labels) for images, labels in digits())
    return Composer(*known, side), Composer(*held, side)
