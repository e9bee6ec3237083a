"""What each CUDA kernel of the installed library takes of each GPU: registers, spills, shared memory. Needs no GPU.

    python benchmarks/cuda_resources.py [--json benchmarks/results/cuda_resources.json]

Needs cuobjdump, which triton brings along. A kernel is its template arguments: head width and, in tiles of 16 tokens,
the length that is too short and the longest for attention_head; the padded head width for attention; for kd_loss the
threads of a row, classes per thread, classes per access and the kind; for kd_mean the threads. Which GPUs is
TORCH_CUDA_ARCH_LIST's matter, when the library is built.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "_build"))
from native import find_nvcc  # noqa: E402

KERNEL = re.compile(r"\d([a-z_]+)_kernelI(?:f|\w*?\d(bfloat16|float16)E)((?:Li\d+E)+)E")  # mangled; f: float
FUNCTION = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)")


def library() -> Path | None:
    """The CUDA library of the package that is installed here; None if it was built without nvcc."""
    package = find_spec("vitkd_fast")
    path = Path(package.origin).parent / "_C_cuda.so" if package and package.origin else None
    return path if path and path.exists() else None


def cuobjdump() -> str | None:
    triton = find_spec("triton")
    if triton and triton.origin:
        return str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    return shutil.which("cuobjdump")


def dump(path: Path, *options: str) -> str:
    return subprocess.run([str(cuobjdump()), *options, str(path)], check=True, capture_output=True, text=True).stdout


def measure(path: Path) -> list[dict]:
    """A row per kernel and architecture. A kernel's stack holds what it spills and nothing else: it calls nothing."""
    rows = []
    for part in dump(path, "--dump-resource-usage").split("arch = ")[1:]:
        for mangled, registers, stack in FUNCTION.findall(part):
            kernel, dtype, arguments = KERNEL.search(mangled).groups()
            rows.append(
                {
                    "kernel": kernel,
                    "dtype": dtype or "float32",
                    "arguments": ", ".join(re.findall(r"Li(\d+)E", arguments)),
                    "architecture": part.split()[0].removesuffix("a"),
                    "registers": int(registers),
                    "spill_bytes": int(stack),
                    "function": mangled,
                }
            )
    rows.sort(key=lambda row: tuple(row.values())[:4])
    shared = _shared_memory(rows)
    return [{**row, "shared_bytes": shared[row["kernel"], row["dtype"], row["arguments"]]} for row in rows]


def spilling(rows: list[dict]) -> list[dict]:
    """Half-precision kernels that spill, the forward of whole heads more than one or two registers needed once per
    strip, of more than 208 tokens three: a stack is of 8 bytes at a time, and three registers are 12.
    """

    def bound(row: dict) -> int:
        if row["kernel"] != "attention_head_forward":
            return 0
        return 16 if row["arguments"] == "64, 13, 17" else 8

    return [row for row in rows if row["dtype"] != "float32" and row["spill_bytes"] > bound(row)]


def _shared_memory(rows: list[dict]) -> dict[tuple, int]:
    """The most dynamic shared memory that each kernel is launched with: from the sources, compiled as plain C++."""
    kernels = sorted({(row["kernel"], row["dtype"], row["arguments"]) for row in rows})
    lines = []
    for kernel, dtype, arguments in kernels:
        numbers = arguments.split(", ")
        shape = f"Shape<{'float' if dtype == 'float32' else dtype}, {arguments}>"
        block = f"shared_bytes(threads_of_block({', '.join(numbers[:2])}))"
        size = {
            "attention_head_forward": f"ForwardShape<{numbers[0]}, {numbers[-1]}>::kBytes",
            "attention_head_backward": f"BackwardShape<{numbers[0]}, {numbers[-1]}>::kBytes",
            "attention_hopper_short": f"HopperShortShape<{numbers[0]}, {numbers[-1]}>::kBytes",
            "attention_hopper_forward": f"HopperForwardShape<{numbers[0]}, {numbers[-1]}>::kBytes",
            "attention_hopper_backward": f"HopperBackwardShape<{numbers[0]}, {numbers[-1]}>::kBytes",
            "attention_forward": f"{shape}::kForwardBytes",
            "attention_backward": f"{shape}::kBackwardBytes + statistics_bytes(kChunk, {shape}::kRows)",
            "kd_loss": block,
            "kd_loss_ahead": f"ahead_bytes<{dtype}>({', '.join(numbers[:2])})",
            "kd_loss_long": f"shared_bytes({numbers[0]})",
            "kd_difference": block,
            "kd_mean": f"shared_bytes({numbers[0]})",
            "scale": "0",
        }[kernel]
        lines.append(f'std::printf("%zu\\n", size_t({size}));')
    hopper = "attention_hopper_forward", "attention_hopper_backward"
    sources = "attention_head", *hopper, "attention_streamed", "kd_loss"
    include = "".join(f'#include "{source}.cu"\n' for source in sources)
    program = f"{include}int main() {{\nusing namespace vitkd::cuda;\n" + "\n".join(lines) + "\n}\n"
    host = ROOT / "tests/kernels/cuda_host"
    flags = ["-std=c++17", "-w", "-I", ROOT / "kernels/cuda", "-I", host, "-include", host / "simt.h"]
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "shared.cpp", Path(folder) / "shared"
        source.write_text(program)
        command = [os.environ.get("CXX") or "c++", *flags, source, "-o", binary]
        subprocess.run([*map(str, command)], check=True)
        sizes = subprocess.run([str(binary)], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(kernels, map(int, sizes), strict=True))


def table(rows: list[dict]) -> str:
    """A line per kernel, a column per architecture: registers, and bytes spilled if any."""
    architectures = sorted({row["architecture"] for row in rows}, key=lambda sm: int(sm[3:]))
    cells = {(row["kernel"], row["dtype"], row["arguments"], row["architecture"]): row for row in rows}
    names = sorted({key[:3] for key in cells}, key=lambda key: (key[0], key[1], list(map(int, key[2].split(", ")))))
    lines = [f"{'kernel':46}{'shared':>8}" + "".join(f"{sm:>14}" for sm in architectures)]
    for name in names:
        line = f"{name[0]}<{name[1]}, {name[2]}>"
        shared = next(row["shared_bytes"] for row in rows if (row["kernel"], row["dtype"], row["arguments"]) == name)
        line = f"{line:46}{shared:>8}"
        for sm in architectures:
            row = cells[(*name, sm)]
            spill = f" +{row['spill_bytes']}" if row["spill_bytes"] else ""
            line += f"{row['registers']}{spill}".rjust(14)
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/cuda_resources.json")
    arguments = parser.parse_args()
    path = library()
    if path is None:
        sys.exit("The installed vitkd_fast has no CUDA library: VITKD_CUDA=1 pip install . says what is missing.")
    if cuobjdump() is None:
        sys.exit("There is no cuobjdump: pip install triton, or put the CUDA toolkit's on PATH.")
    rows = measure(path)
    print(table(rows))
    record = {
        "nvcc": _nvcc_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "kernels": [{name: value for name, value in row.items() if name != "function"} for row in rows],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if found := spilling(rows):
        sys.exit("\n".join(["These spill too much:", *map(str, found)]))


def _nvcc_version() -> str | None:
    nvcc = find_nvcc()
    told = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout if nvcc else ""
    found = re.search(r"V([\d.]+)", told)
    return found[1] if found else None


if __name__ == "__main__":
    main()
