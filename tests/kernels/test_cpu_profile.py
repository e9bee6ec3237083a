"""The profile of the CPU kernels knows their functions by the names that they have."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
cpu_profile = importlib.import_module("cpu_profile")


@pytest.mark.parametrize("name", cpu_profile.STAGE_OF)
def test_functions_exist(name):
    text = "".join(path.read_text() for path in sorted((ROOT / "kernels/cpu").glob("*.*")))
    assert re.search(rf"^ *(inline |static )*[\w<>:]+ {name}(<\w+>)?\(", text, re.MULTILINE), name


@pytest.mark.parametrize(
    "function, name",
    [
        ("void vitkd::cpu::avx2::gemm_tile<float, 4, 3>(Gemm<float> const&, long, long)", "gemm_tile"),
        ("vitkd::cpu::amx::Ahead::some()", "some"),
        ("vitkd::cpu::avx2::(anonymous namespace)::column_max<float>(float const*, long, long)", "column_max"),
        ("void cpu::(anonymous namespace)::exponentials<cpu::amx::Pair, float>(float*)", "exponentials"),
        ("cpu::Lanes<float>::Vec cpu::exponentials<cpu::Gemm<cpu::Pair>, float>(float*, long)", "exponentials"),
        ("??", "??"),
    ],
)
def test_plain_name(function, name):
    assert cpu_profile.plain(function) == name
