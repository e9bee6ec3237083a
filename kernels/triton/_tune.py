"""Which of the candidate tiles a launch takes: the arithmetic's, a recorded winner, or one measured now.

Nothing is measured by default: two processes then compute the same bits, and a first call under CUDA graph capture
meets no timing. VITKD_TRITON_TUNE=1 measures the candidates at the first call of each kind (forward or backward, tokens
in steps of 16, padded head_dim, dtype, device) and keeps the fastest for the process; benchmarks/attention.py records
what was found, benchmarks/choose.py writes it into vitkd_fast/choice.json, and everybody else gets it from there.
"""

import os
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from vitkd_fast import choice
from vitkd_fast.triton._tiles import Split, Tile, as_data, padded_head_dim

Kind = Literal["forward", "backward"]
Tiles = TypeVar("Tiles", Tile, Tile | Split)

TUNE = os.environ.get("VITKD_TRITON_TUNE") == "1"
STEP = 16  # tokens that are not told apart: 197 and 198 are one case, and 16 rows are the least that a product takes

_best: dict[tuple, Any] = {}
_measured: list[dict[str, Any]] = []


def best(kind: Kind, candidates: tuple[Tiles, ...], run: Callable[[Tiles], None], qkv: Tensor) -> Tiles:
    """The tiles to launch with; `run(tiles)` must compute into the same memory whatever the tiles are."""
    bucket = -(-qkv.shape[1] // STEP) * STEP
    key = kind, bucket, padded_head_dim(qkv.shape[-1]), choice.dtype_class(qkv.dtype), qkv.device
    if key in _best:
        return _best[key]
    if TUNE and qkv.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return _recorded(key, candidates)
        _best[key] = _fastest(key, candidates, run)
    else:
        _best[key] = _recorded(key, candidates)
    return _best[key]


def measured() -> list[dict[str, Any]]:
    """What tuning found in this process: kind, tokens, head_dim, dtype, the winner, and all times in microseconds."""
    return list(_measured)


def _recorded(key: tuple, candidates: tuple[Tiles, ...]) -> Tiles:
    """choice.json's if it is still among the candidates, else the first."""
    kind, bucket, head_dim, dtype, device = key
    recorded: Any = choice.entry(device).get("tiles", {}) if device.type == "cuda" else {}
    for part in (kind, dtype, str(head_dim), str(bucket)):
        recorded = recorded.get(part, {})
    return next((tiles for tiles in candidates if as_data(tiles) == recorded), candidates[0])


def _fastest(key: tuple, candidates: tuple[Tiles, ...], run: Callable[[Tiles], None]) -> Tiles:
    from triton.testing import do_bench

    times = [do_bench(lambda: run(tiles), warmup=10, rep=50, return_mode="median") * 1e3 for tiles in candidates]  # noqa: B023
    winner = candidates[times.index(min(times))]
    kind, bucket, head_dim, dtype, _ = key
    _measured.append(
        {"kind": kind, "tokens": bucket, "head_dim": head_dim, "dtype": dtype, "tiles": as_data(winner), "times": times}
    )
    return winner
