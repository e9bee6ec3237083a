"""A small driver for compute-sanitizer: every kernel of ours once per dtype and way of splitting the work, no more."""

import argparse

import torch

from vitkd_fast import backends

# Whole heads, several of them in a block and one too many, split heads, padded rows, padded widths; every path of the
# kernels' tables, in few launches.
ATTENTION = [
    (2, 17, 2, 32),
    (1, 50, 3, 64),
    (2, 65, 1, 64),
    (1, 197, 2, 64),
    (1, 129, 1, 80),
    (1, 257, 1, 128),
    (3, 9, 1, 16),
    (1, 300, 1, 64),
]
LOGITS = [(3, 10), (5, 1000), (2, 8193)]
# More than the GPU has at once, so that blocks go on to others: heads that are brought while those before are computed,
# rows that are fetched ahead.
MANY_HEADS = [(150, 65, 6, 64), (50, 197, 6, 64), (50, 257, 6, 32)]
MANY_ROWS = (2500, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    implementations = [torch.ops.vitkd]
    names = [backends.implementation("attention", device).name]
    if device == "cuda" and names != ["triton"] and "triton" in backends.cuda_kernels():
        implementations.append(torch.ops.vitkd_triton)
        names.append("triton")
    calls = sum(run(implementation, device) for implementation in implementations)
    if device == "cuda" and names[0] == "native":
        calls += run_many()
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"sanitized {calls} calls of {', '.join(names)}")


def run(implementation, device: str) -> int:
    calls = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for batch, tokens, heads, head_dim in ATTENTION:
            qkv = torch.randn(batch, tokens, 3, heads, head_dim).to(device, dtype)
            out = implementation.attention(qkv, head_dim**-0.5)
            grad = implementation.attention_backward(torch.ones_like(out), qkv, head_dim**-0.5)
            finite(out, grad)
            calls += 2
        for rows, classes in LOGITS:
            student, teacher = torch.randn(2, rows, classes).to(device, dtype).unbind(0)
            for kind in range(5):
                loss, *grads = implementation.kd_loss(student, teacher, kind, 1.0, True, True, 1.0, kind % 2 == 0)
                torch.ops.vitkd.scale_(*grads, torch.full((), 0.5, device=device), 1.0)
                finite(loss, *grads)
                calls += 1
    return calls


def run_many() -> int:
    for batch, tokens, heads, head_dim in MANY_HEADS:
        qkv = torch.randn(batch, tokens, 3, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        finite(torch.ops.vitkd.attention(qkv, head_dim**-0.5))
    student, teacher = torch.randn(2, *MANY_ROWS, device="cuda", dtype=torch.bfloat16).unbind(0)
    finite(*torch.ops.vitkd.kd_loss(student, teacher, 0, 4.0, True, True, 1.0, True))
    return len(MANY_HEADS) + 1


def finite(*results: torch.Tensor) -> None:
    for result in results:
        assert result.cpu().isfinite().all(), "a result is not finite"


if __name__ == "__main__":
    main()
