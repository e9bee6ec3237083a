"""Scenes drawn by a program: things of all sizes at random places, over grounds of all kinds."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_fast.generator import Generator, register
from vitkd_fast.ops._precise import without_autocast
from vitkd_fast.procedural import Canvas, drawn

THINGS = 6  # on a scene, at most
SIZES = (0.12, 0.7)  # of a thing's square, in sides of the image
STROKES = 3  # of a thing, at most
FILLED = 10  # of so many things one is filled, not of strokes
DETAIL = 32  # pixels of the square on which a thing is drawn
FULL = 4  # of so many scenes one has shapes of its own beneath the things


@register("scenes")
class SceneGenerator(Generator):
    """What `scenes` draws. There is nothing to learn."""

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        spec = self.spec
        return self.normalise(scenes(len(noise), spec.channels, spec.height, spec.width, self.mean.device))


def scenes(count: int, channels: int, height: int, width: int, device: torch.device) -> Tensor:
    """(count, channels, height, width) images in [0, 1], from the device's global random state."""
    canvas = Canvas(height, width, device)
    images = canvas.colours(count, channels)[:, :, None, None].repeat(1, 1, height, width)
    full = -(-count // FULL)
    images[:full] = drawn(full, channels, height, width, device)
    images = images[torch.randperm(count, device=device)]
    # On most scenes all things have one colour, that stands out from the ground.
    opposite = (images.mean((1, 2, 3)) < 0.5).float()[:, None]
    ink = opposite.lerp(canvas.colours(count, channels), 0.5 * canvas.uniform(count, 1))
    one_ink = canvas.chance(count, 1, of=0.7)
    present = canvas.uniform(count, high=THINGS)
    for thing, cover in enumerate(things(count * THINGS, device).split(count)):
        colour = torch.where(one_ink, ink, canvas.colours(count, channels))[:, :, None, None]
        cover = placed(cover, height, width) * (present > thing).view(-1, 1, 1, 1)
        images.lerp_(colour.expand_as(images), cover.expand_as(images))
    return canvas.textured(images, alone=0.03).clamp_(0, 1)


def things(count: int, device: torch.device) -> Tensor:
    """(count, 1, DETAIL, DETAIL) how much a thing covers of its square: a few strokes, or a filled shape."""
    canvas = Canvas(DETAIL, DETAIL, device)
    thickness = 0.08 + 0.25 * canvas.uniform(count).square()
    blur = canvas.uniform(count, low=0.5, high=3.0) * canvas.pixel
    filled = -(-count // FILLED)
    # As many have one stroke as have two, and as have three.
    having = [-(-(count - filled) * (STROKES - stroke) // STROKES) for stroke in range(STROKES)]
    first, *others = canvas.strokes(torch.cat([thickness[:some] for some in having])).split(having)
    for other in others:
        torch.minimum(first[: len(other)], other, out=first[: len(other)])
    cover = canvas.cover(torch.cat((first, canvas.regions(filled))), blur)
    return cover[torch.randperm(count, device=device)]


def placed(cover: Tensor, height: int, width: int) -> Tensor:
    """Each (1, DETAIL, DETAIL) thing at a random place of an image of its own, its sides by its own factors."""
    count, device = len(cover), cover.device
    low, high = SIZES
    size = low * (high / low) ** torch.rand(count, 1, device=device)
    sides = (size * (0.6 + 0.8 * torch.rand(count, 2, device=device))).clamp_max(1)
    short = min(height, width)
    across, along = sides[:, 0] * (short / width), sides[:, 1] * (short / height)
    share = torch.stack((across, along), 1)
    right, down = ((2 * torch.rand(count, 2, device=device) - 1) * (1 - share)).unbind(1)
    zero = torch.zeros_like(right)
    matrix = torch.stack((1 / across, zero, -right / across, zero, 1 / along, -down / along), 1).view(-1, 2, 3)
    with without_autocast(device):
        grid = F.affine_grid(matrix, [count, 1, height, width], align_corners=False)
    return F.grid_sample(cover, grid, align_corners=False)
