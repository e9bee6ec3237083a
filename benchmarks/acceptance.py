"""How fast the kernels are meant to be, on an H200 and on two CPU cores, and which of these floors a run met."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Floor:
    """`speedup` over the fastest correct baseline (with `against` in its name, or without it after a minus sign), and
    `share` of what the machine reached in the same run: of a copy on a GPU, of a matrix product on a CPU."""

    case: str
    direction: str
    speedup: float
    share: float | None = None
    against: str = ""


def _attention(dtype: str, forward: tuple, both: tuple, *shapes: str) -> list[Floor]:
    directions = (("forward", forward), ("forward+backward", both))
    return [Floor(f"{dtype} {shape}", name, *floor) for shape in shapes for name, floor in directions if floor]


def _both(case: str, *floor, against: str = "") -> Floor:
    return Floor(case, "forward+backward", *floor, against=against)


def _kd_loss(case: str, eager: tuple, compiled: float) -> list[Floor]:
    return [_both(case, *eager, against="-torch.compile"), _both(case, compiled, against="torch.compile")]


_CPU = [
    *_attention("float32", (1.5,), (1.6, 0.60), "32,3,197,64", "32,6,197,64"),
    *_attention("float32", (), (1.8,), "64,3,65,64", "64,3,50,64"),
    *_attention("float32", (), (2.0,), "64,4,17,32"),
    *_kd_loss("float32 kl 256x1000", (4.0,), 1.5),
    _both("float32 deit_tiny 224", 1.05),
    _both("float32 vit_tiny 32/4", 1.1),
]

FLOORS = {
    "cuda": [
        *_attention("bfloat16", (1.5, 0.70), (1.7, 0.55), "256,6,197,64", "256,3,197,64", "256,12,197,64"),
        *_attention("bfloat16", (2.0,), (2.5,), "1024,3,65,64", "1024,3,50,64"),
        *_attention("bfloat16", (1.3,), (1.4,), "256,6,257,64"),
        *_kd_loss("bfloat16 kl 256x1000", (5.0,), 1.5),
        *_kd_loss("bfloat16 kl 4096x1000", (5.0, 0.80), 1.5),
    ],
    "cpu": _CPU,
    "cpu with AMX": [
        *_CPU,
        *_attention("bfloat16", (2.0,), (2.5, 0.30), "32,3,197,64", "32,6,197,64"),
        *(_both(f"bfloat16 {shape}", 6.0, against="sdpa") for shape in ("32,3,197,64", "32,6,197,64")),
        *_attention("bfloat16", (), (2.5,), "64,3,65,64", "64,3,50,64"),
        *(_both(f"bfloat16 {shape}", 15.0, against="sdpa") for shape in ("64,3,65,64", "64,3,50,64")),
        *_attention("bfloat16", (), (3.0,), "64,4,17,32"),
        *_kd_loss("bfloat16 kl 256x1000", (4.0,), 1.5),
        _both("bfloat16 deit_tiny 224", 1.4),
        _both("bfloat16 vit_tiny 32/4", 1.7),
    ],
}


def lines(rows: Iterable, machine: str, share_of: str) -> list[str]:
    """One line for each floor of that machine whose case was measured: what was reached, and whether that is enough."""
    found = []
    for floor in FLOORS[machine]:
        here = [row for row in rows if (row.case, row.direction) == (floor.case, floor.direction)]
        chosen = next((row for row in here if row.chosen), None)
        if chosen is not None:
            found.append(f"floor {floor.case:<24}{floor.direction:<18}{_verdict(floor, chosen, here, share_of)}")
    return found


def _verdict(floor: Floor, chosen, here, share_of: str) -> str:
    if not chosen.ours:
        return f"NOT MET: this is left to {chosen.contender}"
    rivals = [row for row in here if not row.ours and row.median and row.correct and _counts(floor, row.contender)]
    if not (chosen.median and chosen.correct and rivals):
        return f"not judged: {chosen.contender} or its baselines were not measured, or were wrong"
    best = min(rivals, key=lambda row: row.median)
    speedup = best.median / chosen.median
    met = speedup >= floor.speedup and (floor.share is None or chosen.share >= floor.share)
    text = f"{'met' if met else 'NOT MET'}: {chosen.contender} {speedup:.2f}x of {floor.speedup}x over {best.contender}"
    return text if floor.share is None else f"{text}, {chosen.share:.0%} of {floor.share:.0%} {share_of}"


def _counts(floor: Floor, contender: str) -> bool:
    if floor.against.startswith("-"):
        return floor.against[1:] not in contender
    return floor.against in contender
