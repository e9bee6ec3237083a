"""Distillation of how tokens relate to each other: a student of any width is compared without a projection."""

import torch
from torch import Tensor

from vitkd_fast.ops._precise import (
    Reduction,
    check_choice,
    check_dtypes_and_devices,
    precise_dtype,
    reduced,
    without_autocast,
)

NO_DIRECTION = 1e-6  # shorter tokens are zeros that were rounded; a ViT's tokens have a length of 1 and more


def unit_tokens(tokens: Tensor) -> Tensor:
    """Tokens (B, N, C) scaled to length 1. One without a direction becomes 0, and its gradient is 0, not 1 / 0."""
    squared = tokens.square().sum(-1, keepdim=True)
    directed = squared > NO_DIRECTION**2
    return tokens * torch.where(directed, squared, 1).rsqrt() * directed


def token_relation_kd_formula(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_ij (ŝ_i·ŝ_j − t̂_i·t̂_j)² of each image, (B,), where ŝ and t̂ are the tokens scaled to length 1."""
    student, teacher = unit_tokens(student), unit_tokens(teacher)
    # The second product is subtracted in place of being made: two N×N per image, the difference and its square.
    difference = torch.baddbmm(student @ student.mT, teacher, teacher.mT, alpha=-1)  # (B, N, N)
    return difference.square().mean((1, 2))


def token_relation_kd(student_tokens: Tensor, teacher_tokens: Tensor, *, reduction: Reduction = "batchmean") -> Tensor:
    """Mean squared difference between the cosine similarities of all pairs of tokens, in student and teacher.

    Args:
        student_tokens, teacher_tokens: (B, N, C), any widths, usually the patch tokens after a block, without class
            tokens. float32, bfloat16, float16 or float64, any strides. Each receives a gradient if it requires one.
        reduction: "batchmean" (the mean over images) or "none" (each image's loss).

    Returns:
        A scalar or (B,) in [0, 4], computed in float32 (float64 where an input is) whatever the inputs' dtype and
        autocast. A token shorter than 1e-6 has no direction: its similarities are 0, and so is its gradient.

    Raises:
        ValueError: tokens that are not (B, N, C), different B or N, an unknown reduction.
        TypeError, RuntimeError: a dtype that is none of the above, tensors on different devices.

    Source: similarity-preserving distillation (Tung and Mori 2019), between the tokens of an image instead of between
    the images of a batch, with cosines instead of normalised rows.
    """
    check_choice("reduction", reduction, Reduction)
    check_dtypes_and_devices(student_tokens=student_tokens, teacher_tokens=teacher_tokens)
    check_tokens("student_tokens", student_tokens)
    check_tokens("teacher_tokens", teacher_tokens)
    if student_tokens.shape[:2] != teacher_tokens.shape[:2]:
        raise ValueError(
            f"student_tokens and teacher_tokens must have the same images and tokens; got (batch, tokens) "
            f"{tuple(student_tokens.shape[:2])} and {tuple(teacher_tokens.shape[:2])}. Leave out class, distillation "
            f"and register tokens, tokens[:, prefix_tokens:]; if the patch grids differ, resize one to the other's."
        )
    dtype = precise_dtype(student_tokens, teacher_tokens)
    with without_autocast(student_tokens.device):
        losses = token_relation_kd_formula(student_tokens.to(dtype), teacher_tokens.to(dtype))
    return reduced(losses, reduction)


def check_tokens(name: str, tokens: Tensor) -> None:
    if tokens.dim() != 3 or 0 in tokens.shape[1:]:
        raise ValueError(
            f"{name} must be (batch, tokens, channels) with at least one token and channel; got shape "
            f"{tuple(tokens.shape)}."
        )
