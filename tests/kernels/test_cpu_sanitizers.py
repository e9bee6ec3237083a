"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, once per instruction set."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from native import BFLOAT16, INSTRUCTION_SETS, compile_program, cpu_kernels

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

FLAGS = "-std=c++20 -O1 -g1 -Wno-psabi -ffp-contract=fast -fsanitize=address,undefined -fno-sanitize-recover=all"


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    cxx = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(cxx) is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitize")
    # Emulated, for sanitizers do not see what masked and tile instructions touch, and few machines have them all.
    sources = [(ROOT / "tests/kernels/cpu/sanitize.cpp", ""), *cpu_kernels(ROOT, emulated=True)]
    return compile_program(folder / "sanitize", sources, FLAGS)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS | BFLOAT16)
def test_kernels_touch_only_their_memory(program, isa):
    nan = "malloc_fill_byte=255:max_malloc_fill_size=1000000000"  # what is read before it is written, in every dtype
    environment = os.environ | {"VITKD_CPU_ISA": isa, "ASAN_OPTIONS": nan}
    ran = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    if not ran.stdout.endswith(f"cases clean on {isa}\n"):
        pytest.skip(f"this CPU has no {isa}")
