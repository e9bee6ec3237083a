"""Where a ViT's tokens lie: class and other prefix tokens first, then a grid of patches; two ViTs' side by side."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_fast.generator import ImageSpec

MOST_PREFIX = 16  # a class token, one for distillation and registers: more are no such tokens


@dataclass(frozen=True)
class Layout:
    """Of the last tokens of one image."""

    count: int
    prefix: int = 0
    """Class, distillation and register tokens."""
    has_class: bool = False
    """The first of them is the class token."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches; None: not known, so the tokens can only be taken as they are."""


def layout_of(model: Any, count: int, spec: ImageSpec) -> Layout:
    """What timm's attributes say of a model's tokens, as far as it accounts for all `count`."""
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    has_class = prefix > 0 and getattr(model, "cls_token", None) is not None
    patch_embed: Any = getattr(model, "patch_embed", None)
    if patch_embed is None:
        return _of_transformers(model, count, spec)
    if hasattr(patch_embed, "dynamic_feat_size"):
        grid = patch_embed.dynamic_feat_size((spec.height, spec.width))
    else:
        grid = getattr(patch_embed, "grid_size", None)
        grid = (grid, grid) if isinstance(grid, int) else grid
    if not grid or prefix + grid[0] * grid[1] != count:
        return Layout(count)
    return Layout(count, prefix, has_class, (int(grid[0]), int(grid[1])))


def _of_transformers(model: Any, count: int, spec: ImageSpec) -> Layout:
    """What a config of transformers says; its ViTs, too, have their patches last."""
    side = getattr(getattr(model, "config", None), "patch_size", None)
    if side is None:
        return Layout(count)
    down, across = (side, side) if isinstance(side, int) else side
    rows, columns = spec.height // down, spec.width // across
    prefix = count - rows * columns
    if not 0 <= prefix <= MOST_PREFIX:
        return Layout(count)
    embeddings = getattr(getattr(model, "base_model", None), "embeddings", None)
    has_class = prefix > 0 and getattr(embeddings, "cls_token", None) is not None
    return Layout(count, prefix, has_class, (rows, columns))


def same_places(student: Layout, teacher: Layout) -> bool:
    """Whether token n of the one is what token n of the other is; taken on trust where a grid is not known."""
    if student.grid is None or teacher.grid is None:
        return student.count == teacher.count
    return student.grid == teacher.grid and _same_prefix(student, teacher)


def _same_prefix(student: Layout, teacher: Layout) -> bool:
    return (student.prefix, student.has_class) == (teacher.prefix, teacher.has_class)


def why_not_aligned(student: Layout, teacher: Layout, *, resize: bool) -> str | None:
    """Why `align` cannot be had; None when it can."""
    if same_places(student, teacher):
        return None
    if student.grid is None or teacher.grid is None:
        return f"the student has {student.count} tokens and the teacher {teacher.count}"
    if not resize and student.grid != teacher.grid:
        return "the student has {}×{} patches and the teacher {}×{}".format(*student.grid, *teacher.grid)
    return None


def align(student: Tensor, teacher: Tensor, of_student: Layout, of_teacher: Layout) -> tuple[Tensor, Tensor]:
    """What both have of (B, N, …): prefix tokens, and the patches on the teacher's grid.

    Prefix tokens are paired where there are equally many, with a class token or without, else class token with class
    token if both have one. Patches on another grid are resized bilinearly, which (B, N, D) tokens can be and packed qkv
    cannot.
    """
    if same_places(of_student, of_teacher):
        return student, teacher
    if _same_prefix(of_student, of_teacher):
        paired = of_teacher.prefix
    else:
        paired = int(of_student.has_class and of_teacher.has_class)
    patches = student[:, of_student.prefix :]
    if of_student.grid != of_teacher.grid:
        assert of_student.grid is not None and of_teacher.grid is not None
        squares = patches.mT.unflatten(-1, of_student.grid)  # (B, D, rows, columns)
        resized = F.interpolate(squares, of_teacher.grid, mode="bilinear", antialias=True, align_corners=False)
        patches = resized.flatten(2).mT
    return (
        torch.cat((student[:, :paired], patches), 1),
        torch.cat((teacher[:, :paired], teacher[:, of_teacher.prefix :]), 1),
    )
