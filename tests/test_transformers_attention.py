"""transformers' models on our attention: the same answers and gradients, and torch's where ours is not for it."""

import copy
import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from tiny import same, state
from torch import nn

pytest.importorskip("transformers")

import transformers
from tiny_detectors import detr, yolos

from vitkd_fast.accelerate import accelerate, decelerate

ours = importlib.import_module("vitkd_fast.transformers_attention")


@pytest.fixture
def shapes(monkeypatch):
    """Of the packed qkv of each call of our op."""
    seen = []
    op = ours.ops.attention
    monkeypatch.setattr(
        ours.ops, "attention", lambda qkv, scale=None: seen.append(tuple(qkv.shape)) or op(qkv, scale=scale)
    )
    return seen


def images(channels=1, size=16):
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(0))


def answers(model, given):
    """Logits, boxes, and the gradients of all weights and of the images."""
    given = given.clone().requires_grad_()
    output = model(given)
    model.zero_grad()
    (output.logits.square().mean() + output.pred_boxes.square().sum()).backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return [output.logits.detach(), output.pred_boxes.detach(), given.grad], gradients


def assert_close(first, second):
    torch.testing.assert_close(first[0], second[0], atol=2e-5, rtol=1e-4)
    assert first[1].keys() == second[1].keys() and len(first[1]) > 20
    torch.testing.assert_close(first[1], second[1], atol=2e-5, rtol=1e-3)


def qkv(tokens=7, heads=2, width=8, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(2, heads, tokens, width) for _ in range(3)]


def sdpa(query, key, value, **options):
    return nn.functional.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)


@pytest.mark.parametrize("training", [False, True])
def test_yolos_answers_and_learns_as_before(shapes, training):
    model = yolos().train(training)
    before = answers(model, images())
    assert shapes == []
    report = accelerate(model)
    assert (report.switched, report.kept) == (2, {})
    assert str(report).startswith("2 of 2 attention blocks switched, and 2 GELUs")
    assert_close(answers(model, images()), before)
    assert shapes == [(3, 1 + 16 + 5, 3, 2, 8)] * 2


def test_detr_answers_as_before_with_its_cross_attention_on_torchs(shapes):
    model, given = detr(), images(3, 32)
    before = answers(model, given)
    assert accelerate(model).switched == 2  # the encoder's and the decoder's own
    assert_close(answers(model, given), before)
    assert (3, 5, 3, 2, 8) in shapes and len(shapes) <= 2


def test_detr_answers_as_before_where_queries_are_as_many_as_patches():
    model, given = detr(queries=16), images(3, 32)
    before = answers(model, given)
    accelerate(model)
    assert_close(answers(model, given), before)


def test_detr_answers_as_before_to_images_with_a_margin_masked():
    model, given = detr(), images(3, 32)
    mask = torch.ones(3, 32, 32, dtype=torch.int64)
    mask[1, :, 20:] = 0
    with torch.no_grad():
        before = model(given, pixel_mask=mask).logits
        assert (before - model(given).logits).abs().max() > 1e-5
        accelerate(model)
        torch.testing.assert_close(model(given, pixel_mask=mask).logits, before, atol=2e-5, rtol=1e-4)


def test_calling_it_twice_changes_nothing(shapes):
    model = yolos()
    first, second = accelerate(model), accelerate(model)
    assert first == second
    with torch.no_grad():
        model(images())
    assert len(shapes) == 2


def test_weights_copies_and_pickles_stay_as_they_were(shapes):
    model = yolos()
    before = state(model)
    accelerate(model)
    assert same(state(model), before)
    with torch.no_grad():
        expected = model(images()).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            shapes.clear()
            assert torch.equal(other(images()).logits, expected) and len(shapes) == 2


def test_a_saved_model_does_not_ask_for_our_attention(tmp_path):
    model = yolos()
    accelerate(model)
    model.save_pretrained(tmp_path)
    assert ours.NAME not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(loaded(images()).logits, model(images()).logits, atol=2e-5, rtol=1e-4)


def test_a_pickle_runs_in_a_process_that_has_seen_nothing_of_ours(tmp_path):
    model = yolos()
    accelerate(model)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(model.config._attn_implementation, model(torch.zeros(1, 1, 16, 16)).logits.shape[0])"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], capture_output=True, text=True)
    assert ran.stdout.split() == [ours.NAME, "1"], ran.stderr


def test_other_models_of_a_config_stay_as_they_were(shapes):
    first = yolos()
    config = first.config
    second = type(first)(config)
    accelerate(first)
    assert first.config._attn_implementation == ours.NAME
    assert config._attn_implementation == second.config._attn_implementation == "sdpa"
    with torch.no_grad():
        second(images())
    assert shapes == []


def clip(**config):
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 20, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    return transformers.CLIPModel._from_config(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8), **config
    ).eval()


def test_a_part_told_to_run_its_own_attention_is_left_alone():
    model = clip(attn_implementation={"text_config": "eager", "vision_config": "sdpa"})
    report = accelerate(model)
    assert report.switched == 2 and all(name.startswith("vision_model") for name in switched(model))
    assert set(report.kept.values()) == {"the model was told to run on 'eager'"} and len(report.kept) == 2
    tokens = torch.tensor([[0, 5, 1]])
    assert len(model.text_model(tokens, output_attentions=True).attentions) == 2


def switched(model):
    return [name for name, module in model.named_modules() if runs_ours(module)]


def runs_ours(module):
    return hasattr(module, "is_causal") and module.config._attn_implementation == ours.NAME


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
KEPT = {
    "relative positions": (
        lambda: transformers.BeitModel(
            transformers.BeitConfig(**SMALL, image_size=16, patch_size=8, use_relative_position_bias=True)
        ),
        "adds a relative position bias",
        0,
    ),
    "windows": (
        lambda: transformers.SwinModel(
            transformers.SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[2], num_heads=[2], window_size=4)
        ),
        "adds a relative position bias",
        0,
    ),
    "fewer keys": (
        lambda: transformers.SegformerModel(
            transformers.SegformerConfig(
                num_encoder_blocks=2,
                depths=[1, 1],
                sr_ratios=[2, 1],
                hidden_sizes=[8, 16],
                num_attention_heads=[1, 2],
                patch_sizes=[3, 3],
                strides=[2, 2],
                mlp_ratios=[2, 2],
            )
        ),
        "has keys of its own",
        1,
    ),
    "eager": (
        lambda: transformers.ViTModel._from_config(
            transformers.ViTConfig(**SMALL, image_size=16, patch_size=8), attn_implementation="eager"
        ),
        "told to run on 'eager'",
        0,
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_the_report_names_what_does_not_run_on_ours(shapes, case):
    build, reason, count = KEPT[case]
    model = build().eval()
    report = accelerate(model)
    with torch.no_grad():
        model(torch.randn(1, 3, 16, 16))
    assert report.switched == len(shapes) == count
    assert report.kept and all(reason in each for each in report.kept.values())


def test_a_causal_model_is_left_alone():
    model = transformers.GPT2Model(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=10))
    report = accelerate(model)
    assert report.switched == 0 and all("is causal" in reason for reason in report.kept.values())
    assert model.config._attn_implementation == "sdpa"


def test_models_are_found_inside_others():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([yolos(depth=1), yolos(depth=3)])

    assert accelerate(Wrapped()).switched == 4


def test_a_model_told_to_run_its_own_attention_is_left_alone(shapes):
    model = yolos()
    model.set_attn_implementation("eager")
    assert accelerate(model).switched == 0
    with torch.no_grad():
        model(images())
    assert shapes == [] and model.config._attn_implementation == "eager"


def test_dropout_goes_to_torchs_in_training_alone(shapes):
    model = yolos(width=8)
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.5
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.5
    accelerate(model)
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = (model.train()(images()).logits for _ in range(2))
        assert shapes == [] and not torch.equal(first, second)
        model.eval()(images())
    assert len(shapes) == 2


def test_it_is_attention_with_the_scale_that_is_asked(shapes):
    query, key, value = qkv()
    for scale in (None, 0.1):
        found, weights = ours.attention(nn.Module(), query, key, value, None, scaling=scale, is_causal=False)
        assert found.shape == (2, 7, 2, 8) and weights is None
        torch.testing.assert_close(found, sdpa(query, key, value, scale=scale), atol=1e-5, rtol=1e-4)
    assert shapes == [(2, 7, 3, 2, 8)] * 2


def test_what_ours_is_not_for_goes_to_torchs(shapes):
    query, key, value = qkv()
    module = nn.Module()
    module.is_causal = False
    mask = torch.zeros(2, 1, 7, 7).masked_fill(torch.rand(2, 1, 7, 7) < 0.3, -1e9)
    found, _ = ours.attention(module, query, key, value, mask)
    torch.testing.assert_close(found, sdpa(query, key, value, attn_mask=mask))
    found, _ = ours.attention(module, query[:, :, :3], key, value, None)
    torch.testing.assert_close(found, sdpa(query[:, :, :3], key, value))
    found, _ = ours.attention(module, query, key, value, None, is_causal=True)
    torch.testing.assert_close(found, sdpa(query, key, value, is_causal=True))
    bias = torch.randn(1, 2, 7, 7)
    found, _ = ours.attention(module, query, key, value, None, position_bias=bias)
    torch.testing.assert_close(found, sdpa(query, key, value, attn_mask=bias))
    module.is_causal = True
    found, _ = ours.attention(module, query, key, value, None)
    torch.testing.assert_close(found, sdpa(query, key, value, is_causal=True))
    wide = qkv(tokens=3, width=ours.MAX_HEAD_DIM + 8)
    found, _ = ours.attention(nn.Module(), *wide, None, is_causal=False)
    torch.testing.assert_close(found, sdpa(*wide))
    assert shapes == []


def test_decelerate_gives_back_torchs(shapes):
    model, given = yolos(), images()
    before, attributes = answers(model, given), set(vars(model))
    accelerate(model)
    decelerate(model)
    found = answers(model, given)
    assert shapes == [] and set(vars(model)) == attributes
    torch.testing.assert_close(found, before, atol=0, rtol=0)


def test_models_made_of_a_switched_models_config_are_switched_back_by_themselves(shapes):
    first = yolos()
    accelerate(first)
    second, third = type(first)(copy.deepcopy(first.config)), type(first)(first.config)
    decelerate(second)
    assert second.config._attn_implementation == "sdpa" and first.config._attn_implementation == ours.NAME
    accelerate(third)
    decelerate(third)
    assert third.config._attn_implementation == "sdpa" and first.config._attn_implementation == ours.NAME
    with torch.no_grad():
        first(images())
    assert len(shapes) == 2


def test_a_config_taken_from_a_switched_model_works_in_another_process(tmp_path):
    model = yolos()
    accelerate(model)
    torch.save(model.config, tmp_path / "config.pt")
    torch.save(type(model)(model.config), tmp_path / "model.pt")
    code = (
        "import sys, torch, transformers; model = torch.load(sys.argv[2], weights_only=False)\n"
        "config = torch.load(sys.argv[1], weights_only=False)\n"
        "for model in (model, transformers.YolosForObjectDetection(config)):\n"
        "    print(model.config._attn_implementation, model(torch.zeros(1, 1, 16, 16)).logits.shape[0])"
    )
    paths = [tmp_path / "config.pt", tmp_path / "model.pt"]
    ran = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert ran.stdout.split() == [ours.NAME, "1"] * 2, ran.stderr
