"""What every launch here checks and prepares."""

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
