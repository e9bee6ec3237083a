"""What one does with an accelerated module: save, copy, hook, compile, trace, wrap it, and undo it."""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
from timm_blocks import Attention, attention_block, image, make, spy, tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vitkd_fast.accelerate import accelerate, decelerate


def test_state_dict_and_training_mode_stay():
    model = make("vit_tiny_patch16_224", depth=2)
    before, parameters = model.state_dict(), list(model.parameters())
    accelerate(model)
    assert list(model.state_dict()) == list(before)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert not model.blocks[0].attn.training
    assert isinstance(model.blocks[0].attn, Attention)
    accelerated_twin = make("vit_tiny_patch16_224", depth=2)
    accelerated_twin.load_state_dict(model.state_dict())


def test_hooks_stay():
    block = attention_block()
    seen = []
    for name in ("qkv", "proj", "proj_drop"):
        getattr(block, name).register_forward_hook(lambda module, inputs, output, name=name: seen.append(name))
    block.register_forward_pre_hook(lambda module, inputs: seen.append("block"))
    accelerate(block)
    block(tokens())
    assert seen == ["block", "qkv", "proj", "proj_drop"]


def test_qk_norm_hooks_see_timms_layout():
    block = attention_block(qk_norm=True, norm_layer=nn.LayerNorm)
    shapes = []
    block.q_norm.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    block(tokens())
    accelerate(block)
    block(tokens())
    assert shapes == [(2, 3, 17, 16)] * 2


class Doubling(nn.Identity):
    def forward(self, input):
        return 2 * input


@pytest.mark.parametrize("kind", ["hook", "subclass", "forward of its own"])
def test_a_norm_that_is_an_identity_in_name_only_counts(kind):
    block = attention_block()
    plain = block(tokens())
    if kind == "hook":
        block.q_norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif kind == "subclass":
        block.q_norm = Doubling()
    else:
        block.q_norm.forward = lambda input: 2 * input
    expected = block(tokens())
    assert not torch.allclose(plain, expected)
    accelerate(block)
    torch.testing.assert_close(block(tokens()), expected)


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_whole_and_apart(copied, monkeypatch):
    model = make("vit_tiny_patch16_224", depth=2)
    accelerate(model)
    twin = copied(model)
    x = image(model, batch=1)
    with torch.no_grad():
        expected = model(x)
        shapes = spy(monkeypatch)
        assert torch.equal(twin(x), expected)
        assert len(shapes) == 2
        twin.blocks[0].attn.qkv.weight.zero_()
        assert torch.equal(model(x), expected)
        assert not torch.equal(twin(x), expected)


def test_a_pickle_opens_in_a_fresh_process(tmp_path):
    """Where nothing has called accelerate yet, so the fused class does not exist yet."""
    block = attention_block().eval()
    accelerate(block)
    path = tmp_path / "block.pt"
    torch.save((block, tokens(), block(tokens()).detach()), path)
    code = (
        f"import torch; block, x, expected = torch.load({str(path)!r}, weights_only=False); "
        "assert torch.equal(block(x), expected); print(type(block).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "FusedAttention", done.stderr


def test_importing_vitkd_fast_does_not_import_timm():
    code = "import sys, vitkd_fast.accelerate; assert 'timm' not in sys.modules and 'torchvision' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compiles_into_one_graph(monkeypatch):
    torch._dynamo.reset()
    model = nn.Sequential(attention_block(), attention_block(qk_norm=True, norm_layer=nn.LayerNorm))
    accelerate(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(tokens()), model(tokens()))
    gradients = [
        torch.autograd.grad(function(tokens()).square().sum(), tuple(model.parameters()))
        for function in (compiled, model)
    ]
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected)
    assert counter.frame_count == 1
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert sum("vitkd.attention" in target for target in targets) == 2


def test_compiles_with_symbolic_sizes():
    torch._dynamo.reset()
    block = attention_block(attn_drop=0.1).eval()
    accelerate(block)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    compiled(tokens(17))
    compiled_once = counter.frame_count
    for count in (17, 50, 197):
        torch.testing.assert_close(compiled(tokens(count)), block(tokens(count)))
    assert counter.frame_count == compiled_once


class LowRank(nn.Module):
    """A linear with two small ones beside it, as LoRA wraps it: only its call is that of a linear."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.down = inner, nn.Linear(inner.in_features, 2, bias=False)
        self.up = nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))


def test_a_wrapped_qkv_is_called_as_it_is():
    model = make("vit_tiny_patch16_224", depth=2, img_size=32)
    model.blocks[1].attn.qkv = LowRank(model.blocks[1].attn.qkv)
    x = image(model)
    expected = model(x)
    report = accelerate(model)
    assert (report.switched, report.kept) == (2, {})
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def test_fx_traces_an_accelerated_model():
    model = make("vit_tiny_patch16_224", depth=2, img_size=32)
    accelerate(model)
    arguments = inspect.signature(model.forward).parameters.values()  # those of a mask are no part of the graph
    given = {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}
    traced, x = torch.fx.symbolic_trace(model, concrete_args=given), image(model)
    torch.testing.assert_close(traced(x), model(x))
    assert sum(getattr(node.target, "__name__", "") == "attention" for node in traced.graph.nodes) == 2


def test_decelerate_gives_back_timms_own():
    model = make("vit_tiny_patch16_224", depth=2, img_size=32)
    x, classes = image(model), [type(module) for module in model.modules()]
    expected = model(x)
    accelerate(model)
    assert [type(module) for module in model.modules()] != classes
    decelerate(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(x), expected)
