"""Report: FLOPs, parameters and bytes against what can be counted by hand."""

import copy

import pytest
import torch
from tiny import TinyNet
from torch import nn

from vitkd_fast.generator import ImageSpec
from vitkd_fast.report import model_facts

SPEC = ImageSpec(8, 8, (0.5,), (0.5,))


def test_counts_of_a_linear_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    facts = model_facts(model, SPEC, "linear")
    assert (facts.parameters, facts.flops, facts.bytes) == (325, 2 * 64 * 5, 4 * 325)


def test_counting_changes_nothing():
    model = TinyNet(4).train()
    before = copy.deepcopy(model.state_dict())
    model_facts(model, SPEC, "tiny")
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_attention_is_counted_accelerated_or_not():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    from vitkd_fast.accelerate import accelerate

    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=32, depth=2, num_heads=2, global_pool="token"
    )
    tokens, dim = 5, 32
    block = 2 * tokens * 12 * dim * dim + 4 * tokens * tokens * dim  # qkv, proj and MLP; q k^T and weights·v
    by_hand = 2 * 4 * 16 * dim + 2 * block + 2 * dim * 3
    assert model_facts(model, SPEC, "vit").flops == by_hand
    assert accelerate(model).switched == 2
    assert model_facts(model, SPEC, "vit").flops == by_hand
