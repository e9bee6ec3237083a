"""Random small movements of images, each image by its own; gradients reach the images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_fast.ops._precise import without_autocast

SCALE = 0.7  # how much a turned image may also grow or shrink, for each radian that it may turn


def shifted(images: Tensor, share: float) -> Tensor:
    """Each (C, H, W) image moved by its own whole pixels, up to `share` of its sides; edges are repeated."""
    batch, _, *sides = images.shape
    most = [round(share * side) for side in sides]
    if not any(most):
        return images
    for dim, (side, reach) in enumerate(zip(sides, most, strict=True), start=2):
        places = torch.arange(side, device=images.device)
        places = (places + torch.randint(-reach, reach + 1, (batch, 1), device=images.device)).clamp_(0, side - 1)
        index = places.view(batch, 1, *(side if dim == other else 1 for other in (2, 3)))
        images = images.gather(dim, index.expand(images.shape))
    return images  # contiguous: of others torch's gradient of a convolution of one pixel in two crashes


def warped(
    images: Tensor, angle: Tensor, scale: Tensor, right: Tensor, down: Tensor, padding: str = "border"
) -> Tensor:
    """Each (C, H, W) image sampled where its own turned, scaled and moved grid lies; angle … down are (B,).

    `angle` is in radians, a `scale` above 1 shows more than the image, `right` and `down` are in half sides, `padding`
    is `grid_sample`'s padding_mode.
    """
    cos, sin = angle.cos() * scale, angle.sin() * scale
    height, width = images.shape[-2:]
    matrix = torch.stack((cos, -sin * height / width, right, sin * width / height, cos, down), dim=1).view(-1, 2, 3)
    with without_autocast(images.device):  # a grid in bfloat16 reads whole columns twice
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode=padding, align_corners=False)


def turned(images: Tensor, turn: float) -> Tensor:
    """Each (C, H, W) image turned by up to `turn` radians and scaled by up to 0.7 of that; edges are repeated."""
    if turn == 0:
        return images
    angle, size = turn * (2 * torch.rand(2, len(images), device=images.device) - 1)
    zero = torch.zeros_like(angle)
    return warped(images, angle, 1 + SCALE * size, zero, zero)


def augmented(images: Tensor, shift: float, turn: float) -> Tensor:
    """Turned, then shifted."""
    return shifted(turned(images, turn), shift)
