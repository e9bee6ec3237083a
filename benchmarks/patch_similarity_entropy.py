"""The entropy of patch similarities against the plain formula and torch.compile: forward, and with its gradient."""

import sys
from functools import partial

import torch
from _common import DTYPES, Row, dtypes, finish, parser, start
from _losses import compared
from _sizes import sizes

from vitkd_fast.ops import patch_similarity_entropy
from vitkd_fast.ops.patch_similarity_entropy import density_formula, entropy_formula, similarity_grid
from vitkd_fast.ops.token_relation_kd import unit_tokens

SHAPES = [(16, 196, 384), (64, 64, 192)]  # images, patches, channels
BANDWIDTH = 0.05


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--shapes", nargs="+", type=sizes(3), metavar="IMAGES,PATCHES,CHANNELS", default=SHAPES)
    arguments, measured = start(options)
    rows = [row for name in dtypes(arguments) for size in arguments.shapes for row in run_case(size, name, arguments)]
    return finish("patch_similarity_entropy", arguments, measured, rows, "of copy")


def formula(tokens, dtype: torch.dtype = torch.float32):
    """As PSAQ-ViT's is written, all kernels at once; in float32 as under autocast."""
    units = unit_tokens(tokens.to(dtype))
    density = density_formula((units @ units.mT).flatten(1), similarity_grid(BANDWIDTH, units), BANDWIDTH)
    return entropy_formula(density, BANDWIDTH).mean()


def run_case(size: tuple[int, ...], name: str, arguments) -> list[Row]:
    def make(seed: int):
        tokens = torch.randn(size, device=arguments.device).to(DTYPES[name])
        return tokens.requires_grad_(), torch.ones((), device=arguments.device)

    ours = partial(patch_similarity_entropy, bandwidth=BANDWIDTH)
    forward, backward = compared(f"{name} {','.join(map(str, size))}", ours, formula, make, arguments)
    return forward + backward


if __name__ == "__main__":
    sys.exit(main())
