"""What every launch here checks and prepares."""

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise TypeError unless the tensor has this dtype, or any dtype the kernels take."""
    accepted = DTYPES if dtype is None else (dtype,)
    if tensor.dtype not in accepted:
        names = ", ".join(str(each).removeprefix("torch.") for each in accepted)
        raise TypeError(
            f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; the Triton kernel takes {names}."
        )


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is not contiguous: the kernels load it in 16-byte pieces."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def capability(tensor: Tensor) -> tuple[int, int]:
    """The compute capability of the tensor's device; Triton's interpreter, on the CPU, has the limits of none."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Of all dimensions but the last, in elements; that of a dimension of one means nothing, and is 0 here."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]))


def in_units(strides: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Strides in the largest unit of 1, 2, 4 or 8 elements that divides them all, and that unit."""
    unit = math.gcd(8, *strides)
    return tuple(stride // unit for stride in strides), unit
