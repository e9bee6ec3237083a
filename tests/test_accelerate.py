"""accelerate: which blocks it switches, that nothing else changes, and that results stay within the error rule."""

import copy
import importlib
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
from testing_rules import assert_follows_rule, assert_native
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vitkd_fast.accelerate import AccelerateReport, accelerate, decelerate

try:
    import timm
    from timm.models.vision_transformer import Attention
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

module_under_test = importlib.import_module("vitkd_fast.accelerate")  # as an attribute it is the function

# name, how it is built, blocks switched. Depth is cut to two where the blocks are all alike.
FUSED = {
    "vit_tiny": ("vit_tiny_patch16_224", {"depth": 2}),
    "deit_tiny": ("deit_tiny_patch16_224", {"depth": 2}),
    "deit_tiny distilled": ("deit_tiny_distilled_patch16_224", {"depth": 2}),
    "deit3_small": ("deit3_small_patch16_224", {"depth": 2}),
    "dinov2, 261 tokens": ("vit_small_patch14_reg4_dinov2.lvd142m", {"depth": 2, "img_size": 224, "num_classes": 10}),
    "qk_norm": ("vit_tiny_patch16_224", {"depth": 2, "qk_norm": True}),
    "scale_norm": ("vit_tiny_patch16_224", {"depth": 2, "scale_attn_norm": True}),
}
KEPT = {
    "eva02_tiny_patch14_224": "rotary position embedding",
    "beit_base_patch16_224": "relative position bias",
    "vit_relpos_small_patch16_224": "relative position bias",
}


def make(name, **arguments):
    """A model whose attention attends: timm's 0.02 initialisation leaves the softmax all but flat."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name:
                parameter.mul_(4)
    return model


def image(model, batch=2):
    size = model.patch_embed.img_size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def attention_block(**arguments):
    torch.manual_seed(0)
    block = Attention(48, num_heads=3, qkv_bias=True, **arguments)
    nn.init.normal_(block.qkv.weight, std=0.3)
    return block


def tokens(count=17, dtype=torch.float32):
    return torch.randn(2, count, 48, generator=torch.Generator().manual_seed(1), dtype=dtype)


def spy(monkeypatch):
    """A list that grows by one shape each time the op is called."""
    shapes = []
    fused = module_under_test.ops.attention
    monkeypatch.setattr(
        module_under_test.ops, "attention", lambda qkv, scale=None: shapes.append(tuple(qkv.shape)) or fused(qkv, scale)
    )
    return shapes


@pytest.mark.parametrize("case", FUSED)
def test_logits_and_gradients_follow_the_rule(case, monkeypatch):
    """The accelerated model errs, against the float64 model, no more than the rule allows over timm's own."""
    assert_native("attention")
    name, arguments = FUSED[case]
    model = make(name, **arguments)
    fast, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    report = accelerate(fast)
    assert (report.switched, report.kept) == (2, {})
    shapes = spy(monkeypatch)

    def run(model, x):
        x = x.clone().requires_grad_()
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, torch.arange(len(x)))
        gradients = torch.autograd.grad(loss, (x, *model.parameters()), allow_unused=True)
        return logits, gradients

    x = image(model)
    logits, gradients = run(fast, x)
    assert len(shapes) == 2
    plain_logits, plain_gradients = run(model, x)
    exact_logits, exact_gradients = run(exact, x.double())
    assert len(shapes) == 2
    assert_follows_rule(logits, exact_logits, plain_logits, "logits")
    names = ["image", *(name for name, _ in model.named_parameters())]
    for name, gradient, plain, best in zip(names, gradients, plain_gradients, exact_gradients, strict=True):
        assert (gradient is None) == (plain is None), name
        if gradient is None:
            continue
        if (
            best.abs().max() < 1e-15
        ):  # what moves all keys alike: rounding and nothing else, of which a maximum is chance
            assert gradient.norm() <= 1.5 * plain.norm(), name
        else:
            assert_follows_rule(gradient, best, plain, f"gradient of {name}")


@pytest.mark.parametrize("name", KEPT)
def test_blocks_the_op_cannot_take_are_kept(name):
    model = make(name, depth=2)
    x = image(model, batch=1)
    with torch.no_grad():
        expected = model(x)
        report = accelerate(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)  # its GELUs are ours now
    assert report.switched == 0
    assert list(report.kept) == ["blocks.0.attn", "blocks.1.attn"]
    assert all(KEPT[name] in reason for reason in report.kept.values())


def test_window_attention_is_kept():
    report = accelerate(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)))
    assert report.switched == 0
    assert len(report.kept) == 4
    assert all("relative position bias" in reason for reason in report.kept.values())


def test_a_tree_with_both_kinds():
    """A timm ViT inside a module of one's own, beside an attention of another sort."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = timm.create_model("vit_tiny_patch16_224", depth=1)
            self.decoder = nn.MultiheadAttention(48, 3)

    report = accelerate(Detector())
    assert report.switched == 1
    assert report.kept == {"decoder": "MultiheadAttention is not the self-attention of timm's ViT"}


class TestReport:
    @pytest.fixture(autouse=True)
    def any_other_cpu(self, monkeypatch):
        """Than Zen 5, on which linear layers are switched, too."""
        monkeypatch.setattr(module_under_test, "faster_by_convolution", lambda: False)

    def test_counts_every_block(self):
        assert str(accelerate(timm.create_model("vit_tiny_patch16_224"))) == (
            "12 of 12 attention blocks switched, and 12 GELUs"
        )

    def test_twice_is_once(self):
        model = make("vit_tiny_patch16_224", depth=2)
        first = accelerate(model)
        classes = [type(module) for module in model.modules()]
        assert accelerate(model) == first
        assert [type(module) for module in model.modules()] == classes

    def test_groups_what_was_kept(self):
        report = AccelerateReport(1, {"a": "too wide", "b": "too wide"})
        assert str(report) == "1 of 3 attention blocks switched\n  kept a, b: too wide"

    def test_says_when_there_is_nothing(self):
        report = accelerate(nn.Sequential(nn.Linear(3, 3)))
        assert report == AccelerateReport(0, {})
        assert "0 attention blocks switched: the model has none" in str(report)

    def test_says_which_blocks_drop_out(self):
        report = accelerate(timm.create_model("vit_tiny_patch16_224", depth=2, attn_drop_rate=0.1))
        assert report.eval_only == ("blocks.0.attn", "blocks.1.attn")
        assert str(report) == ("2 of 2 attention blocks switched (2 in eval mode only: attention dropout), and 2 GELUs")

    def test_wide_heads_are_kept(self):
        report = accelerate(Attention(320, num_heads=2))
        assert report.kept == {"": "head_dim 160 is above 128"}
        assert "the model itself" in str(report)

    def test_a_subclass_with_its_own_forward_is_kept(self):
        class Biased(Attention):
            def forward(self, x, attn_mask=None, is_causal=False):
                return super().forward(x + 1)

        assert accelerate(Biased(48, num_heads=3)).kept == {"": "Biased has a forward of its own"}

    def test_a_replaced_forward_is_kept(self):
        block = attention_block()
        block.forward = lambda x: x
        assert "forward of its own" in accelerate(block).kept[""]

    def test_a_timm_with_parts_unknown_here_is_kept(self):
        block = attention_block()
        block.sink = nn.Parameter(torch.zeros(3))
        assert "parts unknown here: sink" in accelerate(block).kept[""]


def test_a_subclass_that_inherits_forward_is_switched():
    block = copy.deepcopy(Named(48, num_heads=3))
    assert accelerate(block).switched == 1
    assert isinstance(block, Named)
    twin = pickle.loads(pickle.dumps(block))
    assert isinstance(twin, Named)
    assert torch.equal(twin(tokens()), block(tokens()))


class Named(Attention):
    pass


class TestDropout:
    def test_is_applied_in_training_by_timms_own_code(self, monkeypatch):
        block = attention_block(attn_drop=0.5)
        plain = copy.deepcopy(block)
        accelerate(block)
        shapes = spy(monkeypatch)
        results = []
        for model in (block.train(), plain.train()):
            torch.manual_seed(7)
            results.append((model(tokens()), model(tokens())))
        assert torch.equal(results[0][0], results[1][0])
        assert not torch.equal(results[0][0], results[0][1]), "two draws of dropout agree"
        assert shapes == []

    def test_leaves_evaluation_fused(self, monkeypatch):
        block = attention_block(attn_drop=0.5).eval()
        expected = block(tokens())
        accelerate(block)
        shapes = spy(monkeypatch)
        torch.testing.assert_close(block(tokens()), expected)
        assert shapes == [(2, 17, 3, 3, 16)]

    def test_of_the_projection_stays(self, monkeypatch):
        block = attention_block(proj_drop=0.5)
        plain = copy.deepcopy(block)
        accelerate(block)
        shapes = spy(monkeypatch)
        results = []
        for model in (block.train(), plain.train()):
            torch.manual_seed(7)
            results.append(model(tokens()))
        torch.testing.assert_close(*results)
        assert (results[0] == 0).float().mean() > 0.4
        assert len(shapes) == 1


class TestMasks:
    @pytest.mark.parametrize(
        "arguments",
        [{"attn_mask": torch.ones(17, 17, dtype=torch.bool).tril()}, {"is_causal": True}, {"attn_mask": torch.eye(17)}],
    )
    def test_a_masked_call_is_timms_own(self, arguments, monkeypatch):
        block = attention_block().eval()
        expected = block(tokens(), **arguments)
        accelerate(block)
        shapes = spy(monkeypatch)
        assert torch.equal(block(tokens(), **arguments), expected)
        assert shapes == []

    def test_so_is_one_with_a_positional_mask(self, monkeypatch):
        block = attention_block().eval()
        mask = torch.ones(17, 17, dtype=torch.bool).tril()
        expected = block(tokens(), mask)
        accelerate(block)
        shapes = spy(monkeypatch)
        assert torch.equal(block(tokens(), mask), expected)
        assert shapes == []

    def test_the_next_call_is_fused_again(self, monkeypatch):
        block = attention_block().eval()
        accelerate(block)
        shapes = spy(monkeypatch)
        block(tokens(), is_causal=True)
        block(tokens(), attn_mask=None, is_causal=False)
        assert len(shapes) == 1


def test_fused_attn_off_gives_the_weights_back(monkeypatch):
    """timm's way to see attention maps: fused_attn off and a hook on attn_drop."""
    block = attention_block().eval()
    accelerate(block)
    maps = []
    block.attn_drop.register_forward_hook(lambda module, inputs, output: maps.append(output))
    block.fused_attn = False
    block(tokens())
    assert maps[0].shape == (2, 3, 17, 17)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 3, 17))
    assert "fused_attn is off" in accelerate(block).kept[""]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gated": True},
        {"qk_norm": True, "norm_layer": nn.LayerNorm},
        {"scale_norm": True, "norm_layer": nn.LayerNorm},
        {"attn_head_dim": 20, "dim_out": 36},
        {"qk_norm": True, "scale_norm": True, "gated": True, "norm_layer": nn.LayerNorm, "proj_bias": False},
    ],
    ids=str,
)
def test_every_part_of_the_block(arguments):
    """In float64, where nothing hides behind rounding: output and all gradients equal timm's."""
    try:
        block = attention_block(**arguments).double()
    except TypeError:
        pytest.skip(f"this timm's Attention does not take {arguments}")
    plain = copy.deepcopy(block)
    assert accelerate(block).switched == 1
    x = tokens(dtype=torch.float64).requires_grad_()
    outputs = block(x), plain(x)
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-12)
    gradients = [
        torch.autograd.grad(output.square().sum(), (x, *model.parameters()))
        for output, model in zip(outputs, (block, plain), strict=True)
    ]
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize("arguments", [{}, {"qk_norm": True, "norm_layer": nn.LayerNorm}], ids=["plain", "qk_norm"])
def test_autocast_follows_the_rule(arguments):
    block = attention_block(**arguments)
    plain, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    accelerate(block)
    results = []
    for model in (block, plain):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(tokens(65))
        results.append((out, *torch.autograd.grad(out.float().square().sum(), tuple(model.parameters()))))
    out = exact(tokens(65).double())
    best = (out, *torch.autograd.grad(out.square().sum(), tuple(exact.parameters())))
    names = ["out", *(name for name, _ in block.named_parameters())]
    for name, result, expected, exact_value in zip(names, *results, best, strict=True):
        assert_follows_rule(result, exact_value, expected, name)
    assert results[0][0].dtype is torch.bfloat16


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


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model is a str; accepted: an nn\.Module"):
        accelerate("vit_tiny_patch16_224")
