"""What the losses on the inside of a ViT share: float32 or wider inside, whatever goes in; one set of reductions."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["batchmean", "none"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def precise_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype is torch.float64 for tensor in tensors) else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast would run the matrix products in bfloat16, where a similarity has two decimals."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    return losses.mean() if reduction == "batchmean" else losses


def check_dtypes_and_devices(**tensors: Tensor) -> None:
    accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; accepted: {accepted}.")
    (first, one), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != one.device:
            raise RuntimeError(f"{first} is on {one.device} and {name} on {tensor.device}; move one to the other.")


def check_choice(name: str, value: str, accepted: object) -> None:
    """`accepted` is a Literal."""
    if value not in get_args(accepted):
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(get_args(accepted))}.")
