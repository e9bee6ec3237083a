"""Training steps that the device itself skips when a loss or gradient is not finite, and what the host may read.

Asking the host (`if loss.isfinite()`) would stall the device at every step. Here the decision is a tensor that torch's
fused optimisers take, the one that GradScaler uses, and the counts wait on the device for the next log point.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitkd_fast.muon import Muon

PEAK = 0.3  # share of the run after which the learning rate is at its peak


class NonFiniteError(RuntimeError):
    """Too many steps had a loss or gradient that was not finite."""


class Ledger:
    """Sums of named scalars, counts of their non-finite values and of steps with any, on the device until `read`."""

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self.names = tuple(names)
        # Rows: sums and counts of the finite values since the last read; counts of the others since the start.
        self.table = torch.zeros(3, len(self.names), device=device)
        self.skipped = torch.zeros((), device=device)

    def add(self, values: dict[str, Tensor]) -> Tensor:
        """Book one step's scalars; returns a 0/1 tensor: 1 when any of them is not finite."""
        row = torch.stack([values[name].detach() for name in self.names])  # promotes to one dtype
        finite = row.isfinite()
        self.table += torch.stack([row.where(finite, 0), finite.float(), 1 - finite.float()])
        bad = 1 - finite.all().float()
        self.skipped += bad
        return bad

    def read(self) -> tuple[dict[str, float], dict[str, int], int]:
        """Means of what was finite since the last read; since the start, non-finite counts and steps with any. Here the
        host waits."""
        *table, steps = torch.cat((self.table.flatten(), self.skipped.view(1))).tolist()
        sums, counts, bad = (table[row * len(self.names) :][: len(self.names)] for row in range(3))
        self.table[:2] = 0
        means = {name: total / count for name, total, count in zip(self.names, sums, counts, strict=True) if count}
        return means, {name: int(n) for name, n in zip(self.names, bad, strict=True) if n}, int(steps)


class GuardedOptimizer:
    """Fused AdamW, and Muon for matrices, on a one-cycle learning rate; the device skips what is not finite.

    Args:
        name: "generator" or "student"; its gradient's norm is booked as `<name>_gradient`.
        module: its trainable weights are optimised; its buffers (BatchNorm averages) are put back when a step is
            skipped.
        lr: peak of the learning rate.
        terms: names of the values that each step books in `ledger`.
        clip: largest gradient norm; 0 does not clip.
        own_lr: peaks of weights that have another one.
        matrices: weights that Muon optimises, with the same rate.

    Raises:
        ValueError: the module has nothing to train.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        lr: float,
        terms: Iterable[str],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        clip: float = 0.0,
        own_lr: Mapping[nn.Parameter, float] | None = None,
        matrices: Iterable[Tensor] = (),
    ) -> None:
        self.module = module
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        if not self.weights:
            raise ValueError(f"{type(module).__name__} has no weight with requires_grad=True, so it cannot learn.")
        self.owners = _owners_of_buffers(module)
        self.kept_buffers = [buffer.clone() for buffer in self._buffers()]
        self.clip = clip
        self.gradient = f"{name}_gradient"
        self.ledger = Ledger([*terms, self.gradient], self.weights[0].device)
        own = own_lr or {}
        self.lr, self.muon = lr, Muon(matrices, weight_decay)
        elsewhere = {*own, *itertools.chain(*self.muon.stacks)}
        groups = [{"params": [weight for weight in self.weights if weight not in elsewhere], "peak": lr}]
        groups += [{"params": [weight], "peak": peak} for weight, peak in own.items()]
        groups = [group for group in groups if group["params"]] or groups
        self.optimizer: Any = torch.optim.AdamW(groups, lr, betas, weight_decay=weight_decay, fused=True)

    def step(self, loss: Tensor, values: dict[str, Tensor], progress: float) -> None:
        """Differentiate `loss`, book `values` and the gradient's norm, and step unless one of them is not finite.

        `progress` is the share of the run that is done, in [0, 1); it sets the learning rate.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = one_cycle(progress, group["peak"])
        for weight in self.weights:
            weight.grad = None
        with torch.autograd.set_multithreading_enabled(False):  # else a GPU's nodes wait for a thread of their own
            loss.backward()
        norm = nn.utils.get_total_norm([weight.grad for weight in self.weights if weight.grad is not None])
        bad = self.ledger.add(values | {self.gradient: norm})
        self.optimizer.found_inf = bad
        self.optimizer.grad_scale = (norm / self.clip).clamp_(min=1) if self.clip else None
        self.optimizer.step()
        self.muon.step(one_cycle(progress, self.lr), bad, self.optimizer.grad_scale)
        if self.owners:
            back, buffers = bad > 0, self._buffers()
            self.kept_buffers = [torch.where(back, *pair) for pair in zip(self.kept_buffers, buffers, strict=True)]
            torch._foreach_copy_(buffers, self.kept_buffers)

    def _buffers(self) -> list[Tensor]:
        """As they are now: a forward may put another tensor in a buffer's place."""
        return [buffers[name].detach() for buffers, name in self.owners]

    def finish(self) -> None:
        """Leave no gradients behind."""
        for weight in self.weights:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, the module's weights included."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "momenta": self.muon.momenta,
            "ledger": self.ledger.table,
            "skipped": self.ledger.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.muon.momenta = state["momenta"]
        self.kept_buffers = [buffer.clone() for buffer in self._buffers()]
        self.ledger.table = state["ledger"]
        self.ledger.skipped = state.get("skipped", state["ledger"][2].max())  # of before steps were counted


def _can_be_put_back(buffer: Tensor) -> bool:
    plain = buffer.layout is torch.strided and not buffer.is_quantized
    return plain and all(stride or size < 2 for size, stride in zip(buffer.shape, buffer.stride()))  # not expanded


def _owners_of_buffers(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where each buffer stands, shared ones once."""
    found: dict[Tensor, tuple[dict[str, Any], str]] = {}
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and _can_be_put_back(buffer):
                found.setdefault(buffer, (part._buffers, name))
    return list(found.values())


def one_cycle(progress: float, peak: float) -> float:
    """Learning rate at a share of the run (Smith & Topin 2017): cosines up for 30 % of it, then down to nothing."""
    if progress < PEAK:
        return peak * (0.04 + 0.96 * (1 - math.cos(math.pi * progress / PEAK)) / 2)
    return peak * (1 + math.cos(math.pi * (progress - PEAK) / (1 - PEAK))) / 2
