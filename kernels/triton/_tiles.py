"""How many queries and keys an attention program takes at a time, by tokens, padded head_dim, dtype and chip.

The first tile of each row is chosen by padding arithmetic, not by timings: tiles are powers of two, so the waste is in
the padding, and at 65 tokens tiles of 32 compute 96 x 96 scores where tiles of 64 would compute 128 x 128. The others
are the alternatives that `_tune` measures when asked to. None of them spills a register on sm_80 or sm_90 or takes more
than the 99 KB of shared memory that sm_86, sm_89 and sm_120 have (tests/kernels/test_triton_compile.py).
"""

from dataclasses import astuple, dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        """As keyword arguments of a kernel launch."""
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class Split:
    """The tiles of the three backward kernels that share the work of a head."""

    rows: Tile
    keys: Tile
    queries: Tile


def as_data(tiles: Tile | Split) -> list:
    """As it stands in a table: four numbers, or three times four."""
    parts = [astuple(tile) for tile in (tiles.rows, tiles.keys, tiles.queries)] if isinstance(tiles, Split) else None
    return [list(part) for part in parts] if parts else list(astuple(tiles))


# most tokens (None: any), most padded head_dim, tiles
_FORWARD = (
    (16, 64, (Tile(16, 16, num_warps=1), Tile(16, 32, num_warps=1))),
    (32, 128, (Tile(32, 32, num_warps=2), Tile(16, 32, num_warps=1))),
    (64, 128, (Tile(64, 64, num_warps=4), Tile(64, 32, num_warps=4), Tile(32, 32, num_warps=2))),
    (96, 128, (Tile(32, 32, num_warps=2), Tile(64, 32, num_warps=4))),
    (None, 128, (Tile(64, 64, num_warps=4), Tile(64, 32, num_warps=4), Tile(128, 64, num_warps=8))),
)
# No tensor cores: the operands of a product sit in registers.
_FORWARD_FLOAT32 = ((None, 128, (Tile(32, 32, num_warps=4), Tile(16, 32, num_warps=4), Tile(32, 32, num_warps=8))),)

_SPLIT = (
    Split(rows=Tile(64, 64, num_warps=4), keys=Tile(32, 64, num_warps=4), queries=Tile(64, 32, num_warps=4)),
    Split(rows=Tile(128, 64, num_warps=8), keys=Tile(64, 64, num_warps=8), queries=Tile(128, 32, num_warps=8)),
    Split(rows=Tile(64, 32, num_warps=4), keys=Tile(32, 64, num_warps=4), queries=Tile(64, 64, num_warps=8)),
)
# One Tile: a program takes a whole head, whose float32 dK and dV must fit in registers.
_BACKWARD = (
    (16, 64, (Tile(16, 16, num_warps=1), Tile(16, 32, num_warps=2))),
    (32, 64, (Tile(32, 32, num_warps=4), Tile(32, 32, num_warps=2), Tile(16, 32, num_warps=2))),
    (32, 128, (Tile(32, 32, num_warps=4), Tile(16, 32, num_warps=4))),
    (64, 64, (Tile(32, 64, num_warps=4), Tile(32, 64, num_warps=8), Tile(16, 64, num_warps=4))),
    (64, 128, (Tile(32, 64, num_warps=8), Tile(16, 64, num_warps=4))),
    (128, 128, (Tile(32, 128, num_warps=8), Tile(16, 128, num_warps=8), _SPLIT[0])),
)
# 128 KB of shared memory, which sm_90 and sm_100 have; sm_80 spills 350 bytes.
_BACKWARD_LONG = (256, 64, (Tile(32, 256, num_warps=8), Tile(16, 256, num_warps=8), *_SPLIT))

_ROWS_FLOAT32 = Tile(32, 32, num_warps=4)
_NARROW_FLOAT32 = Tile(16, 32, num_warps=4, num_stages=1)
_SPLIT_FLOAT32_NARROW = Split(rows=_ROWS_FLOAT32, keys=_NARROW_FLOAT32, queries=_NARROW_FLOAT32)
_SPLIT_FLOAT32 = Split(
    rows=_ROWS_FLOAT32, keys=Tile(32, 32, num_warps=4), queries=Tile(32, 32, num_warps=8, num_stages=1)
)
_BACKWARD_FLOAT32 = (
    (32, 128, (_NARROW_FLOAT32, _SPLIT_FLOAT32_NARROW)),
    (None, 64, (_SPLIT_FLOAT32, _SPLIT_FLOAT32_NARROW)),
    (None, 128, (_SPLIT_FLOAT32_NARROW,)),
)


def padded_head_dim(head_dim: int) -> int:
    """The next power of two, at least the 16 that a tensor-core product needs."""
    return max(16, 1 << (head_dim - 1).bit_length())


@cache
def forward_tiles(tokens: int, block_d: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles to choose from, the arithmetic's choice first."""
    return _first_fit(_FORWARD_FLOAT32 if dtype is torch.float32 else _FORWARD, tokens, block_d)


@cache
def backward_tiles(
    tokens: int, block_d: int, dtype: torch.dtype, capability: tuple[int, int]
) -> tuple[Tile | Split, ...]:
    """The same for the backward: one tile where a program can take a whole head, or three."""
    if dtype is torch.float32:
        return _first_fit(_BACKWARD_FLOAT32, tokens, block_d)
    long = (_BACKWARD_LONG,) if capability[0] in (9, 10) else ()
    return _first_fit((*_BACKWARD, *long, (None, 128, _SPLIT)), tokens, block_d)


def _first_fit(table: tuple, tokens: int, block_d: int) -> tuple:
    return next(tiles for most, widest, tiles in table if (most is None or tokens <= most) and block_d <= widest)
