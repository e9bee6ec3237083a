"""taps: what is recorded is what timm computes, models are left as they were, and errors name the way out."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitkd_fast.accelerate import accelerate
from vitkd_fast.ops import attention_kd
from vitkd_fast.taps import layer_map, taps

try:
    import timm
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
# name, how it is built, prefix tokens
VITS = {
    "vit": ("vit_tiny_patch16_224", {}, 1),
    "vit, qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}, 1),
    "vit, no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}, 2),
    "deit3": ("deit3_small_patch16_224", {}, 1),
    "dinov2, registers": ("vit_small_patch14_reg4_dinov2", {}, 5),
}


def make(kind="vit", depth=3, accelerated=False, **options):
    torch.manual_seed(0)
    name, arguments, _ = VITS[kind]
    model = timm.create_model(name, **SMALL | {"depth": depth} | arguments | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if accelerated:
        assert accelerate(model).switched == depth
    return model


def images(seed=0):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def timm_maps(model, batch):
    """Each block's map, as timm makes it in memory with fused_attn off: what its attention dropout is given."""
    model, maps = copy.deepcopy(model), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _module, inputs, _output: maps.append(inputs[0]))
    model(batch)
    return maps


def hook_count(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
@pytest.mark.parametrize("kind", VITS)
def test_the_recorded_qkv_makes_timms_map_and_output(kind, accelerated):
    model = make(kind, accelerated=accelerated)
    maps, inputs = timm_maps(model, images()), []
    handle = model.blocks[1].attn.proj.register_forward_hook(lambda _module, given, _output: inputs.append(given[0]))
    with taps(model) as tapped:
        model(images())
    handle.remove()
    assert list(tapped.qkv) == list(tapped.tokens) == [0, 1, 2]
    for block, expected in enumerate(maps):
        query, key, _ = tapped.qkv[block].permute(2, 0, 3, 1, 4)
        made = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-6)
    query, key, value = tapped.qkv[1].permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attended, inputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
@pytest.mark.parametrize("kind", VITS)
def test_tokens_are_the_blocks_outputs_and_prefix_tokens_are_told_apart(kind, accelerated):
    model, prefix = make(kind, accelerated=accelerated), VITS[kind][2]
    with taps(model) as tapped:
        features = model.forward_features(images())
    assert torch.equal(model.norm(tapped.tokens[2]), features)
    assert tapped.prefix_tokens == prefix
    assert tapped.patches(tapped.tokens[0]).shape == (2, 16, 24)
    assert tapped.patches(tapped.qkv[0]).shape == (2, 16, 3, 2, 12)
    assert torch.equal(tapped.patches(tapped.tokens[2]), tapped.tokens[2][:, prefix:])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
@pytest.mark.parametrize("kind", VITS)
def test_outputs_gradients_and_hooks_are_left_as_they_were(kind, accelerated, training):
    model = make(kind, accelerated=accelerated).train(training)
    batch, hooks = images().requires_grad_(), hook_count(model)
    logits = model(batch)
    (grad,) = torch.autograd.grad(logits.sum(), batch)
    with taps(model):
        assert hook_count(model) > hooks
        tapped_logits = model(batch)
        (tapped_grad,) = torch.autograd.grad(tapped_logits.sum(), batch)
    assert torch.equal(tapped_logits, logits) and torch.equal(tapped_grad, grad)
    assert hook_count(model) == hooks and torch.equal(model(batch), logits)


def test_hooks_are_gone_after_an_error():
    model = make()
    with pytest.raises(RuntimeError, match="mine"), taps(model):
        raise RuntimeError("mine")
    assert hook_count(model) == 0


@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
@pytest.mark.parametrize("kind", ["vit", "vit, qk_norm"])
def test_the_graph_is_kept(kind, accelerated):
    model, batch = make(kind, accelerated=accelerated), images().requires_grad_()
    with taps(model) as tapped:
        model(batch)
    other = torch.randn(tapped.qkv[1].shape, generator=torch.Generator().manual_seed(3))
    attention_kd(tapped.qkv[1], other).backward(retain_graph=True)
    assert batch.grad.any() and model.blocks[0].mlp.fc1.weight.grad.any() and model.blocks[1].attn.qkv.weight.grad.any()
    assert model.blocks[1].mlp.fc1.weight.grad is None, "what runs after the map has no part in it"
    tapped.tokens[1].square().sum().backward()
    assert model.blocks[1].mlp.fc1.weight.grad.any() and model.blocks[2].mlp.fc1.weight.grad is None


def test_without_a_graph():
    model = make("vit, qk_norm")
    with torch.no_grad(), taps(model) as tapped:
        model(images())
    assert not any(tensor.requires_grad for tensor in (*tapped.qkv.values(), *tapped.tokens.values()))


@pytest.mark.parametrize("kind", ["vit", "vit, qk_norm"])
def test_autocast(kind):
    model = make(kind)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = model(images())
        with taps(model) as tapped:
            assert torch.equal(model(images()), logits)
    assert tapped.qkv[0].dtype is torch.bfloat16


def test_a_forward_replaces_the_one_before():
    model = make()
    with taps(model) as tapped:
        model(images(0))
        first = dict(tapped.tokens)
        model(images(1))
        second = dict(tapped.tokens)
        tapped.clear()
        assert not tapped.tokens and not tapped.qkv
        model(images(0))
    for block in range(3):
        assert not torch.equal(first[block], second[block]) and torch.equal(first[block], tapped.tokens[block])


def test_a_forward_that_fails_leaves_no_mixture():
    model = make()
    with taps(model) as tapped:
        model(images())
        handle = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images(1))
        handle.remove()
    assert list(tapped.tokens) == [0, 1]


def test_two_contexts_at_once():
    model = make()
    with taps(model, what={"qkv"}) as outer:
        with taps(model, [1]) as inner:
            model(images())
        assert torch.equal(outer.qkv[1], inner.qkv[1])
        model(images(1))
    assert not torch.equal(outer.qkv[1], inner.qkv[1])


def test_chosen_blocks_and_kinds():
    model = make()
    with taps(model, [-1, 0, 2], {"qkv"}) as tapped:
        model(images())
    assert list(tapped.qkv) == [0, 2] and not tapped.tokens
    with pytest.raises(KeyError, match="qkv of block 1 is not tapped; tapped blocks: 0, 2"):
        tapped.qkv[1]
    with pytest.raises(KeyError, match="tokens of block 0 is not tapped; tapped blocks: none"):
        tapped.tokens[0]


def test_reading_before_a_forward():
    with taps(make()) as tapped:
        with pytest.raises(KeyError, match="no qkv of block 1 yet: call the model inside the context"):
            tapped.qkv[1]


class Stranger(nn.Module):
    """A transformer that is not timm's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

    def forward(self, tokens):
        tokens = self.embed(tokens)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


def test_modules_by_name():
    model, batch = Stranger(), torch.randn(2, 6, 4)
    with taps(model, ["layers.1", "embed"], {"tokens"}) as tapped:
        out = model(batch)
    assert list(tapped.tokens) == ["embed", "layers.1"]  # as they run
    assert torch.equal(tapped.tokens["layers.1"], out) and torch.equal(tapped.tokens["embed"], model.embed(batch))
    with pytest.raises(ValueError, match=r"has no num_prefix_tokens.*slice"):
        tapped.patches(out)


def test_timm_blocks_by_name_inside_another_model():
    model = make()
    wrapped = nn.Sequential(nn.Identity(), model)
    with taps(wrapped, ["1.blocks.2"]) as tapped, taps(model, [2]) as expected:
        wrapped(images())
    assert torch.equal(tapped.qkv["1.blocks.2"], expected.qkv[2])
    assert torch.equal(tapped.tokens["1.blocks.2"], expected.tokens[2])


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Stranger, {}, r"Stranger has no list of blocks.*pass blocks= the names.*named_modules"),
        (Stranger, {"blocks": ["layers.7"]}, "Stranger has no module 'layers.7'"),
        (Stranger, {"blocks": ["layers.0"]}, "MultiheadAttention is not the self-attention of timm's ViT"),
        (make, {"blocks": [3]}, "VisionTransformer has 3 blocks, so there is no block 3"),
        (make, {"blocks": [-4]}, "so there is no block -4"),
        (make, {"blocks": []}, "blocks is empty"),
        (make, {"blocks": 1}, r"blocks is 1; accepted: a sequence.*\[1\]"),
        (make, {"blocks": "blocks.1"}, r"\['blocks.1'\]"),
        (make, {"blocks": [0, "blocks.1"]}, "numbers alone or names alone"),
        (make, {"what": {"attention"}}, "accepted: a collection of 'qkv' and 'tokens'"),
        (make, {"what": "qkv"}, "what is 'qkv'; accepted: a collection"),
        (make, {"what": ()}, "accepted: a collection"),
    ],
)
def test_errors_say_what_to_do(model, options, message):
    model = model()
    with pytest.raises(ValueError, match=message), taps(model, **options):
        pass
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [("eva02_tiny_patch14_224", "rotates queries and keys"), ("beit_base_patch16_224", "relative position bias")],
)
def test_attention_that_is_more_than_queries_and_keys(name, reason):
    size = {"img_size": 28, "patch_size": 14} if "eva" in name else {"img_size": 32, "embed_dim": 24, "num_heads": 2}
    model = timm.create_model(name, depth=1, **size)
    with pytest.raises(ValueError, match=reason + r'.*what=\{"tokens"\}'), taps(model):
        pass
    with taps(model, what={"tokens"}) as tapped:
        model(torch.randn(1, 3, *model.patch_embed.img_size))
    assert tapped.patches(tapped.tokens[0]).shape[1] == 4


def test_activation_checkpointing_is_refused():
    model = make()
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match=r"set_grad_checkpointing\(False\)"), taps(model):
        pass


def test_an_output_that_is_not_tokens():
    with taps(model := nn.Sequential(nn.Linear(4, 4)), ["0"], {"tokens"}):
        with pytest.raises(TypeError, match=r"block '0' \(Linear\) gives shape \(2, 4\)"):
            model(torch.zeros(2, 4))
    with taps(model := nn.Sequential(nn.LSTM(4, 4)), ["0"], {"tokens"}):
        with pytest.raises(TypeError, match=r"block '0' \(LSTM\) gives tuple"):
            model(torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (4, 12, (2, 5, 8, 11)),
        (5, 12, (2, 4, 7, 9, 11)),
        (3, 3, (0, 1, 2)),
        (1, 6, (5,)),
        (6, 2, (0, 0, 0, 1, 1, 1)),
        (2, 3, (1, 2)),
    ],
)
def test_layer_map(student, teacher, expected):
    assert layer_map(student, teacher) == expected


def test_layer_map_goes_up_evenly_from_any_depth_to_any():
    for student in range(1, 25):
        for teacher in range(1, 25):
            followed = layer_map(student, teacher)
            steps = {after - before for before, after in pairwise(followed)}
            assert len(followed) == student and followed[-1] == teacher - 1 and followed[0] >= 0
            assert not steps or (max(steps) - min(steps) <= 1 and min(steps) >= 0)
    with pytest.raises(ValueError, match="depths are 0 and 3"):
        layer_map(0, 3)
