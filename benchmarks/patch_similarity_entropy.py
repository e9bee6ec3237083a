"""The entropy of patch similarities against the plain formula and torch.compile: forward, and with its gradient."""

import sys
from functools import partial

import torch
from _common import (
    DTYPES,
    OUT_OF_TIME,
    Contender,
    Row,
    check_loss,
    copies,
    dtypes,
    finish,
    forward_backward_of,
    forward_of,
    measured_rows,
    out_of_time,
    parser,
    start,
)
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

    inputs = copies(make, arguments.device)
    torch._dynamo.reset()
    contenders = [
        Contender("vitkd", partial(patch_similarity_entropy, bandwidth=BANDWIDTH), ours=True),
        Contender("formula", formula),
        Contender("formula torch.compile", torch.compile(formula, dynamic=False)),
    ]
    contenders = [each for each in contenders if not any(word in each.name for word in arguments.skip)]
    exact = partial(formula, dtype=torch.float64)
    verdicts = {
        each.name: OUT_OF_TIME if out_of_time(arguments) else check_loss(each, inputs[0], exact, formula)
        for each in contenders
    }
    rows = []
    for direction, wrap in (("forward", forward_of), ("forward+backward", forward_backward_of)):
        rows += measured_rows(
            f"{name} {','.join(map(str, size))}", direction, contenders, verdicts, wrap, inputs, arguments
        )
    for row in rows:
        row.chosen = row.ours
    return rows


if __name__ == "__main__":
    sys.exit(main())
