"""The ops: one file each, the plain-torch formula first, the public function last."""

from vitkd_fast.ops.attention import attention
from vitkd_fast.ops.kd_loss import kd_loss

__all__ = ["attention", "kd_loss"]
