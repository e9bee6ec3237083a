"""The floors that `best` must reach in each setting, and whether a result reached them."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from accuracy_models import ResNet
from torch import nn

from vitkd_fast.methods import METHODS

OURS = ("best", "adversarial")


@dataclass(frozen=True)
class Result:
    """What the floors judge: means over seeds, in percent."""

    seeds: int
    teacher: float
    methods: dict[str, float]
    seconds: float | None
    """Of the slowest run of `best`."""
    ratio: float
    """Weights of the teacher over those of the student."""


Verdict = tuple[bool, str]


class NotJudgedError(Exception):
    """What a floor compares was not run."""


def _mean(result: Result, method: str) -> float:
    if method not in result.methods:
        raise NotJudgedError(f"{method} was not run, or failed")
    return result.methods[method]


def teacher_reaches(result: Result, figure: float) -> Verdict:
    return result.teacher >= figure, f"teacher {result.teacher:.2f} % of {figure} %"


def best_reaches(result: Result, figure: float) -> Verdict:
    best = _mean(result, "best")
    return best >= figure, f"best {best:.2f} % of {figure} %"


def within_of_teacher(result: Result, figure: float) -> Verdict:
    below = result.teacher - _mean(result, "best")
    return below <= figure + 1e-9, f"best {below:.2f} points below the teacher, {figure} allowed"


def within_of_real_kd(result: Result, figure: float) -> Verdict:
    below = _mean(result, "real_kd") - _mean(result, "best")
    return below <= figure + 1e-9, f"best {below:.2f} points below KD on real images, {figure} allowed"


def ahead_of_peers(result: Result, figure: float) -> Verdict:
    best, peers = _mean(result, "best"), {name: _mean(result, name) for name in METHODS if name not in OURS}
    name = max(peers, key=lambda peer: peers[peer])
    ahead = best - peers[name]
    met = ahead >= figure - 1e-9 if figure else ahead > 0
    return met, f"best {ahead:+.2f} points from {name}, the best of {len(peers)} others; {figure or 'any'} asked"


def minutes(result: Result, figure: float) -> Verdict:
    _mean(result, "best")
    assert result.seconds is not None
    return result.seconds <= 60 * figure, f"best took {result.seconds / 60:.1f} of {figure} minutes"


def times_smaller(result: Result, figure: float) -> Verdict:
    return result.ratio >= figure, f"student {result.ratio:.2f} times smaller, {figure} asked"


# What `best` is meant to reach with three seeds; times on two CPU cores, CIFAR-10's on a GPU.
FLOORS: dict[str, tuple[tuple[Callable[[Result, float], Verdict], float], ...]] = {
    "digits": ((times_smaller, 6), (within_of_teacher, 0.8), (within_of_real_kd, 0.5), (minutes, 4)),
    "mnist": (
        (teacher_reaches, 99.0),
        (times_smaller, 6),
        (best_reaches, 98.4),
        (within_of_teacher, 0.6),
        (minutes, 45),
    ),
    "cifar16": ((times_smaller, 6), (within_of_real_kd, 3.0)),
    "cifar10": (
        *((teacher_reaches, 90.0), (times_smaller, 4), (within_of_real_kd, 5.0), (ahead_of_peers, 3.0)),
        (minutes, 20),
    ),
    "digits, equal time": ((ahead_of_peers, 0.0),),
    "mnist, equal time": ((ahead_of_peers, 0.0),),
    "digits, another teacher": ((within_of_real_kd, 3.0),),
    "mnist, a given ViT": ((times_smaller, 1), (best_reaches, 97.0), (minutes, 45)),
    "cifar10, a given CNN to ResNet-20": ((best_reaches, 88.0),),
}


def settings_judged(arguments: argparse.Namespace, teacher: nn.Module) -> list[str]:
    """Which rows of FLOORS this run belongs to."""
    setting = arguments.data
    if arguments.teacher_json:
        setting += ", a given CNN" if isinstance(teacher, ResNet) else ", a given ViT"
    elif arguments.teacher_size:
        setting += ", another teacher"
    if arguments.student == "resnet20":
        setting += " to ResNet-20"
    return [setting] + ([f"{arguments.data}, equal time"] if arguments.seconds else [])


def verdicts(settings: list[str], result: Result) -> list[str]:
    """One line for each floor of these settings: what was reached, and whether that is enough."""
    found = []
    for setting in settings:
        for judge, figure in FLOORS.get(setting, ()):
            try:
                met, told = judge(result, figure)
            except NotJudgedError as error:
                found.append(f"floor {setting:<20} not judged: {error}")
                continue
            verdict = "met" if met else "NOT MET"
            if result.seeds < 3:
                verdict = f"not judged ({result.seeds} of 3 seeds)"
            found.append(f"floor {setting:<20} {verdict}: {told}")
    return found
