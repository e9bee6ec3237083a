"""Runs the CUDA kernels on the CPU: builds them with the emulator of simt.h and talks to the executable over a pipe."""

import concurrent.futures
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "kernels"
FLAGS = (
    "-std=c++17 -O1 -g1 -Wall -Wextra -Wno-unknown-pragmas -fno-strict-aliasing -U_FORTIFY_SOURCE "
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
).split()
SCHEDULES = ("ascending", "descending", "random")  # the order is simt.h's enum
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # the order is kernels.h's enum


def build(folder: Path, kernels: Path = KERNELS) -> Path:
    """Compile the .cu files of `kernels` as C++ for the emulator; the executable's path."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    sources = [*sorted((kernels / "cuda").glob("*.cu")), HERE / "main.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        include = ["-include", "simt.h", "-I", HERE]
        _run(compiler, *FLAGS, *include, "-x", "c++", "-c", source, "-o", target)

    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        list(pool.map(compile_one, sources, objects))
    _run(compiler, *FLAGS, *objects, "-o", folder / "emulator")
    return folder / "emulator"


def _run(*command: object) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")


class Emulator:
    """The three kernels as functions of tensors; strides, storage offsets and byte alignment reach them unchanged."""

    def __init__(self, executable: Path):
        self._executable = executable
        self._process: subprocess.Popen | None = None
        self.schedule = SCHEDULES[0]
        self.max_shared = 227 * 1024  # bytes that a block may have
        self.warpgroups = False  # whether four warps can multiply at once, as on sm_90
        self.slots = True  # whether a launch can count its blocks

    def attention(self, qkv: Tensor, scale: float, out_offset: int = 0) -> Tensor:
        batch, tokens, _, heads, head_dim = qkv.shape
        words = [_dtype(qkv), batch, tokens, heads, head_dim, scale, *qkv.stride()[:4]]
        (out,) = self._ask("attention", words, [qkv], [((batch, tokens, heads * head_dim), qkv.dtype)], out_offset)
        return out

    def attention_backward(self, grad_out: Tensor, qkv: Tensor, scale: float, out_offset: int = 0) -> Tensor:
        batch, tokens, _, heads, head_dim = qkv.shape
        grad_out = grad_out.unflatten(2, (heads, head_dim))
        words = [_dtype(qkv), batch, tokens, heads, head_dim, scale, *qkv.stride()[:4], *grad_out.stride()[:3]]
        (grad,) = self._ask("attention_backward", words, [qkv, grad_out], [(qkv.shape, qkv.dtype)], out_offset)
        return grad

    def kd_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        kind: int,
        temperature: float,
        student_grad: bool,
        teacher_grad: bool,
        weight: float = 1.0,
        mean: bool = False,
        out_offset: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the op; with `mean`, the rows' losses too come from the kernel, and the mean stands before them."""
        rows, classes = student.shape
        words = [_dtype(student), kind, rows, classes, temperature, weight, student.stride(0), teacher.stride(0)]
        grads = [((rows, classes) if wanted else (0,), student.dtype) for wanted in (student_grad, teacher_grad)]
        losses = [((rows,), torch.float32), (() if mean else (0,), torch.float32)]
        loss, average, *grads = self._ask("kd_loss", words, [student, teacher], [*losses, *grads], out_offset)
        return (average, loss, *grads) if mean else (loss, *grads)

    def scale(self, first: Tensor, second: Tensor, factor: Tensor, share: float) -> tuple[Tensor, Tensor]:
        words = [_dtype(first), share, first.numel(), second.numel()]
        outputs = [(each.shape, each.dtype) for each in (first, second)]
        return self._ask("scale", words, [first, second, factor], outputs, 0)

    def _ask(self, operation: str, words: list, inputs: list[Tensor], outputs: list[tuple], out_offset: int) -> tuple:
        """Outputs start `out_offset` elements into their buffers, to take 16-byte alignment away."""
        if self._process is None:
            self._process = subprocess.Popen(
                [self._executable], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        # What lies before the tensor in its storage goes along: it decides the alignment.
        storages = [torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy() for tensor in inputs]
        buffers = []
        for tensor, storage in zip(inputs, storages, strict=True):
            buffers += [len(storage), tensor.storage_offset() * tensor.element_size()]
        shapes = [(torch.Size(shape), dtype) for shape, dtype in outputs]
        for shape, dtype in shapes:
            offset = out_offset * dtype.itemsize if shape.numel() else 0
            buffers += [shape.numel() * dtype.itemsize + offset, offset]
        request = [operation, SCHEDULES.index(self.schedule), self.max_shared, int(self.warpgroups)]
        request += [int(self.slots), *words, *buffers]
        try:
            self._process.stdin.write(" ".join(map(repr, request)).replace("'", "").encode() + b"\n")
            for storage in storages:
                self._process.stdin.write(storage.data)
            self._process.stdin.flush()
            answer = self._process.stdout.readline().decode().strip()
            if not answer:
                raise BrokenPipeError
        except BrokenPipeError:
            report = self._process.stderr.read().decode()
            self._process = None
            raise RuntimeError(f"the emulator stopped:\n{report}") from None
        if answer != "ok":
            raise ValueError(answer)
        return tuple(self._receive(shape, dtype) for shape, dtype in shapes)

    def _receive(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        content = self._process.stdout.read(shape.numel() * dtype.itemsize)
        return (
            torch.frombuffer(bytearray(content), dtype=dtype).view(shape)
            if content
            else torch.empty(shape, dtype=dtype)
        )


def _dtype(tensor: Tensor) -> int:
    return DTYPES.index(tensor.dtype)
