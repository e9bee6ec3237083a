"""`vitkd_fast.ops.attention` as an attention of transformers' models, among those that they can be switched to."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vitkd_fast import ops
from vitkd_fast.ops.attention import MAX_HEAD_DIM

NAME = "vitkd"
PROJECTIONS = ({"query", "key", "value"}, {"q_proj", "k_proj", "v_proj"})  # what attention modules call their layers
BIASES = ("rel_pos", "relative_position", "attention_bias")  # what parameters of a bias of the scores are called
BIASED = ("use_relative_position_bias", "use_shared_relative_position_bias")  # ... where a config tells of one
FEWER_KEYS = {"sr", "sequence_reduction"}
DROPOUTS = ("dropout_prob", "attention_dropout", "dropout", "attn_dropout")


def switch(model: nn.Module) -> tuple[list[str], dict[str, str], list[str]]:
    """Let the models of transformers in `model` that run on torch's attention run on ours.

    Returns the names of the blocks that do, why each of the others does not, and which of the first have dropout. A
    call that our attention is not for, with a mask, a bias, dropout or queries of other keys, goes to torch's.
    """
    blocks: dict[str, Any] = {name: module for name, module in model.named_modules() if _is_attention(module)}
    kept = {name: reason for name, module in blocks.items() if (reason := _reason_to_keep(module))}
    blocks = {name: module for name, module in blocks.items() if name not in kept}
    if not all("vitkd_switched" in vars(block) for block in blocks.values()):
        _own_configs(model)
    if blocks:
        _register()
    for block in blocks.values():
        block.vitkd_switched = True
        block.config._attn_implementation = {"": _Name(NAME)}  # and not of the configs in it
    return [*blocks], kept, [name for name, block in blocks.items() if _dropout(block) > 0]


def switch_back(model: nn.Module) -> None:
    """To torch's attention, whatever of `model` still runs on ours."""
    for module in model.modules():
        vars(module).pop("vitkd_switched", None)
        config: Any = vars(module).get("config")  # which may be made of a switched model's
        if getattr(config, "_attn_implementation", None) == NAME:
            config._attn_implementation = {"": "sdpa"}


class _Name(str):
    """What a config says: unpickling one in another process registers our attention there."""

    def __reduce__(self):
        return _registered, ()


def _registered() -> _Name:
    _register()
    return _Name(NAME)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # an attention without it is never given a mask


def _own_configs(model: nn.Module) -> None:
    """Give the model configs of its own: the choice of an attention stands there, and models may share them."""
    copies: dict = {}
    for module in model.modules():
        if hasattr(vars(module).get("config"), "_attn_implementation"):
            module.config = copy.deepcopy(module.config, copies)


def _is_attention(module: nn.Module) -> bool:
    return is_of_transformers(module) and (
        _asks_the_interface(module) or any(names <= set(module._modules) for names in PROJECTIONS)
    )


def _asks_the_interface(module: nn.Module) -> bool:
    """Whether it looks up its attention among those that are registered."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _reason_to_keep(module: Any) -> str | None:
    name = type(module).__name__
    if not _asks_the_interface(module) or not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return f"{name} has an attention of its own"
    if module.config._attn_implementation not in ("sdpa", NAME):
        return f"the model was told to run on {module.config._attn_implementation!r}"
    if "Cross" in name or FEWER_KEYS & set(module._modules):
        return f"{name} has keys of its own"
    if getattr(module, "is_causal", False):
        return f"{name} is causal"
    if has_position_bias(module) or any(getattr(module.config, flag, False) for flag in BIASED):
        return f"{name} adds a relative position bias"
    return None


def has_position_bias(module: nn.Module) -> bool:
    parts = [part for part, _ in (*module.named_parameters(), *module.named_buffers())]
    return any(word in part for part in parts for word in BIASES)


def _dropout(module: nn.Module) -> float:
    probabilities = (getattr(module, name, 0.0) for name in DROPOUTS)
    return max(getattr(probability, "p", probability) for probability in probabilities)


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
