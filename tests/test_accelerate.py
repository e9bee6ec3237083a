"""accelerate: which blocks it switches, that nothing else changes, and that results stay within the error rule."""

import copy
import pickle

import pytest
import torch
from testing_rules import assert_follows_rule, assert_native
from timm_blocks import Attention, accelerating, attention_block, image, make, spy, timm, tokens
from torch import nn

from vitkd_fast.accelerate import AccelerateReport, accelerate

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
        monkeypatch.setattr(accelerating, "faster_by_convolution", lambda: False)

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


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model is a str; accepted: an nn\.Module"):
        accelerate("vit_tiny_patch16_224")
