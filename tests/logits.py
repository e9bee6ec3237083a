"""Logits for the tests of the distillation losses."""

import torch

from vitkd_fast.ops.kd_loss import KINDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOFTENED = ("kl", "reverse_kl", "js")
# (kind, temperature): the raw-logit kinds have no temperature
LOSSES = [(kind, temperature) for kind in SOFTENED for temperature in (0.5, 1.0, 4.0, 20.0)]
LOSSES += [(kind, 1.0) for kind in KINDS if kind not in SOFTENED]


def draw(rows, classes, dtype, device="cpu", seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, classes, generator=generator) * spread
    return student.to(device, dtype), teacher.to(device, dtype)
