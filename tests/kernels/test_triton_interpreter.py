"""Triton's kernels without a GPU: their tests under Triton's interpreter, and their compilation for real chips."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("op", ["attention", "kd_loss"])
def test_interpreted(op):
    """In a process of its own: TRITON_INTERPRET is read when a kernel is defined, and would reach other tests."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / f"test_triton_{op}.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 50, f"the interpreted tests did not run:\n{run.stdout}"
