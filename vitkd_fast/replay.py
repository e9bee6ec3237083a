"""Images of earlier generators, kept on the device so that the student does not forget what they taught."""

import torch
from torch import Tensor

from vitkd_fast.generator import Generator


class ReplayPool:
    """A ring of images as bytes: a quarter of the memory of float32, and no host copy in or out.

    Args:
        capacity: images kept; rounded up to whole batches.
        generator: whose images come in; it knows their normalisation.
    """

    def __init__(self, capacity: int, generator: Generator) -> None:
        self.capacity, self.generator = capacity, generator
        self.bytes = torch.empty(0, dtype=torch.uint8)  # (capacity, C, H, W) from the first batch on
        self.count = self.cursor = 0

    def add(self, images: Tensor) -> None:
        """Keep (B, C, H, W) normalised images in place of the oldest; every batch must have the first one's size."""
        size = len(images)
        if self.count == 0:
            batches = -(-self.capacity // size)
            self.bytes = images.new_empty(batches * size, *images.shape[1:], dtype=torch.uint8)
        pixels = self.generator.pixels(images.detach()).mul_(255).round_().clamp_(0, 255)
        self.bytes[self.cursor : self.cursor + size] = pixels.to(torch.uint8)
        self.cursor = (self.cursor + size) % len(self.bytes)
        self.count = min(self.count + size, len(self.bytes))

    def sample(self, count: int) -> Tensor:
        """`count` images drawn with replacement, normalised again."""
        index = torch.randint(self.count, (count,), device=self.bytes.device)
        return self.generator.normalise(self.bytes[index].float().div_(255))
