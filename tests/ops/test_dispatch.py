"""The ops as torch sees them: schema, fake, autograd, compile, autocast, grad modes, errors."""

import copy
import os
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch.nn.functional as F
from testing_rules import assert_native, needs_native
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from vitkd_fast import backends
from vitkd_fast.ops import attention, kd_loss
from vitkd_fast.ops.kd_loss import KINDS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMESPACES = (torch.ops.vitkd, torch.ops.vitkd_triton)


def packed(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def logits(rows=9, classes=10, dtype=torch.float32, device="cpu"):
    return packed(2, rows, classes, dtype=dtype, device=device).unbind(0)


@pytest.mark.parametrize("op", ["attention", "attention_backward", "kd_loss"])
def test_the_cpu_runs_the_native_kernels(op):
    """Or, with VITKD_NO_NATIVE, the formulas: every other test here and beside it stands on this one."""
    assert_native(op)
    name, reason = backends.implementation(op, "cpu")
    if os.environ.get("VITKD_NO_NATIVE"):
        assert name == "formula", reason


@pytest.mark.parametrize("device", DEVICES)
class TestOpcheck:
    """Schema (no hidden aliasing or mutation), fake against real (shapes, strides, dtypes), autograd registration,
    and agreement under torch.compile's tracing with static and dynamic shapes."""

    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("ops", NAMESPACES, ids=lambda ops: ops.name)
    def test_attention(self, device, ops, dtype, requires_grad):
        qkv = packed(2, 17, 3, 2, 32, dtype=dtype, device=device).requires_grad_(requires_grad)
        torch.library.opcheck(ops.attention.default, (qkv, 0.2))

    @pytest.mark.parametrize("shape", [(2, 1, 3, 2, 16), (2, 5, 3, 1, 16), (0, 5, 3, 2, 16), (1, 1, 3, 1, 7)])
    def test_attention_of_small_sizes(self, device, shape):
        torch.library.opcheck(torch.ops.vitkd.attention.default, (packed(*shape, device=device), 0.2))

    def test_attention_of_a_strided_view(self, device):
        qkv = packed(3, 2, 2, 34, 32, device=device).permute(1, 3, 0, 2, 4)[:, 1:, ..., ::2]
        torch.library.opcheck(torch.ops.vitkd.attention.default, (qkv, 0.2))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("ops", NAMESPACES, ids=lambda ops: ops.name)
    def test_attention_backward(self, device, ops, dtype):
        qkv = packed(2, 17, 3, 2, 32, dtype=dtype, device=device)
        grad_out = packed(1, 1, 1, dtype=dtype, device=device).expand(2, 17, 64)
        torch.library.opcheck(ops.attention_backward.default, (grad_out, qkv, 0.2))

    @pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)], ids=str)
    @pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
    @pytest.mark.parametrize("ops", NAMESPACES, ids=lambda ops: ops.name)
    def test_kd_loss(self, device, ops, kind, wanted):
        student, teacher = (
            tensor.requires_grad_(want) for tensor, want in zip(logits(device=device), wanted, strict=True)
        )
        torch.library.opcheck(ops.kd_loss.default, (student, teacher, kind, 1.0, *wanted))
        torch.library.opcheck(ops.kd_loss.default, (student, teacher, kind, 1.0, *wanted, 0.3, True))

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
    def test_kd_loss_in_low_precision(self, device, dtype):
        student, teacher = logits(dtype=dtype, device=device)
        torch.library.opcheck(torch.ops.vitkd.kd_loss.default, (student, teacher, 0, 4.0, True, True))

    @pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
    def test_kd_loss_of_strided_logits(self, device, kind):
        student, teacher = logits(10, 9, device=device)
        torch.library.opcheck(torch.ops.vitkd.kd_loss.default, (student.T, teacher.T, kind, 1.0, True, True))


class Distilling(nn.Module):
    """Both ops in one differentiable module: attention over image tokens, a head, the loss against a teacher."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.head = nn.Linear(32, 10)

    def forward(self, x, teacher_logits):
        qkv = self.qkv(x).unflatten(-1, (3, 2, 16))
        return kd_loss(self.head(attention(qkv).mean(1)), teacher_logits, temperature=4.0)


def loss_and_grads(function, module, *inputs):
    loss = function(*inputs)
    return loss, *torch.autograd.grad(loss, (*module.parameters(), inputs[-1]))


def distilling_inputs(batch, tokens, device="cpu"):
    return packed(batch, tokens, 32, device=device), packed(batch, 10, device=device).requires_grad_()


class TestCompile:
    @pytest.mark.parametrize("device", DEVICES)
    def test_one_graph(self, device):
        """Through inductor, with gradients to the weights and to the teacher's logits."""
        torch.manual_seed(0)
        module, inputs = Distilling().to(device), distilling_inputs(4, 17, device)
        compiled = torch.compile(module, fullgraph=True)
        for result, expected in zip(
            loss_and_grads(compiled, module, *inputs), loss_and_grads(module, module, *inputs), strict=True
        ):
            torch.testing.assert_close(result, expected)

    @pytest.mark.parametrize("device", DEVICES)
    def test_one_graph_for_all_sizes(self, device):
        """aot_eager: the traced graph with symbolic sizes; a second size must not compile again.

        On a GPU, sizes that one implementation takes: what another takes is another graph.
        """
        torch.manual_seed(0)
        torch._dynamo.reset()
        module, counter = Distilling().to(device), CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
        for batch, tokens in ((4, 17), (3, 50), (7, 198 if device == "cpu" else 100)):
            inputs = distilling_inputs(batch, tokens, device)
            for result, expected in zip(
                loss_and_grads(compiled, module, *inputs), loss_and_grads(module, module, *inputs), strict=True
            ):
                torch.testing.assert_close(result, expected)
        assert counter.frame_count == 1

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("head_dim", [16, 160])
    def test_inference(self, device, head_dim):
        qkv = packed(2, 17, 3, 2, head_dim, device=device)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(qkv), attention(qkv))

    def test_export(self):
        """torch.export keeps the op in the program, where a deployment can find it."""
        program = torch.export.export(Distilling(), distilling_inputs(4, 17))
        targets = [str(node.target) for node in program.graph.nodes]
        assert "vitkd.attention.default" in targets
        assert "vitkd.kd_loss.default" in targets


STUDENT, TEACHER = logits()
STEPS = {  # a function of one tensor, and the tensor
    "attention": (attention, packed(2, 17, 3, 2, 16)),
    "kd_loss": (lambda student: kd_loss(student, TEACHER, temperature=4.0), STUDENT),
    "kd_loss rows": (lambda student: kd_loss(student, TEACHER, reduction="none"), STUDENT),
}


def step(name):
    function, x = STEPS[name]
    return function, x.clone().requires_grad_()


@pytest.mark.parametrize("name", STEPS)
class TestEager:
    """Real tensors in eager mode take a shorter way, which nothing that looks at ops may notice."""

    def test_the_general_way_is_not_taken(self, name):
        """Its Python, torch's and ours, costs the host more than a kernel takes."""
        function, x = step(name)
        files = set()
        for leaf in (x.detach(), x):
            sys.setprofile(lambda frame, event, _: files.add(frame.f_code.co_filename))
            try:
                result = function(leaf).sum()
            finally:
                sys.setprofile(None)
        sys.setprofile(lambda frame, event, _: files.add(frame.f_code.co_filename))
        try:
            result.backward()
        finally:
            sys.setprofile(None)
        names = {"/".join(Path(file).parts[-2:]) for file in files}
        assert f"ops/{name.partition(' ')[0]}.py" in names
        assert "_library/autograd.py" not in names

    def test_its_gradients_are_those_of_the_general_way(self, name):
        function, x = step(name)
        out = function(x)
        grad_out = packed(*out.shape)
        (grad,) = torch.autograd.grad(out, x, grad_out)
        wrapped = x.detach().as_subclass(type("Wrapped", (torch.Tensor,), {})).requires_grad_()
        general = function(wrapped)
        assert general.grad_fn.name() != out.grad_fn.name()
        (expected,) = torch.autograd.grad(general, wrapped, grad_out)
        for result, value in ((out, general), (grad, expected)):
            torch.testing.assert_close(result, value.as_subclass(torch.Tensor))

    def test_traces_hold_the_ops(self, name):
        function, x = step(name)
        op = name.partition(" ")[0]

        def gradient(leaf):
            return torch.autograd.grad(function(leaf).sum(), leaf)

        targets = [str(node.target) for node in make_fx(gradient)(x).graph.nodes]
        assert f"vitkd.{op}.default" in targets
        assert op != "attention" or "vitkd.attention_backward.default" in targets
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            traced = torch.jit.trace(function, (x,), check_trace=False)
        assert f"vitkd::{op}" in str(traced.inlined_graph)

    def test_backward_compiles_after_an_eager_forward(self, name):
        function, x = step(name)
        (expected,) = torch.autograd.grad(function(x).sum(), x)
        loss = function(x).sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            loss.backward()
        assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("device", DEVICES)
class TestAutocast:
    @pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
    @pytest.mark.parametrize("head_dim", [16, 160])
    def test_attention_answers_in_the_dtype_of_torchs(self, device, head_dim, dtype):
        qkv = packed(2, 17, 3, 2, head_dim, dtype=dtype, device=device).requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            out = attention(qkv)
            expected = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        assert out.dtype is expected.dtype
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
        (grad,) = torch.autograd.grad(out.sum(), qkv)
        assert grad.dtype is dtype

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_kd_loss_stays_in_float32(self, device, dtype):
        student, teacher = logits(dtype=dtype, device=device)
        with torch.autocast(device, torch.bfloat16):
            loss = kd_loss(student, teacher)
        assert loss.dtype is torch.float32
        assert torch.equal(loss, kd_loss(student, teacher))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_modules_that_use_the_ops_can_be_copied(copied):
    module, inputs = Distilling(), distilling_inputs(4, 17)
    expected = loss_and_grads(module, module, *inputs)
    twin = copied(module)
    for result, value in zip(loss_and_grads(twin, twin, *inputs), expected, strict=True):
        assert torch.equal(result, value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    qkv, (student, teacher) = packed(2, 17, 3, 2, 16).requires_grad_(), (t.requires_grad_() for t in logits())
    expected = attention(qkv), kd_loss(student, teacher)
    with mode():
        results = attention(qkv), kd_loss(student, teacher)
    for result, value in zip(results, expected, strict=True):
        assert not result.requires_grad
        assert value.requires_grad
        assert torch.equal(result, value)


def test_no_gradient_is_computed_for_a_side_that_needs_none(monkeypatch):
    asked = []
    op = torch.ops.vitkd.kd_loss
    monkeypatch.setattr(torch.ops.vitkd, "kd_loss", lambda *args: asked.append(args[4:6]) or op(*args))
    student, teacher = logits()
    kd_loss(student, teacher)
    kd_loss(student.requires_grad_(), teacher)
    kd_loss(student.detach(), teacher.requires_grad_())
    kd_loss(student, teacher)
    with torch.no_grad():
        kd_loss(student, teacher)
    assert asked == [(False, False), (True, False), (False, True), (True, True), (False, False)]


def test_the_other_side_gets_no_gradient():
    student, teacher = logits()
    kd_loss(student.requires_grad_(), teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("shape", "given"),
    [((2, 17, 96), "(2, 17, 96)"), ((2, 17, 2, 2, 16), "(2, 17, 2, 2, 16)"), ((2, 0, 3, 2, 16), "(2, 0, 3, 2, 16)")],
)
def test_attention_names_a_wrong_shape(shape, given):
    with pytest.raises(ValueError, match=r"qkv must be \(batch, tokens, 3, heads, head_dim\)") as error:
        attention(torch.zeros(shape))
    assert given in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_attention_names_a_wrong_dtype(dtype):
    with pytest.raises(TypeError, match=f"qkv has dtype {str(dtype).removeprefix('torch.')}; accepted: float32"):
        attention(torch.zeros(1, 2, 3, 1, 16).to(dtype))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((4, 10), (4, 11)), ((4, 10), (5, 10)), ((10,), (10,)), ((2, 4, 10), (2, 4, 10)), ((4, 0), (4, 0))],
)
def test_kd_loss_names_wrong_shapes(student, teacher):
    with pytest.raises(ValueError, match="student_logits and teacher_logits must both be") as error:
        kd_loss(torch.zeros(student), torch.zeros(teacher))
    assert str(student) in str(error.value)
    assert str(teacher) in str(error.value)


@pytest.mark.parametrize("side", [0, 1], ids=["student_logits", "teacher_logits"])
def test_kd_loss_names_a_wrong_dtype(side):
    both = [torch.zeros(4, 10), torch.zeros(4, 10)]
    both[side] = both[side].long()
    name = ("student_logits", "teacher_logits")[side]
    with pytest.raises(TypeError, match=f"{name} has dtype int64; accepted: float32"):
        kd_loss(*both)


def test_kd_loss_names_wrong_devices():
    with pytest.raises(RuntimeError, match="student_logits is on cpu and teacher_logits on meta"):
        kd_loss(torch.zeros(4, 10), torch.zeros(4, 10, device="meta"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "hinton"}, "kind is 'hinton'; accepted: kl, reverse_kl, js, l1, mse"),
        ({"reduction": "sum"}, "reduction is 'sum'; accepted: batchmean, none"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be above 0"),
        ({"kind": "l1", "temperature": 4.0}, "kind 'l1' compares raw logits"),
    ],
)
def test_kd_loss_names_a_wrong_setting(arguments, message):
    with pytest.raises(ValueError, match=message):
        kd_loss(torch.zeros(4, 10), torch.zeros(4, 10), **arguments)


@needs_native
@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: torch.ops.vitkd.attention(torch.zeros(2, 17, 96), 0.2), "qkv"),
        (lambda: torch.ops.vitkd.attention(packed(2, 17, 3, 2, 16).half(), 0.2, True), "bfloat16"),
        (lambda: torch.ops.vitkd.attention_backward(torch.zeros(2, 17, 33), packed(2, 17, 3, 2, 16), 0.2), "grad_out"),
        (
            lambda: torch.ops.vitkd.attention_backward(packed(2, 17, 32).half(), packed(2, 17, 3, 2, 16), 0.2),
            "grad_out",
        ),
        (lambda: torch.ops.vitkd.kd_loss(torch.zeros(4, 10), torch.zeros(4, 9), 0, 1.0, True, True), "teacher"),
        (lambda: torch.ops.vitkd.kd_loss(torch.zeros(4, 10), torch.zeros(4, 10).half(), 0, 1.0, True, True), "teacher"),
    ],
)
def test_the_native_ops_check_for_themselves(call, named):
    """Whoever calls torch.ops directly gets an error, not memory read out of bounds."""
    assert_native("attention")
    with pytest.raises(RuntimeError, match=named):
        call()
