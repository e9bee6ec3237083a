"""Where the CPU's attention kernels spend their time: one thread, no torch, shares by what the code there is for.

    python benchmarks/cpu_profile.py [--shapes B,H,N,D ...] [--dtype float32 bfloat16] [--isa NAME] [--seconds S]

The kernels are compiled with the library's own flags and debugging information, and interrupted 4,000 times a second;
where a thread was is looked up in what the compiler inlined there. `least` is the best call's time, which other work on
the machine only ever adds to; "products GF/s" is the rate of the products in their share of it. --program runs what an
earlier run built, for a machine without a compiler.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "_build"))

from _sizes import sizes  # noqa: E402
from native import BFLOAT16, CXX_FLAGS, INSTRUCTION_SETS, compile_program, cpu_kernels  # noqa: E402

FOLDER = ROOT / "build/cpu_profile"
SHAPES = [(8, 3, 197, 64), (16, 3, 65, 64), (16, 3, 50, 64), (16, 4, 17, 32)]

# What a function of the kernels is for; the innermost inlined one that has a name here counts.
STAGES = {
    "products": ("gemm", "gemm_panel", "gemm_rest", "gemm_tile", "multiply_add", "amx_block"),
    "softmax": ("exponentials", "softmax_backward", "column_max", "exponent_factor"),
    "lone": ("dots", "pack_lone", "row_max", "exponentials_of_row", "softmax_backward_of_row", "to_columns"),
    "operands": ("pack_across", "pack_rows", "pack_down", "by_elements", "by_vectors", "clear"),
    "turning": ("turn",),
    "results": ("finish",),
    "prefetch": ("some", "begin", "take", "look_ahead"),
}
STAGE_OF = {name: stage for stage, names in STAGES.items() for name in names}
OPERATIONS = {"forward": 4, "backward": 10}  # per token, token and channel


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shapes", nargs="+", type=sizes(4), metavar="B,H,N,D", default=SHAPES)
    options.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    options.add_argument("--isa", choices=[*INSTRUCTION_SETS, *BFLOAT16], help="the best of this CPU by default")
    options.add_argument("--seconds", type=float, default=1.0, help="of timing, and of sampling, per row")
    options.add_argument("--program", type=Path, help="run this instead of building it")
    arguments = options.parse_args()
    program = arguments.program or build()
    environment = os.environ | ({"VITKD_CPU_ISA": arguments.isa} if arguments.isa else {})
    columns = f"{'case':<26}{'direction':<10}{'kernels':<12}{'least µs':>10}{'median':>9}{'GF/s':>6}"
    print(columns + "".join(f"{stage:>10}" for stage in (*STAGES, "other")) + f"{'products GF/s':>15}")
    for dtype in arguments.dtype:
        for size in arguments.shapes:
            command = [program, dtype, *map(str, size), str(arguments.seconds)]
            text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            for block in re.split(r"\n(?=[a-z])", text.strip()):
                print(line(dtype, size, block, program))
    return 0


def line(dtype: str, size: tuple[int, ...], block: str, program: Path) -> str:
    head, *addresses = block.split("\n")
    direction, isa, least, median = head.split()
    batch, heads, tokens, head_dim = size
    operations = OPERATIONS[direction] * batch * heads * tokens**2 * head_dim
    shares = stages(addresses, program)
    text = f"{dtype} {','.join(map(str, size)):<17}{direction:<10}{isa:<12}{float(least):>10.0f}{float(median):>9.0f}"
    text += f"{operations / float(least) / 1e3:>6.0f}"
    text += "".join(f"{shares[stage]:>10.1%}" for stage in (*STAGES, "other"))
    return text + f"{operations / (float(least) * shares['products']) / 1e3:>15.0f}"


def stages(addresses: list[str], program: Path) -> dict[str, float]:
    """The share of each stage in the samples."""
    samples = Counter(addresses)
    command = ["addr2line", "-a", "-i", "-f", "-C", "-e", program, *samples]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict.fromkeys((*STAGES, "other"), 0)
    for frames in re.split(r"^(?=0x)", text, flags=re.MULTILINE)[1:]:
        address, *names = frames.split("\n")
        stage = next(filter(None, (STAGE_OF.get(plain(name)) for name in names[::2])), "other")
        found[stage] += samples[hex(int(address, 16))]
    return {stage: number / len(addresses) for stage, number in found.items()}


def plain(function: str) -> str:
    """gemm_tile of "void vitkd::cpu::avx2::gemm_tile<float, 4, 3>(...)"."""
    function = function.replace("(anonymous namespace)", "")
    while (shorter := re.sub(r"<[^<>]*>", "", function)) != function:
        function = shorter
    return re.split(r"[: ]", function.split("(")[0])[-1]


def build() -> Path:
    cxx = os.environ.get("CXX", "c++").split()
    if shutil.which(cxx[0]) is None:
        raise SystemExit(f"There is no C++ compiler {cxx[0]!r}: install g++ or clang++, or name yours in CXX.")
    FOLDER.mkdir(parents=True, exist_ok=True)
    sources = [(ROOT / "benchmarks/cpu_profile.cpp", ""), *cpu_kernels(ROOT)]
    return compile_program(FOLDER / "cpu_profile", sources, f"-g {CXX_FLAGS}", link="-static")


if __name__ == "__main__":
    sys.exit(main())
