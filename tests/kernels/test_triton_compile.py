"""Triton's kernels compiled for real chips, which needs no GPU: what ptxas says of registers, spills, shared memory."""

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from vitkd_fast.ops.kd_loss import KINDS  # noqa: E402
from vitkd_fast.triton._tiles import Tile, backward_tiles, forward_tiles, padded_head_dim  # noqa: E402

attention = importlib.import_module("vitkd_fast.triton.attention")  # the package's attribute is the function
kd_loss = importlib.import_module("vitkd_fast.triton.kd_loss")

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Bytes that a block may take (CUDA C++ programming guide, compute capabilities). sm_80 has 163 KB, but its tiles serve
# sm_86, sm_89 and sm_120 too.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}


def compiled(kernel, chip, pointers, constants, **options):
    """Compile as a launch with 16-byte aligned tensors would; returns the PTX and ptxas's figures."""
    types, hints = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in pointers:
            types[name] = "*" + pointers[name]
        else:
            types[name] = "fp32" if name in ("scale", "log2_scale", "temperature", "weight") else "i32"
        if name in pointers:
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constexprs=constants, attrs=hints)
    result = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    return result.asm["ptx"], result.metadata.shared


def figures(ptx, chip, folder):
    """Registers per thread and bytes spilled."""
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    name = f"sm_{chip}{'a' if chip == 90 else ''}"
    report = subprocess.run(
        [PTXAS, "-v", f"--gpu-name={name}", path, "-o", folder / "kernel.cubin"],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    return int(re.search(r"Used (\d+) registers", report)[1]), int(re.search(r"(\d+) bytes spill stores", report)[1])


def attention_kernels(tokens, head_dim, dtype, chip):
    """Every kernel and tile that may be launched for such a head, tuned or not."""
    width = padded_head_dim(head_dim)
    for tile in forward_tiles(tokens, width, dtype):
        yield attention._forward_kernel, tile
    for tiles in backward_tiles(tokens, width, dtype, (chip // 10, chip % 10)):
        if isinstance(tiles, Tile):
            yield attention._backward_head_kernel, tiles
        else:
            yield attention._backward_rows_kernel, tiles.rows
            yield attention._backward_keys_kernel, tiles.keys
            yield attention._backward_queries_kernel, tiles.queries


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention(dtype, head_dim, chip, tmp_path, record_property):
    """Fits the chip and spills nothing; 16-byte accesses and tensor cores where they are meant."""
    pointers = dict.fromkeys(("qkv", "out", "grad_out", "grad_qkv"), TYPES[dtype]) | {"statistics": "fp32"}
    kernels = {
        each: None for n in (16, 17, 50, 65, 128, 197, 577) for each in attention_kernels(n, head_dim, dtype, chip)
    }
    for kernel, tile in kernels:
        constants = {"NEGATIVE": False, "UNIT": 8, "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim)}
        constants |= {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
        ptx, shared = compiled(kernel, chip, pointers, constants, num_warps=tile.num_warps, num_stages=tile.num_stages)
        registers, spilled = figures(ptx, chip, tmp_path)
        name = kernel.__name__.strip("_")
        line = f"sm_{chip} {TYPES[dtype]} D={head_dim} {name} {tile}: {registers} registers, {shared} B shared"
        record_property(name, line)
        print(line)
        assert spilled == 0, f"{line}, {spilled} B spilled"
        assert shared <= SHARED_LIMIT[chip], line
        share = min(tile.block_q, tile.block_k) * constants["BLOCK_D"] // (32 * tile.num_warps)  # of a tile, per thread
        if share * dtype.itemsize >= 16:
            assert re.search(r"ld\.global\S*\.v4|cp\.async\.\S* \[[^]]*\], \[[^]]*\], 0x10", ptx), f"{line}: narrow"
        if dtype is torch.bfloat16:
            assert "wgmma" in ptx or "mma.sync" in ptx, f"{line}: no tensor cores"


class Launches:
    """Stands in for a kernel: notes what it would be compiled for, and launches nothing."""

    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen
        self.bind = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
        )

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        _, specialization, options = self.bind(*args, **options)
        self.seen.add((self.kernel.__name__, str(specialization), str(options)))


@pytest.mark.parametrize("tokens", [23, 300])  # one backward kernel; three
@pytest.mark.parametrize("head_dim", [7, 20, 64])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (2, 0, 3, 1, 4)], ids=str)
def test_one_compilation_for_all_batch_sizes(order, head_dim, tokens, monkeypatch):
    """In any order of the dimensions in memory: strides that grow with the batch are not what is compiled for.

    Where head_dim is no multiple of 8, strides of one batch size may have a larger common divisor than those of
    another: at most one more kernel for each unit (1, 2, 4, 8 elements), never one per batch size.
    """
    seen = set()
    for name in ("forward", "backward_head", "backward_rows", "backward_keys", "backward_queries"):
        kernel = getattr(attention, f"_{name}_kernel")
        monkeypatch.setattr(attention, f"_{name}_kernel", Launches(kernel, seen))
    counts = {}
    for batch in (3, 1, 2, 4, 5, 8, 16, 17, 64):
        shape = (batch, tokens, 3, 3, head_dim)
        memory = torch.empty([shape[dim] for dim in order], dtype=torch.bfloat16)
        qkv = memory.permute([order.index(dim) for dim in range(5)])
        assert qkv.shape == shape
        out = attention.attention(qkv, 0.125)
        attention.attention_backward(out, qkv, 0.125)
        counts[batch] = len(seen)
    assert counts[3] == (2 if tokens == 23 else 4)
    units = 1 if head_dim % 8 == 0 or order == (0, 1, 2, 3, 4) else 3 if head_dim % 4 == 0 else 4
    assert counts[64] <= units * counts[3], counts


@pytest.mark.parametrize("chip, classes", [(90, 1), (90, 10), (90, 1000), (90, 8192), (90, 65_536), (80, 1000)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", ["kl", "js", "l1", "mse"])  # reverse_kl is launched as kl
def test_kd_loss(kind, dtype, chip, classes, tmp_path, record_property):
    """Spills nothing, and reads rows of a length that 8 divides 16 bytes at a time (Triton alone sees only 16s)."""
    ptx = compiled_kd_loss(kind, dtype, classes, chip)
    registers, spilled = figures(ptx, chip, tmp_path)
    record_property("registers", registers)
    assert spilled == 0
    if classes % 8 == 0:
        assert "ld.global.v4" in ptx and "st.global.v4" in ptx
    if dtype is torch.float32:  # else the loss would depend on which gradients are wanted
        assert "fma.rn.f32" not in ptx


@pytest.mark.parametrize("classes", [10, 1000, 8192])
@pytest.mark.parametrize("kind", ["kl", "js", "l1", "mse"])
@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True)], ids=str)
def test_kd_loss_of_fewer_gradients(wanted, kind, classes):
    """What is not wanted is not written: the loss of the row is then the only store."""
    ptx = compiled_kd_loss(kind, torch.float16, classes, 90, wanted)
    assert ("st.global.v4" in ptx or "st.global.b16" in ptx) == any(wanted)


def compiled_kd_loss(kind, dtype, classes, chip, wanted=(True, True)):
    index = KINDS.index(kind)
    kernel, block = kd_loss._plan(index, classes)
    logits = ("student", "teacher", "student_grad", "teacher_grad")
    pointers = dict.fromkeys(logits, TYPES[dtype]) | {"rows": "fp32"}
    constants = {"KIND": index, "STUDENT_GRAD": wanted[0], "TEACHER_GRAD": wanted[1], "BLOCK": block}
    constants["UNIT"] = 8 if classes % 8 == 0 else 2 if classes % 2 == 0 else 1
    ptx, _ = compiled(kernel, chip, pointers, constants, **kd_loss._options(dtype, block))
    return ptx
