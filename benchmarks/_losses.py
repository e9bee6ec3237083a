"""A loss of ours against its formula, as one writes it and as torch.compile makes it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _common import (
    OUT_OF_TIME,
    Contender,
    Row,
    check_loss,
    copies,
    forward_backward_of,
    forward_of,
    measured_rows,
    out_of_time,
)


def compared(
    case: str, ours: Callable, formula: Callable, make: Callable[[int], tuple], arguments: Any
) -> tuple[list[Row], list[Row]]:
    """Rows of the forward, and of it with its gradients, on what make(seed) draws; `formula` takes a dtype=, too."""
    inputs = copies(make, arguments.device)
    torch._dynamo.reset()
    contenders = [
        Contender("vitkd", ours, ours=True),
        Contender("formula", formula),
        Contender("formula torch.compile", torch.compile(formula, dynamic=False)),
    ]
    contenders = [each for each in contenders if not any(word in each.name for word in arguments.skip)]
    exact = partial(formula, dtype=torch.float64)
    verdicts = {
        each.name: OUT_OF_TIME if out_of_time(arguments) else check_loss(each, inputs[0], exact, formula)
        for each in contenders
    }
    forward, backward = (
        measured_rows(case, direction, contenders, verdicts, wrap, inputs, arguments)
        for direction, wrap in (("forward", forward_of), ("forward+backward", forward_backward_of))
    )
    for row in (*forward, *backward):
        row.chosen = row.ours
    return forward, backward


def rate(rows: list[Row], operations: int, peak: float) -> None:
    """GF/s of rows that take so many operations, and their share of what a product reaches."""
    for row in rows:
        if row.median:
            row.gflops = operations / row.median / 1e3
            row.share = row.gflops / peak
