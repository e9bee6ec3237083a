"""A convolutional generator: noise in, images in the teacher's normalisation out."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ImageSpec:
    """What a teacher takes: its image size and how [0, 1] pixels are normalised, per channel."""

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.mean)


class Generator(nn.Module):
    """A small grid grown from noise by bilinear upsampling, with a 3×3 convolution at every size.

    8×8 images begin at 4×4, 224×224 ones at 7×7. BatchNorm always uses the batch's own statistics, in eval mode too:
    the generator changes at every step, so running averages would describe generators that are gone.

    Args:
        spec: the images to make; any size, any number of channels.
        latent: noise values per image.
        width: channels of the first grid; halved with each doubling, 32 at least, so that every size costs alike.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ImageSpec, latent: int = 128, width: int = 128) -> None:
        super().__init__()
        self.latent = latent
        self.sizes = _sizes(spec.height, spec.width)
        channels = [max(width >> i, min(width, 32)) for i in range(len(self.sizes))]
        height, breadth = self.sizes[0]
        self.seed = nn.Sequential(
            nn.Linear(latent, width * height * breadth),
            nn.Unflatten(1, (width, height, breadth)),
            nn.BatchNorm2d(width, track_running_stats=False),
        )
        self.stages = nn.ModuleList(_stage(i, o) for i, o in zip([width, *channels[:-1]], channels, strict=True))
        self.to_pixels = nn.Conv2d(channels[-1], spec.channels, 3, padding=1)
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1))

    def forward(self, noise: Tensor) -> Tensor:
        """(B, latent) noise to (B, channels, height, width) images, normalised as the teacher wants them."""
        x = self.seed(noise)
        for size, stage in zip(self.sizes, self.stages, strict=True):
            if x.shape[-2:] != size:
                x = F.interpolate(x, size, mode="bilinear", align_corners=False)
            x = stage(x)
        return self.normalise((self.to_pixels(x).tanh() + 1) / 2)

    def sample(self, count: int) -> Tensor:
        """`count` fresh images, from the generator's device's global random state."""
        return self(torch.randn(count, self.latent, device=self.mean.device))

    def normalise(self, pixels: Tensor) -> Tensor:
        """[0, 1] pixels to what the teacher takes."""
        return (pixels - self.mean) / self.std

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return images * self.std + self.mean


def _stage(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out, track_running_stats=False),
        nn.LeakyReLU(0.2, inplace=True),
    )


def _sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Coarse to fine: halved, rounding up, while the short side is at least 8."""
    sizes = [(height, width)]
    while min(sizes[0]) >= 8:
        sizes.insert(0, (-(-sizes[0][0] // 2), -(-sizes[0][1] // 2)))
    return sizes
