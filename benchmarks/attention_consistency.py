"""How attention follows a mirrored image, against the plain formula and torch.compile: forward, and with the gradients
of both sides' queries and keys."""

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
    return attention_consistency_formula(*saliencies).mean()


def run_case(size: tuple[int, ...], name: str, measured, arguments) -> list[Row]:
    images, grid, heads, head_dim = size
    patches = grid * grid

    def make(seed: int):
        shape = images, 1 + patches, 3, heads, head_dim
        sides = (torch.randn(shape, device=arguments.device).to(DTYPES[name]).requires_grad_() for _ in range(2))
        return *sides, torch.ones((), device=arguments.device)

    inputs = copies(make, arguments.device)
    torch._dynamo.reset()
    ours = partial(attention_consistency, transform=HorizontalFlip(), grid=(grid, grid), prefix_tokens=1)
    contenders = [
        Contender("vitkd", ours, ours=True),
        Contender("formula", partial(formula, grid=grid)),
        Contender("formula torch.compile", partial(torch.compile(formula, dynamic=False), grid=grid)),
    ]
    contenders = [each for each in contenders if not any(word in each.name for word in arguments.skip)]
    exact, plain = partial(formula, grid=grid, dtype=torch.float64), partial(formula, grid=grid)
    verdicts = {
        each.name: OUT_OF_TIME if out_of_time(arguments) else check_loss(each, inputs[0], exact, plain)
        for each in contenders
    }
    product = 2 * 2 * images * heads * patches**2 * head_dim  # of both sides
    rows = []
    for direction, wrap, products in (("forward", forward_of, 1), ("forward+backward", forward_backward_of, 4)):
        case = f"{name} {','.join(map(str, size))}"
        for row in measured_rows(case, direction, contenders, verdicts, wrap, inputs, arguments):
            row.chosen = row.ours
            if row.median:
                row.gflops = products * product / row.median / 1e3
                row.share = row.gflops / measured.products(name)
            rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
