"""How attention follows a mirrored image, against the plain formula and torch.compile: forward, and with the gradients
of both sides' queries and keys."""

import sys
from functools import partial

import torch
from _common import DTYPES, Row, dtypes, finish, parser, start
from _losses import compared, rate
from _sizes import sizes

from vitkd_fast.ops import attention_consistency
from vitkd_fast.ops.attention_consistency import HorizontalFlip, attention_consistency_formula, log_saliency

SHAPES = [(16, 14, 6, 64), (64, 8, 3, 64), (64, 4, 4, 16)]  # images, rows and columns of patches, heads, head_dim


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--shapes", nargs="+", type=sizes(4), metavar="IMAGES,GRID,HEADS,HEAD_DIM", default=SHAPES)
    arguments, measured = start(options)
    rows: list[Row] = []
    for name in dtypes(arguments):
        for size in arguments.shapes:
            rows += run_case(size, name, measured, arguments)
    return finish("attention_consistency", arguments, measured, rows, "of GEMM")


def formula(before, after, grid: int, dtype: torch.dtype = torch.float32):
    """As one writes it, in float32 as under autocast, and with the maps kept for backward."""
    patches = torch.arange(1, grid * grid + 1, device=before.device)
    mirrored = patches.view(grid, grid).flip(1).flatten()
    saliencies = log_saliency(before.to(dtype), patches, patches), log_saliency(after.to(dtype), mirrored, mirrored)
    return attention_consistency_formula(*saliencies)


def run_case(size: tuple[int, ...], name: str, measured, arguments) -> list[Row]:
    images, grid, heads, head_dim = size
    patches = grid * grid

    def make(seed: int):
        shape = images, 1 + patches, 3, heads, head_dim
        sides = (torch.randn(shape, device=arguments.device).to(DTYPES[name]).requires_grad_() for _ in range(2))
        return *sides, torch.ones(images, device=arguments.device)

    # Each image's loss: next to nothing, it is what is left of large terms, and one mean's error would be luck.
    options = dict(transform=HorizontalFlip(), grid=(grid, grid), prefix_tokens=1, reduction="none")
    ours = partial(attention_consistency, **options)
    case = f"{name} {','.join(map(str, size))}"
    forward, backward = compared(case, ours, partial(formula, grid=grid), make, arguments)
    product = 2 * 2 * images * heads * patches**2 * head_dim  # of both sides
    rate(forward, product, measured.products(name))
    rate(backward, 4 * product, measured.products(name))
    return forward + backward


if __name__ == "__main__":
    sys.exit(main())
