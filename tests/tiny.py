"""The smallest networks that the distillation tests need: they learn in seconds."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

SIZE = 8
CLASSES = 4
QUICK = {"method": "adversarial", "batch_size": 32, "width": 16, "latent": 16, "log_every": 10, "progress": False}


class TinyNet(nn.Module):
    """A classifier of (B, 1, 8, 8) images with BatchNorm and, like timm's ViTs, last tokens: one per 4×4 patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 4, stride=4)
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, CLASSES)
        self.pretrained_cfg = {"input_size": (1, SIZE, SIZE), "mean": (0.5,), "std": (0.25,)}

    def forward_features(self, images):
        return self.mix(F.gelu(self.norm(self.stem(images)))).flatten(2).mT  # (B, 4, width)

    def forward_head(self, tokens):
        return self.head(F.gelu(tokens).mean(1))

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


def tiny_teacher() -> TinyNet:
    """A fixed teacher of smooth patterns, with logits spread out and all four classes in use."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        teacher = TinyNet(16)
        ramp = torch.linspace(-1, 1, 4)
        patterns = torch.stack((torch.ones(4, 4), ramp.expand(4, 4), ramp.unsqueeze(1).expand(4, 4), ramp.outer(ramp)))
        teacher.stem.weight.data = torch.einsum("ok,kyx->oyx", torch.randn(16, 4) / 8, patterns).unsqueeze(1)
        images = smooth_images(256)
        with torch.no_grad():
            teacher(images)
            teacher.eval()
            logits = teacher(images)
            scale = 3 / logits.std(0)
            teacher.head.weight.mul_(scale.unsqueeze(1))
            teacher.head.bias.copy_((teacher.head.bias - logits.mean(0)) * scale)
    return teacher


def failing_teacher(error: BaseException, at: int) -> TinyNet:
    """The same, but its call number `at` raises the error."""
    teacher, calls = tiny_teacher(), itertools.count(1)
    head = teacher.forward_head

    def forward_head(tokens):
        if next(calls) == at:
            raise error
        return head(tokens)

    teacher.forward_head = forward_head
    return teacher


def smooth_images(count: int) -> torch.Tensor:
    """(count, 1, 8, 8) in [-2, 2], as the teacher's normalisation has them."""
    return 2 * F.interpolate(torch.randn(count, 1, 4, 4), SIZE, mode="bilinear").tanh()


def tiny_student(seed: int = 2) -> TinyNet:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return TinyNet(8)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything the module holds."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def digit_vit(embed_dim=16, depth=2):
    """A timm ViT for 8×8 digits, for tests that have benchmarks/ on their path."""
    from accuracy_models import vit

    with torch.random.fork_rng([]):
        torch.manual_seed(embed_dim)
        return vit(8, 1, {"patch_size": 4, "embed_dim": embed_dim, "depth": depth, "num_heads": 2})


def held_images(count=512):
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return smooth_images(count)


def agreement_of(student, teacher):
    with torch.no_grad():
        return (student(held_images()).argmax(1) == teacher(held_images()).argmax(1)).float().mean().item()
