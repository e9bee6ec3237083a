"""A GAN generator with self-attention: noise becomes tokens, transformer blocks relate them, each becomes a patch.

"Transformer-augmented" is what Habib et al. 2024 (arXiv 2408.05952) call theirs, and its layers are not published:
these are ours, after TransGAN (Jiang et al. 2021) and ViTGAN (Lee et al. 2021).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_fast import ops
from vitkd_fast.generator import Generator, GeneratorSettings, ImageSpec, register

DEPTH = 3  # blocks
HEAD_DIM = 32
CHANNELS = 16  # of every pixel before the last convolution, which sees across the patches' borders


class Attention(nn.Module):
    """Multi-head self-attention of (B, N, C) tokens, on `vitkd_fast.ops.attention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D)
        return self.proj(ops.attention(qkv))


class Block(nn.Module):
    """A ViT's block: attention, then a perceptron, both with their norms before and their inputs added after."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@register("transformer")
class Transformer(Generator):
    """Noise to one token per patch by a linear layer, `DEPTH` blocks of self-attention, a patch from each token.

    Two BatchNorms, over the batch's own statistics as in `Convolutional`, keep the images of a batch apart: a LayerNorm
    sees one image only, and does not mind that all are alike. A 3×3 convolution blends the patches at their borders.
    Tokens have `settings.width` channels. A label is a learned vector that multiplies the noise.
    """

    def __init__(self, spec: ImageSpec, settings: GeneratorSettings) -> None:
        super().__init__(spec, settings)
        heads = max(1, settings.width // HEAD_DIM)
        dim = settings.width // heads * heads
        self.size = spec.height, spec.width
        self.patch = patch_size(min(self.size))
        self.grid = -(-spec.height // self.patch), -(-spec.width // self.patch)
        tokens = self.grid[0] * self.grid[1]
        self.label = nn.Embedding(settings.classes, settings.latent) if settings.classes else None
        self.seed = nn.Sequential(
            nn.Linear(settings.latent, dim * tokens),
            nn.Unflatten(1, (dim, tokens)),
            nn.BatchNorm1d(dim, track_running_stats=False),
        )
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(DEPTH)))
        self.to_patches = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, CHANNELS * self.patch**2))
        self.to_pixels = nn.Sequential(
            nn.BatchNorm2d(CHANNELS, track_running_stats=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(CHANNELS, spec.channels, 3, padding=1),
        )

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.label is not None:
            noise = noise * self.label(labels)
        x = self.blocks(self.seed(noise).mT)  # (B, N, C)
        x = self.to_patches(x).mT.unflatten(2, self.grid)  # (B, C·P², rows, columns)
        x = F.pixel_shuffle(x, self.patch)[..., : self.size[0], : self.size[1]]  # (B, C, H, W)
        return self.normalise((self.to_pixels(x).tanh() + 1) / 2)


def patch_size(side: int) -> int:
    """Pixels of a patch's side: near the root of the image's, so that tokens and pixels in a token grow alike.

    8 pixels: 2 (a grid of 4×4); 28 and 32: 4 (7×7, 8×8); 224: 16 (14×14).
    """
    size = 2
    while size**2 < side / 2:
        size *= 2
    return size
