"""Muon: steps along the momentum of a matrix with all its singular values made alike (Jordan et al. 2024)."""

from collections.abc import Collection, Iterable
from functools import cache

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ROOT_MEAN_SQUARE = 1.0  # of a step, in learning rates; of Adam's it is 0.2 to 0.4 (Liu et al. 2025, arXiv 2502.16982)
QUINTIC = (3.4445, -4.7750, 2.0315)  # x ↦ a x + b x³ + c x⁵ five times over brings (0, 1] near 1 (Jordan et al. 2024)
LEAST_SIDE = 64  # of matrices that a CPU multiplies in bfloat16: 3 to 4 times as fast as float32 on Zen 5, below slower


class Muon:
    """Momentum and steps of matrices, those of one shape together.

    torch.optim.Muon asks the host for each matrix in turn and cannot be told by the device to skip a step.
    """

    def __init__(self, weights: Iterable[Tensor], weight_decay: float = 0.0) -> None:
        self.weight_decay = weight_decay
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for weight in weights:
            by_shape.setdefault(weight.shape, []).append(weight)
        self.stacks = list(by_shape.values())
        self.momenta = [stack[0].detach().new_zeros(len(stack), *stack[0].shape) for stack in self.stacks]

    @torch.no_grad()
    def step(self, lr: float, bad: Tensor, scale: Tensor | None = None) -> None:
        """One step with the gradients of the weights over `scale`; none at all where `bad` is not 0. Both are 0-dim."""
        skipped = bad > 0
        rate = torch.where(skipped, 0.0, lr)
        for stack, momentum in zip(self.stacks, self.momenta, strict=True):
            gradient = torch.stack([torch.zeros_like(w) if w.grad is None else w.grad for w in stack])
            gradient = torch.where(skipped, 0.0, gradient if scale is None else gradient / scale)
            momentum.copy_(torch.where(skipped, momentum, momentum.lerp(gradient, 1 - MOMENTUM)))
            direction = orthogonalised(_matrices(gradient.lerp(momentum, MOMENTUM)))
            length = ROOT_MEAN_SQUARE * max(direction.shape[-2:]) ** 0.5
            if decaying := [weight for weight in stack if weight.grad is not None]:
                torch._foreach_mul_(decaying, 1 - rate * self.weight_decay)
            torch._foreach_sub_(stack, (direction * (rate * length)).reshape(momentum.shape).unbind())


def _matrices(stack: Tensor) -> Tensor:
    """(count, outputs, inputs, …) as (count, rows, columns) or, of q, k and v in one, (count, 3, rows, columns)."""
    stack = stack.flatten(2)
    _, rows, columns = stack.shape
    return stack.unflatten(1, (3, columns)) if rows == 3 * columns else stack


def orthogonalised(matrices: Tensor) -> Tensor:
    """(…, rows, columns) with the singular values of each brought to about 1, between 0.6 and 1.3; 0 stays 0."""
    a, b, c = QUINTIC
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    shape, x = x.shape, x.reshape(-1, *x.shape[-2:])
    if x.is_cuda or (x.is_cpu and x.shape[1] >= LEAST_SIDE and has_bfloat16_products()):
        x = x.bfloat16()  # its errors are far below what the polynomial leaves
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype).view(shape)
    return x if wide else x.mT


@cache
def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    try:
        from vitkd_fast import _facts
    except ImportError:
        return False
    cpu = _facts.cpu()
    return torch.backends.mkldnn.is_available() and (cpu["avx512_bf16"] or cpu["amx_bf16"])


def hidden_matrices(model: nn.Module, channels: int, outputs: Collection[int]) -> list[Tensor]:
    """The weights that Muon is for: of Linear and convolutions, but for convolutions of images, which have so many
    `channels`, and for what answers, which is as wide as one of the `outputs`.

    Rows are outputs; a convolution's columns are all inputs of an output. Grouped convolutions are left out: the rows
    of their matrices have different inputs.
    """
    found: dict[Tensor, None] = {}  # in order, tied ones once
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            hidden = layer.out_features not in outputs
        elif isinstance(layer, nn.modules.conv._ConvNd):
            hidden = layer.groups == 1 and layer.in_channels != channels and layer.out_channels not in outputs
            hidden = hidden and not layer.transposed
        else:
            continue
        learns = layer.weight.requires_grad and layer.weight.is_leaf  # parametrized ones are computed from what learns
        if hidden and learns and min(layer.weight.flatten(1).shape) > 1:
            found[layer.weight] = None
    return list(found)
