"""Square windows of scenes, each with an object in it: small objects in large frames, made a task for a CPU."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import ColorJitter, Compose, RandomGrayscale

from vitkd_fast.detection.data import Scenes
from vitkd_fast.detection.objects import Objects, clipped

ZOOM = 1.3  # how much nearer or farther a window to learn from may be


class Windows:
    """Batches to learn from: objects of all classes alike often, each window mirrored or not, nearer or farther,
    lighter or darker, coloured or grey."""

    def __init__(self, scenes: Scenes, side: int) -> None:
        self.scenes, self.side = scenes, side
        first = [int(some.labels[0]) if len(some) else None for some in scenes.objects]
        counts = Counter(first)
        self.chances = torch.tensor([0.0 if label is None else 1 / counts[label] for label in first])
        self.light = Compose([ColorJitter(brightness=0.3, contrast=0.3), RandomGrayscale(0.2)])

    def __call__(self, count: int) -> tuple[Tensor, list[Objects]]:
        chosen = torch.multinomial(self.chances, count, replacement=True).tolist()
        pixels, objects = zip(*(self._window(*self.scenes[index]) for index in chosen))
        return torch.stack(pixels), list(objects)

    def _window(self, pixels: Tensor, objects: Objects) -> tuple[Tensor, Objects]:
        zoom = ZOOM ** (2 * torch.rand(()).item() - 1)
        pixels, objects = around_one(pixels, objects, min(round(self.side * zoom), *pixels.shape[1:]))
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
            objects.boxes[:, 0] = 1 - objects.boxes[:, 0]
        size = (self.side, self.side)
        pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        return self.light(pixels), objects


def to_measure_on(scenes: Scenes, side: int) -> list[tuple[Tensor, Objects]]:
    """One window of every scene, always the same."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return [around_one(*scenes[index], side) for index in range(len(scenes))]


def around_one(pixels: Tensor, objects: Objects, side: int) -> tuple[Tensor, Objects]:
    """A random window of side × side pixels of (C, H, W), with all of one object in it if it is no larger; anywhere
    where there is none."""
    height, width = pixels.shape[1:]
    corner = [torch.rand(()).item() * (extent - side) for extent in (width, height)]
    if len(objects):
        centre_size = objects.boxes[int(torch.randint(len(objects), ()))].tolist()
        for axis, extent in enumerate((width, height)):
            middle, half = centre_size[axis] * extent, min(centre_size[2 + axis] * extent, side) / 2
            low, high = max(middle + half - side, 0), min(middle - half, extent - side)
            corner[axis] = low + torch.rand(()).item() * max(high - low, 0)
    left, top = (max(0, min(round(at), extent - side)) for at, extent in zip(corner, (width, height)))
    boxes = (objects.boxes * torch.tensor([width, height] * 2) - torch.tensor([left, top, 0, 0])) / side
    return pixels[:, top : top + side, left : left + side], clipped(Objects(boxes, objects.labels))
