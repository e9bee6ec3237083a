"""Images made earlier, kept on the device so that the student does not forget what they taught."""

from typing import Any

import torch
from torch import Tensor

from vitkd_fast.generator import Generator

RAREST = 0.02  # a class is drawn as if it had at least this part of an equal share of the images


class ReplayPool:
    """A ring of images as bytes: a quarter of the memory of float32, and no host copy in or out.

    Args:
        capacity: images kept; rounded up to whole batches.
        generator: whose images come in; it knows their normalisation.
        classes: how many there are, to draw images of all of them equally often; 0: to draw every image equally often.
    """

    def __init__(self, capacity: int, generator: Generator, classes: int = 0) -> None:
        self.capacity, self.generator = capacity, generator
        self.bytes = torch.empty(0, dtype=torch.uint8)  # (capacity, C, H, W) from the first batch on
        self.count = self.cursor = 0
        self.members = torch.zeros(classes)  # how many of each class are here
        self.classes = torch.empty(0, dtype=torch.int64)  # (capacity,) of each image

    def add(self, images: Tensor, classes: Tensor | None = None) -> None:
        """Keep (B, C, H, W) normalised images, of (B,) classes where those matter, in place of the oldest; every batch
        must have the first one's size."""
        size = len(images)
        if self.count == 0:
            batches = -(-self.capacity // size)
            self.bytes = images.new_empty(batches * size, *images.shape[1:], dtype=torch.uint8)
            self.classes = torch.zeros(batches * size, dtype=torch.int64, device=images.device)
        ring = slice(self.cursor, self.cursor + size)
        pixels = self.generator.pixels(images.detach()).mul_(255).round_().clamp_(0, 255)
        self.bytes[ring] = pixels.to(torch.uint8)
        self.cursor = (self.cursor + size) % len(self.bytes)
        self.count = min(self.count + size, len(self.bytes))
        if classes is not None:
            self.classes[ring] = classes
            one = torch.ones((), device=images.device).expand(self.count)
            none = torch.zeros(len(self.members), device=images.device)
            self.members = none.index_add_(0, self.classes[: self.count], one)

    def state_dict(self) -> dict[str, Any]:
        """The images that are here; saving a part of a tensor as it is would save all of it."""
        filled = self.count == len(self.bytes)
        return {
            "bytes": self.bytes if filled else self.bytes[: self.count].clone(),
            "classes": self.classes if filled else self.classes[: self.count].clone(),
            "members": self.members,
            "cursor": self.cursor,
            "room": len(self.bytes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        images, classes, room = state["bytes"], state["classes"], state["room"]
        self.members, self.cursor, self.count = state["members"], state["cursor"], len(images)
        self.bytes, self.classes = images.new_empty(room, *images.shape[1:]), classes.new_zeros(room)
        self.bytes[: self.count], self.classes[: self.count] = images, classes

    def sample(self, count: int) -> Tensor:
        """`count` images drawn with replacement, normalised again."""
        if len(self.members):
            least = RAREST * self.count / len(self.members)
            chances = self.members.clamp(min=least).reciprocal()[self.classes[: self.count]]
            index = torch.multinomial(chances, count, replacement=True)
        else:
            index = torch.randint(self.count, (count,), device=self.bytes.device)
        return self.generator.normalise(self.bytes[index].float().div_(255))
