"""Fused attention against everything PyTorch has, on a packed qkv: forward, and forward with backward.

Every contender gets the same (B, N, 3, H, D) tensor and must deliver (B, N, H*D), so layout copies count.
"""

import sys

import torch
import torch.nn.functional as F
from _common import (
    DTYPES,
    Contender,
    Row,
    copies,
    dtypes,
    finish,
    forward_backward_of,
    forward_of,
    judge,
    measure,
    parser,
    relative_error,
    start,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitkd_fast import backends
from vitkd_fast.ops.attention import attention_backward_formula, attention_formula

SHAPES = {  # batch, heads, tokens, head_dim
    "cpu": [(32, 3, 197, 64), (32, 6, 197, 64), (64, 3, 65, 64), (64, 3, 50, 64), (64, 4, 17, 32)],
    "cuda": [
        (256, 3, 197, 64),
        (256, 6, 197, 64),
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


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--shapes", nargs="+", type=shape, metavar="B,H,N,D", help="of the issue's tables by default")
    arguments, measured = start(options)
    rows: list[Row] = []
    for name in dtypes(arguments):
        for size in arguments.shapes or SHAPES[arguments.device]:
            rows += run_case(size, name, measured, arguments)
    return finish("attention", arguments, measured, rows, "of GEMM" if arguments.device == "cpu" else "of copy")


def shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 4:
        raise ValueError(text)
    return sizes


def contenders(arguments, scale: float) -> list[Contender]:
    chosen = backends.implementation("attention", arguments.device).name
    result = [Contender(f"vitkd {chosen}", lambda qkv: torch.ops.vitkd.attention(qkv, scale), ours=True)]
    if arguments.device == "cuda" and chosen != "triton":
        result.append(Contender("vitkd triton", lambda qkv: triton_attention(qkv, scale), ours=True))
    result += [
        Contender(f"sdpa {name}", sdpa(scale), context=lambda backend=backend: sdpa_kernel(backend))
        for name, backend in SDPA[arguments.device].items()
    ]
    result.append(Contender("sdpa default", sdpa(scale)))
    result.append(Contender("formula", lambda qkv: attention_formula(qkv, scale)))
    compiled = torch.compile(attention_formula, dynamic=False)
    result.append(Contender("formula torch.compile", lambda qkv: compiled(qkv, scale)))
    return [each for each in result if not any(word in each.name for word in arguments.skip)]


def sdpa(scale: float):
    def run(qkv):
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)

    return run


def triton_attention(qkv, scale: float):
    from vitkd_fast import triton

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv):
            ctx.save_for_backward(qkv)
            return triton.attention(qkv, scale)

        @staticmethod
        def backward(ctx, grad_out):
            return triton.attention_backward(grad_out, *ctx.saved_tensors, scale)

    return Attention.apply(qkv)


def run_case(size: tuple[int, ...], name: str, measured, arguments) -> list[Row]:
    batch, heads, tokens, head_dim = size
    scale = head_dim**-0.5

    def make(seed: int):
        qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=arguments.device).to(DTYPES[name])
        grad_out = torch.randn(batch, tokens, heads * head_dim, device=arguments.device).to(DTYPES[name])
        return qkv.requires_grad_(), grad_out

    inputs = copies(make, arguments.device)
    torch._dynamo.reset()
    all_contenders = contenders(arguments, scale)
    verdicts = {each.name: check(each, *inputs[0], scale) for each in all_contenders}
    rows = []
    for direction, wrap, flops, tensors in (
        ("forward", forward_of, 4, 4),
        ("forward+backward", forward_backward_of, 14, 11),
    ):
        group = []
        for each in all_contenders:
            row = Row(f"{name} {','.join(map(str, size))}", direction, each.name, each.ours)
            verdict = verdicts[each.name]
            if isinstance(verdict, str):
                row.note = verdict
            else:
                judge(row, *verdict[direction], DTYPES[name])
            group.append((row, each, wrap(each.function)))
        measure(group, inputs, arguments)
        for row, *_ in group:
            if row.median:
                row.gflops = flops * batch * heads * tokens**2 * head_dim / row.median / 1e3
                row.gbytes = tensors * batch * tokens * heads * head_dim * DTYPES[name].itemsize / row.median / 1e3
                of_gemm = row.gflops / measured.gemm[name]
                row.share = of_gemm if arguments.device == "cpu" else row.gbytes / measured.copy
            rows.append(row)
    return rows


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
