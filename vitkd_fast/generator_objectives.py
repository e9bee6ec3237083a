"""What a generator can minimise; see `vitkd_fast.objectives` for adding to it."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitkd_fast import ops
from vitkd_fast.objectives import Scene, generator_objective
from vitkd_fast.ops.attention_consistency import HorizontalFlip
from vitkd_fast.pair import NO_WHOLE_PATCHES, Pair
from vitkd_fast.student_objectives import discrepancy


@generator_objective("classes", "student")
def disagreement(scene: Scene) -> Tensor:
    """Minus the distance of the two networks' logits: images that the student gets wrong (Fang et al. 2019, DFAD)."""
    assert scene.student is not None
    return -discrepancy(scene, scene.config.disagreement)


@generator_objective("classes", "student")
def boundary(scene: Scene) -> Tensor:
    """Minus KL(teacher ‖ student) where both decide alike, so that images do not run away from where the student is
    right (Fang et al. 2022, FastDFKD)."""
    assert scene.student is not None
    rows = ops.kd_loss(
        scene.student.logits, scene.teacher.logits, temperature=scene.config.temperature, reduction="none"
    )
    alike = scene.student.logits.argmax(-1) == scene.teacher.logits.argmax(-1)
    return -(rows * alike).mean()


@generator_objective("classes")
def one_hot(scene: Scene) -> Tensor:
    """Cross-entropy of the teacher with its own decision, in nats: 0 when it is sure of every image.

    Chen et al. 2019 (DAFL), eq. 2.
    """
    return -F.log_softmax(scene.teacher.logits.float(), dim=-1).amax(-1).mean()


@generator_objective("classes", "labels")
def asked(scene: Scene) -> Tensor:
    """Cross-entropy of the teacher with the label that the image was made for, in nats (Yin et al. 2020)."""
    assert scene.labels is not None
    return F.cross_entropy(scene.teacher.logits.float(), scene.labels)


@generator_objective("classes")
def balance(scene: Scene) -> Tensor:
    """Minus the entropy of the batch's mean prediction, in nats: −log C when every class is equally frequent.

    Chen et al. 2019 (DAFL), eq. 4.
    """
    log_p = F.log_softmax(scene.teacher.logits.float(), dim=-1)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # in logs, a class that underflows to 0 has no NaN gradient
    return (log_mean.exp() * log_mean).sum()


@generator_objective("tokens")
def activation(scene: Scene) -> Tensor:
    """Minus the mean size of the teacher's last tokens: real images excite a network more than others.

    Chen et al. 2019 (DAFL), eq. 3, on the features before a CNN's classifier.
    """
    assert scene.teacher.tokens is not None
    return -scene.teacher.tokens.float().abs().mean()


@generator_objective()
def total_variation(scene: Scene) -> Tensor:
    """Mean squared difference of neighbouring pixels, down and across, in units of [0, 1] pixels."""
    squares = []  # with the deviations as numbers: as a tensor they would be copied to the device in every step
    for channel, std in zip(scene.images.float().unbind(1), scene.pair.spec.std, strict=True):
        steps = [channel.diff(dim=dim) for dim in (-2, -1) if channel.shape[dim] > 1]
        squares.append(std**2 * sum((step.square().mean() for step in steps), channel.new_zeros(())))
    return torch.stack(squares).mean()


@generator_objective("attention")
def patch_entropy(scene: Scene) -> Tensor:
    """Minus the entropy of the similarities between patches, mean over the teacher's blocks.

    Li et al. 2022 (PSAQ-ViT, arXiv 2203.02250), L_PSE, on the output of each block's attention, mean over its heads;
    the sum over the blocks there, which grows with the depth.
    """
    entropies = []
    for qkv in scene.teacher.attention:  # (B, N, 3, H, D)
        heads = ops.attention(qkv).unflatten(2, qkv.shape[3:])  # (B, N, H, D)
        entropies.append(ops.patch_similarity_entropy(heads.mean(2)[:, scene.pair.prefix_tokens :]))
    return -torch.stack(entropies).mean()


@generator_objective("attention")
class attention_consistency(nn.Module):
    """How far the teacher's attention fails to follow an image that is mirrored; the last of its blocks.

    L_attention of Habib et al. 2024 (arXiv 2408.05952), whose form is not published: this one is ours. Off where the
    patches of a mirrored image are not the mirrored patches.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.off = None if pair.whole_patches else NO_WHOLE_PATCHES

    def forward(self, scene: Scene) -> Tensor:
        pair = scene.pair
        mirrored = pair.look(pair.teacher, scene.images.flip(-1), frozenset({"attention"}), paired=False)
        return ops.attention_consistency(
            scene.teacher.attention[-1],
            mirrored.attention[-1],
            HorizontalFlip(),
            grid=pair.grid,
            prefix_tokens=pair.prefix_tokens,
        )


@generator_objective()
class feature_statistics(nn.Module):
    """How far mean and variance of what the teacher's BatchNorms see are from those of its training images.

    ‖μ − μ*‖₂ + ‖σ² − σ*²‖₂ over the channels: R_feature of Yin et al. 2020 (DeepInversion, arXiv 1912.08795), the mean
    over the layers where theirs is the sum, which grows with the depth. Off for a teacher without BatchNorm, as most
    ViTs are.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        norms = (module for module in pair.teacher.modules() if isinstance(module, _BatchNorm))
        self.layers = tuple(norm for norm in norms if norm.running_mean is not None)  # a tuple: they stay the teacher's
        self.off = None if self.layers else "the teacher has no BatchNorm with running averages"
        self.distances: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the teacher's BatchNorms say what they see."""
        self.distances.clear()
        with ExitStack() as stack:
            for norm in self.layers:
                stack.callback(norm.register_forward_pre_hook(self._measure).remove)
            yield

    def _measure(self, norm: Any, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0].float().transpose(0, 1).flatten(1), dim=1, correction=0)
        self.distances.append((mean - norm.running_mean).norm() + (variance - norm.running_var).norm())

    def forward(self, scene: Scene) -> Tensor:
        return torch.stack(self.distances).mean()
