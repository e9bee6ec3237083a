"""The CUDA kernels as nvcc compiles them: all of them there, no spills where ViTs live, tensor cores, wide accesses."""

import importlib
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
cuda_resources = importlib.import_module("cuda_resources")
pytestmark = pytest.mark.skipif(cuda_resources.find_nvcc() is None, reason="there is no nvcc")

INSTRUCTIONS = {
    "tensor core": r"\bHMMA\.16816\.F32\.BF16\b",
    "16-byte copy to shared memory": r"\bLDGSTS\S*\.128\b",
    "16-byte store": r"\bSTG\S*\.128\b",
    "atomic": r"\b(?:ATOMG?|ATOMS|REDG?)\.",
    "register spill": r"\b(?:LDL|STL)\b",
}
DTYPES = {"float32", "bfloat16", "float16"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    return cuda_resources.measure(["9.0"], folder), folder


def test_every_kernel_is_there(compiled):
    rows, _ = compiled
    widths = {"float32": {32, 64, 96, 128}, "bfloat16": {16, 32, 48, 64, 80, 96, 128}}
    widths["float16"] = widths["bfloat16"]
    for kernel in ("attention_forward", "attention_backward"):
        for dtype in DTYPES:
            found = [int(row["arguments"]) for row in rows if (row["kernel"], row["dtype"]) == (kernel, dtype)]
            assert sorted(found) == sorted(widths[dtype])
    teams = {(row["dtype"], row["arguments"]) for row in rows if row["kernel"] == "kd_loss"}
    assert teams == {(dtype, team) for dtype in DTYPES for team in ("32, 8", "32, 32", "256, 16")}
    assert len(rows) == 2 * (4 + 7 + 7) + 9


def test_no_spills_in_half_precision(compiled):
    """Widths 32 and 64 must not spill; at present none of the half-precision kernels does."""
    half = [row for row in compiled[0] if row["dtype"] != "float32"]
    assert sum(row["arguments"] in ("32", "64") for row in half) == 8
    assert [row for row in half if row["spill_store_bytes"] or row["spill_load_bytes"]] == []


def test_shared_memory_fits_every_gpu(compiled):
    """99 KiB is what a block gets on sm_86, sm_89 and sm_120."""
    sizes = [row["shared_bytes"] for row in compiled[0]]
    assert 64 * 1024 < max(sizes) <= 99 * 1024


def test_machine_code_has_tensor_cores_and_wide_accesses(compiled):
    cuobjdump = shutil.which("cuobjdump")
    if find_spec("triton"):
        cuobjdump = str(Path(find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump")
    if cuobjdump is None:
        pytest.skip("neither triton nor the CUDA toolkit's cuobjdump is installed")
    dump = subprocess.run([cuobjdump, "-sass", compiled[1] / "attention.sm_90.o"], capture_output=True, text=True)
    assert dump.returncode == 0, dump.stderr
    functions = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", dump.stdout, re.DOTALL))
    for kernel in ("attention_forward_kernel", "attention_backward_kernel"):
        (code,) = (code for name, code in functions.items() if f"{kernel}I" in name and "bfloat16ELi64E" in name)
        counts = {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}
        assert counts["tensor core"] >= 64, counts
        assert counts["16-byte copy to shared memory"] >= 8, counts
        assert counts["16-byte store"] >= 1, counts
        assert counts["atomic"] == counts["register spill"] == 0, counts
