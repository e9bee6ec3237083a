"""A small driver for a profiler such as Nsight Compute: our attention and kd_loss kernels, each once per size, warm.

ncu --clock-control none --set full --nvtx --nvtx-include measured/ python benchmarks/profiled.py
"""

import argparse

import torch
from _sizes import sizes
from attention import SHAPES

LOGITS = [(256, 1000), (4096, 1000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", type=sizes(4), metavar="B,H,N,D", default=SHAPES["cuda"][:6])
    arguments = parser.parse_args()
    import vitkd_fast  # noqa: F401  registers the ops

    calls = [call for size in arguments.shapes for call in attention_calls(size, arguments.device)] + [
        kd_loss_call(*size, arguments.device) for size in LOGITS
    ]
    for call in calls:
        call()
    with torch.cuda.nvtx.range("measured"):
        for call in calls:
            call()
    torch.cuda.synchronize()
    print(f"profiled {len(calls)} kernels")


def attention_calls(size: tuple[int, ...], device: str):
    batch, heads, tokens, head_dim = size
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=torch.bfloat16)
    grad_out = torch.randn(batch, tokens, heads * head_dim, device=device, dtype=torch.bfloat16)
    scale = head_dim**-0.5
    yield lambda: torch.ops.vitkd.attention(qkv, scale)
    if tokens <= 208:
        yield lambda: torch.ops.vitkd.attention_backward(grad_out, qkv, scale)


def kd_loss_call(rows: int, classes: int, device: str):
    student, teacher = torch.randn(2, rows, classes, device=device, dtype=torch.bfloat16).unbind(0)
    return lambda: torch.ops.vitkd.kd_loss(student, teacher, 0, 1.0, True, True)


if __name__ == "__main__":
    main()
