"""How good is a detector made without data? Teacher, data-free student and its bounds on a folder of real scenes.

The teacher is trained on the training scenes or given; the student learns by KD on those scenes (the upper bound), from
noise (the lower bound) and by each data-free method, which gets teacher and student and nothing else.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, _cpu_name, _git
from detection_windows import Windows, to_measure_on
from safetensors.torch import save_model
from torch import Tensor, nn

from vitkd_fast.detection.data import Scenes, read_scenes
from vitkd_fast.detection.objects import Objects, clipped
from vitkd_fast.detection.training import small_yolos, train
from vitkd_fast.distill import distill
from vitkd_fast.generator import ImageSpec, supplied
from vitkd_fast.methods import DETECTION_METHODS
from vitkd_fast.report import Report, percent

SHIFT = 0.125  # of the sides, by which training scenes are moved at most
POINTS = 10  # in the course of a run at which its student is measured
REAL = "real_kd"  # the bound that sees real scenes
PARTS = ("train", "val")  # to learn from, to measure on


def main(argv: Sequence[str] | None = None) -> int:
    """Train or load the teacher, make every student, print the table, write the record."""
    arguments = parsed(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    known, held = (read_scenes(annotations(arguments.data, part), tuple(arguments.size)) for part in PARTS)
    if arguments.window and arguments.window > min(arguments.size):
        raise SystemExit(f"detection.py: --window is {arguments.window}, larger than scenes of {arguments.size}.")
    if known.classes != held.classes:
        raise SystemExit(f"detection.py: classes to learn, {known.classes}, and to measure, {held.classes}, differ.")
    spec = ImageSpec(*(2 * [arguments.window] if arguments.window else arguments.size), (0.5,) * 3, (0.5,) * 3)
    learned = Windows(known, arguments.window) if arguments.window else Moved(known)
    measured = to_measure_on(held, arguments.window) if arguments.window else held
    started = time.perf_counter()
    sizes = {"classes": len(known.classes), "patch": arguments.patch, "queries": arguments.queries}
    if arguments.teacher:
        teacher = given(arguments.teacher)
    else:
        teacher = small_yolos(spec, **sizes, **triple(arguments.teacher_size)).to(arguments.device)
        say(f"training the teacher on {len(known)} scenes, {arguments.teacher_steps:,} steps …")
        steps = {"steps": arguments.teacher_steps, "lr": arguments.teacher_lr}
        train(teacher, learned, spec, batch_size=arguments.batch_size, **steps)
        arguments.out.mkdir(parents=True, exist_ok=True)
        save_model(teacher, str(arguments.out / "teacher.safetensors"))
    seconds = time.perf_counter() - started
    reports: dict[str, Report] = {}
    courses: dict[str, list[dict[str, Any]]] = {}
    for name in (REAL, *arguments.methods):
        torch.manual_seed(arguments.seed)
        student = small_yolos(spec, **sizes, **triple(arguments.student_size)).to(arguments.device)
        say(f"{name} …")
        with supplied(lambda count: learned(count)[0]) as real_images:
            result = distill(
                teacher,
                student,
                task="detection",
                evaluate=measured,
                evaluate_every=max(1, arguments.steps // POINTS),
                steps=arguments.steps,
                batch_size=arguments.batch_size,
                precision=arguments.precision,
                seed=arguments.seed,
                out=arguments.out / name,
                overwrite=True,
                **({"generator": real_images, "candidates": 1} if name == REAL else {"method": name}),
            )
        if result.report.status == "interrupted":
            return 130
        reports[name] = result.report
        courses[name] = [{"step": e["step"], **e["evaluated"]} for e in result.history if "evaluated" in e]
        courses[name].append({"step": result.report.steps, **figures(result.report)})
    print(table(reports))
    for name, course in courses.items():
        print(f"{name}, agreement after steps: " + ", ".join(f"{e['step']} {percent(e['agreement'])}" for e in course))
    print(f"record: {record(arguments, known, held, seconds, reports, courses)}")
    return 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = options.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="instances_train.json, instances_val.json and images")
    add("--teacher", metavar="FILE:NAME", help="a function without arguments in a Python file that gives a detector")
    add("--methods", nargs="+", choices=list(DETECTION_METHODS), default=["noise", "best"])
    add("--size", nargs=2, type=int, default=[128, 160], metavar=("HEIGHT", "WIDTH"), help="scenes are stretched to it")
    add("--window", type=int, metavar="SIDE", help="learn and measure on windows of that side, cut around objects")
    add("--patch", type=int, default=16)
    add("--queries", type=int, default=10)
    add("--teacher-size", nargs=3, type=int, default=[96, 6, 3], metavar=("WIDTH", "DEPTH", "HEADS"))
    add("--student-size", nargs=3, type=int, default=[56, 4, 2], metavar=("WIDTH", "DEPTH", "HEADS"))
    add("--teacher-steps", type=int, default=3000)
    add("--teacher-lr", type=float, default=6e-4, help="peak of the one cycle")
    add("--steps", type=int, default=3000, help="student steps of every run")
    add("--batch-size", type=int, default=32)
    add("--seed", type=int, default=0)
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=["float32", "bfloat16"], default="float32")
    add("--threads", type=int, default=torch.get_num_threads())
    add(
        "--out",
        type=Path,
        default=Path("runs/detection"),
        help="the teacher's weights, and a run folder for each student",
    )
    add("--results", type=Path, default=ROOT / "benchmarks/results", help="where the record goes")
    return options.parse_args(argv)


def annotations(folder: Path, part: str) -> Path:
    """The annotation file of one part, as COCO names it: instances_train.json, instances_val2017.json, …"""
    found = sorted(folder.glob(f"instances_{part}*.json"))
    if len(found) != 1:
        raise SystemExit(f"detection.py: {len(found)} files instances_{part}*.json in {folder}; there must be one.")
    return found[0]


def triple(size: Sequence[int]) -> dict[str, int]:
    return dict(zip(("width", "depth", "heads"), size, strict=True))


def given(place: str) -> nn.Module:
    """The detector that a function in a Python file makes; the file registers an adaptor if it needs one."""
    path, _, name = place.rpartition(":")
    found = importlib.util.spec_from_file_location("given_detector", path) if path.endswith(".py") else None
    if found is None or found.loader is None or not Path(path).exists():
        raise SystemExit(f"detection.py: --teacher is {place!r}; accepted: FILE.py:FUNCTION of a file that is there.")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return getattr(module, name)()


class Moved:
    """Batches of random training scenes, mirrored or not and moved a little, with the boxes that are still there."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __call__(self, count: int) -> tuple[Tensor, list[Objects]]:
        pairs = [self._moved(*self.scenes[int(index)]) for index in torch.randint(len(self.scenes), (count,))]
        pixels, objects = zip(*pairs)
        return torch.stack(pixels), list(objects)

    def _moved(self, pixels: Tensor, objects: Objects) -> tuple[Tensor, Objects]:
        boxes = objects.boxes.clone()
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
            boxes[:, 0] = 1 - boxes[:, 0]
        for dim, axis in ((-1, 0), (-2, 1)):
            side = pixels.shape[dim]
            most = round(SHIFT * side)
            move = int(torch.randint(-most, most + 1, ()))
            pixels = pixels.index_select(dim, (torch.arange(side) - move).clamp(0, side - 1))
            boxes[:, axis] += move / side
        return pixels, clipped(Objects(boxes, objects.labels))


def figures(report: Report) -> dict[str, Any]:
    """What a report says of the scenes to measure on, as in the course of a run."""
    names = ("agreement", "teacher_map", "teacher_map50", "student_map", "student_map50")
    return {name: getattr(report, name) for name in names}


def table(reports: dict[str, Report]) -> str:
    teacher = next(iter(reports.values()))
    rows = [("", "mAP50", "mAP", "agreement", "parameters", "seconds")]
    rows.append(
        ("teacher", *map(percent, (teacher.teacher_map50, teacher.teacher_map)), "", _count(teacher.teacher), "")
    )
    for name, report in reports.items():
        figures = map(percent, (report.student_map50, report.student_map, report.agreement))
        rows.append((name, *figures, _count(report.student), f"{report.seconds:.0f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _count(facts: Any) -> str:
    return f"{facts.parameters:,}"


def record(
    arguments: argparse.Namespace,
    known: Scenes,
    held: Scenes,
    seconds: float,
    reports: dict[str, Report],
    courses: dict[str, list[dict[str, Any]]],
) -> Path:
    """What was measured, where and when, as a JSON file."""
    now = datetime.now(timezone.utc)
    content = {
        "benchmark": "detection",
        "date": now.isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": torch.cuda.get_device_name() if arguments.device == "cuda" else _cpu_name(),
        "arguments": {
            name: value for name, value in vars(arguments).items() if name not in ("data", "out", "results", "teacher")
        },
        "data": {"classes": known.classes, "scenes": [len(known), len(held)]},
        "teacher_seconds": seconds,
        "students": {name: report.to_dict() for name, report in reports.items()},
        "courses": courses,
    }
    for report in content["students"].values():
        report["settings"].pop("out")
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"detection-{now:%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
