"""Fused distillation of attention maps against the plain formula and torch.compile: forward, and with the gradient of
the student's queries and keys."""

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

from vitkd_fast.ops import attention_kd
from vitkd_fast.ops.attention_kd import KINDS, attention_kd_rows, attention_scores, log_attention

SHAPES = {  # images, tokens, heads of student and teacher, head_dim of both
    "cpu": [(16, 197, 3, 6, 64), (16, 197, 3, 3, 64), (64, 65, 3, 6, 64), (64, 17, 4, 6, 16)],
    "cuda": [(128, 197, 3, 6, 64), (128, 197, 6, 6, 64), (512, 65, 3, 6, 64)],
}


def main() -> int:
    options = parser(__doc__)
    named = "IMAGES,TOKENS,STUDENT_HEADS,TEACHER_HEADS,HEAD_DIM"
    options.add_argument("--shapes", nargs="+", type=sizes(5), metavar=named, help="by default four, or three on a GPU")
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=["kl"])
    arguments, measured = start(options)
    rows: list[Row] = []
    for name in dtypes(arguments):
        for kind in arguments.kinds:
            for size in arguments.shapes or SHAPES[arguments.device]:
                rows += run_case(size, name, kind, measured, arguments)
    return finish("attention_kd", arguments, measured, rows, "of GEMM")


def formula(student, teacher, kind: str, dtype: torch.dtype = torch.float32):
    """As one writes it, in float32 as under autocast, and with the maps kept for backward."""
    scores = [attention_scores(side.to(dtype), side.shape[-1] ** -0.5) for side in (student, teacher)]
    average = student.shape[3] != teacher.shape[3]
    log_q, log_p = (log_attention(side, average)[1] for side in scores)
    return attention_kd_rows(log_q, log_p, kind).mean()


def run_case(size: tuple[int, ...], name: str, kind: str, measured, arguments) -> list[Row]:
    images, tokens, student_heads, teacher_heads, head_dim = size

    def make(seed: int):
        sides = [
            torch.randn(images, tokens, 3, heads, head_dim, device=arguments.device).to(DTYPES[name])
            for heads in (student_heads, teacher_heads)
        ]
        return sides[0].requires_grad_(), sides[1], torch.ones((), device=arguments.device)

    inputs = copies(make, arguments.device)
    torch._dynamo.reset()
    contenders = [
        Contender("vitkd", partial(attention_kd, kind=kind), ours=True),
        Contender("formula", partial(formula, kind=kind)),
        Contender("formula torch.compile", partial(torch.compile(formula, dynamic=False), kind=kind)),
    ]
    contenders = [each for each in contenders if not any(word in each.name for word in arguments.skip)]
    exact, plain = partial(formula, kind=kind, dtype=torch.float64), partial(formula, kind=kind)
    verdicts = {
        each.name: OUT_OF_TIME if out_of_time(arguments) else check_loss(each, inputs[0], exact, plain)
        for each in contenders
    }
    product = 2 * images * tokens**2 * head_dim
    rows = []
    for direction, wrap, products in (
        ("forward", forward_of, student_heads + teacher_heads),
        ("forward+backward", forward_backward_of, 3 * student_heads + teacher_heads),
    ):
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
