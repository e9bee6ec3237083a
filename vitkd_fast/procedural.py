"""Images drawn by a program: strokes, shapes, shades and textures at random, for which no data are needed.

A network that has learned from images of one kind answers those of another in its own way, and a student that is shown
enough different ones learns to answer alike (Beyer et al. 2022; Asano and Saeed 2023, whose images are crops of a
single picture). What a program draws can stand for a picture (Kataoka et al. 2020; Baradad et al. 2021), and unlike
what a generator learns to make it has nothing in it that only this teacher sees.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_fast.generator import Generator, register

LAYERS = 5  # shapes on an image, at most
SEGMENTS = 8  # straight pieces of a stroke
FINEST = 32  # points of the short side at which distances are computed; between them they are interpolated
NOISE_ALONE = 0.15  # share of the images on which there are no shapes
SHADE = 0.3  # standard deviation of how much brighter a shaded surface is at the image's edge than in its middle
GRAIN = 0.25  # of a surface's texture, at most
SURFACES = 4  # grounds that have the same texture, on average; as many shapes have it


@register("procedural")
class Procedural(Generator):
    """What `drawn` draws. There is nothing to learn."""

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        spec = self.spec
        return self.normalise(drawn(len(noise), spec.channels, spec.height, spec.width, self.mean.device))


def drawn(count: int, channels: int, height: int, width: int, device: torch.device) -> Tensor:
    """(count, channels, height, width) images in [0, 1], from the device's global random state."""
    canvas = Canvas(height, width, device)
    images = canvas.shapes(count, channels)
    images = canvas.textured(images)
    return images[torch.randperm(count, device=device)].clamp_(0, 1)


class Canvas:
    """Draws images of one size. Lengths are in halves of the short side, (row, column), from the image's middle."""

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        self.size, self.device = (height, width), device
        short = min(height, width)
        self.pixel = 2 / short
        fine = min(1.0, FINEST / short)
        self.grid = round(height * fine), round(width * fine)
        rows, columns = (
            (torch.arange(n, device=device) - (n - 1) / 2) * (side / n) * self.pixel
            for n, side in zip(self.grid, self.size, strict=True)
        )
        self.points = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(1, -1, 2)
        self.reach = self.points.amax((0, 1))  # of the image, from its middle
        # From -1 to 1 over the image, one pixel after the other.
        self.rows = torch.linspace(-1, 1, height, device=device).view(-1, 1)
        self.columns = torch.linspace(-1, 1, width, device=device)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, device=self.device)

    def chance(self, *shape: int, of: float) -> Tensor:
        return torch.rand(*shape, device=self.device) < of

    def shapes(self, count: int, channels: int) -> Tensor:
        """One to five shapes on a ground, (B, C, H, W): strokes, or filled ones, or both. On half of the images shapes
        and ground are shaded and textured, as on photographs, on the others plain."""
        black_or_white = self.chance(count, 1, of=1 / 3).float().expand(-1, channels)
        ground = torch.where(self.chance(count, 1, of=0.5), black_or_white, self.colours(count, channels))
        textures = self.noise(-(-count // SURFACES), channels)
        lively = self.chance(count, 1, 1, 1, of=0.5).float()
        images = self.surface(ground, textures, lively)
        # Half of the images have one colour that stands out, and on most all shapes have the same.
        opposite = (ground.mean(1, keepdim=True) < 0.5).float().expand(-1, channels)
        ink = torch.where(self.chance(count, 1, of=0.5), opposite, self.colours(count, channels))
        one_ink = self.chance(count, 1, of=0.6)
        thickness = 0.06 + 0.3 * self.uniform(count).square()
        blur = self.uniform(count, low=0.5, high=2.0) * self.pixel
        for outline in self.outlines(thickness):
            having = slice(len(outline))
            cover = self.cover(outline, blur[having])
            colour = torch.where(one_ink[having], ink[having], self.colours(len(outline), channels))
            surface = self.surface(colour, textures, lively[having])
            images[having].lerp_(surface, cover.expand_as(surface))
        return images

    def outlines(self, thickness: Tensor) -> list[Tensor]:
        """Distances from the first shape of all images, from the second of those that have two, and so on, each
        (images, points). Of three images one has strokes, one filled shapes and one both by turns.

        All strokes are computed at once: a GPU is asked a few hundred times for a batch, not some thousand.
        """
        count, points = len(thickness), self.points.shape[1]
        having = [-(-count * (LAYERS - layer) // LAYERS) for layer in range(LAYERS)]
        outlines = [self.points.new_empty(images, points) for images in having]
        lines: list[Tensor] = []  # where strokes go
        fills: list[Tensor] = []
        halves: list[Tensor] = []  # of their thickness
        for layer, outline in enumerate(outlines):
            for kind in range(3):
                if kind == 0 or (kind == 1 and layer % 2 == 0):
                    lines.append(outline[kind::3])
                    halves.append(thickness[kind : len(outline) : 3])
                else:
                    fills.append(outline[kind::3])
        torch._foreach_copy_(lines, self.strokes(torch.cat(halves)).split([*map(len, lines)]))
        torch._foreach_copy_(fills, self.regions(sum(map(len, fills))).split([*map(len, fills)]))
        return outlines

    def surface(self, colour: Tensor, textures: Tensor, lively: Tensor) -> Tensor:
        """(B, C) colours as surfaces, (B, C, H, W): plain where `lively`, (B, 1, 1, 1), is 0; where it is 1, brighter
        to one side and with one of the textures."""
        count = len(colour)
        angle = 2 * math.pi * self.uniform(count, 1, 1, 1)
        shade = SHADE * lively * torch.randn(count, 1, 1, 1, device=self.device)
        grain = GRAIN * lively * self.uniform(count, 1, 1, 1).pow(1.5)
        texture = textures[torch.randint(len(textures), (count,), device=self.device)]
        plain = colour[:, :, None, None] + shade * angle.sin() * self.rows
        return (plain + shade * angle.cos() * self.columns).addcmul_(texture, grain)

    def colours(self, count: int, channels: int) -> Tensor:
        """(count, channels) of any brightness and of any saturation."""
        grey = self.uniform(count, 1)
        return grey.lerp(self.uniform(count, channels), self.uniform(count, 1)) if channels > 1 else grey

    def cover(self, distance: Tensor, blur: Tensor) -> Tensor:
        """Distances from an outline, negative inside, (B, points), as how much a shape covers, (B, 1, H, W)."""
        distance = distance.view(-1, 1, *self.grid)
        if self.grid != self.size:
            distance = F.interpolate(distance, self.size, mode="bilinear", align_corners=False)
        return (0.5 - distance / blur[:, None, None, None]).clamp_(0, 1)

    def strokes(self, thickness: Tensor) -> Tensor:
        """Distances from curves with two ends or from parts of a ring, of half that thickness, (B, points)."""
        count = len(thickness)
        t = torch.linspace(0, 1, SEGMENTS + 1, device=self.device)[None, :, None]
        start, middle, end = (self.uniform(count, 3, 2, low=-0.95, high=0.95) * self.reach).split(1, dim=1)
        straight = (start + middle + end) / 3
        middle = straight.lerp(middle, self.uniform(count, 1, 1, high=2.0))
        curve = (1 - t).square() * start + 2 * t * (1 - t) * middle + t.square() * end
        centre = self.uniform(count, 1, 2, low=-0.6, high=0.6) * self.reach
        turned = self.uniform(count, 1, 1) + t * self.uniform(count, 1, 1, low=0.4, high=2.2).clamp_max(1)
        radii = self.uniform(count, 1, 1, low=0.15, high=0.75)
        squeezed = self.uniform(count, 1, 1, low=0.5, high=1.5)
        angle = 2 * math.pi * turned
        ring = centre + radii * torch.cat((angle.sin() * squeezed, angle.cos()), -1)
        corners = torch.where(self.chance(count, 1, 1, of=0.35), ring, curve)
        return self.from_line(corners) - thickness[:, None]

    def from_line(self, corners: Tensor) -> Tensor:
        """Distance of every point from the line through (B, corners, 2), (B, points)."""
        nearest = None
        rows, columns = self.points.unbind(-1)
        for start, step in zip(corners[:, :-1].unbind(1), corners.diff(dim=1).unbind(1)):
            (row, column), (down, right) = start[..., None].unbind(1), step[..., None].unbind(1)
            row, column = rows - row, columns - column
            length = (down * down + right * right).clamp_min(1e-8)
            along = (row * (down / length)).addcmul_(column, right / length).clamp_(0, 1)
            row.addcmul_(along, down, value=-1)
            column.addcmul_(along, right, value=-1)
            square = row.square_().addcmul_(column, column)
            nearest = square if nearest is None else torch.minimum(nearest, square, out=nearest)
        assert nearest is not None
        return nearest.sqrt_()

    def regions(self, count: int) -> Tensor:
        """Distances, about, from the outlines of ellipses and boxes, (B, points)."""
        middle = self.uniform(count, 1, 2, low=-1, high=1) * self.reach
        row, column = (self.points - middle).unbind(-1)
        angle = 2 * math.pi * self.uniform(count, 1)
        along, across = column * angle.cos() + row * angle.sin(), row * angle.cos() - column * angle.sin()
        half = 0.1 + 0.9 * self.uniform(count, 2).pow(1.5)
        along, across = along / half[:, :1], across / half[:, 1:]
        ellipse, box = torch.hypot(along, across), torch.maximum(along.abs(), across.abs())
        return (torch.where(self.chance(count, 1, of=0.5), ellipse, box) - 1) * half.amin(1, keepdim=True)

    def textured(self, images: Tensor, alone: float = NOISE_ALONE) -> Tensor:
        """Noise of its own kind over half of the images, and instead of the share `alone`."""
        count, channels = images.shape[:2]
        noise = self.noise(count, channels)
        strength = 0.25 * self.uniform(count, 1, 1, 1) * self.chance(count, 1, 1, 1, of=0.5)
        ground = self.uniform(count, channels, 1, 1, low=0.2, high=0.8)
        contrast = self.uniform(count, 1, 1, 1, low=0.1, high=0.5)
        instead = self.chance(count, 1, 1, 1, of=alone)
        return torch.where(instead, ground, images).addcmul_(noise, torch.where(instead, contrast, strength))

    def noise(self, count: int, channels: int) -> Tensor:
        """Noise whose amplitude falls with the frequency to a random power, (B, C, H, W), of about unit variance; most
        of it is the same in all channels."""
        height, width = self.size
        rows, columns = torch.fft.fftfreq(height, device=self.device), torch.fft.rfftfreq(width, device=self.device)
        octave = torch.hypot(rows[:, None], columns).clamp_min(1 / max(self.size)).log()
        amplitude = (octave * -self.uniform(count, 1, 1, 1, low=0.3, high=2.0)).exp()
        amplitude[:, :, 0, 0] = 0
        waves = torch.randn(count, 1, *octave.shape, 2, device=self.device)
        if channels > 1:
            waves = waves + 0.5 * torch.randn(count, channels, *octave.shape, 2, device=self.device)
        waves = torch.view_as_complex(waves * amplitude[..., None])
        # A real image's waves of opposite directions are conjugates. Most of these pairs have one wave here.
        for column in (0, width // 2) if width % 2 == 0 else (0,):
            both = waves[..., column]
            waves[..., column] = (both + both.flip(-1).roll(1, -1).conj()) / 2**0.5
        noise = torch.fft.irfft2(waves, s=self.size)
        length = torch.linalg.vector_norm(noise, dim=(1, 2, 3), keepdim=True)
        return noise.mul_(noise[0].numel() ** 0.5 / length.clamp_min(1e-6))
