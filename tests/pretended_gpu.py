"""A GPU that is not there, for the tests of who would take what on it: the fixture `pretend` puts it into a machine."""

import torch

from vitkd_fast.ops.attention import choose

CUDA = torch.device("cuda", 0)
GPU = {"gpu": "NVIDIA Test", "capability": [9, 0]}


def names(dtype, head_dim, *tokens):
    return [choose(CUDA, dtype, head_dim, each)[0] for each in tokens]


def check_ranges(ranges):
    *limits, last = [most for most, _ in ranges]
    assert last is None and limits == sorted(set(limits))
    assert {name for _, name in ranges} <= {"native", "triton", "sdpa"}
