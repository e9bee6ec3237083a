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


def test_what_is_tied_counts_once_and_an_exported_model_has_weights():
    tied = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    tied[2].weight = tied[1].weight
    exported = nn.Sequential(nn.Flatten(), nn.Module())
    exported[1].register_buffer("weight", torch.zeros(64, 64))
    exported[1].register_buffer("count", torch.zeros(3, dtype=torch.int64))
    exported[1].forward = lambda x: x @ exported[1].weight
    spec = ImageSpec(8, 8, (0.5,), (0.5,))
    assert model_facts(tied, spec, "tied").bytes == 4 * 64 * 64
    facts = model_facts(exported, spec, "exported")
    assert (facts.parameters, facts.bytes) == (64 * 64, 4 * 64 * 64 + 8 * 3)


def test_linear_layers_are_counted_accelerated_or_not():
    from vitkd_fast.accelerate import accelerate

    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 640), nn.GELU(), nn.Linear(640, 96))
    spec = ImageSpec(8, 8, (0.5,) * 512, (0.5,) * 512)  # 512 rows
    by_hand = 2 * 512 * (64 * 640 + 640 * 96)
    assert model_facts(model, spec, "mlp").flops == by_hand
    accelerate(model)
    assert model_facts(model, spec, "mlp").flops == by_hand


def test_what_cannot_be_counted_is_unknown():
    class Refusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 5)
            self.register_buffer("sparse", torch.eye(3).to_sparse())

        def forward(self, images):
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise RuntimeError("looked at")
            return self.head(images.flatten(1))

    facts = model_facts(Refusing(), SPEC, "refusing")
    assert facts.flops is None and facts.bytes == 4 * 325 + 3 * 4


def test_compiled_models_are_counted_as_they_are_written():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    assert model_facts(compiled, SPEC, "it").flops == model_facts(plain, SPEC, "it").flops == 2 * 64 * 5
