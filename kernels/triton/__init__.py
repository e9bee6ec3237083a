"""Triton versions of the ops, for CUDA machines without nvcc: one module per op, named after it."""

from vitkd_fast.triton.attention import attention, attention_backward
from vitkd_fast.triton.kd_loss import kd_loss

__all__ = ["attention", "attention_backward", "kd_loss"]
