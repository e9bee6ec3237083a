"""`vitkd_fast.ops.attention` as an attention of transformers' models, among those that they can be switched to."""

from typing import Any

import torch
from torch import Tensor, nn

from vitkd_fast import ops
from vitkd_fast.ops.attention import MAX_HEAD_DIM

NAME = "vitkd"
PROJECTIONS = ({"query", "key", "value"}, {"q_proj", "k_proj", "v_proj"})  # what attention modules call their layers


def switch(model: Any) -> int:
    """Let the models of transformers in `model` that run on torch's attention run on ours; how many self-attentions do.

    A call that our attention is not for, with a mask, a bias, dropout or queries of other keys, goes to torch's.
    """
    count = 0
    for module in model.modules():
        if hasattr(module, "set_attn_implementation") and module.config._attn_implementation in ("sdpa", NAME):
            from transformers import AttentionInterface, AttentionMaskInterface
            from transformers.masking_utils import sdpa_mask

            AttentionInterface.register(NAME, attention)
            AttentionMaskInterface.register(NAME, sdpa_mask)  # an attention without it is never given a mask
            module.set_attn_implementation(NAME)
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == NAME:
            projects = any(names <= {name for name, _ in module.named_children()} for names in PROJECTIONS)
            count += projects and "Cross" not in type(module).__name__
    return count


def is_of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Of (B, H, N, D) queries, keys and values, as transformers hands them over; (B, N, H, D), and no weights."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    alike = query.shape == key.shape == value.shape and query.shape[-1] <= MAX_HEAD_DIM
    biased = others.get("position_bias") is not None or others.get("softcap") is not None
    if attention_mask is not None or dropout or causal or biased or not alike:
        from transformers import AttentionInterface

        return AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **others
        )
    qkv = torch.stack([part.transpose(1, 2) for part in (query, key, value)], dim=2)  # (B, N, 3, H, D)
    return ops.attention(qkv, scale=scaling).unflatten(-1, qkv.shape[3:]), None
