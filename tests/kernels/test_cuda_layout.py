"""The shared-memory layouts of the CUDA attention, from the functions that nvcc compiles."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "cuda_host"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_element_has_its_place_and_no_bank_is_met_twice(tmp_path):
    flags = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-include", "simt.h", "-I", HERE]
    build = subprocess.run(
        ["g++", *flags, HERE / "layout.cpp", "-o", tmp_path / "layout"], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    result = subprocess.run([tmp_path / "layout"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith("0 failures\n")
