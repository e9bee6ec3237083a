"""A whole training step's forward and backward: timm's model as it comes against the same model accelerated.

float32 as it is; bfloat16 and float16 under autocast, the way such models are trained. On a GPU both also compiled by
torch.compile (--skip compile leaves that out): the accelerated model is to be faster than the stock one compiled.
"""

import copy
import sys

import timm
import torch
import torch.nn.functional as F
from _common import (
    DTYPES,
    OUT_OF_TIME,
    Contender,
    Row,
    copies,
    dtypes,
    finish,
    measure,
    out_of_time,
    parser,
    relative_error,
    start,
)
from torch import nn

import vitkd_fast
from vitkd_fast.config import Config
from vitkd_fast.models import image_spec
from vitkd_fast.report import model_facts

CASES = {  # timm name, what it is built with, batch size on a CPU and on a GPU
    "deit_tiny 224": ("deit_tiny_patch16_224", {}, 16, 256),
    "deit_small 224": ("deit_small_patch16_224", {}, 8, 256),
    "vit_tiny 32/4": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, "num_classes": 10}, 64, 1024),
}
DEFAULT_CASES = {"cpu": ["deit_tiny 224", "vit_tiny 32/4"], "cuda": ["deit_tiny 224", "deit_small 224"]}


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--cases", nargs="+", choices=list(CASES), help="by default two")
    arguments, measured = start(options)
    arguments.cases = arguments.cases or DEFAULT_CASES[arguments.device]
    rows: list[Row] = []
    for name in dtypes(arguments):
        for case in arguments.cases:
            rows += run_case(case, name, measured, arguments)
    return finish("models", arguments, measured, rows, "of GEMM")


def run_case(case: str, name: str, measured, arguments) -> list[Row]:
    architecture, settings, *batch = CASES[case]
    stock = timm.create_model(architecture, **settings).to(arguments.device).train()
    fast = copy.deepcopy(stock)
    report = vitkd_fast.accelerate(fast)
    assert not report.kept, report
    contenders = [Contender("vitkd accelerated", fast, ours=True), Contender("timm", stock)]
    if arguments.device == "cuda":
        torch._dynamo.reset()
        contenders.append(Contender("vitkd accelerated compiled", torch.compile(fast, dynamic=False), ours=True))
        contenders.append(Contender("timm compiled", torch.compile(stock, dynamic=False)))
    contenders = [each for each in contenders if not any(word in each.name for word in arguments.skip)]
    size = stock.patch_embed.img_size[0]

    def make(seed: int):
        images = torch.randn(batch[arguments.device == "cuda"], 3, size, size, device=arguments.device)
        labels = torch.randint(stock.num_classes, images.shape[:1], device=arguments.device)
        return images, labels

    inputs = copies(make, arguments.device)
    step = step_of(DTYPES[name], arguments.device)
    exact = gradients(copy.deepcopy(stock).double(), inputs[0], torch.float64, arguments.device)
    formula_error = relative_error(gradients(stock, inputs[0], DTYPES[name], arguments.device), exact)
    flops = model_facts(stock, image_spec(stock, Config()), case).flops * len(inputs[0][0])  # of one forward pass
    rows = []
    for each in contenders:
        row = Row(f"{name} {case}", "forward+backward", each.name, each.ours, chosen=each.name == "vitkd accelerated")
        if out_of_time(arguments):  # before it is compiled
            row.note = OUT_OF_TIME
        else:
            row.error = relative_error(gradients(each.function, inputs[0], DTYPES[name], arguments.device), exact)
            row.correct = row.error <= 2 * formula_error + 1e-6
        rows.append((row, each, lambda images, labels, model=each.function: step(model, images, labels)))
    measure(rows, inputs, arguments)
    for row, *_ in rows:
        if row.median:
            row.gflops = 3 * flops / row.median / 1e3
            row.share = row.gflops / measured.products(name)
    return [row for row, *_ in rows]


def step_of(dtype: torch.dtype, device: str):
    def step(model: nn.Module, images, labels) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast(device, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    return step


def gradients(model: nn.Module, batch, dtype: torch.dtype, device: str):
    """All the gradients of one step as one vector."""
    images, labels = batch
    images = images.double() if dtype is torch.float64 else images
    step_of(dtype, device)(model, images, labels)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


if __name__ == "__main__":
    sys.exit(main())
