"""Run the attention of a model of timm or of transformers on `vitkd_fast.ops.attention`, its GELUs on
`vitkd_fast.ops.gelu` and, where that gains anything, its linear layers on `vitkd_fast.ops.linear`, in place."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_fast import ops
from vitkd_fast.ops.attention import MAX_HEAD_DIM
from vitkd_fast.ops.linear import faster_by_convolution
from vitkd_fast.transformers_attention import has_position_bias, is_of_transformers, switch, switch_back

# timm's attention of ViT and DeiT: its home today, and before timm 1.0.20. Matched by name, so that neither
# `import vitkd_fast` nor `accelerate` imports timm: a model with timm blocks has imported it already.
TIMM_ATTENTION = {("timm.layers.attention", "Attention"), ("timm.models.vision_transformer", "Attention")}

# What the fused forward below knows how to run and to refuse; a timm that adds to either is left alone.
SUBMODULES = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
ARGUMENTS = {"self", "x", "attn_mask", "is_causal"}


@dataclass(frozen=True)
class AccelerateReport:
    """What `accelerate` did, by blocks.

    Attributes:
        switched: number of attention blocks that now run on `vitkd_fast.ops.attention`.
        kept: module name -> why that attention block still runs its own code.
        eval_only: names of switched blocks with attention dropout, which run their own code while training.
        activations: number of GELUs that now run on `vitkd_fast.ops.gelu`.
        linears: number of linear layers that now run on `vitkd_fast.ops.linear`, which AMD's Zen 5 alone gains by.
    """

    switched: int
    kept: dict[str, str]
    eval_only: tuple[str, ...] = ()
    activations: int = 0
    linears: int = 0

    def __str__(self) -> str:
        total = self.switched + len(self.kept)
        if total == 0:
            lines = ["0 attention blocks switched: the model has none of timm's or transformers' that ours can replace"]
        else:
            lines = [f"{self.switched} of {total} attention blocks switched"]
        if self.eval_only:
            lines[0] += f" ({len(self.eval_only)} in eval mode only: attention dropout)"
        counts = [(self.activations, "GELUs"), (self.linears, "linear layers")]
        if others := [f"{count} {name}" for count, name in counts if count]:
            lines[0] += f", and {' and '.join(others)}"
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            by_reason.setdefault(reason, []).append(name or "the model itself")
        lines += [f"  kept {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> AccelerateReport:
    """Switch every timm ViT/DeiT attention block in `model` to `vitkd_fast.ops.attention`, in place; models of
    transformers that run on torch's attention (`attn_implementation="sdpa"`, their default); the GELUs of all to
    `vitkd_fast.ops.gelu`; and on AMD's Zen 5 their linear layers to `vitkd_fast.ops.linear`.

    Parameters, state_dict keys, hooks, train/eval mode, deepcopy, pickle, torch.compile and torch.fx (which sees linear
    layers as functions) stay as they were, torch.onnx.export, torch.jit.script and quantization do not (`decelerate`
    first); calling it again changes nothing.
    A block that needs what the op lacks keeps its own code, and so does a single call that does: an attention mask, or
    attention dropout in training mode. Setting a block's `fused_attn` to False, timm's way to have the attention
    weights in memory, turns the op off there.

    Args:
        model: any module tree; blocks are found wherever they are in it.

    Returns:
        How many blocks were switched, and why each of the others was kept; `print` it.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; accepted: an nn.Module, such as timm.create_model gives.")
    switched, kept, eval_only = switch(model)
    for name, module in model.named_modules():
        if not _is_attention(module) or is_of_transformers(module):
            continue
        reason = _reason_to_keep(module)
        if reason is not None:
            kept[name] = reason
            continue
        if not isinstance(module, _FusedAttention):
            module.__class__ = _fused_class(type(module))
        switched.append(name)
        if _dropout(module) > 0:
            eval_only.append(name)
    return AccelerateReport(len(switched), kept, tuple(eval_only), _switch_activations(model), _switch_linears(model))


def decelerate(model: nn.Module) -> None:
    """Take back what `accelerate` did to `model`, in place: torch.onnx.export and torch.jit.script do not know our
    ops, nor torch's quantization our linear layers."""
    module: Any
    for module in model.modules():
        if isinstance(module, _FusedAttention):
            module.__class__ = type(module).__bases__[1]
        elif isinstance(module, _FastGELU):
            module.__class__ = nn.GELU  # type: ignore[assignment]
        elif type(module) is _FastLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
        elif type(module).__bases__ == (_FastLinear,):  # the class that torch made of it alone, to parametrize it
            type(module).__bases__ = (nn.Linear,)
        elif is_of_transformers(module) and getattr(module, "act", None) is ops.gelu:
            module.act = F.gelu
    switch_back(model)


class _FusedAttention(nn.Module):
    """timm's Attention.forward with the packed qkv handed to the op as it leaves the linear layer.

    The block's class is swapped rather than its `forward` replaced (a bound method would follow deepcopy into the
    wrong block) or the block wrapped (which would rename every parameter); isinstance checks on timm's class hold.
    """

    num_heads: int
    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        masked = any(value is not None and value is not False for value in (*args, *kwargs.values()))
        dropped = self.training and _dropout(self) > 0
        if masked or dropped or not getattr(self, "fused_attn", True):
            return super().forward(x, *args, **kwargs)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, H, D)
        if not (_is_nothing(self.q_norm) and _is_nothing(self.k_norm)):
            qkv = self._normalise(qkv)
        out = ops.attention(qkv)  # (B, N, H*D), with the scale that timm leaves to torch's attention, D ** -0.5
        norm, gate = getattr(self, "norm", None), getattr(self, "gate", None)
        if norm is not None:
            out = norm(out)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _normalise(self, qkv: Tensor) -> Tensor:
        # The norms see the (B, H, N, D) views that timm gives them. Under autocast they answer in float32; going back
        # to v's dtype before packing is the cast that attention would make, on two tensors instead of three.
        query, key, value = qkv.transpose(1, 3).unbind(2)  # (B, H, N, D) each
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        return torch.stack((query, key, value), dim=2).transpose(1, 3)  # (B, N, 3, H, D)

    def __reduce_ex__(self, protocol):
        # The class is made at run time, where pickle and deepcopy cannot find it by name: name its base instead.
        state = super().__reduce_ex__(protocol)[2:]
        return _rebuild, (type(self).__bases__[1],), *state


class _FastGELU(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input)


class _FastLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


def _switch_linears(model: nn.Module) -> int:
    """Let torch's linear layers run on ours where this machine gains by it; how many do."""
    count, gains = 0, faster_by_convolution()
    for module in model.modules():
        if gains and type(module) is nn.Linear and "forward" not in vars(module):
            module.__class__ = _FastLinear
        count += isinstance(module, _FastLinear)
    return count


def _switch_activations(model: nn.Module) -> int:
    """Let torch's and transformers' exact GELUs run on ours; how many do."""
    count = 0
    module: Any
    for module in model.modules():
        if type(module) is nn.GELU and module.approximate == "none" and "forward" not in vars(module):
            module.__class__ = _FastGELU
        elif is_of_transformers(module) and getattr(module, "act", None) is F.gelu:
            module.act = ops.gelu
        count += isinstance(module, _FastGELU) or getattr(module, "act", None) is ops.gelu
    return count


_FUSED_CLASSES: dict[type, type] = {}  # timm's Attention, or a subclass with the same forward -> its fused subclass


def _fused_class(base: type) -> type:
    if base not in _FUSED_CLASSES:
        members = {"__module__": __name__, "__doc__": base.__doc__}
        _FUSED_CLASSES[base] = type(f"Fused{base.__name__}", (_FusedAttention, base), members)
    return _FUSED_CLASSES[base]


def _rebuild(base: type) -> nn.Module:
    return object.__new__(_fused_class(base))


def _is_nothing(module: nn.Module) -> bool:
    """Whether it may be left out: torch's Identity, to which nobody listens."""
    if type(module) is not nn.Identity or "forward" in vars(module):
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks)


def _dropout(module: nn.Module) -> float:
    return getattr(getattr(module, "attn_drop", None), "p", 0.0)


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "fused_attn") or type(module).__name__.lower().endswith(("attention", "attn"))


def _timm_class(module: nn.Module) -> type[nn.Module] | None:
    classes = (cls for cls in type(module).__mro__ if (cls.__module__, cls.__qualname__) in TIMM_ATTENTION)
    return next(classes, None)


def _reason_to_keep(module: Any) -> str | None:
    """Why this attention module must run its own code; None when the op can take it."""
    timm_class = _timm_class(module)
    if timm_class is None:
        return _foreign_reason(module)
    known_forwards = (timm_class.forward, _FusedAttention.forward)
    if "forward" in vars(module) or type(module).forward not in known_forwards:
        return f"{type(module).__name__} has a forward of its own"
    unknown = {name for name, _ in module.named_children()} - SUBMODULES
    unknown |= {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    unknown |= set(inspect.signature(timm_class.forward).parameters) - ARGUMENTS
    if unknown:
        return f"this version of timm's Attention has parts unknown here: {', '.join(sorted(unknown))}"
    if not getattr(module, "fused_attn", True):
        return "fused_attn is off, which asks for the attention weights in memory"
    if module.head_dim > MAX_HEAD_DIM:
        return f"head_dim {module.head_dim} is above {MAX_HEAD_DIM}"
    return None


def _foreign_reason(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript runs its own code"
    if "rope" in inspect.signature(type(module).forward).parameters:
        return f"{name} rotates queries and keys (rotary position embedding)"
    if has_position_bias(module):
        return f"{name} adds a relative position bias"
    return f"{name} is not the self-attention of timm's ViT"
