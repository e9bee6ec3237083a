"""What a ViT computes on its inside, taken during a forward: each block's packed qkv and its output tokens."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vitkd_fast.accelerate import _foreign_reason, _FusedAttention, _is_attention, _timm_class
from vitkd_fast.models import as_written

What = Literal["qkv", "tokens"]
Block = int | str


class Records(dict[Block, Tensor]):
    """Tensors by block; a missing one says why."""

    def __init__(self, what: str, wanted: Collection[Block]) -> None:
        super().__init__()
        self.what, self.wanted = what, wanted

    def __missing__(self, block: Block) -> Tensor:
        if block in self.wanted:
            raise KeyError(
                f"no {self.what} of block {block!r} yet: call the model inside the context, not a copy of it."
            )
        known = ", ".join(map(repr, self.wanted)) or "none"
        raise KeyError(f"{self.what} of block {block!r} is not tapped; tapped blocks: {known}.")


class Tapped:
    """What the latest forward left.

    Attributes:
        qkv: block -> (B, N, 3, H, D), queries and keys after their norms if the block has any.
        tokens: block -> (B, N, C), the block's output.
        prefix_tokens: how many class, distillation and register tokens come before the patches; None if the model
            does not say.
    """

    def __init__(self, what: Collection[What], blocks: Collection[Block], prefix_tokens: int | None) -> None:
        self.qkv = Records("qkv", blocks if "qkv" in what else ())
        self.tokens = Records("tokens", blocks if "tokens" in what else ())
        self.prefix_tokens = prefix_tokens

    def patches(self, recorded: Tensor) -> Tensor:
        """The patches' part of a recorded tensor, without the prefix tokens: a view, (B, patches, …)."""
        if self.prefix_tokens is None:
            raise ValueError(
                "the model has no num_prefix_tokens, so which tokens are patches is not known; set it on the model, "
                "or slice recorded[:, prefix_tokens:] yourself."
            )
        return recorded[:, self.prefix_tokens :]

    def clear(self) -> None:
        self.qkv.clear()
        self.tokens.clear()


@contextmanager
def taps(
    model: nn.Module, blocks: Sequence[Block] | None = None, what: Collection[What] = ("qkv", "tokens")
) -> Iterator[Tapped]:
    """Record what `model`'s blocks compute in forwards inside the context.

        with taps(teacher, blocks=[2, 5], what={"qkv"}) as tapped:
            logits = teacher(images)
        tapped.qkv[5]  # (B, N, 3, H, D)

    Args:
        model: a timm ViT or DeiT, accelerated or not; or any module, with `blocks` as names.
        blocks: numbers of blocks (negative ones from the end) or names of modules, as in `named_modules`; all blocks
            when None. The records have the numbers from the start, or the names, as keys.
        what: "qkv", "tokens" or both. A module by name gives its "tokens" if its output is (B, N, C), and its "qkv" if
            there is a timm Attention in it.

    Outputs are not changed and nothing is copied, except q and k where they are normalised. The tensors are part of
    the autograd graph if there is one. Each forward replaces the records of the one before, from its first tapped
    block on; keep them under another name to compare two. The records stay after the context; the hooks do not.

    Raises:
        ValueError: the model's blocks are not known, there is no such block, its queries and keys cannot be had, `what`
            is unknown or empty, or activation checkpointing is on, which runs blocks without a graph, and twice.
        TypeError: in the forward, when a block's output is not a (B, N, C) tensor.
    """
    if isinstance(what, str) or not what or not set(what) <= set(get_args(What)):
        raise ValueError(f"what is {what!r}; accepted: a collection of {' and '.join(map(repr, get_args(What)))}.")
    if getattr(model, "grad_checkpointing", False):
        raise ValueError(
            f"{type(model).__name__} has activation checkpointing on, which runs blocks without a graph, and twice; "
            f"model.set_grad_checkpointing(False) turns it off."
        )
    found = _find_blocks(model, blocks)
    tapped = Tapped(what, tuple(found), getattr(model, "num_prefix_tokens", None))
    attentions = {block: _attention_of(block, module) for block, module in found.items()} if "qkv" in what else {}
    handles = []
    try:
        for block, module in found.items():
            if block == next(iter(found)):
                handles.append(module.register_forward_pre_hook(lambda *_: tapped.clear()))
            if "tokens" in what:
                handles.append(module.register_forward_hook(_record_tokens(tapped.tokens, block)))
        for block, attention in attentions.items():
            handles += _tap_qkv(attention, tapped.qkv, block)
        with as_written(model):
            yield tapped
    finally:
        for handle in handles:
            handle.remove()


def layer_map(student_depth: int, teacher_depth: int) -> tuple[int, ...]:
    """For each block of the student, the number of the teacher's block that it follows: evenly spread, last to last.

    Raises:
        ValueError: a depth below 1.
    """
    if student_depth < 1 or teacher_depth < 1:
        raise ValueError(f"depths are {student_depth} and {teacher_depth}; both must be at least 1.")
    return tuple(-(-(block + 1) * teacher_depth // student_depth) - 1 for block in range(student_depth))


def _find_blocks(model: nn.Module, blocks: Sequence[Block] | None) -> dict[Block, nn.Module]:
    """The wanted blocks in the order of the model, so that the first one tapped is the first one to run."""
    if isinstance(blocks, (str, int)):
        raise ValueError(f"blocks is {blocks!r}; accepted: a sequence of block numbers or module names, [{blocks!r}].")
    names = [block for block in blocks or () if isinstance(block, str)]
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(
                f"{type(model).__name__} has no module {name!r}; dict(model.named_modules()) has its names."
            )
    found: dict[Block, nn.Module] = {name: module for name, module in modules.items() if name in names}
    if blocks is not None and len(names) == len(blocks):
        if not found:
            raise ValueError("blocks is empty; name at least one block, or leave it at None for all.")
        return found
    if names:
        raise ValueError(f"blocks is {list(blocks or ())!r}; accepted: numbers alone or names alone.")
    listed = getattr(model, "blocks", None)
    if not isinstance(listed, (nn.Sequential, nn.ModuleList)):
        raise ValueError(
            f"{type(model).__name__} has no list of blocks as timm's ViTs have (model.blocks); pass blocks= the names "
            f"of the modules to tap, from dict(model.named_modules())."
        )
    depth = len(listed)
    for block in blocks or ():
        if not -depth <= block < depth:  # type: ignore[operator]
            raise ValueError(f"{type(model).__name__} has {depth} blocks, so there is no block {block}.")
    wanted = range(depth) if blocks is None else sorted({block % depth for block in blocks})  # type: ignore[operator]
    return {int(block): listed[int(block)] for block in wanted}


def _attention_of(block: Block, module: nn.Module) -> Any:
    """The block's timm Attention, whose q kᵀ is all there is to its map."""
    found = [part for part in module.modules() if _is_attention(part)]
    reason = f"{len(found)} attention modules are in it" if len(found) != 1 else None
    if reason is None:
        timm_class = _timm_class(found[0])
        if timm_class is None:
            reason = _foreign_reason(found[0])
        elif "forward" in vars(found[0]) or type(found[0]).forward not in (timm_class.forward, _FusedAttention.forward):
            reason = f"{type(found[0]).__name__} has a forward of its own"
    if reason is not None:
        raise ValueError(
            f"the qkv of block {block!r} ({type(module).__name__}) does not say its attention map: {reason}. Tap "
            f'what={{"tokens"}}, or name blocks that hold one timm Attention each.'
        )
    return found[0]


def _tap_qkv(attention: Any, records: Records, block: Block) -> list[Any]:
    """Hooks on the linear layer and on the norms: the blocks of timm and of `accelerate` call both alike."""

    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    normed = [slot for slot, norm in enumerate(norms) if norm is not None and not isinstance(norm, nn.Identity)]
    parts: list[Tensor] = []

    def unpack(_module, _inputs, output):
        packed = output.unflatten(-1, (3, attention.num_heads, -1))  # (B, N, 3, H, D)
        if normed:
            parts[:] = packed.unbind(2)
        else:
            records[block] = packed

    def replace(slot: int) -> Callable:
        def hook(_module, _inputs, output):  # (B, H, N, D)
            parts[slot] = output.transpose(1, 2).to(parts[slot].dtype)  # under autocast a norm answers in float32
            if slot == normed[-1]:
                records[block] = torch.stack(parts, 2)
                parts.clear()

        return hook

    handles = [attention.qkv.register_forward_hook(unpack)]
    return handles + [norms[slot].register_forward_hook(replace(slot)) for slot in normed]  # type: ignore[union-attr]


def _record_tokens(records: Records, block: Block) -> Callable:
    def hook(module, _inputs, output):
        if not isinstance(output, Tensor) or output.dim() != 3:
            given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(
                f"block {block!r} ({type(module).__name__}) gives {given}; its tokens must be one (batch, tokens, "
                f"channels) tensor. Tap another module, by its name in dict(model.named_modules())."
            )
        records[block] = output

    return hook
