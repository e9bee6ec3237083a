"""What the runs come to, over all seeds: table, plot, floors and JSON record."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _common import Limits, record
from accuracy_bench import Bench, say
from accuracy_floors import Result, settings_judged, verdicts
from accuracy_models import parameters
from accuracy_pair import Teacher
from accuracy_runs import Run
from torch import nn


def report(bench: Bench, teachers: list[Teacher], student: nn.Module, runs: list[Run]) -> int:
    """Table, plot, floors and record; the exit status: 1 if a run failed."""
    arguments = bench.arguments
    found = outcomes(runs)
    facts = {"teacher": parameters(teachers[0].model), "student": parameters(student)}
    seconds = max(found["best"].seconds) if "best" in found else None
    means = {name: statistics.mean(one.accuracy) for name, one in found.items()}
    teacher_mean = 100 * statistics.mean(teacher.accuracy for teacher in teachers)
    result = Result(len(teachers), teacher_mean, means, seconds, facts["teacher"] / facts["student"])
    budget = f"{arguments.seconds:g} s" if arguments.seconds else f"{arguments.steps:,} steps"
    machine = bench.machine
    head = (
        f"{arguments.data}: teacher {facts['teacher']:,} weights, student {facts['student']:,}; {budget} of "
        f"{bench.task.batch_size} images; seeds: {arguments.seeds}; {machine['device']}, {machine['threads']} threads, "
        f"{machine['precision']}"
    )
    lines = table(teachers, found, runs)
    judged = verdicts(settings_judged(arguments, teachers[0].model), result)
    notes = list(dict.fromkeys(f"{run.method}: {note}" for run in runs for note in run.notes))
    arguments.out.mkdir(parents=True, exist_ok=True)
    page = arguments.out / f"accuracy-{arguments.data}.md"
    page.write_text(
        "\n".join([head, "", *lines, "", *(f"- {line}" for line in judged + notes)]) + "\n", encoding="utf-8"
    )
    say("\n".join(["", head, "", *lines, "", *judged, *(f"note {note}" for note in notes)]))
    say(f"table: {page}; samples: {arguments.out / 'samples'}; {plot(arguments, teacher_mean, found)}")
    say(f"record: {_recorded(bench, teachers, runs, facts, lines, judged)}")
    return int(any(run.error for run in runs))


@dataclass(frozen=True)
class Outcome:
    """All seeds of one contender; accuracy and agreement in percent."""

    method: str
    accuracy: list[float]
    agreement: list[float]
    seconds: list[float]
    images_per_second: list[float]


def outcomes(runs: list[Run]) -> dict[str, Outcome]:
    """By contender, of those whose every seed succeeded: a mean of the lucky ones would flatter."""
    found = {}
    for name in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == name]
        if not any(run.error for run in own):
            columns = ([getattr(run, what) for run in own] for what in ("seconds", "images_per_second"))
            shares = ([100 * getattr(run, what) for run in own] for what in ("accuracy", "agreement"))
            found[name] = Outcome(name, *shares, *columns)
    return found


def table(teachers: list[Teacher], found: dict[str, Outcome], runs: list[Run]) -> list[str]:
    """Markdown that reads well in a terminal, too."""
    rows = [("", "accuracy, %", "agreement, %", "seconds", "images/s")]
    rows.append(("teacher", spread([100 * teacher.accuracy for teacher in teachers]), "", "", ""))
    for name in dict.fromkeys(run.method for run in runs):
        if name not in found:
            failed = next(run for run in runs if run.method == name and run.error)
            rows.append((name, f"failed with seed {failed.seed}", "", "", ""))
            continue
        one = found[name]
        speed = f"{statistics.mean(one.seconds):.1f}", f"{statistics.mean(one.images_per_second):,.0f}"
        rows.append((name, spread(one.accuracy), spread(one.agreement), *speed))
    widths = [max(map(len, column)) for column in zip(*rows)]
    ruler = tuple("-" * (width - 1) + ("-" if first else ":") for width, first in zip(widths, [True] + [False] * 4))
    return [_line(row, widths) for row in (rows[0], ruler, *rows[1:])]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths))
    )
    return f"| {' | '.join((first, *others))} |"


def spread(values: list[float]) -> str:
    """Mean and, of more than one, the sample's standard deviation."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def plot(arguments: argparse.Namespace, teacher: float, found: dict[str, Outcome]) -> str:
    """Accuracy against wall time, one point with its spreads for each contender; says where it is, or why it is not."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: that needs matplotlib (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.axhline(teacher, color="grey", linestyle="--", label="teacher")
    for index, one in enumerate(found.values()):
        spreads = (statistics.stdev(values) if len(values) > 1 else 0.0 for values in (one.accuracy, one.seconds))
        up, across = spreads
        axes.errorbar(
            statistics.mean(one.seconds),
            statistics.mean(one.accuracy),
            up,
            across,
            "os^Dv*PX"[index % 8],
            capsize=3,
            label=one.method,
        )
    axes.set(xlabel="wall time of learning, s", ylabel="test accuracy, %", title=f"{arguments.data}, mean ± sd")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", bbox_to_anchor=(1, 1), loc="upper left")
    path = arguments.out / f"accuracy-{arguments.data}.png"
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return f"plot: {path}"


def _recorded(
    bench: Bench, teachers: list[Teacher], runs: list[Run], facts: dict[str, int], lines: list[str], judged: list[str]
) -> Path:
    """In the form of the other benchmarks' records; settings once for each contender, and no folder of this machine."""
    local = {"out", "cache", "results", "data_dir"}
    asked = {
        key: value.name if isinstance(value, Path) else value
        for key, value in vars(bench.arguments).items()
        if key not in local
    }
    rows: Any = [replace(run, settings={}) for run in runs]
    where = argparse.Namespace(**asked, out=bench.arguments.results, graph=False)
    return record(
        f"accuracy-{bench.arguments.data}",
        where,
        Limits(),
        rows,
        data=bench.fingerprint,
        task=asdict(bench.task),
        parameters=facts,
        teachers=[{"accuracy": one.accuracy, "seconds": one.seconds, "digest": one.digest} for one in teachers],
        settings={run.method: run.settings for run in runs if run.settings},
        table=lines,
        floors=judged,
    )
