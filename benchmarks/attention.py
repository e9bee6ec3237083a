"""Fused attention against everything PyTorch has, on a packed qkv: forward, and forward with backward.

Every contender gets the same (B, N, 3, H, D) tensor and must deliver (B, N, H*D), so layout copies count.
"""

import sys
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from _common import (
    DTYPES,
    OUT_OF_TIME,
    Contender,
    Limits,
    Row,
    copies,
    dtypes,
    finish,
    forward_backward_of,
    forward_of,
    judge,
    measure,
    out_of_time,
    parser,
    relative_error,
    start,
)
from _sizes import sizes
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitkd_fast import backends
from vitkd_fast.ops import attention
from vitkd_fast.ops.attention import attention_backward_formula, attention_formula, choose

SHAPES = {  # batch, heads, tokens, head_dim
    "cpu": [(32, 3, 197, 64), (32, 6, 197, 64), (64, 3, 65, 64), (64, 3, 50, 64), (64, 4, 17, 32)],
    "cuda": [
        (256, 6, 197, 64),
        (256, 3, 197, 64),
        (256, 12, 197, 64),
        (1024, 3, 65, 64),
        (1024, 3, 50, 64),
        (256, 6, 257, 64),
        (1024, 4, 17, 32),
        (64, 6, 577, 64),
    ],
}
SDPA = {
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
    "cuda": {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    },
}
DIRECTIONS = {"forward": (forward_of, 4, 4), "forward+backward": (forward_backward_of, 14, 11)}  # FLOPs, tensors moved


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument(
        "--shapes", nargs="+", type=sizes(4), metavar="B,H,N,D", help="by default the floors' and more"
    )
    arguments, measured = start(options)
    rows: list[Row] = []
    for name in dtypes(arguments):
        for size in arguments.shapes or SHAPES[arguments.device]:
            rows += run_case(size, name, measured, arguments)
    share_of = "of GEMM" if arguments.device == "cpu" else "of copy"
    return finish("attention", arguments, measured, rows, share_of, tiles=tuned_tiles())


def tuned_tiles() -> list[dict]:
    """What VITKD_TRITON_TUNE=1 measured on the way."""
    if "vitkd_fast.triton" not in sys.modules:
        return []
    from vitkd_fast.triton import _tune

    return _tune.measured()


def contenders(arguments, size: tuple[int, ...], scale: float) -> list[Contender]:
    result = ours(arguments.device, scale)
    result += [
        Contender(f"sdpa {name}", sdpa(scale), context=lambda backend=backend: sdpa_kernel(backend))
        for name, backend in SDPA[arguments.device].items()
    ]
    result.append(Contender("sdpa default", sdpa(scale)))
    result.append(Contender("formula", lambda qkv: attention_formula(qkv, scale)))
    if arguments.device == "cpu" or size in SHAPES["cuda"][:6]:  # the shapes; elsewhere its seconds are missed
        functions = {"formula": lambda qkv: attention_formula(qkv, scale)}
        if arguments.device == "cuda":
            functions["sdpa"] = sdpa(scale)
        result += [Contender(f"{name} torch.compile", torch.compile(f, dynamic=False)) for name, f in functions.items()]
    return [each for each in result if not any(word in each.name for word in arguments.skip)]


def ours(device: str, scale: float) -> list[Contender]:
    """What the dispatcher has; on a GPU the CUDA and the Triton kernels side by side."""
    function = partial(attention, scale=scale)
    chosen = backends.implementation("attention", device).name
    result = [Contender(f"vitkd {chosen}", function, ours=True, context=partial(taken_by, "native"))]
    if device == "cuda" and chosen != "triton" and "triton" in backends.cuda_kernels():
        result.append(Contender("vitkd triton", function, ours=True, context=partial(taken_by, "triton")))
    return result


def taken_by(name: str):
    """A context in which, whatever the package would choose, these kernels compute."""
    module = sys.modules["vitkd_fast.ops.attention"]  # the package's attribute is the function
    return mock.patch.object(module, "choose", lambda *_: (name, "asked for"))


def sdpa(scale: float):
    def run(qkv):
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)

    return run


def make_inputs(size: tuple[int, ...], name: str, device: str) -> list[tuple[torch.Tensor, ...]]:
    batch, heads, tokens, head_dim = size

    def make(seed: int):
        qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=DTYPES[name])
        grad_out = torch.randn(batch, tokens, heads * head_dim, device=device, dtype=DTYPES[name])
        return qkv.requires_grad_(), grad_out

    return copies(make, device)


def run_case(size: tuple[int, ...], name: str, measured: Limits, arguments) -> list[Row]:
    inputs = make_inputs(size, name, arguments.device)
    scale = size[3] ** -0.5
    torch._dynamo.reset()
    all_contenders = contenders(arguments, size, scale)
    verdicts = {
        each.name: OUT_OF_TIME if out_of_time(arguments) else check(each, *inputs[0], scale) for each in all_contenders
    }
    rows = []
    for direction, (wrap, _, _) in DIRECTIONS.items():
        group = [
            (row_of(size, name, direction, each, verdicts[each.name]), each, wrap(each.function))
            for each in all_contenders
        ]
        measure(group, inputs, arguments)
        for row, *_ in group:
            rate(row, size, name, measured, arguments.device)
            row.chosen = row.contender == chosen_for(size, name, direction) if arguments.device == "cuda" else row.ours
            rows.append(row)
    return rows


def chosen_for(size: tuple[int, ...], name: str, direction: str) -> str:
    """The contender that `vitkd_fast.ops.attention` is, on this GPU."""
    _, _, tokens, head_dim = size
    device = torch.device("cuda", torch.cuda.current_device())
    found, _ = choose(device, DTYPES[name], head_dim, tokens, gradient=direction != "forward")
    return "sdpa default" if found == "sdpa" else f"vitkd {found}"


def row_of(size: tuple[int, ...], name: str, direction: str, contender: Contender, verdict) -> Row:
    row = Row(f"{name} {','.join(map(str, size))}", direction, contender.name, contender.ours)
    if isinstance(verdict, str):
        row.note = verdict
    else:
        judge(row, *verdict[direction], DTYPES[name])
    return row


def rate(row: Row, size: tuple[int, ...], name: str, measured: Limits, device: str) -> None:
    """FLOPs and bytes a second, and the share of what this machine can do."""
    if row.median:
        batch, heads, tokens, head_dim = size
        _, flops, tensors = DIRECTIONS[row.direction]
        row.gflops = flops * batch * heads * tokens**2 * head_dim / row.median / 1e3
        row.gbytes = tensors * batch * tokens * heads * head_dim * DTYPES[name].itemsize / row.median / 1e3
        row.share = row.gflops / measured.products(name) if device == "cpu" else row.gbytes / measured.copy


def check(contender: Contender, qkv, grad_out, scale: float) -> dict[str, tuple[float, float]] | str:
    """(error, the plain formula's error) of both directions on the first and last image, or why there is none."""
    try:
        with contender.context():
            out = contender.function(qkv)
            (grad,) = torch.autograd.grad(out, qkv, grad_out)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    if out.shape != grad_out.shape:
        return f"gives {tuple(out.shape)}"
    with torch.no_grad():
        qkv, grad_out, out, grad = (tensor.detach()[[0, -1]] for tensor in (qkv, grad_out, out, grad))
        exact = attention_formula(qkv.double(), scale)
        exact_grad = attention_backward_formula(grad_out.double(), qkv.double(), scale)
        plain = attention_formula(qkv, scale)
        plain_grad = attention_backward_formula(grad_out, qkv, scale)
        forward = relative_error(out, exact), relative_error(plain, exact)
        backward = relative_error(grad, exact_grad), relative_error(plain_grad, exact_grad)
    worst = max(forward, backward, key=lambda pair: pair[0] / max(pair[1], 1e-12))
    return {"forward": forward, "forward+backward": worst}


if __name__ == "__main__":
    sys.exit(main())
