"""Fused distillation loss against eager PyTorch and torch.compile: forward, and forward with both gradients."""

import sys
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from _common import (
    DTYPES,
    OUT_OF_TIME,
    Contender,
    Row,
    Verdict,
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

from vitkd_fast import backends, choice
from vitkd_fast.ops import kd_loss
from vitkd_fast.ops.kd_loss import KINDS, kd_rows_formula

SHAPES = {  # rows, classes
    "cpu": [(256, 10), (256, 1000), (4096, 1000)],
    "cuda": [(256, 10), (256, 1000), (4096, 1000), (1024, 8192), (256, 65_536)],
}
TEMPERATURE = 4.0


def main() -> int:
    options = parser(__doc__)
    options.add_argument(
        "--shapes", nargs="+", type=sizes(2), metavar="ROWS,CLASSES", help="by default the floors' and more"
    )
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=["kl"])
    arguments, measured = start(options)
    rows: list[Row] = []
    for name in dtypes(arguments):
        for kind in arguments.kinds:
            for size in arguments.shapes or SHAPES[arguments.device]:
                rows += run_case(size, name, kind, measured, arguments)
    return finish("kd_loss", arguments, measured, rows, "of copy")


def contenders(arguments, kind: str) -> list[Contender]:
    temperature = 1.0 if kind in ("l1", "mse") else TEMPERATURE
    loss = partial(kd_loss, kind=kind, temperature=temperature)
    chosen = backends.implementation("kd_loss", arguments.device).name
    result = [Contender(f"vitkd {chosen}", loss, ours=True, context=partial(taken_by, torch.ops.vitkd))]
    if arguments.device == "cuda" and chosen != "triton" and "triton" in backends.cuda_kernels():
        taken = partial(taken_by, torch.ops.vitkd_triton)
        result.append(Contender("vitkd triton", loss, ours=True, context=taken))
    if kind == "kl":
        result.append(Contender("F.kl_div", hinton))
        result.append(Contender("F.kl_div torch.compile", torch.compile(hinton, dynamic=False)))
    compiled = torch.compile(formula, dynamic=False)
    result.append(Contender("formula", lambda s, t: formula(s, t, kind, temperature)))
    result.append(Contender("formula torch.compile", lambda s, t: compiled(s, t, kind, temperature)))
    return [each for each in result if not any(word in each.name for word in arguments.skip)]


def formula(student, teacher, kind: str, temperature: float):
    return kd_rows_formula(student.float(), teacher.float(), kind, temperature).mean()


def hinton(student, teacher):
    """As a training script writes it; float32 as under autocast."""
    log_q = F.log_softmax(student.float() / TEMPERATURE, dim=-1)
    log_p = F.log_softmax(teacher.float() / TEMPERATURE, dim=-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2


def taken_by(ops):
    """A context in which, whatever the package would choose, this namespace's kernel computes."""
    module = sys.modules["vitkd_fast.ops.kd_loss"]  # the package's attribute is the function
    return mock.patch.object(module, "_ops", lambda logits: ops)


def chosen_for(size: tuple[int, int], name: str) -> str:
    """The contender that `vitkd_fast.ops.kd_loss` is, on this GPU."""
    ranges = choice.kd_loss(torch.device("cuda", torch.cuda.current_device()), DTYPES[name])
    found = next(name for most, name, _ in ranges if most is None or size[1] <= most)
    return f"vitkd {found}"


def run_case(size: tuple[int, ...], name: str, kind: str, measured, arguments) -> list[Row]:
    count, classes = size

    def make(seed: int):
        logits = (torch.randn(2, count, classes, device=arguments.device) * 4).to(DTYPES[name])
        grad = torch.ones((), device=arguments.device)
        return logits[0].clone().requires_grad_(), logits[1].clone().requires_grad_(), grad

    inputs = copies(make, arguments.device)
    torch._dynamo.reset()
    all_contenders = contenders(arguments, kind)
    verdicts = {
        each.name: OUT_OF_TIME if out_of_time(arguments) else check(each, inputs[0], kind) for each in all_contenders
    }
    rows = []
    for direction, wrap, passes in (("forward", forward_of, 2), ("forward+backward", forward_backward_of, 4)):
        case = f"{name} {kind} {count}x{classes}"
        for row in measured_rows(case, direction, all_contenders, verdicts, wrap, inputs, arguments):
            if row.median:
                row.gbytes = passes * count * classes * DTYPES[name].itemsize / row.median / 1e3
                row.share = row.gbytes / measured.copy
            row.chosen = row.contender == chosen_for(size, name) if arguments.device == "cuda" else row.ours
            rows.append(row)
    return rows


def check(contender: Contender, inputs, kind: str) -> Verdict:
    temperature = 1.0 if kind in ("l1", "mse") else TEMPERATURE
    return check_loss(
        contender,
        inputs,
        lambda student, teacher: kd_rows_formula(student, teacher, kind, temperature).mean(),
        lambda student, teacher: formula(student, teacher, kind, temperature),
    )


if __name__ == "__main__":
    sys.exit(main())
