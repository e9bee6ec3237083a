"""benchmarks/detection.py on a few drawn scenes: that it runs, what it reports, and how training scenes are moved."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("torchmetrics")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import detection

from vitkd_fast.detection.objects import Objects
from vitkd_fast.detection.scenes import Scenes

QUICK = ["--size", "16", "16", "--patch", "8", "--queries", "3", "--teacher-steps", "2", "--steps", "2"]
SMALL = ["--batch-size", "4", "--teacher-size", "8", "1", "2", "--student-size", "8", "1", "2", "--device", "cpu"]


@pytest.fixture
def data(tmp_path):
    from PIL import Image

    (tmp_path / "data/images").mkdir(parents=True)
    for part in ("train", "val2017"):
        content = {
            "categories": [{"id": 1, "name": "square"}, {"id": 7, "name": "other"}],
            "images": [],
            "annotations": [],
        }
        for number in range(3):
            name = f"{part}{number}.png"
            Image.new("RGB", (24, 16), (40 * number, 0, 0)).save(tmp_path / "data/images" / name)
            content["images"].append({"id": number, "file_name": name, "width": 24, "height": 16})
            box = {"id": number, "image_id": number, "category_id": 7, "bbox": [2, 2, 8, 6], "area": 48, "iscrowd": 0}
            content["annotations"].append(box)
        (tmp_path / f"data/instances_{part}.json").write_text(json.dumps(content))
    return tmp_path / "data"


def test_it_reports_the_teacher_and_every_student(data, tmp_path, capsys):
    folders = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    assert detection.main(["--data", str(data), *QUICK, *SMALL, *folders]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ("teacher", "real_kd", "noise", "best"))
    (path,) = (tmp_path / "results").iterdir()
    record = json.loads(path.read_text())
    assert record["students"].keys() == {"real_kd", "noise", "best"}
    assert record["students"]["real_kd"]["settings"]["generator"] == "real_images"
    assert str(tmp_path) not in path.read_text()
    assert (tmp_path / "out/best/images.png").exists()


def test_a_teacher_can_come_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text("from torch import nn\ndef make():\n    return nn.Identity()\n")
    assert isinstance(detection.given(f"{tmp_path}/mine.py:make"), torch.nn.Identity)
    for wrong in ("mine", f"{tmp_path}/other.py:make", "mine.txt:make"):
        with pytest.raises(SystemExit, match=r"FILE\.py:FUNCTION"):
            detection.given(wrong)


def test_annotations_that_are_missing_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"0 files instances_val\*\.json"):
        detection.annotations(tmp_path, "val")


def test_boxes_move_with_their_scene():
    pixels = torch.zeros(1, 3, 16, 32, dtype=torch.uint8)
    pixels[:, :, 6:10, 12:20] = 255
    scenes = Scenes(
        pixels, [Objects(torch.tensor([[0.5, 0.5, 0.25, 0.25]]), torch.tensor([0]))], ["square"], [(16, 32)]
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        moved, objects = detection.Moved(scenes)(32)
    assert len({tuple(some.boxes[0].tolist()) for some in objects}) > 8
    for scene, some in zip(moved, objects):
        left, top, right, bottom = some.corners(16, 32)[0].round().int().tolist()
        inside = torch.zeros(16, 32, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(scene[0] > 0.5, inside)
