"""Generators: noise in, and a class if they are asked for one; images in the teacher's normalisation out.

A generator of your own is one registered class; then `distill(…, generator="mine")`:

    @register("mine")
    class Mine(Generator):
        def __init__(self, spec, settings): …
        def forward(self, noise, labels=None): …  # self.normalise([0, 1] pixels)
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
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

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised (B, C, H, W) images back to [0, 1]."""
        mean, std = self._per_channel(images)
        return images * std + mean

    def normalised(self, pixels: Tensor) -> Tensor:
        """The inverse."""
        mean, std = self._per_channel(pixels)
        return (pixels - mean) / std

    def _per_channel(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return mean, std


@dataclass(frozen=True)
class GeneratorSettings:
    """What a generator is made for, besides its images."""

    latent: int = 128
    """Noise values per image."""
    width: int = 128
    """Channels where the image is coarsest, or of a token."""
    classes: int = 0
    """That it can be asked for; 0: it is not."""
    batch_size: int = 64
    """Images of a round, for generators that hold them."""


class Generator(nn.Module):
    """What all generators share: their noise and the teacher's normalisation. `forward` is the subclass's own."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ImageSpec, settings: GeneratorSettings) -> None:
        super().__init__()
        self.spec, self.settings = spec, settings
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1))

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, latent) noise and (B,) labels to (B, channels, height, width) images, normalised for the teacher."""
        raise NotImplementedError

    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Noise for `count` images, and labels if it takes them, from its device's global random state."""
        device, classes = self.mean.device, self.settings.classes
        noise = torch.randn(count, self.settings.latent, device=device)
        return noise, torch.randint(classes, (count,), device=device) if classes else None

    def sample(self, count: int) -> Tensor:
        """`count` fresh images."""
        return self(*self.draw(count))

    def restart(self) -> None:
        """Begin again with new random weights."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def restart_noise(self) -> None:
        """Begin again with the layer that takes the noise; by default with nothing."""

    def normalise(self, pixels: Tensor) -> Tensor:
        """[0, 1] pixels to what the teacher takes."""
        return (pixels - self.mean) / self.std

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return images * self.std + self.mean


class Several(Generator):
    """Generators that take turns, each learning what the others do not make.

    Forward, noise and labels are those of the one whose turn it is; in eval mode `sample` asks all of them.
    """

    def __init__(self, parts: Sequence[Generator]) -> None:
        super().__init__(parts[0].spec, parts[0].settings)
        self.parts = nn.ModuleList(parts)
        self.turn = 0

    def next(self) -> None:
        """Hand the turn on."""
        self.turn = (self.turn + 1) % len(self.parts)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.parts[self.turn](noise, labels)

    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        return self.parts[self.turn].draw(count)  # type: ignore[operator]

    def sample(self, count: int) -> Tensor:
        if self.training:
            return super().sample(count)
        shares = [count // len(self.parts) + (part < count % len(self.parts)) for part in range(len(self.parts))]
        return torch.cat([part.sample(share) for part, share in zip(self.parts, shares, strict=True) if share])  # type: ignore[operator]


SUPPLIED = "real_images"  # the name of a generator while `supplied` is open, and never otherwise
GENERATORS: dict[str, type[Generator]] = {}


def register(name: str) -> Callable[[type[Generator]], type[Generator]]:
    """Make a generator known by `name`.

    Raises:
        ValueError: the name is taken.
    """

    def known(generator: type[Generator]) -> type[Generator]:
        if name in GENERATORS:
            raise ValueError(f"there is a generator {name!r} already; choose another name.")
        GENERATORS[name] = generator
        return generator

    return known


@contextlib.contextmanager
def supplied(make: Callable[[int], Tensor]) -> Iterator[str]:
    """Inside, the generator of the yielded name gives the (B, C, H, W) pixels in [0, 1] that `make` returns for B.

    Of real images, it makes `distill` the upper bound: KD on them, that differs from a method in its images and in
    nothing else. Outside, the name is unknown.
    """

    class Supplied(Generator):
        def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.normalise(make(len(noise)).to(self.mean.device))

    register(SUPPLIED)(Supplied)
    try:
        yield SUPPLIED
    finally:
        del GENERATORS[SUPPLIED]


@register("noise")
class Noise(Generator):
    """Gaussian noise where the teacher expects images: what a generator has to beat. There is nothing to learn."""

    def __init__(self, spec: ImageSpec, settings: GeneratorSettings) -> None:
        super().__init__(spec, settings)
        self.shape = spec.channels, spec.height, spec.width

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.randn(len(noise), *self.shape, device=noise.device)


@register("pixels")
class Pixels(Generator):
    """The images themselves are what is learned, from Gaussian noise on (Yin et al. 2020, DeepInversion).

    Takes the noise of one round's batch, whose images it holds, and no other number of images.
    """

    def __init__(self, spec: ImageSpec, settings: GeneratorSettings) -> None:
        super().__init__(spec, settings)
        self.images = nn.Parameter(torch.empty(settings.batch_size, spec.channels, spec.height, spec.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.images)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        with torch.no_grad():  # back into [0, 1] after each step; beyond, a pixel would have to return before it shows
            self.images.clamp_(self.normalise(torch.zeros_like(self.mean)), self.normalise(torch.ones_like(self.mean)))
        return self.images.repeat(-(-len(noise) // len(self.images)), 1, 1, 1)[: len(noise)]


@register("convolutional")
class Convolutional(Generator):
    """A small grid grown from noise by bilinear upsampling, with a 3×3 convolution at every size.

    8×8 images begin at 4×4, 224×224 ones at 7×7. BatchNorm always uses the batch's own statistics, in eval mode too:
    the generator changes at every step, so running averages would describe generators that are gone.

    The first grid has `settings.width` channels; halved with each doubling, 32 at least, so that every size costs
    alike. A label is a learned vector that multiplies the noise.
    """

    def __init__(self, spec: ImageSpec, settings: GeneratorSettings) -> None:
        super().__init__(spec, settings)
        width = settings.width
        self.sizes = _sizes(spec.height, spec.width)
        channels = [max(width >> i, min(width, 32)) for i in range(len(self.sizes))]
        height, breadth = self.sizes[0]
        self.label = nn.Embedding(settings.classes, settings.latent) if settings.classes else None
        self.seed = nn.Sequential(
            nn.Linear(settings.latent, width * height * breadth),
            nn.Unflatten(1, (width, height, breadth)),
            nn.BatchNorm2d(width, track_running_stats=False),
        )
        self.stages = nn.ModuleList(_stage(i, o) for i, o in zip([width, *channels[:-1]], channels, strict=True))
        self.to_pixels = nn.Conv2d(channels[-1], spec.channels, 3, padding=1)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.label is not None:
            noise = noise * self.label(labels)
        x = self.seed(noise)
        for size, stage in zip(self.sizes, self.stages, strict=True):
            if x.shape[-2:] != size:
                x = F.interpolate(x, size, mode="bilinear", align_corners=False)
            x = stage(x)
        return self.normalise((self.to_pixels(x).tanh() + 1) / 2)


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
