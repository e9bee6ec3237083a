"""How the table of who takes what on a GPU is made from the benchmarks' records."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from pretended_gpu import CUDA, GPU, check_ranges, names
from torch._subclasses.fake_tensor import FakeTensorMode

from vitkd_fast import choice

ROOT = Path(__file__).parents[1]


def choose_py():
    path = ROOT / "benchmarks/choose.py"
    if not path.exists():
        pytest.skip("the benchmarks are not here")
    spec = importlib.util.spec_from_file_location("choose", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(benchmark="attention", date="2026-01-01", gpu="NVIDIA Test", tiles=(), **cases):
    """A record as the benchmarks write it; the cases are {case: {contender: median}}."""
    rows = [
        {
            "case": case,
            "direction": direction,
            "contender": contender,
            "median": median,
            "correct": contender != "wrong",
        }
        for case, times in cases.items()
        for contender, median in times.items()
        for direction in ("forward", "forward+backward")
    ]
    machine = {"gpu": gpu, "capability": [9, 0]}
    return {
        "benchmark": benchmark,
        "date": date,
        "commit": "c0ffee",
        "machine": machine,
        "arguments": {"graph": False},
        "rows": rows,
        "tiles": list(tiles),
    }


def times(native, triton, sdpa, cudnn=0.1):
    return {"vitkd native": native, "vitkd triton": triton, "sdpa default": sdpa, "sdpa cudnn": cudnn}


RECORDS = [
    record(**{
        "bfloat16 64,6,50,64": times(2, 1, 3),
        "bfloat16 64,6,65,64": times(1, 2, 3),
        "bfloat16 64,3,197,64": times(1, 2, 3),
        "bfloat16 64,6,197,64": times(2, 3, 1.9),
        "bfloat16 64,6,577,64": times(3, 2, 1),
        "float32 64,6,50,64": times(3, 2, 1),
        "bfloat16 64,6,577,32": times(3, 2, 1),
    }),
    record("attention_sweep", **{"float16 64,6,400,64": times(1, 2, 3), "float16 64,6,50,16": times(1, 2, 3)}),
    record("kd_loss", **{
        "bfloat16 kl 256x10": {"vitkd native": 2, "vitkd triton": 1, "formula": 0.1},
        "bfloat16 kl 256x1000": {"vitkd native": 1, "vitkd triton": 2},
    }),
]  # fmt: skip


class TestChoosePy:
    def test_sizes_are_parted_midway(self):
        (entry,) = choose_py().choose(RECORDS, {"gpus": []})["gpus"]
        assert (entry["gpu"], entry["capability"]) == ("NVIDIA Test", [9, 0])
        assert entry["attention"]["16-bit"]["64"] == [[57, "triton"], [488, "native"], [None, "sdpa"]]
        assert entry["attention"]["32-bit"] == {"64": [[None, "sdpa"]]}
        assert entry["kd_loss"] == {"16-bit": [[505, "triton"], [None, "native"]]}
        assert "32" not in entry["attention"]["16-bit"]  # only measured at 577

    def test_without_a_gradient_the_forward_decides(self):
        both = record(**{"bfloat16 64,6,50,64": times(1, 2, 3), "bfloat16 64,6,257,64": times(3, 1, 2)})
        for row in both["rows"]:
            if row["direction"] == "forward":
                row["median"] = {"vitkd native": 1, "vitkd triton": 2, "sdpa default": 3}.get(row["contender"])
        (entry,) = choose_py().choose([both], {"gpus": []})["gpus"]
        assert entry["attention"]["16-bit"]["64"] == [[153, "native"], [257, "triton"], [None, "sdpa"]]
        assert entry["attention_forward"]["16-bit"]["64"] == [[257, "native"], [None, "sdpa"]]

    def test_what_lies_beyond_the_measured_sizes_is_torchs(self):
        (entry,) = choose_py().choose(RECORDS, {"gpus": []})["gpus"]
        assert entry["attention"]["16-bit"]["16"] == [[112, "native"], [None, "sdpa"]]
        long = record(**{"bfloat16 64,6,577,64": times(1, 2, 3), "bfloat16 64,6,50,64": times(1, 2, 3)})
        (entry,) = choose_py().choose([long], {"gpus": []})["gpus"]
        assert entry["attention"]["16-bit"]["64"] == [[577, "native"], [None, "sdpa"]]

    def test_the_order_of_the_records_does_not_matter(self):
        module = choose_py()
        texts = {
            module.text(module.choose(order, {"gpus": []}))
            for order in (RECORDS, RECORDS[::-1], RECORDS[1:] + RECORDS[:1])
        }
        assert len(texts) == 1
        assert json.loads(texts.pop())["gpus"]

    def test_wrong_results_and_failures_do_not_win(self):
        wrong = record(**{"bfloat16 64,6,197,64": times(3, 2, None)})
        for row in wrong["rows"]:
            row["correct"] = row["contender"] != "vitkd triton"
        wrong["rows"] += record(**{"bfloat16 64,6,65,64": times(3, None, 2)})["rows"]
        (entry,) = choose_py().choose([wrong], {"gpus": []})["gpus"]
        assert entry["attention"]["16-bit"]["64"] == [[None, "sdpa"]]

    def test_a_later_record_of_a_case_replaces_an_earlier_one(self):
        again = record(date="2026-01-02", **{"bfloat16 64,6,50,64": times(1, 2, 3)})
        (entry,) = choose_py().choose([again, *RECORDS], {"gpus": []})["gpus"]
        assert entry["attention"]["16-bit"]["64"] == [[488, "native"], [None, "sdpa"]]

    def test_kd_loss_is_chosen_with_the_hosts_time(self):
        graph = record("kd_loss", date="2026-01-02", **{"bfloat16 kl 256x10": {"vitkd native": 1, "vitkd triton": 2}})
        graph["arguments"]["graph"] = True
        (entry,) = choose_py().choose([*RECORDS, graph], {"gpus": []})["gpus"]
        assert entry["kd_loss"] == {"16-bit": [[505, "triton"], [None, "native"]]}

    def test_other_gpus_keep_their_entry_and_this_one_loses_its_old(self):
        other = {
            "gpu": "NVIDIA Another",
            "capability": [8, 0],
            "measured": [],
            "kd_loss": {"16-bit": [[None, "triton"]]},
        }
        old = {**GPU, "measured": [], "kd_loss": {"32-bit": [[None, "triton"]]}}
        entries = choose_py().choose(RECORDS, {"gpus": [old, other]})["gpus"]
        assert entries[0] == other
        assert "32-bit" not in entries[1]["kd_loss"]

    def test_tiles_that_won_are_launched(self, pretend, monkeypatch):
        """As long as they are among the candidates, which are known to compile without spills."""
        pytest.importorskip("triton")
        from vitkd_fast.triton import _tune
        from vitkd_fast.triton._tiles import Tile, as_data, backward_tiles, forward_tiles

        forward = forward_tiles(197, 64, torch.bfloat16)
        backward = backward_tiles(197, 64, torch.bfloat16, (9, 0))
        won = {"forward": as_data(forward[1]), "backward": as_data(backward[-1])}
        assert won["forward"] == [64, 32, 4, 2] and len(won["backward"]) == 3
        about = {"tokens": 208, "head_dim": 64, "dtype": "16-bit", "times": [2, 1]}
        tiles = [{"kind": kind, "tiles": each, **about} for kind, each in won.items()]
        tiles.append({"kind": "forward", "tiles": [1, 2, 3, 4], **about, "tokens": 272})
        table = json.loads(choose_py().text(choose_py().choose([record(tiles=tiles)], {"gpus": []})))
        pretend(*table["gpus"])
        monkeypatch.setattr(_tune, "_best", {})
        with FakeTensorMode():
            for tokens, expected in ((193, (forward[1], backward[-1])), (208, (forward[1], backward[-1])),
                                     (192, (forward[0], backward[0])), (257, (forward[0], backward[0]))):  # fmt: skip
                qkv = torch.empty(2, tokens, 3, 3, 64, device=CUDA, dtype=torch.float16)
                found = [
                    _tune.best(kind, each, None, qkv) for kind, each in (("forward", forward), ("backward", backward))
                ]
                assert tuple(found) == expected
        assert isinstance(found[0], Tile)

    def test_a_record_of_a_cpu_is_refused(self):
        with pytest.raises(SystemExit, match="is not of a GPU"):
            choose_py().choose([record(gpu=None)], {"gpus": []})

    def test_the_file_it_writes_is_what_the_package_reads(self, tmp_path, pretend, capsys, monkeypatch):
        paths = []
        for i, each in enumerate(RECORDS):
            paths.append(tmp_path / f"{i}.json")
            paths[-1].write_text(json.dumps(each))
        table = tmp_path / "choice.json"
        table.write_text('{"gpus": []}')
        monkeypatch.setattr(sys, "argv", ["choose.py", *map(str, paths), "--table", str(table)])
        assert choose_py().main() == 0
        pretend(*json.loads(table.read_text())["gpus"])
        assert names(torch.bfloat16, 64, 57, 58, 489) == ["triton", "native", "sdpa"]
        for widths in choice.entry(CUDA)["attention"].values():
            for ranges in widths.values():
                check_ranges(ranges)
