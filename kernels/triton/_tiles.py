"""How many queries and keys an attention program takes at a time, by tokens, padded head_dim, dtype and chip.

Chosen by padding arithmetic and by what ptxas says for sm_80 and sm_90 (no spilled registers, at most the 99 KB of
shared memory that sm_86, sm_89 and sm_120 have), not by timings. Tiles are powers of two, so the waste is in the
padding: at 65 tokens tiles of 32 compute 96 x 96 scores where tiles of 64 would compute 128 x 128.
"""

from dataclasses import dataclass

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


# most tokens, most padded head_dim, tile
_FORWARD = (
    (16, 128, Tile(16, 16, num_warps=1)),
    (32, 128, Tile(32, 32, num_warps=2)),
    (64, 128, Tile(64, 64, num_warps=4)),
    (96, 128, Tile(32, 32, num_warps=2)),
)
_FORWARD_LONG = Tile(64, 64, num_warps=4)
_FORWARD_FLOAT32 = Tile(32, 32, num_warps=4)  # no tensor cores: the operands of a product sit in registers

_HEAD = (
    (16, 64, Tile(16, 16, num_warps=1)),
    (32, 128, Tile(32, 32, num_warps=4)),
    (64, 64, Tile(32, 64, num_warps=4)),
    (64, 128, Tile(32, 64, num_warps=8)),
    (128, 128, Tile(32, 128, num_warps=8)),
)
_HEAD_LONG = (256, 64, Tile(32, 256, num_warps=8))  # 128 KB of shared memory; sm_80 spills 350 bytes
_HEAD_FLOAT32 = (32, 128, Tile(16, 32, num_warps=4, num_stages=1))

_SPLIT = Split(rows=Tile(64, 64, num_warps=4), keys=Tile(32, 64, num_warps=4), queries=Tile(64, 32, num_warps=4))
_SPLIT_FLOAT32 = Split(
    rows=Tile(32, 32, num_warps=4), keys=Tile(32, 32, num_warps=4), queries=Tile(32, 32, num_warps=4)
)
_SPLIT_FLOAT32_WIDE = Split(
    rows=Tile(32, 32, num_warps=4),
    keys=Tile(16, 32, num_warps=4, num_stages=1),
    queries=Tile(16, 32, num_warps=4, num_stages=1),
)


def padded_head_dim(head_dim: int) -> int:
    """The next power of two, at least the 16 that a tensor-core product needs."""
    return max(16, 1 << (head_dim - 1).bit_length())


def forward_tile(tokens: int, block_d: int, dtype: torch.dtype) -> Tile:
    if dtype is torch.float32:
        return _FORWARD_FLOAT32
    return _first_fit(_FORWARD, tokens, block_d) or _FORWARD_LONG


def backward_tiles(tokens: int, block_d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile | Split:
    """One tile where a program can take a whole head (its float32 dK and dV must fit in registers), else three."""
    if dtype is torch.float32:
        split = _SPLIT_FLOAT32_WIDE if block_d > 64 else _SPLIT_FLOAT32
        return _first_fit((_HEAD_FLOAT32,), tokens, block_d) or split
    head = (*_HEAD, _HEAD_LONG) if capability[0] in (9, 10) else _HEAD
    return _first_fit(head, tokens, block_d) or _SPLIT


def _first_fit(table: tuple[tuple[int, int, Tile], ...], tokens: int, block_d: int) -> Tile | None:
    return next((tile for most, widest, tile in table if tokens <= most and block_d <= widest), None)
