"""What the microbenchmarks share: fair timing, the machine's own limits, the check before a claim, table and record."""

import argparse
import contextlib
import ctypes
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import acceptance
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import vitkd_fast

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROTATED_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}  # inputs take turns beyond this: an H200's L2 is 60 MB
MAX_COPIES = 64
STARTED = time.monotonic()
OUT_OF_TIME = "not measured: --limit was reached"


@dataclass
class Contender:
    """One way to compute the op. `ours` claims the speed-ups; the others are the baselines."""

    name: str
    function: Callable[..., Tensor]
    ours: bool = False
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass
class Row:
    """One measurement. Times in microseconds; error is the largest one against float64, relative to max |exact|.
    `chosen`: what the package's public function runs for this case."""

    case: str
    direction: str
    contender: str
    ours: bool
    median: float | None = None
    low: float | None = None
    high: float | None = None
    gflops: float | None = None
    gbytes: float | None = None
    share: float | None = None
    extra_mb: float | None = None
    error: float | None = None
    correct: bool = False
    note: str = ""
    speedup: float | None = None
    chosen: bool = False


@dataclass
class Limits:
    """What this machine reached in this run: a matrix product (GF/s) and a copy (GB/s read plus written), by dtype."""

    gemm: dict[str, float] = field(default_factory=dict)
    copy: float = 0.0

    def products(self, name: str) -> float:
        """GF/s of products of this dtype, which a CPU without instructions for them computes in float32."""
        return max(self.gemm[name], self.gemm.get("float32", 0.0))


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=None, help="all that suit the device")
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument("--seconds", type=float, default=0.6, help="of measuring per contender and direction")
    result.add_argument(
        "--rounds", type=int, default=3, help="contenders take turns this often, so that drift hits all"
    )
    result.add_argument(
        "--skip", nargs="*", default=[], metavar="WORD", help="leave out contenders with this in the name"
    )
    result.add_argument("--limit", type=float, metavar="SECONDS", help="start nothing new after this long")
    result.add_argument("--graph", action="store_true", help="time CUDA graph replays: no launch costs on any side")
    result.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    return result


def dtypes(arguments: argparse.Namespace) -> list[str]:
    return arguments.dtype or (["bfloat16", "float32"] if arguments.device == "cpu" else ["bfloat16"])


def out_of_time(arguments: argparse.Namespace) -> bool:
    return arguments.limit is not None and time.monotonic() - STARTED > arguments.limit


def copies(make: Callable[[int], tuple[Tensor, ...]], device: str) -> list[tuple[Tensor, ...]]:
    """As many different inputs as it takes to push the first out of the cache before its turn comes again."""
    first = make(0)
    size = sum(tensor.nbytes for tensor in first)
    count = min(MAX_COPIES, max(2, -(-ROTATED_BYTES[device] // size)))
    return [first, *(make(seed) for seed in range(1, count))]


def forward_of(function: Callable[..., Tensor]) -> Callable[..., None]:
    def run(*inputs: Tensor) -> None:
        with torch.no_grad():
            function(*inputs[:-1])

    return run


def forward_backward_of(function: Callable[..., Tensor]) -> Callable[..., None]:
    def run(*inputs: Tensor) -> None:
        *arguments, grad_out = inputs
        torch.autograd.grad(function(*arguments), [one for one in arguments if one.requires_grad], grad_out)

    return run


def measure(
    rows: Sequence[tuple[Row, Contender, Callable[..., None]]], inputs: list[tuple[Tensor, ...]], arguments
) -> None:
    """Fill in the times of contenders for one case and direction. One that cannot run says why in its note."""
    times: dict[int, list[float]] = {}
    for _ in range(arguments.rounds):
        for index, (row, contender, run) in enumerate(rows):
            if row.note:
                continue
            if index not in times and out_of_time(arguments):
                row.note = OUT_OF_TIME
                continue
            turn = itertools.cycle(inputs)
            try:
                with contender.context():
                    times.setdefault(index, []).extend(_times(lambda: run(*next(turn)), arguments))  # noqa: B023
            except Exception as error:
                row.note = _first_line(error)
    for index, seen in times.items():
        row, contender, run = rows[index]
        if row.note:
            continue
        row.median = statistics.median(seen)
        row.low, row.high = (
            (min(seen), max(seen)) if len(seen) < 5 else (statistics.quantiles(seen, n=5)[i] for i in (0, 3))
        )
        row.extra_mb = _peak_memory(contender, run, inputs[0], arguments.device)


Verdict = dict[str, tuple[float, float, torch.dtype]] | str
"""By direction a contender's error, the formula's, and the dtype that rounds it; or why there is none."""


def check_loss(
    contender: Contender, inputs: Sequence[Tensor], exact: Callable[..., Tensor], formula: Callable[..., Tensor]
) -> Verdict:
    """Of a loss, a scalar or each image's, and the gradients of its sum by those of the inputs, all but the last, that
    require one; `exact` is given them as float64."""
    arguments = inputs[:-1]
    learn = [one for one in arguments if one.requires_grad]
    try:
        with contender.context():
            loss = contender.function(*arguments)
            grads = torch.autograd.grad(loss.sum(), learn)
    except Exception as error:
        return _first_line(error)
    precise = [one.detach().double().requires_grad_(one.requires_grad) for one in arguments]
    exact_loss, plain_loss = exact(*precise), formula(*arguments)
    exact_grads = torch.autograd.grad(exact_loss.sum(), [one for one in precise if one.requires_grad])
    plain_grads = torch.autograd.grad(plain_loss.sum(), learn)
    worst, plain_worst = (
        max(relative_error(grad, expected) for grad, expected in zip(found, exact_grads, strict=True))
        for found in (grads, plain_grads)
    )
    return {
        "forward": (relative_error(loss, exact_loss), relative_error(plain_loss, exact_loss), torch.float32),
        "forward+backward": (worst, plain_worst, learn[0].dtype),
    }


def measured_rows(
    case: str,
    direction: str,
    contenders: Sequence[Contender],
    verdicts: dict[str, Verdict],
    wrap: Callable[[Callable[..., Tensor]], Callable[..., None]],
    inputs: list[tuple[Tensor, ...]],
    arguments: argparse.Namespace,
) -> list[Row]:
    """A row for each contender, judged and timed in this direction."""
    group = []
    for each in contenders:
        row = Row(case, direction, each.name, each.ours)
        verdict = verdicts[each.name]
        if isinstance(verdict, str):
            row.note = verdict
        else:
            judge(row, *verdict[direction])
        group.append((row, each, wrap(each.function)))
    measure(group, inputs, arguments)
    return [row for row, *_ in group]


def _times(call: Callable[[], None], arguments: argparse.Namespace) -> list[float]:
    """Microseconds of single calls (CUDA) or of short blocks of calls (CPU)."""
    seconds = arguments.seconds / arguments.rounds
    if arguments.device == "cpu":
        timer = Timer("call()", globals={"call": call}, num_threads=arguments.threads)
        measured = timer.blocked_autorange(min_run_time=seconds)
        return [time * 1e6 for time in measured.times]
    from triton.testing import do_bench, do_bench_cudagraph

    if arguments.graph:  # replayed ten times
        return [time * 1e3 for time in do_bench_cudagraph(call, rep=seconds * 100, return_mode="all")]
    return [time * 1e3 for time in do_bench(call, warmup=min(50, seconds * 500), rep=seconds * 1e3, return_mode="all")]


def _peak_memory(contender: Contender, run: Callable[..., None], inputs: tuple[Tensor, ...], device: str) -> float:
    """What a call takes at most beyond what was taken before it, in MB: of the GPU's memory, or of the process's.

    The process's counts what kernels allocate for themselves; Linux alone tells (NaN elsewhere).
    """
    if device == "cpu":
        return _peak_of_process(contender, run, inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with contender.context():
        run(*inputs)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _peak_of_process(contender: Contender, run: Callable[..., None], inputs: tuple[Tensor, ...]) -> float:
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give back what was freed, or it would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
        with contender.context():
            run(*inputs)
        return _resident("VmHWM") - before
    except (OSError, AttributeError):
        return math.nan


def _resident(kind: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{kind}:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def judge(row: Row, error: float, formula_error: float, dtype: torch.dtype) -> None:
    """Ours must keep the tests' rule: twice the plain formula's error plus a rounding. A baseline may be 10 off."""
    row.error = error
    row.correct = error <= (2 if row.ours else 10) * formula_error + 2 * torch.finfo(dtype).eps


def relative_error(result: Tensor, exact: Tensor) -> float:
    """NaN where a value is missing, which no bound accepts."""
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


def compare(rows: Iterable[Row]) -> None:
    """Speed-ups of ours over the fastest correct baseline of the same case and direction, if ours is correct."""
    rows = list(rows)
    for row in rows:
        rivals = [
            other.median
            for other in rows
            if (other.case, other.direction) == (row.case, row.direction)
            and other.median and other.correct and not other.ours
        ]  # fmt: skip
        if row.ours and row.correct and row.median and rivals:
            row.speedup = min(rivals) / row.median


def limits(names: Iterable[str], arguments: argparse.Namespace) -> Limits:
    """Measured here and now: shares of a data sheet's peak would hide a slow machine."""
    result = Limits()
    on_cpu = arguments.device == "cpu"
    for name in dict.fromkeys([*names, "float32"] if on_cpu else names):
        for size in (512, 2048) if on_cpu else (8192,):
            a, b = (torch.randn(size, size, device=arguments.device).to(DTYPES[name]) for _ in range(2))
            products = [partial(torch.mm, a, b)]
            if on_cpu and name == "float32":  # on AMD's CPUs oneDNN's convolution is a faster product than MKL's
                products.append(partial(torch.conv2d, a[None, :, None].permute(0, 3, 1, 2), b[:, :, None, None]))
            time = min(statistics.median(_times(product, _plain(arguments))) for product in products)
            result.gemm[name] = 2 * size**3 / time / 1e3
            if time > 1e5:  # bfloat16 without instructions for it: the larger one would take a minute
                break
    source = torch.randn((64 << 20) if on_cpu else (256 << 20), device=arguments.device)
    target = torch.empty_like(source)
    time = statistics.median(_times(lambda: target.copy_(source), _plain(arguments)))
    result.copy = 2 * source.nbytes / time / 1e3
    return result


def _plain(arguments: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**(vars(arguments) | {"graph": False}))


def start(options: argparse.ArgumentParser) -> tuple[argparse.Namespace, Limits]:
    """Read the command line, fix threads and seed, and measure the machine."""
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments, limits(dtypes(arguments), arguments)


def finish(
    benchmark: str, arguments: argparse.Namespace, measured: Limits, rows: list[Row], share_of: str, **more
) -> int:
    """Compare, print and record (with `more`); the exit status: 1 if ours was wrong anywhere."""
    compare(rows)
    print_table(rows, share_of)
    gemm = ", ".join(f"{name} {rate:.0f} GF/s" for name, rate in measured.gemm.items())
    print(f"limits measured in this run: GEMM {gemm}; copy {measured.copy:.0f} GB/s; threads {arguments.threads}")
    for line in acceptance.lines(rows, _floors_of(arguments), share_of):
        print(line)
    print(f"record: {record(benchmark, arguments, measured, rows, **more)}")
    late = sum(row.note == OUT_OF_TIME for row in rows)
    if late:
        print(f"{late} of {len(rows)} rows {OUT_OF_TIME}")
    return int(any(row.ours and not row.correct and row.note != OUT_OF_TIME for row in rows))


def _floors_of(arguments: argparse.Namespace) -> str:
    """Which table of `acceptance.FLOORS` this machine is held to."""
    if arguments.device == "cuda":
        return "cuda"
    return "cpu with AMX" if "amx" in vitkd_fast.backends.implementation("attention", "cpu").reason else "cpu"


def print_table(rows: Iterable[Row], share_of: str) -> None:
    columns = f"{'case':<24}{'direction':<18}{'contender':<26}{'median µs':>11}{'20-80 %':>19}{'GF/s':>9}{'GB/s':>8}"
    print(f"{columns}{share_of:>9}{'extra MB':>10}{'error':>9}{'speed-up':>10}")
    for row in rows:
        if row.median is None:
            print(f"{row.case:<24}{row.direction:<18}{row.contender:<26}  {row.note}")
            continue
        line = f"{row.case:<24}{row.direction:<18}{row.contender:<26}{row.median:>11.1f}"
        line += f"{f'{row.low:.1f}-{row.high:.1f}':>19}{row.gflops or 0:>9.0f}{row.gbytes or 0:>8.0f}"
        line += f"{row.share or 0:>9.0%}{'' if row.extra_mb is None else f'{row.extra_mb:.0f}':>10}{row.error:>9.1e}"
        verdict = "" if row.speedup is None else f"{row.speedup:.2f}x"
        print(f"{line}{verdict if row.correct else 'WRONG':>10}")


def record(benchmark: str, arguments: argparse.Namespace, measured: Limits, rows: list[Row], **more) -> Path:
    """Write what was measured, where and when, as one JSON file; returns its path."""
    now = datetime.now(timezone.utc)
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = _machine(arguments)
    kind = re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or machine["cpu"]).lower()).strip("-")
    graph = "-graph" if arguments.graph else ""
    path = arguments.out / f"{benchmark}-{kind}{graph}-{now:%Y%m%dT%H%M%SZ}.json"
    content = {
        "benchmark": benchmark,
        "date": now.isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": machine,
        "arguments": {key: value for key, value in vars(arguments).items() if key != "out"},
        "limits": asdict(measured),
        "rows": [asdict(row) for row in rows],
        **more,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _machine(arguments: argparse.Namespace) -> dict:
    on_gpu = arguments.device == "cuda"
    choice = vitkd_fast.backends.implementation("attention", arguments.device)
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "capability": torch.cuda.get_device_capability() if on_gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": platform.python_version(),
        "vitkd_fast": vitkd_fast.__version__,
        "implementation": f"{choice.name}: {choice.reason}",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


def _version(module: str) -> str | None:
    with contextlib.suppress(ImportError):
        return __import__(module).__version__
    return None


def _git(*command: str) -> str | None:
    try:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]
