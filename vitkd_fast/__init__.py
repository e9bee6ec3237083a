"""Compress a Vision Transformer without its training data: fused kernels under a data-free distillation loop."""

from vitkd_fast import backends, ops
from vitkd_fast._version import __version__
from vitkd_fast.accelerate import AccelerateReport, accelerate
from vitkd_fast.doctor import doctor

__all__ = ["AccelerateReport", "__version__", "accelerate", "backends", "doctor", "ops"]
