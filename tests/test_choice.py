"""Who takes attention and the losses on a GPU: the default, a measured table, the wish."""

import sys
from pathlib import Path

import pytest
import torch
from pretended_gpu import CUDA, GPU, check_ranges, names
from testing_rules import needs_cuda_build
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from vitkd_fast import backends, choice, ops
from vitkd_fast.doctor import doctor
from vitkd_fast.ops.attention import choose, fallback_reason

ROOT = Path(__file__).parents[1]
GPUS = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]

MIXED = {
    **GPU,
    "attention": {"16-bit": {"64": [[57, "triton"], [400, "native"], [None, "sdpa"]]}},
    "kd_loss": {"32-bit": [[100, "native"], [None, "triton"]]},
}


def test_the_shipped_table_is_well_formed():
    for entry in choice.table():
        assert entry["gpu"] and len(entry["capability"]) == 2 and entry["measured"]
        for what in ("attention", "attention_forward"):
            for widths in entry.get(what, {}).values():
                for ranges in widths.values():
                    check_ranges(ranges)
        for ranges in entry.get("kd_loss", {}).values():
            check_ranges(ranges)


def test_attention_without_a_gradient_has_a_table_of_its_own(pretend):
    forward = {"16-bit": {"64": [[272, "native"], [None, "sdpa"]]}}
    pretend({**MIXED, "attention_forward": forward})
    found = [choose(CUDA, torch.float16, 64, tokens, gradient=False)[0] for tokens in (57, 272, 273)]
    assert found == ["native", "native", "sdpa"]
    assert names(torch.float16, 64, 57, 272, 273) == ["triton", "native", "native"]
    assert choose(CUDA, torch.float16, 32, 50, gradient=False) == choose(CUDA, torch.float16, 32, 50)
    assert "attention without gradient" in str(doctor())
    pretend(MIXED)
    assert choice.attention(CUDA, torch.float16, False) == choice.attention(CUDA, torch.float16)
    assert "attention without gradient" not in str(doctor())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gpus_that_the_kernels_are_not_compiled_for_run_on_torch(pretend, monkeypatch, dtype):
    pretend()
    monkeypatch.setattr(choice, "_model", lambda device: ("Tesla T4", [7, 5]))
    for tokens in (2, 50, 300):
        assert choose(CUDA, dtype, 64, tokens) == ("sdpa", "compute capability 7.5 is below 8.0")
    assert [name for _, name, _ in choice.kd_loss(CUDA, dtype)] == ["sdpa"]
    if torch.version.cuda:
        with FakeTensorMode(), torch.device("cuda"):
            module = sys.modules["vitkd_fast.ops.kd_loss"]
            assert module._ops(torch.zeros(2, 3, dtype=dtype)) is None


def test_attention_asks_whether_there_will_be_a_gradient(monkeypatch):
    asked = []
    module = sys.modules["vitkd_fast.ops.attention"]
    monkeypatch.setattr(module, "choose", lambda *kind: asked.append(kind[-1]) or ("native", ""))
    qkv = torch.randn(1, 3, 3, 1, 8, requires_grad=True)
    ops.attention(qkv)
    ops.attention(qkv.detach())
    with torch.no_grad():
        ops.attention(qkv)
    assert asked == [True, False, False]


def test_without_a_measurement_there_is_a_default_that_says_so(pretend):
    pretend({**GPU, "gpu": "another"})
    assert names(torch.bfloat16, 64, 2, 197, 208, 209, 577) == ["native"] * 3 + ["sdpa"] * 2
    assert names(torch.float16, 32, 208, 209) == ["native", "sdpa"]
    assert names(torch.float32, 64, 112, 113) == ["native", "sdpa"]
    assert names(torch.bfloat16, 128, 112, 113) == ["native", "sdpa"]
    assert fallback_reason("cuda:0", torch.bfloat16, 64, 197) is None
    assert fallback_reason("cuda:0", torch.bfloat16, 64, 577) == "more than 208 tokens (default, not measured)"
    assert [name for _, name, _ in choice.kd_loss(CUDA, torch.float32)] == ["native"]


def test_a_measured_gpu_goes_by_its_table(pretend):
    widths = {"64": [[57, "triton"], [400, "native"], [None, "sdpa"]], "32": [[None, "sdpa"]]}
    pretend(
        {**GPU, "capability": [8, 0], "attention": {"16-bit": {"64": [[None, "sdpa"]]}}},
        {**GPU, "attention": {"16-bit": widths}, "kd_loss": {"16-bit": [[1000, "native"], [None, "triton"]]}},
    )
    assert names(torch.bfloat16, 64, 50, 57, 58, 400, 401) == ["triton", "triton", "native", "native", "sdpa"]
    assert names(torch.float16, 32, 50) == ["sdpa"]
    assert fallback_reason(CUDA, torch.float16, 32, 50) == "any tokens (measured)"
    assert fallback_reason(CUDA, torch.float16, 64, 401) == "tokens above 400 (measured)"
    assert names(torch.bfloat16, 48, 50, 577) == ["native", "sdpa"]  # neither this width
    assert names(torch.float32, 64, 50, 577) == ["native", "sdpa"]  # nor this dtype was measured
    assert [name for _, name, _ in choice.kd_loss(CUDA, torch.float16)] == ["native", "triton"]
    text = str(doctor())
    assert "native: 58 to 400 tokens (measured); sdpa: tokens above 400 (measured)" in text
    assert "any other head_dim" in text and "(default, not measured)" in text


def test_what_the_kernels_cannot_take_goes_to_torch_whatever_the_table_says(pretend):
    pretend(wish="native")
    assert names(torch.bfloat16, 64, 1, 2, 5000) == ["sdpa", "native", "native"]
    assert names(torch.bfloat16, 129, 50) == ["sdpa"]
    assert names(torch.float64, 64, 50) == ["sdpa"]


@pytest.mark.parametrize("wish", ["native", "triton", "sdpa"])
def test_the_wish_overrides_default_and_table(pretend, wish):
    pretend(
        {**GPU, "attention": {"16-bit": {"64": [[None, "native"]]}}, "kd_loss": {"16-bit": [[None, "native"]]}},
        wish=wish,
    )
    for head_dim in (32, 64):
        assert names(torch.bfloat16, head_dim, 50, 577) == [wish, wish]
    assert [name for _, name, _ in choice.kd_loss(CUDA, torch.bfloat16)] == ["native" if wish == "sdpa" else wish]


def test_kernels_that_are_not_there_are_replaced(pretend):
    entry = {**GPU, "attention": {"16-bit": {"64": [[100, "native"], [200, "triton"], [None, "sdpa"]]}}}
    for kernels, expected in (
        (("native",), ["native", "native", "sdpa"]),
        (("triton",), ["triton", "triton", "sdpa"]),
        ((), ["sdpa", "sdpa", "sdpa"]),
    ):
        pretend(entry, kernels=kernels)
        assert names(torch.bfloat16, 64, 50, 150, 250) == expected
    assert fallback_reason(CUDA, torch.bfloat16, 64, 50) == "no CUDA kernels here"


@pytest.mark.parametrize(
    ("built", "runs"),
    [
        ("sm_80,sm_86,sm_90a,sm_100,sm_120", [gpu for gpu in GPUS if gpu != (11, 0)]),
        ("sm_80,sm_86,sm_90a,sm_100,sm_120,compute_100", GPUS),
        ("sm_90a", [(9, 0)]),
        ("sm_90a,compute_90", [(9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]),
        ("sm_86", [(8, 6), (8, 7), (8, 9)]),
        ("sm_80,sm_120,compute_120", [(8, 0), (8, 6), (8, 7), (8, 9), (12, 0), (12, 1)]),
        ("sm_90a,sm_100a,sm_120f", [(9, 0), (10, 0), (12, 0), (12, 1)]),
        ("compute_90a,compute_120f", [(9, 0), (12, 0), (12, 1)]),
        ("", []),
    ],
)
def test_the_library_serves_the_gpus_that_it_has_code_for(built, runs, monkeypatch):
    from vitkd_fast import _facts

    monkeypatch.setattr(_facts, "build", lambda: {"cuda_code": built})
    assert [gpu for gpu in GPUS if backends.has_code_for(gpu)] == runs


def test_a_gpu_without_code_in_the_library_runs_tritons(pretend, monkeypatch):
    there = backends.cuda_kernels
    pretend(MIXED)
    monkeypatch.setattr(backends, "cuda_kernels", there)
    monkeypatch.setattr(backends, "_PROBLEMS", {"_C_cuda": None, "triton": None})
    for has_code, expected in ((True, "native"), (False, "triton")):
        monkeypatch.setattr(backends, "has_code_for", lambda capability, answer=has_code: answer)
        choice.forget()
        assert names(torch.bfloat16, 64, 100) == [expected]
        assert choice.kd_loss(CUDA, torch.float32)[0][1] == expected


def test_a_cpu_is_never_asked(monkeypatch):
    for name in ("attention", "kd_loss"):
        monkeypatch.setattr(choice, name, lambda *_: pytest.fail("the table is for GPUs"))
    qkv = torch.randn(1, 577, 3, 1, 16, requires_grad=True)
    ops.attention(qkv).sum().backward()
    ops.kd_loss(qkv.flatten(1), qkv.flatten(1).detach(), reduction="none").sum().backward()
    assert fallback_reason("cpu", torch.float32, 16, 577) is None


@pytest.mark.parametrize("namespace", ["vitkd", "vitkd_triton"])
def test_the_backward_is_that_of_the_forward(namespace):
    qkv = torch.randn(2, 5, 3, 2, 16, requires_grad=True)
    out = getattr(torch.ops, namespace).attention(qkv, 0.25)
    with Seen() as seen:
        torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert [name for name in seen.names if "vitkd" in name] == [f"{namespace}.attention_backward.default"]


@needs_cuda_build
class TestCalls:
    """Tensors of no GPU: what is called, and what is compiled, needs none."""

    def test_eager(self, pretend):
        pretend(MIXED)
        with FakeTensorMode(), Seen() as seen:
            for tokens in (50, 197):
                out = ops.attention(torch.empty(2, tokens, 3, 3, 64, device=CUDA, dtype=torch.bfloat16))
                assert out.shape == (2, tokens, 192) and out.device == CUDA
            for classes in (100, 101):
                ops.kd_loss(*torch.empty(2, 8, classes, device=CUDA), reduction="none")
        assert [name.removesuffix(".default") for name in seen.names if "vitkd" in name] == [
            "vitkd_triton.attention",
            "vitkd.attention",
            "vitkd.kd_loss",
            "vitkd_triton.kd_loss",
        ]

    def test_one_graph_for_the_sizes_of_a_range(self, pretend):
        """No graph break; a second graph only where somebody else takes over."""
        pretend(MIXED)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(ops.attention, fullgraph=True, dynamic=True, backend=counter)
        counts = []
        with FakeTensorMode():
            for batch, tokens in ((2, 197), (3, 65), (8, 300), (2, 50), (4, 17), (2, 577), (3, 600)):
                compiled(torch.empty(batch, tokens, 3, 3, 64, device=CUDA, dtype=torch.bfloat16))
                counts.append(counter.frame_count)
        assert counts == [1, 1, 1, 2, 2, 3, 3]
        targets = [str([node.target for node in graph.graph.nodes]) for graph in counter.graphs]
        assert ["vitkd.attention" in t for t in targets] == [True, False, False]
        assert ["vitkd_triton.attention" in t for t in targets] == [False, True, False]
        assert "scaled_dot_product_attention" in targets[2]

    def test_one_graph_of_the_loss_for_the_sizes_of_a_range(self, pretend):
        pretend(MIXED)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(ops.kd_loss, fullgraph=True, dynamic=True, backend=counter)
        counts = []
        with FakeTensorMode():
            for rows, classes in ((8, 10), (9, 100), (10, 101), (11, 1000), (12, 20)):
                compiled(*torch.empty(2, rows, classes, device=CUDA))
                counts.append(counter.frame_count)
        assert counts == [1, 1, 2, 2, 2]


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))
