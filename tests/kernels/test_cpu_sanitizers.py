"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, once per instruction set."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native import BFLOAT16, INSTRUCTION_SETS, cpu_kernels

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

FLAGS = "-std=c++20 -O1 -g -Wno-psabi -ffp-contract=fast -fsanitize=address,undefined -fno-sanitize-recover=all".split()


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    cxx = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(cxx) is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitize")
    # Emulated, for sanitizers do not see what masked and tile instructions touch, and few machines have them all.
    jobs = [(ROOT / "tests/kernels/cpu/sanitize.cpp", ""), *cpu_kernels(ROOT, emulated=True)]
    objects = [str(folder / f"{number}.o") for number in range(len(jobs))]
    commands = [
        [cxx, *FLAGS, *flags.split(), "-c", str(source), "-o", made]
        for (source, flags), made in zip(jobs, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(subprocess.check_call, commands))
    subprocess.check_call([cxx, *FLAGS, *objects, "-o", str(folder / "sanitize")])
    return folder / "sanitize"


@pytest.mark.parametrize("isa", INSTRUCTION_SETS | BFLOAT16)
def test_kernels_touch_only_their_memory(program, isa):
    nan = "malloc_fill_byte=255:max_malloc_fill_size=1000000000"  # what is read before it is written, in every dtype
    environment = os.environ | {"VITKD_CPU_ISA": isa, "ASAN_OPTIONS": nan}
    ran = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    if not ran.stdout.endswith(f"cases clean on {isa}\n"):
        pytest.skip(f"this CPU has no {isa}")
