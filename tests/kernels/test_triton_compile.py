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
from triton.compiler import ASTSource  # noqa: E402

from vitkd_fast.ops.kd_loss import KINDS  # noqa: E402
from vitkd_fast.triton._tiles import Tile, backward_tiles, forward_tile, padded_head_dim  # noqa: E402

attention = importlib.import_module("vitkd_fast.triton.attention")  # the package's attribute is the function
kd_loss = importlib.import_module("vitkd_fast.triton.kd_loss")

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Bytes that a block may take (CUDA C++ programming guide, compute capabilities). sm_80 has 163 KB, but its tiles serve
# sm_86, sm_89 and sm_120 too.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}


def compiled(kernel, chip, pointers, constants, num_warps, num_stages=3):
    """Compile as a launch with 16-byte aligned tensors would; returns the PTX and ptxas's figures."""
    types, hints = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in pointers:
            types[name] = "*" + pointers[name]
        else:
            types[name] = "fp32" if name in ("scale", "log2_scale", "temperature", "weight") else "i32"
        if name in pointers or "stride" in name:
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constexprs=constants, attrs=hints)
    options = {"num_warps": num_warps, "num_stages": num_stages}
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
    width = padded_head_dim(head_dim)
    yield attention._forward_kernel, forward_tile(tokens, width, dtype)
    tiles = backward_tiles(tokens, width, dtype, (chip // 10, chip % 10))
    if isinstance(tiles, Tile):
        yield attention._backward_head_kernel, tiles
    else:
        yield attention._backward_rows_kernel, tiles.rows
        yield attention._backward_keys_kernel, tiles.keys
        yield attention._backward_queries_kernel, tiles.queries


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize(
    "dtype, tokens, head_dim",
    [(torch.bfloat16, tokens, 64) for tokens in (17, 50, 65, 197, 577)]
    + [(torch.bfloat16, 65, 32), (torch.bfloat16, 197, 128), (torch.float32, 197, 64)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_attention(dtype, tokens, head_dim, chip, tmp_path, record_property):
    """Fits the chip and spills nothing; 16-byte accesses and tensor cores where they are meant."""
    pointers = dict.fromkeys(("qkv", "out", "grad_out", "grad_qkv"), TYPES[dtype]) | {"statistics": "fp32"}
    for kernel, tile in attention_kernels(tokens, head_dim, dtype, chip):
        constants = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim)}
        constants |= {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
        ptx, shared = compiled(kernel, chip, pointers, constants, tile.num_warps, tile.num_stages)
        registers, spilled = figures(ptx, chip, tmp_path)
        name = kernel.__name__.strip("_")
        line = f"sm_{chip} {TYPES[dtype]} N={tokens} D={head_dim} {name}: {registers} registers, {shared} B shared"
        record_property(name, line)
        print(line)
        assert spilled == 0, f"{line}, {spilled} B spilled"
        assert shared <= SHARED_LIMIT[chip], line
        assert re.search(r"ld\.global\S*\.v4|cp\.async\.\S* \[[^]]*\], \[[^]]*\], 0x10", ptx), f"{line}: narrow loads"
        if dtype is torch.bfloat16:
            assert "wgmma" in ptx or "mma.sync" in ptx, f"{line}: no tensor cores"


@pytest.mark.parametrize("chip, classes", [(90, 1), (90, 10), (90, 1000), (90, 8192), (90, 65_536), (80, 1000)])
@pytest.mark.parametrize("kind", ["kl", "js", "mse"])
def test_kd_loss(kind, chip, classes, tmp_path, record_property):
    """Spills nothing, and reads rows of a length that 8 divides 16 bytes at a time (Triton alone sees only 16s)."""
    index = KINDS.index(kind)
    kernel, block = kd_loss._plan(index, classes)
    pointers = dict.fromkeys(("student", "teacher", "student_grad", "teacher_grad"), "bf16") | {"rows": "fp32"}
    constants = {"KIND": index, "STUDENT_GRAD": True, "TEACHER_GRAD": True, "BLOCK": block}
    constants["UNIT"] = 8 if classes % 8 == 0 else 1
    ptx, _ = compiled(kernel, chip, pointers, constants, kd_loss._warps(block))
    registers, spilled = figures(ptx, chip, tmp_path)
    record_property("registers", registers)
    assert spilled == 0
    if classes % 8 == 0:
        assert "ld.global.v4" in ptx and "st.global.v4" in ptx
