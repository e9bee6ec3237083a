"""Attention must follow the image: flipped, shifted or cropped, what was looked at before is looked at still."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitkd_fast.ops._library import LIBRARY, Below, is_plain, keepable, number, transformed
from vitkd_fast.ops._precise import (
    Reduction,
    check_choice,
    check_dtypes_and_devices,
    precise_dtype,
    reduced,
    without_autocast,
)
from vitkd_fast.ops.attention_kd import check_attention

Queries = Literal["patches", "prefix"]
LEAST = 1e-20  # of a key's share: a weight that one of 10^6 of the sum needs is still a normal number
Axis = Sequence[int | None]  # for each place after a transform, the place before it; None: it came from outside


class Transform(ABC):
    """A change of an image that moves whole patches, rows and columns each on their own.

    One rule, `axes`, is read at two resolutions: of pixels it moves the image, of patches (of size 1) the attention
    map. A transform of your own is a frozen dataclass with that method.
    """

    @abstractmethod
    def axes(self, size: tuple[int, int], patch: tuple[int, int]) -> tuple[Axis, Axis]:
        """Where rows and columns come from, on an image of this (height, width) whose patches have this size."""

    def image(self, images: Tensor, patch: int | tuple[int, int]) -> Tensor:
        """Images (B, C, height, width) transformed, differentiable; what comes in from outside is 0.

        Raises:
            ValueError: height or width is not a multiple of the patch's.
        """
        patch = (patch, patch) if isinstance(patch, int) else patch
        size = images.shape[-2], images.shape[-1]
        if size[0] % patch[0] or size[1] % patch[1]:
            raise ValueError(
                f"images of {size[0]}×{size[1]} pixels are not made of whole {patch[0]}×{patch[1]} patches."
            )
        for dim, axis in zip((-2, -1), self.axes(size, patch), strict=True):
            source = torch.tensor([place or 0 for place in axis], device=images.device)
            images = images.index_select(dim, source)
            if None in axis:
                inside = torch.tensor([place is not None for place in axis], device=images.device)
                images = images * (inside.unsqueeze(1) if dim == -2 else inside)
        return images

    def patches(self, grid: tuple[int, int]) -> tuple[list[int], list[int], int]:
        """Patches that stay in the image: their numbers before and after, row by row; and how many there are after."""
        (rows, new_rows), (columns, new_columns), size = self.kept(grid)
        before = [row * grid[1] + column for row in rows for column in columns]
        after = [row * size[1] + column for row in new_rows for column in new_columns]
        return before, after, size[0] * size[1]

    def kept(self, grid: tuple[int, int]) -> tuple[tuple[list[int], ...], tuple[list[int], ...], tuple[int, int]]:
        """Rows that stay in the image, their numbers before and after; columns alike; and the grid after."""
        axes = self.axes(grid, (1, 1))
        rows, columns = (
            ([old for old in axis if old is not None], [new for new, old in enumerate(axis) if old is not None])
            for axis in axes
        )
        return rows, columns, (len(axes[0]), len(axes[1]))


@dataclass(frozen=True)
class HorizontalFlip(Transform):
    """Left becomes right. A ViT follows it only as far as its patch embedding learned to."""

    def axes(self, size, patch):
        return range(size[0]), range(size[1] - 1, -1, -1)


@dataclass(frozen=True)
class Shift(Transform):
    """Down by `rows` and right by `columns` of patches (up and left where negative).

    What leaves the image comes back at the other side if circular; else it is lost, and what comes in is 0.
    """

    rows: int
    columns: int
    circular: bool = True

    def axes(self, size, patch):
        return self._axis(size[0], self.rows * patch[0]), self._axis(size[1], self.columns * patch[1])

    def _axis(self, length: int, by: int) -> Axis:
        if self.circular:
            return [(place - by) % length for place in range(length)]
        return [place - by if 0 <= place - by < length else None for place in range(length)]


@dataclass(frozen=True)
class Crop(Transform):
    """The window of `height` × `width` patches whose first patch is (top, left); the image becomes that small.

    The model must take images of that size: of timm's ViTs those made with dynamic_img_size=True do.
    """

    top: int
    left: int
    height: int
    width: int

    def axes(self, size, patch):
        grid = size[0] // patch[0], size[1] // patch[1]
        if not (
            0 <= self.top < self.top + self.height <= grid[0] and 0 <= self.left < self.left + self.width <= grid[1]
        ):
            raise ValueError(f"{self} does not lie within {grid[0]}×{grid[1]} patches.")
        rows = range(self.top * patch[0], (self.top + self.height) * patch[0])
        return rows, range(self.left * patch[1], (self.left + self.width) * patch[1])


TRANSFORMS: dict[str, type[Transform]] = {"flip": HorizontalFlip, "shift": Shift, "crop": Crop}


def log_saliency(attention: Tensor, queries: Tensor, keys: Tensor, scale: float | None = None) -> Tensor:
    """Log of the share of attention that each key gets among `keys`, mean over heads and `queries`: (B, keys).

    Each query's attention is normalised over these keys alone, before the mean: then it does not matter to a query
    whose keys all remain what else there was to see.
    """
    if attention.dim() == 4:
        scores = attention[:, :, queries][..., keys]
        scores = scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
    else:
        scores = _scores(attention, queries, keys, attention.shape[-1] ** -0.5 if scale is None else scale)
    count = scores.shape[1] * scores.shape[2]
    return torch.log_softmax(scores, dim=-1).flatten(1, 2).logsumexp(1) - math.log(count)


def _scores(qkv: Tensor, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """(B, H, queries, keys)"""
    query = qkv[:, queries, 0].transpose(1, 2)
    return query * scale @ qkv[:, keys, 1].permute(0, 2, 3, 1)


def attention_shares_formula(qkv: Tensor, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The share of each head's attention that each key gets among `keys`, mean over `queries`: (B, H, keys)."""
    return _scores(qkv.to(precise_dtype(qkv)), queries, keys, scale).softmax(-1).mean(2)


def attention_shares_backward_formula(grad: Tensor, qkv: Tensor, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    precise = qkv.to(grad.dtype)
    weights = _scores(precise, queries, keys, scale).softmax(-1)
    grad = (grad * (scale / len(queries))).unsqueeze(2)
    grad = weights * (grad - (weights * grad).sum(-1, keepdim=True))  # of the scores
    of_queries = (grad @ precise[:, keys, 1].transpose(1, 2)).transpose(1, 2)  # (B, queries, H, D)
    of_keys = (grad.mT @ precise[:, queries, 0].transpose(1, 2)).transpose(1, 2)
    nothing = torch.zeros_like(precise[:, :, 0])
    by_token = nothing.index_add(1, queries, of_queries), nothing.index_add(1, keys, of_keys)
    return torch.stack((*by_token, *[nothing] * (qkv.shape[2] - 2)), 2).to(qkv.dtype)


# No ops of the public kind: the CPU alone has kernels for them, and `_Shares` alone calls them.
LIBRARY.define("attention_shares(Tensor qk, Tensor queries, Tensor keys, float scale) -> Tensor")
LIBRARY.define("attention_shares_backward(Tensor grad, Tensor qk, Tensor queries, Tensor keys, float scale) -> Tensor")
LIBRARY.impl("attention_shares", attention_shares_formula, "CompositeExplicitAutograd")
LIBRARY.impl("attention_shares_backward", attention_shares_backward_formula, "CompositeExplicitAutograd")


class _Shares(torch.autograd.Function):
    """`attention_shares_formula` by the CPU's kernel, which keeps no map; its backward is differentiable in turn."""

    @staticmethod
    def forward(ctx, qkv, queries, keys, scale):
        ctx.save_for_backward(qkv, queries, keys)
        ctx.scale = scale
        with Below():
            return torch.ops.vitkd.attention_shares(qkv, queries, keys, scale)

    @staticmethod
    def backward(ctx, grad):
        qkv, queries, keys = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain(grad):  # create_graph, or traced
            with without_autocast(grad.device):
                grad = attention_shares_backward_formula(grad, qkv, queries, keys, ctx.scale)
        else:
            with Below():
                grad = torch.ops.vitkd.attention_shares_backward(grad.contiguous(), qkv, queries, keys, ctx.scale)
        return grad, None, None, None


def fused_log_saliency(qkv: Tensor, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """`log_saliency` of a packed qkv by the CPU's kernel, unless a key gets next to nothing, which is less than sums of
    weights can hold."""
    saliency = _Shares.apply(keepable(qkv), queries, keys, scale).mean(1)
    return saliency.log() if _held(saliency) else log_saliency(qkv.to(saliency.dtype), queries, keys, scale)


def _held(saliency: Tensor) -> bool:
    """Read on the CPU alone."""
    return saliency.numel() == 0 or bool(saliency.detach().amin() > LEAST)


def attention_consistency_formula(log_before: Tensor, log_after: Tensor) -> Tensor:
    """KL(before ‖ after) of each image's (B, M) saliency, in nats, (B,)."""
    return (log_before.exp() * (log_before - log_after)).sum(1)


def attention_consistency(
    attention: Tensor,
    transformed_attention: Tensor,
    transform: Transform,
    *,
    grid: tuple[int, int],
    prefix_tokens: int = 0,
    queries: Queries = "patches",
    scale: float | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """How far a block's attention to an image's patches fails to follow the image under a transform.

    Args:
        attention: of the images, (B, N, 3 or 2, H, D), a block's packed qkv as `vitkd_fast.taps` records it, or
            (B, H, N, N), the map itself. float32, bfloat16, float16 or float64, any strides.
        transformed_attention: of the same block for `transform.image(images, patch)`. Both receive gradients.
        transform: `HorizontalFlip`, `Shift`, `Crop` or a `Transform` of your own.
        grid: rows and columns of patches in the untransformed image.
        prefix_tokens: class, distillation and register tokens before the patches: N = prefix_tokens + rows * columns.
        queries: whose attention: that of the "patches" that are in both images, or that of the "prefix" tokens.
        scale: what q kᵀ is multiplied by; D ** -0.5 when None. Not used for a map.
        reduction: "batchmean" (the mean over images) or "none" (each image's loss).

    Returns:
        KL(a ‖ b) in nats, a scalar or (B,): a and b are the shares of attention that the patches in both images get
        before and after, mean over heads and queries. In float32 (float64 where an input is). 0 for a network that
        sees the patches as a set, which a ViT with position embeddings does not.

    Raises:
        ValueError: another shape, a number of tokens that does not fit the grid, no patch in both images, no prefix
            tokens to ask, an unknown choice.
        TypeError, RuntimeError: a dtype that is none of the above, tensors on different devices.

    Source: the place of the loss is L_attention of Habib et al. 2024 (arXiv 2408.05952), "attention consistency" of the
    generator; its exact form is not published, so this one is ours.
    """
    check_choice("queries", queries, Queries)
    check_choice("reduction", reduction, Reduction)
    check_dtypes_and_devices(attention=attention, transformed_attention=transformed_attention)
    rows, columns, size = transform.kept(grid)
    _check("attention", attention, prefix_tokens, grid[0] * grid[1])
    _check("transformed_attention", transformed_attention, prefix_tokens, size[0] * size[1])
    if len(attention) != len(transformed_attention):
        raise ValueError(
            f"attention has {len(attention)} images and transformed_attention {len(transformed_attention)}; they must "
            f"be the same images."
        )
    if not (rows[0] and columns[0]):
        raise ValueError(f"{transform} leaves none of {grid[0]}×{grid[1]} patches in the image.")
    if queries == "prefix" and prefix_tokens == 0:
        raise ValueError('queries is "prefix", but prefix_tokens is 0; ask the "patches", or say how many there are.')
    dtype = precise_dtype(attention, transformed_attention)
    if scale is not None:
        scale = number("scale", scale)
    saliencies = []
    with without_autocast(attention.device):
        sides = (attention, transformed_attention), rows, columns, (grid[1], size[1])
        for side, down, across, width in zip(*sides, strict=True):
            first = _numbers(down, side.device) * width + prefix_tokens  # of each row
            keys = (first.unsqueeze(1) + _numbers(across, side.device)).flatten()
            asked = keys if queries == "patches" else torch.arange(prefix_tokens, device=side.device)
            if side.dim() == 5 and side.is_cpu and is_plain(side) and not transformed():
                side = side.to(dtype) if dtype is torch.float64 else side
                factor = side.shape[-1] ** -0.5 if scale is None else scale
                saliencies.append(fused_log_saliency(side, asked, keys, factor))
            else:
                saliencies.append(log_saliency(side.to(dtype), asked, keys, scale))
        losses = attention_consistency_formula(*saliencies)
    return reduced(losses, reduction)


def _numbers(places: Sequence[int], device: torch.device) -> Tensor:
    """Evenly spaced ones are counted on the device: a GPU would be waited for to take a copy."""
    step = places[1] - places[0] if len(places) > 1 else 1
    if step and all(later - place == step for place, later in itertools.pairwise(places)):
        return torch.arange(places[0], places[-1] + step, step, device=device)
    return torch.tensor(places, device=device)


def _check(name: str, attention: Tensor, prefix_tokens: int, patches: int) -> None:
    _, tokens = check_attention(name, attention)
    if prefix_tokens < 0:
        raise ValueError(f"prefix_tokens is {prefix_tokens}; it must be 0 or more.")
    if tokens != prefix_tokens + patches:
        raise ValueError(
            f"{name} has {tokens} tokens, but {prefix_tokens} prefix tokens and {patches} patches make "
            f"{prefix_tokens + patches}; check grid= and prefix_tokens=."
        )
