"""Blocks and models of timm whose attention attends, for the tests of accelerate."""

import importlib

import pytest
import torch
from torch import nn

try:
    import timm
    from timm.models.vision_transformer import Attention
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

accelerating = importlib.import_module("vitkd_fast.accelerate")  # as an attribute it is the function


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
    fused = accelerating.ops.attention
    monkeypatch.setattr(
        accelerating.ops, "attention", lambda qkv, scale=None: shapes.append(tuple(qkv.shape)) or fused(qkv, scale)
    )
    return shapes
