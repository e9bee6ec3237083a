"""Compress a Vision Transformer without its training data: fused kernels under a data-free distillation loop."""

from vitkd_fast import backends, generator, methods, objectives, ops
from vitkd_fast._version import __version__
from vitkd_fast.accelerate import AccelerateReport, accelerate, decelerate
from vitkd_fast.config import Config
from vitkd_fast.distill import Result, distill
from vitkd_fast.doctor import doctor

__all__ = [
    "AccelerateReport",
    "Config",
    "Result",
    "__version__",
    "accelerate",
    "backends",
    "decelerate",
    "distill",
    "doctor",
    "generator",
    "methods",
    "objectives",
    "ops",
]
