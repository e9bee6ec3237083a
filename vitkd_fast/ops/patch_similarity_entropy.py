"""How varied the patches of an image look to a ViT: the entropy of their similarities, a prior for generated images."""

import math

import torch
from torch import Tensor

from vitkd_fast.ops._library import LIBRARY, Below, is_plain, number, transformed
from vitkd_fast.ops._precise import (
    Reduction,
    check_choice,
    check_dtypes_and_devices,
    precise_dtype,
    reduced,
    without_autocast,
)
from vitkd_fast.ops.token_relation_kd import check_tokens, unit_tokens

TAIL = 5  # bandwidths that the grid reaches beyond ±1: what is cut off from a kernel at ±1 is 3e-7 of it
CHUNK = 2**20  # kernels in memory at a time: 4 MB in float32, whatever B, N and the bandwidth
FLOOR = 1e-12  # densities below it count as 0, where the entropy's slope is infinite


def density_formula(similarities: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
    """The kernel density estimate of each image's (B, M) similarities at the G points of `grid`, (B, G).

    f(u) = 1/M Σ_m K((u − s_m) / h) / h with the standard normal density K.
    """
    return _kernels(similarities, grid, bandwidth)[1].mean(1)


def entropy_formula(density: Tensor, spacing: float) -> Tensor:
    """−∫ f log f of each (B, G) density by the trapezoidal rule, whose end points are 0 here; (B,), in nats."""
    return -(density * density.clamp_min(FLOOR).log()).sum(1) * spacing


def similarity_grid(bandwidth: float, like: Tensor) -> Tensor:
    """Points one bandwidth apart over all that a cosine can be and the kernels' tails, (G,).

    Gaussian kernels are smooth enough for that: the sum over the grid is off by e^(−2π²) = 3e-9 of the integral of f,
    and the entropy of a few separate peaks, the worst case, by 2e-4 nats.
    """
    # What torch.compile has as a symbol is a number in a range.
    return _points(range(math.ceil(1 / bandwidth) + TAIL)[-1] + 1, bandwidth, like)


def _points(half: int, bandwidth: float, like: Tensor) -> Tensor:
    return torch.arange(-half, half + 1, dtype=like.dtype, device=like.device) * bandwidth


def _kernels(similarities: Tensor, grid: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Distances in bandwidths and kernels, (B, M, G) each."""
    distance = (grid - similarities.unsqueeze(2)) / bandwidth
    return distance, (distance.square() / -2).exp() / (bandwidth * math.sqrt(2 * math.pi))


class _Density(torch.autograd.Function):
    """`density_formula` without its (B, M, G): by the CPU's kernel, or a chunk of the similarities at a time, again in
    backward, which is differentiable in turn."""

    @staticmethod
    def forward(ctx, similarities, grid, bandwidth):
        ctx.save_for_backward(similarities, grid)
        ctx.bandwidth = bandwidth
        if not _has_kernel(similarities):
            return _density(similarities, grid, bandwidth)
        with Below():
            return torch.ops.vitkd.similarity_density(similarities.contiguous(), len(grid), bandwidth)

    @staticmethod
    def backward(ctx, grad):
        similarities, grid = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain(grad) or not _has_kernel(similarities):
            with without_autocast(similarities.device):
                return _density_backward(grad, similarities, grid, ctx.bandwidth), None, None
        with Below():
            grad = torch.ops.vitkd.similarity_density_backward(
                grad.contiguous(), similarities.contiguous(), ctx.bandwidth
            )
        return grad, None, None


def _has_kernel(similarities: Tensor) -> bool:
    return similarities.is_cpu and is_plain(similarities)


def _density(similarities: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
    density = similarities.new_zeros(len(similarities), len(grid))
    for chunk in _chunks(similarities, grid):
        density += _kernels(chunk, grid, bandwidth)[1].sum(1)
    return density / similarities.shape[1]


def _density_backward(grad: Tensor, similarities: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
    grad = (grad / (similarities.shape[1] * bandwidth)).unsqueeze(2)  # (B, G, 1)
    grads = []
    for chunk in _chunks(similarities, grid):
        distance, kernels = _kernels(chunk, grid, bandwidth)
        grads.append((distance * kernels @ grad).squeeze(2))
    return torch.cat(grads, 1)


# No ops of the public kind: the CPU alone has kernels for them, and `_Density` alone calls them.
LIBRARY.define("similarity_density(Tensor similarities, int points, float bandwidth) -> Tensor")
LIBRARY.define("similarity_density_backward(Tensor grad, Tensor similarities, float bandwidth) -> Tensor")


def _by_points(similarities: Tensor, points: int, bandwidth: float) -> Tensor:
    return _density(similarities, _points(points // 2, bandwidth, similarities), bandwidth)


def _by_points_backward(grad: Tensor, similarities: Tensor, bandwidth: float) -> Tensor:
    return _density_backward(grad, similarities, _points(grad.shape[1] // 2, bandwidth, similarities), bandwidth)


LIBRARY.impl("similarity_density", _by_points, "CompositeExplicitAutograd")
LIBRARY.impl("similarity_density_backward", _by_points_backward, "CompositeExplicitAutograd")


def _chunks(similarities: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
    return similarities.split(max(1, CHUNK // max(1, len(similarities) * len(grid))), dim=1)


def patch_similarity_entropy(tokens: Tensor, *, bandwidth: float = 0.05, reduction: Reduction = "batchmean") -> Tensor:
    """Entropy of the distribution of cosine similarities between the patch tokens of an image.

    High for real images, whose foreground and background differ, low for noise: a generator maximises its sum over
    the teacher's blocks (PSAQ-ViT minimises L_PSE = −Σ_l H_l).

    Args:
        tokens: (B, N, C), the patch tokens after a block, without class tokens. PSAQ-ViT takes the output of the
            attention, averaged over the heads. float32, bfloat16, float16 or float64, any strides.
        bandwidth: h of the Gaussian kernels, in units of cosine similarity; 0.001 to 1.
        reduction: "batchmean" (the mean over images) or "none" (each image's entropy).

    Returns:
        The differential entropy in nats, a scalar or (B,), computed in float32 (float64 for float64 tokens) whatever
        the tokens' dtype and autocast. log(h √(2πe)) when all tokens point the same way, which is −1.58 for the default
        bandwidth; at most log(2 + 12h).

    Raises:
        ValueError: tokens that are not (B, N, C), a bandwidth out of range, an unknown reduction.
        TypeError: a dtype that is none of the above, a bandwidth that requires a gradient.

    Source: Li et al. 2022 (PSAQ-ViT, arXiv 2203.02250). All N² pairs count, as there. Ours: a bandwidth of 0.05 and a
    fixed grid over [−1, 1] as fine as the bandwidth, where the published code has 0.01 and ten points between the
    batch's extremes, most kernels falling between them. Nothing is read on the host; the similarities are one matrix
    product, and no more than a chunk of kernels is in memory.
    """
    check_choice("reduction", reduction, Reduction)
    check_dtypes_and_devices(tokens=tokens)
    check_tokens("tokens", tokens)
    if isinstance(bandwidth, Tensor):
        bandwidth = number("bandwidth", bandwidth)
    if not 0.001 <= bandwidth <= 1:
        raise ValueError(f"bandwidth is {bandwidth}; accepted: 0.001 to 1, in units of cosine similarity.")
    with without_autocast(tokens.device):
        units = unit_tokens(tokens.to(precise_dtype(tokens)))
        grid = similarity_grid(bandwidth, units)
        density_of = density_formula if transformed() else _Density.apply
        density = density_of((units @ units.mT).flatten(1), grid, bandwidth)
        entropies = entropy_formula(density, bandwidth)
    return reduced(entropies, reduction)
