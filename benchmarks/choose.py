"""Writes vitkd_fast/choice.json from GPU records: who takes which sizes of attention and kd_loss, with which tiles.

    python benchmarks/choose.py RECORD.json... [--table FILE] [--out FILE]

Records of attention.py, sweep.py and kd_loss.py with --device cuda; of kd_loss.py those without --graph, since in
training it waits for the host, whose time graphs leave out. For each GPU, dtype (16 or 32 bits) and head_dim
the measured sizes are sorted; the fastest of "native", "triton" and, for attention, "sdpa" (what torch takes by itself)
wins each by its median of forward with backward, and attention without a gradient by that of the forward; neighbours
that differ are parted midway. Beyond the largest measured size nothing is known: a kernel of ours that won there keeps
what the default gives it, torch takes the rest; and of a head_dim measured only beyond the default's bound nothing is
written. GPUs of which no record is given keep their entry. The same records in any order give the same file.
"""

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from vitkd_fast.choice import default_tokens, dtype_class

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "vitkd_fast/choice.json"
NAMES = {"vitkd native": "native", "vitkd triton": "triton", "sdpa default": "sdpa"}  # a tie goes to the first


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("records", nargs="+", type=Path, metavar="RECORD.json")
    options.add_argument("--table", type=Path, default=TABLE, help="the table to start from")
    options.add_argument("--out", type=Path, help="where to write it; --table itself by default")
    arguments = options.parse_args()
    records = [json.loads(path.read_text()) for path in arguments.records]
    table = choose(records, json.loads(arguments.table.read_text()))
    (arguments.out or arguments.table).write_text(text(table))
    for entry in table["gpus"]:
        print(
            entry["gpu"],
            *(f"{key} {entry[key]}" for key in ("attention", "attention_forward", "kd_loss") if key in entry),
            sep="\n  ",
        )
    return 0


def choose(records: Iterable[dict], table: dict) -> dict:
    """The table with new entries for the GPUs of these records."""
    by_gpu = defaultdict(list)
    for record in records:
        machine = record["machine"]
        if not machine.get("gpu"):
            raise SystemExit(f"the {record['benchmark']} record of {record['date']} is not of a GPU")
        by_gpu[machine["gpu"], tuple(machine["capability"])].append(record)
    entries = {(entry["gpu"], tuple(entry["capability"])): entry for entry in table["gpus"]}
    for (gpu, capability), found in by_gpu.items():
        found.sort(key=lambda record: (record["date"], json.dumps(record, sort_keys=True)))
        entries[gpu, capability] = {"gpu": gpu, "capability": list(capability), **entry_of(capability, found)}
    return {"gpus": [entries[key] for key in sorted(entries)]}


def entry_of(capability: tuple[int, int], records: list[dict]) -> dict:
    measured = [{key: record.get(key) for key in ("benchmark", "date", "commit")} for record in records]
    entry: dict = {"measured": measured}
    for key, direction in (("attention", "forward+backward"), ("attention_forward", "forward")):
        attention = sizes_of(records, ("attention", "attention_sweep"), direction)
        for (dtype, head_dim), sizes in sorted(attention.items()):
            default = default_tokens(capability, dtype, head_dim)
            if min(sizes) > default:
                continue
            ranges = close(parted(sizes), default)
            entry.setdefault(key, {}).setdefault(dtype, {})[str(head_dim)] = ranges
    for (dtype, _), sizes in sorted(sizes_of(records, ("kd_loss",), "forward+backward").items()):
        ranges = parted(sizes)
        entry.setdefault("kd_loss", {})[dtype] = [*ranges[:-1], [None, ranges[-1][1]]]
    tiles = [each for record in records for each in record.get("tiles", [])]
    for each in sorted(tiles, key=lambda each: (each["kind"], each["dtype"], each["head_dim"], each["tokens"])):
        place = entry.setdefault("tiles", {}).setdefault(each["kind"], {}).setdefault(each["dtype"], {})
        place.setdefault(str(each["head_dim"]), {})[str(each["tokens"])] = each["tiles"]
    return entry


def sizes_of(records: list[dict], benchmarks: tuple[str, ...], direction: str) -> dict[tuple[str, int], dict[int, str]]:
    """(dtype class, head_dim) -> size -> the winner. Of a case in several records the last record counts."""
    cases: dict[str, dict[str, float]] = {}
    for record in records:
        by_device_alone = record["benchmark"] == "kd_loss" and record["arguments"]["graph"]
        if record["benchmark"] in benchmarks and not by_device_alone:
            here: dict[str, dict[str, float]] = defaultdict(dict)
            for row in record["rows"]:
                counts = row["contender"] in NAMES and row["direction"] == direction
                if counts and row["median"] and row["correct"]:
                    here[row["case"]][NAMES[row["contender"]]] = row["median"]
            cases |= {case: times for case, times in here.items() if len(times) > 1}
    costs: dict = defaultdict(lambda: defaultdict(list))
    for case, times in sorted(cases.items()):
        kind, size = parse(case)
        costs[kind][size].append({name: math.log(time / min(times.values())) for name, time in times.items()})
    return {
        kind: {size: winner(found) for size, found in sorted(sizes.items())} for kind, sizes in sorted(costs.items())
    }


def winner(costs: list[dict[str, float]]) -> str:
    """The least geometric mean of time over the best, of those that were measured in all cases of this size."""
    everywhere = [name for name in NAMES.values() if all(name in cost for cost in costs)]
    candidates = everywhere or [name for name in NAMES.values() if any(name in cost for cost in costs)]
    return min(candidates, key=lambda name: sum(cost.get(name, math.inf) for cost in costs))


def parse(case: str) -> tuple[tuple[str, int], int]:
    """("16-bit", head_dim), tokens of "bfloat16 256,6,197,64"; ("16-bit", 0), classes of "bfloat16 kl 256x1000"."""
    name, *_, size = case.split()
    dtype = dtype_class(getattr(torch, name))
    if "," in size:
        _, _, tokens, head_dim = map(int, size.split(","))
        return (dtype, head_dim), tokens
    return (dtype, 0), int(size.split("x")[1])


def parted(sizes: dict[int, str]) -> list[list]:
    """[[up to this size, who], ...], the last one up to the largest that was measured."""
    ranges: list[list] = []
    for size, name in sorted(sizes.items()):
        if ranges and ranges[-1][1] != name:
            ranges[-1][0] = (ranges[-1][0] + size) // 2
        if ranges and ranges[-1][1] == name:
            ranges[-1][0] = size
        else:
            ranges.append([size, name])
    return ranges


def close(ranges: list[list], default: int) -> list[list]:
    """With torch beyond what is known."""
    *first, (largest, name) = ranges
    if name == "sdpa":
        return [*first, [None, "sdpa"]]
    return [*first, [max(largest, default), name], [None, "sdpa"]]


def text(table: dict) -> str:
    """One range, or one tile, a line."""
    lines = json.dumps(table, indent=1)
    flat = re.compile(r"\[\s+((?:-?\d+|null|\"\w+\")(?:,\s+(?:-?\d+|\"\w+\"))*)\s+\]")
    return flat.sub(lambda found: "[" + re.sub(r",\s+", ", ", found[1]) + "]", lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
