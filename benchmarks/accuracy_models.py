"""Teachers and students of the accuracy benchmark: their sizes for each data set, and training with real images."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accuracy_data import Labelled
from torch import Tensor, nn

from vitkd_fast import accelerate
from vitkd_fast.augment import warped
from vitkd_fast.checkpoint import load_into, read_state_dict
from vitkd_fast.generator import ImageSpec, supplied
from vitkd_fast.guard import GuardedOptimizer
from vitkd_fast.synthesis import is_due


@dataclass(frozen=True)
class Augmentation:
    """What happens to real images in training. All of it leaves the label right; each image has its own draw."""

    rotate: float = 0.0
    """Up to this many radians."""
    scale: float = 0.0
    """Up to this share larger or smaller."""
    shift: float = 0.0
    """Up to this share of the side, in both directions."""
    flip: bool = False
    colour: float = 0.0
    """Brightness, contrast and saturation up to this share up or down."""
    erase: float = 0.0
    """A black square somewhere, up to this share of the side."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1]; what comes in from outside the image is black."""
        if self.rotate or self.scale or self.shift or self.flip:
            pixels = self._moved(pixels)
        if self.colour:
            pixels = self._coloured(pixels)
        return self._erased(pixels) if self.erase else pixels

    def _moved(self, pixels: Tensor) -> Tensor:
        # Offsets are in units of half a side.
        largest = pixels.new_tensor([self.rotate, self.scale, 2 * self.shift, 2 * self.shift])
        angle, scale, right, down = (_around_zero(4, len(pixels), pixels) * largest.unsqueeze(1)).unbind()
        moved = warped(pixels, angle, 1 + scale, right, down, padding="zeros")
        if not self.flip:
            return moved
        kept = torch.randint(2, angle.shape, device=pixels.device).bool()
        return torch.where(kept[:, None, None, None], moved, moved.flip(-1))

    def _coloured(self, pixels: Tensor) -> Tensor:
        brightness, contrast, saturation = (1 + self.colour * _around_zero(3, len(pixels), pixels))[
            ..., None, None, None
        ]
        pixels = pixels * brightness
        grey = pixels.mean(1, keepdim=True)
        pixels = grey + (pixels - grey) * saturation
        mean = grey.mean((2, 3), keepdim=True)
        return (mean + (pixels - mean) * contrast).clamp(0, 1)

    def _erased(self, pixels: Tensor) -> Tensor:
        batch, _, height, width = pixels.shape
        half, row, column = torch.rand(3, batch, 1, device=pixels.device)
        half = half * self.erase / 2
        rows = (torch.linspace(0, 1, height, device=pixels.device) - row).abs() < half  # (B, H)
        columns = (torch.linspace(0, 1, width, device=pixels.device) - column).abs() < half  # (B, W)
        return pixels.masked_fill((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0.0)


def _around_zero(rows: int, count: int, like: Tensor) -> Tensor:
    return 2 * torch.rand(rows, count, device=like.device) - 1


@dataclass(frozen=True)
class Recipe:
    """Supervised training: AdamW, one cycle of the learning rate."""

    steps: int
    batch_size: int
    lr: float
    augmentation: Augmentation
    weight_decay: float = 0.05
    cutmix: float = 0.0
    """Share of the batches in which a rectangle of each image comes from another one (Yun et al. 2019)."""


@dataclass(frozen=True)
class Task:
    """What is measured on one data set. Sizes are arguments of timm's VisionTransformer."""

    side: int
    channels: int
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    recipe: Recipe
    """Of the teacher; its augmentation is that of the students on real images, too."""
    steps: int
    batch_size: int
    width: int
    """Of the generators."""


TASKS = {
    # Four patches of 4×4; 252 thousand weights and 40 thousand. Depth and many heads serve a small student better than
    # width: of the same size and trained alike, 2 blocks of 40 with 4 heads ended 1.4 times as far from the teacher's
    # logits, 4 blocks of 28 with 2 heads 1.4 times too (one run each).
    "digits": Task(
        side=8,
        channels=1,
        teacher={"patch_size": 4, "embed_dim": 64, "depth": 5, "num_heads": 4},
        student={"patch_size": 4, "embed_dim": 28, "depth": 4, "num_heads": 4},
        recipe=Recipe(2000, 64, 3e-3, Augmentation(rotate=0.15, scale=0.1, shift=0.075)),
        steps=5000,
        batch_size=128,
        width=64,
    ),
    # 16 patches of 7×7; 678 thousand weights and 102 thousand.
    "mnist": Task(
        side=28,
        channels=1,
        teacher={"patch_size": 7, "embed_dim": 96, "depth": 6, "num_heads": 3},
        student={"patch_size": 7, "embed_dim": 40, "depth": 5, "num_heads": 5},
        recipe=Recipe(9000, 128, 2e-3, Augmentation(rotate=0.25, scale=0.12, shift=0.12)),
        steps=10_000,
        batch_size=128,
        width=64,
    ),
    # CIFAR-10 at 16×16: photographs for a CPU. 16 patches of 4×4; 677 thousand weights and 102 thousand.
    "cifar16": Task(
        side=16,
        channels=3,
        teacher={"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3},
        student={"patch_size": 4, "embed_dim": 40, "depth": 5, "num_heads": 5},
        recipe=Recipe(8000, 128, 2e-3, Augmentation(rotate=0.1, scale=0.15, shift=0.1, flip=True, colour=0.2)),
        steps=10_000,
        batch_size=128,
        width=64,
    ),
    # 64 patches of 4×4; 12.5 million weights and 2.7 million. 200 epochs for the teacher: a matter for a GPU.
    "cifar10": Task(
        side=32,
        channels=3,
        teacher={"patch_size": 4, "embed_dim": 384, "depth": 7, "num_heads": 6, "drop_path_rate": 0.1},
        student={"patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3},
        recipe=Recipe(
            20_000,
            512,
            1e-3,
            Augmentation(rotate=0.2, scale=0.2, shift=0.125, flip=True, colour=0.4, erase=0.5),
            cutmix=0.5,
        ),
        steps=20_000,
        batch_size=256,
        width=128,
    ),
}


def vit(
    side: int,
    channels: int,
    sizes: Mapping[str, Any],
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
    classes: int = 10,
) -> nn.Module:
    """An untrained timm ViT that knows its images, as timm's pretrained ones do; its attention is ours.

    Raises:
        TypeError: one of the sizes is not an argument of timm's VisionTransformer.
    """
    from timm.models.vision_transformer import VisionTransformer

    model: Any = VisionTransformer(
        img_size=side, in_chans=channels, num_classes=classes, **{"weight_init": "moco", **sizes}
    )
    model.pretrained_cfg = {"input_size": (channels, side, side), "mean": mean, "std": std}
    accelerate(model)
    return model


class ResNet(nn.Module):
    """The ResNet for CIFAR of He et al. 2016, section 4.2: 6n + 2 layers of 16, 32 and 64 channels.

    Shortcuts between widths are subsampled and padded with zeros (their option A). Module names are those of the
    checkpoints in circulation: conv1, bn1, layer1 … layer3, linear.
    """

    def __init__(self, depth: int, channels: int = 3, classes: int = 10, side: int = 32) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a ResNet for CIFAR has 6n + 2 layers (20, 32, 44, 56, 110); depth is {depth}.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _residuals(blocks, 16, 16, 1)
        self.layer2 = _residuals(blocks, 16, 32, 2)
        self.layer3 = _residuals(blocks, 32, 64, 2)
        self.linear = nn.Linear(64, classes)
        self.pretrained_cfg = {"input_size": (channels, side, side)}

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _residuals(blocks: int, before: int, after: int, stride: int) -> nn.Sequential:
    rest = (_Residual(after, after, 1) for _ in range(blocks - 1))
    return nn.Sequential(_Residual(before, after, stride), *rest)


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.padding = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


def given_teacher(description: Path, checkpoint: Path | None = None) -> nn.Module:
    """A teacher that somebody else trained.

    Args:
        description: JSON with the arguments of timm's VisionTransformer (`norm_eps` for its LayerNorms) and the
            normalisation, `mean` and `std`; or, of a CNN, with "architecture": "resnet" and its `depth`.
        checkpoint: its weights; by default the file beside it of the same name, .safetensors, .pth, .pt or .th.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or the weights are not those of such a network.
    """
    if not description.is_file():
        raise FileNotFoundError(f"--teacher-json {description} is not a file.")
    arguments = json.loads(description.read_text(encoding="utf-8"))
    if "mean" not in arguments or "std" not in arguments:
        raise ValueError(
            f"--teacher-json {description} needs mean and std: what its teacher's images are normalised by."
        )
    mean, std = (tuple(arguments.pop(name)) for name in ("mean", "std"))
    beside = (description.with_suffix(suffix) for suffix in (".safetensors", ".pth", ".pt", ".th"))
    checkpoint = checkpoint or next((file for file in beside if file.is_file()), None)
    if checkpoint is None:
        raise FileNotFoundError(f"there are no weights beside {description}; pass --teacher-checkpoint.")
    if arguments.pop("architecture", "vit") == "resnet":
        model: Any = ResNet(**arguments)
        model.pretrained_cfg |= {"mean": mean, "std": std}
    else:
        side, channels, classes = (arguments.pop(name) for name in ("img_size", "in_chans", "num_classes"))
        if "norm_eps" in arguments:
            arguments["norm_layer"] = partial(nn.LayerNorm, eps=arguments.pop("norm_eps"))
        model = vit(side, channels, arguments, mean, std, classes)
    state = read_state_dict(checkpoint)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):  # a mere count, which torch before 0.4.1 did not save
            state.setdefault(name, tensor)
    load_into(model, state, description.stem, checkpoint)
    return model.eval()


def parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def train_on_labels(
    model: nn.Module,
    data: Labelled,
    spec: ImageSpec,
    recipe: Recipe,
    *,
    seed: int,
    precision: str = "float32",
    matrices: Iterable[Tensor] = (),
    say: Callable[[str], None] = lambda _: None,
) -> float:
    """Train `model` in place on real images and labels, and return the seconds that it took.

    `matrices` are its weights that Muon optimises, AdamW the rest.
    """
    device = data.labels.device
    optimizer = GuardedOptimizer(
        "model", model, recipe.lr, ["loss"], weight_decay=recipe.weight_decay, clip=1.0, matrices=matrices
    )
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        start = time.perf_counter()
        for step in range(recipe.steps):
            batch = torch.randint(len(data), (recipe.batch_size,), device=device)
            pixels, labels = recipe.augmentation(data.pixels(batch)), data.labels[batch]
            others, share = labels, 1.0
            if is_due(step, recipe.cutmix):
                pixels, others, share = cut_and_mixed(pixels, labels)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                logits = model(spec.normalised(pixels)).float()
                loss = share * F.cross_entropy(logits, labels)
                if share < 1:
                    loss = loss + (1 - share) * F.cross_entropy(logits, others)
            optimizer.step(loss, {"loss": loss}, step / recipe.steps)
            if (step + 1) % 1000 == 0:
                means, bad, _ = optimizer.ledger.read()
                skipped = f", {max(bad.values())} steps skipped: not finite" if bad else ""
                seconds = time.perf_counter() - start
                say(f"step {step + 1:,} of {recipe.steps:,}, loss {means.get('loss', 0):.4f}, {seconds:.0f} s{skipped}")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    model.eval()
    return seconds


def cut_and_mixed(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """Every image with one rectangle from its neighbour in the batch, the neighbour's labels, the share of its own."""
    _, _, height, width = pixels.shape
    side, row, column = torch.rand(3).tolist()  # from the host's random state: one rectangle for the whole batch
    rows, columns = (round(size * side**0.5) for size in (height, width))
    top, left = round(row * (height - rows)), round(column * (width - columns))
    mixed = pixels.clone()
    mixed[:, :, top : top + rows, left : left + columns] = pixels.roll(1, 0)[
        :, :, top : top + rows, left : left + columns
    ]
    return mixed, labels.roll(1, 0), 1 - rows * columns / (height * width)


@contextlib.contextmanager
def real_images(data: Labelled, augmentation: Augmentation) -> Iterator[str]:
    """Inside, the generator of the yielded name gives real images, augmented."""

    def make(count: int) -> Tensor:
        batch = torch.randint(len(data), (count,), device=data.labels.device)
        return augmentation(data.pixels(batch))

    with supplied(make) as name:
        yield name
