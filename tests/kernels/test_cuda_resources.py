"""The CUDA kernels as nvcc compiles them: all of them there, no spills where ViTs live, tensor cores, wide accesses."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from vitkd_fast.choice import default_tokens

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
cuda_resources = importlib.import_module("cuda_resources")
pytestmark = [
    pytest.mark.skipif(cuda_resources.library() is None, reason="the installed library was built without nvcc"),
    pytest.mark.skipif(cuda_resources.cuobjdump() is None, reason="there is no cuobjdump"),
]

INSTRUCTIONS = {
    "tensor core of four warps": r"\bHGMMA\S*\.BF16\b",
    "tensor core": r"\bHMMA\.16816\.F32\.BF16\b",
    "16-byte copy to shared memory": r"\bLDGSTS\S*\.128\b",
    "bulk copy to shared memory": r"\bUTMALDG\b",
    "16-byte load": r"\bLDG\S*\.128\b",
    "16-byte store": r"\bSTG\S*\.128\b",
    "narrower store": r"\bSTG(?!\S*\.128\b)",
    "8x8 matrices to shared memory": r"\bSTSM\b",
    "exponential": r"\bMUFU\.EX2\b",
    "atomic": r"(?<![\w.])(?:ATOMG?|REDG?)\.",  # BAR.RED is a barrier
    "atomic in shared memory": r"\bATOMS\.",
    "wait for what was queued before": r"\bACQBULK\b",
    "register spill": r"\b(?:LDL|STL)\b",
}
DTYPES = ("float32", "bfloat16", "float16")
FORWARD = ("0, 2", "2, 4", "4, 5", "5, 7", "7, 10", "10, 13", "13, 17")  # longer than, up to, in tiles of 16 tokens
BACKWARD = FORWARD[:-1]


@pytest.fixture(scope="module")
def rows():
    return cuda_resources.measure(cuda_resources.library())


def expected():
    """Kernel, dtype and template arguments of all kernels."""
    for dtype in DTYPES:
        yield "scale", dtype, "256"
        run = 4 if dtype == "float32" else 8
        for width in (32, 64, 96, 128) if dtype == "float32" else (16, 32, 48, 64, 80, 96, 128):
            yield "attention_forward", dtype, f"{width}"
            yield "attention_backward", dtype, f"{width}"
        if dtype != "float32":
            for width in (32, 64):
                yield from (("attention_head_forward", dtype, f"{width}, {size}") for size in FORWARD)
                yield from (("attention_head_backward", dtype, f"{width}, {size}") for size in BACKWARD)
                yield "attention_hopper_short", dtype, f"{width}, {FORWARD[1]}"
                yield from (("attention_hopper_forward", dtype, f"{width}, {size}") for size in FORWARD[2:])
                yield "attention_hopper_backward", dtype, f"{width}, {BACKWARD[-1]}"
        if dtype == "float32":
            yield "kd_mean", dtype, "1024"
        else:
            yield "kd_loss_ahead", dtype, "32, 32, 8, 0"
        for each in (run, 1):
            yield from (("kd_loss", dtype, f"128, 8, {each}, {kind}") for kind in (0, 2))
            for team in ("32, 8", "64, 16", "256, 16"):
                yield "kd_difference", dtype, f"{team}, {each}"
                kl = "32, 32" if team == "64, 16" and dtype != "float32" else team
                yield "kd_loss", dtype, f"{kl}, {each}, 0"
                yield "kd_loss", dtype, f"{team}, {each}, 2"
            yield from (("kd_loss_long", dtype, f"512, 8, {each}, {kind}") for kind in (0, 2))


def test_every_kernel_is_there(rows):
    architectures = {row["architecture"] for row in rows}
    found = sorted((row["architecture"], row["kernel"], row["dtype"], row["arguments"]) for row in rows)
    assert found == sorted((architecture, *kernel) for architecture in architectures for kernel in expected())
    assert len(cuda_resources.table(rows).splitlines()) == 1 + len(found) // len(architectures)


def test_spills(rows):
    assert cuda_resources.spilling(rows) == []
    many = {"kernel": "kd_loss", "dtype": "bfloat16", "spill_bytes": 8}
    assert cuda_resources.spilling([many, {**many, "dtype": "float32"}]) == [many]


def test_registers_allow_the_blocks_that_an_sm_should_hold(rows):
    """Of a quarter of an SM's 16384 registers, by warps: 8 warps of an SM may have 255 each, 12 168, 16 128."""
    limits = {
        "attention_head_forward": {"5, 7": 128, "7, 10": 168, "10, 13": 128, "13, 17": 168},
        "attention_head_backward": {"2, 4": 128, "4, 5": 128, "7, 10": 168},
        "kd_loss": {"32, 8, 0": 128},  # 1000 classes: 16 rows and more
        "kd_loss_ahead": {"32, 8, 0": 128},
    }
    for row in rows:
        size = row["arguments"].partition(", ")[2]
        assert row["registers"] <= limits.get(row["kernel"], {}).get(size, 255), row


def test_shared_memory_fits_the_gpus(rows):
    """A block gets 99 KiB on sm_86, sm_89 and sm_120, 163 on sm_80, 227 on sm_90 and sm_100."""
    longest = {99: 0, 163: 0, 227: 0}  # tokens of a head of 64 whose backward fits
    for row in rows:
        kernel, size = row["kernel"], int(row["arguments"].split(", ")[-1])
        if kernel == "attention_head_forward":
            assert 2 * (row["shared_bytes"] + 1024) <= 228 * 1024, row  # two blocks, each with 1 KiB of its own
        elif kernel == "attention_head_backward":
            for kilobytes in longest:
                if row["arguments"].startswith("64") and row["shared_bytes"] <= kilobytes * 1024:
                    longest[kilobytes] = max(longest[kilobytes], 16 * size)
        elif kernel.startswith("attention_hopper"):
            blocks = 5 if kernel.endswith("short") else 1
            assert blocks * (row["shared_bytes"] + 1024) <= 228 * 1024, row
        else:
            assert row["shared_bytes"] <= 99 * 1024, row
    assert longest == {99: 112, 163: 160, 227: 208}
    for capability, kilobytes in (((8, 6), 99), ((8, 0), 163), ((9, 0), 227)):
        assert default_tokens(capability, "16-bit", 64) == longest[kilobytes]


@pytest.fixture(scope="module")
def counts(rows):
    """How often each kind of instruction stands in a kernel for sm_90."""
    if not any(row["architecture"] == "sm_90" for row in rows):
        pytest.skip("the installed library has no code for sm_90")

    def counts(kernel, *arguments):
        wanted = {"kernel": kernel, "dtype": "bfloat16", "arguments": ", ".join(map(str, arguments))}
        (row,) = (row for row in rows if row | wanted == row and row["architecture"] == "sm_90")
        options = "-sass", "-arch", "sm_90a", "-fun", row["function"]
        code = cuda_resources.dump(cuda_resources.library(), *options)
        assert code.count("Function :") == 1
        return {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}

    return counts


def test_machine_code_of_streamed_heads(counts):
    for kernel in ("attention_forward", "attention_backward"):
        found = counts(kernel, 64)
        assert found["tensor core"] >= 64, found
        assert found["16-byte copy to shared memory"] >= 8, found
        assert found["16-byte store"] >= 1, found
        assert found["atomic"] == found["register spill"] == 0, found


def test_machine_code_of_whole_heads(counts):
    """Of 197 tokens: the products of one strip of 16 queries and 13 x 16 keys take 4 x 26 instructions each."""
    forward = counts("attention_head_forward", 64, 10, 13)
    assert forward["tensor core"] == 2 * 104, forward
    assert forward["exponential"] == 104 + 2, forward  # and the correction of two rows between two parts
    assert forward["16-byte copy to shared memory"] >= 3, forward
    assert forward["16-byte store"] == 4 and forward["narrower store"] == 0, forward
    backward = counts("attention_head_backward", 64, 10, 13)
    assert backward["tensor core"] == 2 * 5 * 104, backward  # two strips per warp, five products
    assert backward["exponential"] == 2 * 104, backward
    assert backward["16-byte store"] == 2 * 3 * 4 and backward["narrower store"] == 0, backward
    assert backward["8x8 matrices to shared memory"] == 2 * 2 * 13, backward
    assert forward["atomic"] == backward["atomic"] == 0


def test_machine_code_of_whole_heads_on_hopper(counts):
    """Of 197 tokens: 4 instructions of 64 queries for the scores of each part of the keys, one per 16 keys then.

    Queries, keys and values of a head are brought by one each, at first or when the last warp has left another head.
    """
    forward = counts("attention_hopper_forward", 64, 10, 13)
    assert forward["tensor core of four warps"] == 3 * 4 + 13 and forward["tensor core"] == 0, forward
    assert forward["bulk copy to shared memory"] == 2 * 3 and forward["atomic in shared memory"] == 1, forward
    assert forward["16-byte copy to shared memory"] == 0, forward
    assert forward["16-byte store"] == 4 and forward["narrower store"] == 0, forward
    backward = counts("attention_hopper_backward", 64, 10, 13)
    assert backward["tensor core of four warps"] == 2 * 4 + 4 + 3 * 13, backward  # a group's two blocks of scores
    assert backward["8x8 matrices to shared memory"] == 3 * 13, backward
    assert forward["atomic"] == backward["atomic"] == forward["register spill"] == backward["register spill"] == 0


def test_machine_code_of_the_loss(counts):
    """A thread has 32 classes of both rows: each is loaded, exponentiated and written once."""
    found = counts("kd_loss", 32, 32, 8, 0)
    assert found["16-byte load"] >= 8 and found["16-byte store"] == 8, found
    assert found["narrower store"] <= 2 + 64, found  # the loss, the mean, and rows that are not aligned
    assert 64 <= found["exponential"] <= 68, found
    assert found["wait for what was queued before"] == counts("scale", 256)["wait for what was queued before"] == 1
    assert found["atomic"] == 1 and found["register spill"] == 0, found  # the count of blocks, no sum
