"""NAYER's generator: fixed class vectors in; what makes one image differ from another is a layer of random weights.

Tran et al. 2024 (NAYER, arXiv 2310.00258) take CLIP's embeddings of the class names for the vectors. For vectors of
your own, text embeddings or others, register a subclass:

    @register("named")
    class Named(Noisy):
        def class_vectors(self, classes):
            return torch.load("class_names.pt")  # (classes, D)
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_fast.generator import Convolutional, Generator, GeneratorSettings, ImageSpec, register


class NoisyLayers(nn.Module):
    """Linear layers side by side, each for its own (K, D) rows of a (layers, K, D) input, with N(0, 1) weights."""

    def __init__(self, layers: int, features_in: int, features_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, features_in, features_out))
        self.bias = nn.Parameter(torch.empty(layers, 1, features_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight, alpha=self.weight.shape[1] ** -0.5)  # unit variance out


@register("noisy")
class Noisy(Generator):
    """Class vector, normalised; noisy layer; then the layers of `Convolutional`.

    One noisy layer serves as many images as there are classes, one of each ("K to 1"), since two images of one class by
    one layer would be the same; a batch has as many noisy layers as that takes, and they are all its randomness: the
    noise that `forward` is given is not looked at, and beyond `settings.batch_size` images the layers begin again.

    Raises:
        ValueError: it is not conditional.
    """

    vectors: Tensor

    def __init__(self, spec: ImageSpec, settings: GeneratorSettings) -> None:
        super().__init__(spec, settings)
        if not settings.classes:
            raise ValueError("the noisy generator makes images of a class: set conditional=True.")
        self.distinct = min(settings.classes, settings.batch_size)  # images that share a layer
        vectors = self.class_vectors(settings.classes).float()
        if vectors.dim() != 2 or len(vectors) != settings.classes:
            raise ValueError(f"class_vectors gives {tuple(vectors.shape)}; accepted: ({settings.classes}, D).")
        self.register_buffer("vectors", F.layer_norm(vectors, vectors.shape[1:]))
        self.noisy = NoisyLayers(-(-settings.batch_size // self.distinct), vectors.shape[1], settings.latent)
        self.body = Convolutional(spec, replace(settings, classes=0))

    def class_vectors(self, classes: int) -> Tensor:
        """(classes, D): random and fixed here, from the global random state."""
        return torch.randn(classes, self.settings.latent)

    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Noise that is not looked at, and labels that differ within each layer's share of the images."""
        noise, _ = super().draw(count)
        shares = -(-count // self.distinct)
        order = torch.rand(shares, self.settings.classes, device=noise.device).argsort(1)
        return noise, order[:, : self.distinct].flatten()[:count]

    def restart_noise(self) -> None:
        self.noisy.reset_parameters()

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        whole = len(self.noisy.weight) * self.distinct  # images of all layers
        return self.body(torch.cat([self._varied(part) for part in self.vectors[labels].split(whole)]))

    def _varied(self, vectors: Tensor) -> Tensor:
        """(B, D) vectors, B at most what the layers take, to (B, latent)."""
        whole = len(self.noisy.weight) * self.distinct
        padded = F.pad(vectors, (0, 0, 0, whole - len(vectors)))
        return self.noisy(padded.unflatten(0, (-1, self.distinct))).flatten(0, 1)[: len(vectors)]
