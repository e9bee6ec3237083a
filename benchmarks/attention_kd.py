"""Fused distillation of attention maps against the plain formula and torch.compile: forward, and with the gradient of
the student's queries and keys."""

import sys
from functools import partial

import torch
from _common import DTYPES, Row, dtypes, finish, parser, start
from _losses import compared, rate
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

    case = f"{name} {','.join(map(str, size))}"
    forward, backward = compared(case, partial(attention_kd, kind=kind), partial(formula, kind=kind), make, arguments)
    product = 2 * images * tokens**2 * head_dim
    rate(forward, (student_heads + teacher_heads) * product, measured.products(name))
    rate(backward, (3 * student_heads + teacher_heads) * product, measured.products(name))
    return forward + backward


if __name__ == "__main__":
    sys.exit(main())
