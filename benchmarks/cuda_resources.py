"""What each CUDA kernel takes of each GPU: registers, spills, shared memory. Needs nvcc and no GPU.

    python benchmarks/cuda_resources.py [--json benchmarks/results/cuda_resources.json]

TORCH_CUDA_ARCH_LIST, CUDA_HOME and MAX_JOBS are honoured. A kernel is its template arguments: head width and, in tiles
of 16 tokens, the length that is too short and the longest for attention_head; the padded head width for attention;
for kd_loss the threads of a row, classes per thread, classes per access and the kind.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "_build"))
from native import nvcc_codes  # noqa: E402

ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0"
KERNEL = re.compile(r"\d([a-z_]+)_kernelI(?:f|\w*?\d(bfloat16|float16)E)((?:Li\d+E)+)E")  # mangled; f: float


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def measure(architectures: Sequence[str], folder: Path) -> list[dict]:
    """A row per kernel and architecture; the object files stay in `folder`, named STEM.sm_NN.o."""
    sources = sorted((ROOT / "kernels/cuda").glob("*.cu"))
    jobs = [(source, architecture) for architecture in architectures for source in sources]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda job: _compile(*job, folder), jobs))
    rows = sorted((row for rows in found for row in rows), key=lambda row: tuple(row.values())[:4])
    shared = _shared_memory(rows, folder)
    return [{**row, "shared_bytes": shared[row["kernel"], row["dtype"], row["arguments"]]} for row in rows]


def _compile(source: Path, architecture: str, folder: Path) -> list[dict]:
    architecture = architecture.removesuffix("+PTX")
    sm = "sm_" + architecture.replace(".", "")
    flags = ["-std=c++17", "-O3", *nvcc_codes([architecture]), "-Xptxas", "-v"]
    command = [find_nvcc(), *flags, "-c", source, "-o", folder / f"{source.stem}.{sm}.o"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"nvcc could not compile {source.name} for {sm}:\n{result.stderr}")
    return parse(result.stdout + result.stderr)


def parse(log: str) -> list[dict]:
    """The rows in what `-Xptxas -v` printed."""
    rows = []
    for part in log.split("Compiling entry function ")[1:]:
        mangled, sm = re.match(r"'(\w+)' for '(\w+)'", part).groups()
        kernel, dtype, arguments = KERNEL.search(mangled).groups()
        stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())
        rows.append(
            {
                "kernel": kernel,
                "dtype": dtype or "float32",
                "arguments": ", ".join(re.findall(r"Li(\d+)E", arguments)),
                "architecture": sm.removesuffix("a"),
                "registers": int(re.search(r"Used (\d+) registers", part)[1]),
                "spill_store_bytes": stores,
                "spill_load_bytes": loads,
            }
        )
    return rows


def spilling(rows: list[dict]) -> list[dict]:
    """Half-precision kernels that spill, the forward of whole heads more than three registers needed once per strip."""

    def bound(row: dict) -> int:
        return 12 if row["kernel"] == "attention_head_forward" else 0

    half = [row for row in rows if row["dtype"] != "float32"]
    return [row for row in half if max(row["spill_store_bytes"], row["spill_load_bytes"]) > bound(row)]


def _shared_memory(rows: list[dict], folder: Path) -> dict[tuple, int]:
    """The most dynamic shared memory that each kernel is launched with: from the sources, compiled as plain C++."""
    kernels = sorted({(row["kernel"], row["dtype"], row["arguments"]) for row in rows})
    lines = []
    for kernel, dtype, arguments in kernels:
        numbers = arguments.split(", ")
        shape = f"Shape<{'float' if dtype == 'float32' else dtype}, {arguments}>"
        size = {
            "attention_head_forward": f"ForwardShape<{numbers[0]}, {numbers[-1]}>::kBytes",
            "attention_head_backward": f"BackwardShape<{numbers[0]}, {numbers[-1]}>::kBytes",
            "attention_hopper_forward": f"HopperForwardShape<{numbers[0]}, {numbers[-1]}>::kBytes",
            "attention_hopper_backward": f"HopperBackwardShape<{numbers[0]}, {numbers[-1]}>::kBytes",
            "attention_forward": f"{shape}::kForwardBytes",
            "attention_backward": f"{shape}::kBackwardBytes + statistics_bytes(kChunk, {shape}::kRows)",
            "kd_loss": f"shared_bytes({numbers[0]})",
            "kd_loss_long": f"shared_bytes({numbers[0]})",
            "kd_difference": f"shared_bytes({numbers[0]})",
            "scale": "0",
        }[kernel]
        lines.append(f'std::printf("%zu\\n", size_t({size}));')
    sources = "attention_head", "attention_hopper", "attention_streamed", "kd_loss"
    include = "".join(f'#include "{source}.cu"\n' for source in sources)
    program = f"{include}int main() {{\nusing namespace vitkd::cuda;\n" + "\n".join(lines) + "\n}\n"
    (folder / "shared.cpp").write_text(program)
    host = ROOT / "tests/kernels/cuda_host"
    flags = ["-std=c++17", "-w", "-I", ROOT / "kernels/cuda", "-I", host, "-include", host / "simt.h"]
    command = [os.environ.get("CXX") or "c++", *flags, folder / "shared.cpp"]
    subprocess.run([*map(str, command), "-o", str(folder / "shared")], check=True)
    sizes = subprocess.run([str(folder / "shared")], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(kernels, map(int, sizes), strict=True))


def table(rows: list[dict]) -> str:
    """A line per kernel, a column per architecture: registers, and bytes spilled (stored/loaded) if any."""
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
            spill = f" +{row['spill_store_bytes']}/{row['spill_load_bytes']}" if row["spill_store_bytes"] else ""
            line += f"{row['registers']}{spill}".rjust(14)
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/cuda_resources.json")
    arguments = parser.parse_args()
    if find_nvcc() is None:
        sys.exit("There is no nvcc: put it on PATH, or set CUDA_HOME to the toolkit's folder.")
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(listed or ARCHITECTURES.split(), Path(folder))
    print(table(rows))
    version = subprocess.run([find_nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    record = {
        "nvcc": re.search(r"V([\d.]+)", version)[1],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "kernels": rows,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if found := spilling(rows):
        sys.exit("\n".join(["These spill too much:", *map(str, found)]))


if __name__ == "__main__":
    main()
