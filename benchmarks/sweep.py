"""Is `vitkd_fast.ops.attention`, as it is called, anywhere slower than 0.98 of the best of SDPA's backends?

Every size that the tests know, forward and forward with backward, few timings each, as replays of CUDA graphs: no
launch costs on any side. Printed are the offenders. Left out, since they could not win: torch.compile, which takes
seconds a size and calls SDPA itself, and above 128 tokens the math backend, which moves N x N matrices through memory.
Its record also has the CUDA and the Triton kernels side by side, which choose.py needs. It takes a CUDA device.
"""

import statistics
import sys

import torch
from _common import Contender, Limits, Row, compare, out_of_time, parser, record, start
from attention import DIRECTIONS, SDPA, check, make_inputs, ours, rate, row_of, sdpa
from torch.nn.attention import sdpa_kernel

from vitkd_fast.ops import attention

# Those that matter most come first, so that a run which --limit cuts short has seen them.
TOKENS = (197, 50, 65, 257, 17, 577, 145, 272, 273, 128, 129, 100, 16, 198, 196, 127, 64, 49, 256, 15, 2, 1, 1025)
HEAD_DIMS = (64, 32, 48, 80, 96, 128, 16, 24)
DTYPES = ("bfloat16", "float16", "float32")
ELEMENTS = 32 << 20  # of qkv: their traffic alone takes 20 µs on an H200
CALLS = 8  # in a graph, on inputs that take turns
TOLERATED = 0.98


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    options.add_argument("--head-dims", nargs="+", type=int, default=HEAD_DIMS)
    arguments, measured = start(options)
    arguments.dtype = arguments.dtype or list(DTYPES)
    if arguments.device != "cuda":
        options.error("the sweep takes --device cuda: it replays CUDA graphs")
    return sweep(arguments, measured)


def sweep(arguments, measured: Limits) -> int:
    sizes = [
        (name, size_of(tokens, head_dim))
        for head_dim in arguments.head_dims
        for tokens in arguments.tokens
        for name in arguments.dtype
    ]
    rows: list[Row] = []
    offenders: list[str] = []
    done = 0
    for name, size in sizes:
        if out_of_time(arguments):
            break
        found = run_case(size, name, arguments)
        for row in found:
            rate(row, size, name, measured, arguments.device)
        compare(found)
        offenders += filter(None, (verdict([row for row in found if row.direction == each]) for each in DIRECTIONS))
        rows += found
        done += 1
        torch.cuda.empty_cache()
    print(*offenders, sep="\n")
    print(f"record: {record('attention_sweep', arguments, measured, rows)}")
    print(
        f"{len(offenders)} slower than {TOLERATED} of the best; {done} of {len(sizes)} sizes measured, both directions"
    )
    return int(bool(offenders) or done == 0)


def size_of(tokens: int, head_dim: int) -> tuple[int, int, int, int]:
    """(B, H, N, D) of 384 channels or a little less."""
    heads = min(12, 384 // head_dim)
    return max(1, ELEMENTS // (3 * tokens * heads * head_dim)), heads, tokens, head_dim


def verdict(rows: list[Row]) -> str | None:
    """What is wrong with the first row of a case and direction, if anything is."""
    mine = rows[0]
    case = f"{mine.case:<28}{mine.direction:<18}"
    if not (mine.median and mine.correct):
        return f"{case}{mine.note or 'WRONG'}"
    rivals = [row for row in rows if row.median and row.correct and not row.ours]
    best = min(rivals, key=lambda row: row.median, default=None)
    if best is not None and best.median < TOLERATED * mine.median:
        return f"{case}{best.median / mine.median:.2f}x: {mine.median:.1f} µs, {best.contender} {best.median:.1f} µs"
    return None


def run_case(size: tuple[int, ...], name: str, arguments) -> list[Row]:
    inputs, scale = make_inputs(size, name, arguments.device), size[3] ** -0.5
    contenders = [Contender("attention()", attention, ours=True), *ours(arguments.device, scale)]
    contenders += [
        Contender(f"sdpa {kind}", sdpa(scale), context=lambda backend=backend: sdpa_kernel(backend))
        for kind, backend in SDPA[arguments.device].items()
        if kind != "math" or size[2] <= 128
    ]
    contenders.append(Contender("sdpa default", sdpa(scale)))
    contenders = [each for each in contenders if not any(word in each.name for word in arguments.skip)]
    verdicts = [check(each, *inputs[0], scale) for each in contenders]
    rows = []
    for direction, (wrap, _, _) in DIRECTIONS.items():
        here = [row_of(size, name, direction, *pair) for pair in zip(contenders, verdicts)]
        graphs = [
            None if row.note else captured(row, each, wrap(each.function), inputs)
            for row, each in zip(here, contenders)
        ]
        time_graphs(here, graphs, rounds=3)
        rivals = [row.median for row in here if row.median and row.correct and not row.ours]
        if here[0].median and rivals and min(rivals) < 1.02 * here[0].median:  # too close for few timings
            time_graphs(here, graphs, rounds=15)
        rows += here
    return rows


def captured(row: Row, contender: Contender, run, inputs) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with contender.context(), torch.cuda.graph(graph):
            for i in range(CALLS):
                run(*inputs[i % len(inputs)])
    except Exception as error:
        row.note = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        return None
    return graph


def time_graphs(rows: list[Row], graphs: list, rounds: int) -> None:
    """Contenders take turns; the first round warms up."""
    times: list[list[float]] = [[] for _ in rows]
    for number in range(rounds + 1):
        for seen, graph in zip(times, graphs):
            if graph is not None:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                if number > 0:
                    seen.append(begin.elapsed_time(end) * 1e3 / CALLS)
    for row, seen in zip(rows, times):
        if seen:
            row.median, row.low, row.high = statistics.median(seen), min(seen), max(seen)


if __name__ == "__main__":
    sys.exit(main())
