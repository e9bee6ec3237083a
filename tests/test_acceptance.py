"""What benchmarks/acceptance.py says of a run: met only where what the package runs met every figure."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

PATH = Path(__file__).parents[1] / "benchmarks/acceptance.py"
CASE = ("bfloat16 256,6,197,64", "forward")  # 1.5 times the best, 70 % of copy


@pytest.fixture
def acceptance():
    spec = importlib.util.spec_from_file_location("acceptance", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(contender, median, case=CASE, share=0.8, **more):
    ours = contender.startswith("vitkd")
    facts = {"case": case[0], "direction": case[1], "contender": contender, "median": median, "share": share}
    return SimpleNamespace(**{"ours": ours, "chosen": contender == "vitkd native", "correct": True, **facts, **more})


@pytest.mark.parametrize(
    "rows, verdict",
    [
        ([row("vitkd native", 10), row("sdpa cudnn", 15), row("formula", 99)], "met: vitkd native 1.50x of 1.5x"),
        ([row("vitkd native", 10), row("sdpa cudnn", 14.9), row("formula", 99)], "NOT MET: vitkd native 1.49x"),
        ([row("vitkd native", 10, share=0.69), row("sdpa cudnn", 15)], "NOT MET: vitkd native 1.50x"),
        ([row("vitkd native", 10), row("vitkd triton", 5), row("sdpa cudnn", 15)], "met: vitkd native 1.50x"),
        ([row("vitkd native", 10), row("sdpa cudnn", 15), row("sdpa flash", 1, correct=False)], "met: vitkd native"),
        ([row("vitkd native", 1, correct=False), row("sdpa cudnn", 15)], "not judged"),
        ([row("vitkd native", 10), row("sdpa cudnn", None)], "not judged"),
        ([row("vitkd native", 1, chosen=False), row("sdpa default", 15, chosen=True)], "NOT MET: this is left to sdpa"),
    ],
)
def test_verdicts(acceptance, rows, verdict):
    (line,) = acceptance.lines(rows, "cuda", "of copy")
    assert verdict in line


def test_the_loss_is_held_to_eager_and_to_compiled_rivals(acceptance):
    case = ("bfloat16 kl 4096x1000", "forward+backward")
    times = {
        "vitkd native": 10,
        "F.kl_div": 49,
        "formula": 60,
        "F.kl_div torch.compile": 20,
        "formula torch.compile": 15,
    }
    eager, compiled = acceptance.lines([row(name, median, case) for name, median in times.items()], "cuda", "of copy")
    assert "NOT MET: vitkd native 4.90x of 5.0x over F.kl_div, 80% of 80% of copy" in eager
    assert "met: vitkd native 1.50x of 1.5x over formula torch.compile" in compiled


def test_bfloat16_is_held_to_floors_only_on_a_cpu_with_amx(acceptance):
    case = ("bfloat16 64,3,65,64", "forward+backward")
    rows = [row("vitkd native", 10, case), row("sdpa flash", 160, case), row("formula", 24, case)]
    assert acceptance.lines(rows, "cpu", "of GEMM") == []
    best, sdpa = acceptance.lines(rows, "cpu with AMX", "of GEMM")
    assert "NOT MET: vitkd native 2.40x of 2.5x over formula" in best
    assert "met: vitkd native 16.00x of 15.0x over sdpa flash" in sdpa


def test_float32_on_a_cpu_is_held_to_a_share_of_a_matrix_product(acceptance):
    case = ("float32 32,3,197,64", "forward+backward")
    rows = [row("vitkd native", 10, case, share=0.59), row("sdpa flash", 17, case)]
    for machine in ("cpu", "cpu with AMX"):
        (line,) = acceptance.lines(rows, machine, "of GEMM")
        assert "NOT MET: vitkd native 1.70x of 1.6x over sdpa flash, 59% of 60% of GEMM" in line


@pytest.mark.parametrize("machine, floors", [("cuda", 12 + 4), ("cpu", 11), ("cpu with AMX", 11 + 15)])
def test_every_row_of_the_table_is_there(acceptance, machine, floors):
    found = acceptance.FLOORS[machine]
    assert len({(floor.case, floor.direction, floor.against) for floor in found}) == len(found) == floors


def test_a_case_that_was_not_measured_has_no_line(acceptance):
    assert acceptance.lines([row("vitkd native", 1, case=("bfloat16 1,1,1,64", "forward"))], "cuda", "of copy") == []
