"""The ops: one file each, the plain-torch formula first, the public function last."""

from vitkd_fast.ops.attention import attention
from vitkd_fast.ops.attention_consistency import attention_consistency
from vitkd_fast.ops.attention_kd import attention_kd
from vitkd_fast.ops.gelu import gelu
from vitkd_fast.ops.kd_loss import kd_loss
from vitkd_fast.ops.linear import linear
from vitkd_fast.ops.patch_similarity_entropy import patch_similarity_entropy
from vitkd_fast.ops.token_relation_kd import token_relation_kd

__all__ = [
    "attention",
    "attention_consistency",
    "attention_kd",
    "gelu",
    "kd_loss",
    "linear",
    "patch_similarity_entropy",
    "token_relation_kd",
]
