"""How fast the kernels are meant to be on an H200 in bfloat16, and which of these floors a run met."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Floor:
    """`speedup` over the fastest correct baseline (with `against` in its name, or without it after a minus sign), and
    `share` of the copy bandwidth measured in the same run."""

    case: str
    direction: str
    speedup: float
    share: float | None = None
    against: str = ""


def _attention(forward: tuple, both: tuple, *shapes: str) -> list[Floor]:
    directions = (("forward", forward), ("forward+backward", both))
    return [Floor(f"bfloat16 {shape}", name, *floor) for shape in shapes for name, floor in directions]


FLOORS = [
    *_attention((1.5, 0.70), (1.7, 0.55), "256,6,197,64", "256,3,197,64", "256,12,197,64"),
    *_attention((2.0,), (2.5,), "1024,3,65,64", "1024,3,50,64"),
    *_attention((1.3,), (1.4,), "256,6,257,64"),
    Floor("bfloat16 kl 256x1000", "forward+backward", 5.0, against="-torch.compile"),
    Floor("bfloat16 kl 256x1000", "forward+backward", 1.5, against="torch.compile"),
    Floor("bfloat16 kl 4096x1000", "forward+backward", 5.0, 0.80, against="-torch.compile"),
    Floor("bfloat16 kl 4096x1000", "forward+backward", 1.5, against="torch.compile"),
]


def lines(rows) -> list[str]:
    """One line for each floor whose case was measured: what was reached, and whether that is enough."""
    found = []
    for floor in FLOORS:
        here = [row for row in rows if (row.case, row.direction) == (floor.case, floor.direction)]
        chosen = next((row for row in here if row.chosen), None)
        if chosen is not None:
            found.append(f"floor {floor.case:<24}{floor.direction:<18}{_verdict(floor, chosen, here)}")
    return found


def _verdict(floor: Floor, chosen, here) -> str:
    if not chosen.ours:
        return f"NOT MET: this is left to {chosen.contender}"
    rivals = [row for row in here if not row.ours and row.median and row.correct and _counts(floor, row.contender)]
    if not (chosen.median and chosen.correct and rivals):
        return f"not judged: {chosen.contender} or its baselines were not measured, or were wrong"
    best = min(rivals, key=lambda row: row.median)
    speedup = best.median / chosen.median
    met = speedup >= floor.speedup and (floor.share is None or chosen.share >= floor.share)
    text = f"{'met' if met else 'NOT MET'}: {chosen.contender} {speedup:.2f}x of {floor.speedup}x over {best.contender}"
    return text if floor.share is None else f"{text}, {chosen.share:.0%} of {floor.share:.0%} of copy"


def _counts(floor: Floor, contender: str) -> bool:
    if floor.against.startswith("-"):
        return floor.against[1:] not in contender
    return floor.against in contender
