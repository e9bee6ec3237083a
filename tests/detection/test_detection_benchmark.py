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
from detection_windows import Windows, to_measure_on

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
    assert [point["step"] for point in record["courses"]["best"]] == [1, 2]
    assert "best, agreement after steps: 1 " in table
    assert (tmp_path / "out/best/images.png").exists() and (tmp_path / "out/teacher.safetensors").exists()


def test_it_runs_on_windows_too(data, tmp_path, capsys):
    folders = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"), "--methods", "noise"]
    assert detection.main(["--data", str(data), *QUICK, *SMALL, *folders, "--window", "8"]) == 0
    assert "noise" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--window is 20, larger than scenes of"):
        detection.main(["--data", str(data), *QUICK, *SMALL, *folders, "--window", "20"])


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


def bright_squares():
    """Two scenes of 32 × 48 pixels, with a white square of class 0 and with two of class 1; a third without any."""
    pixels = torch.zeros(3, 3, 32, 48, dtype=torch.uint8)
    places = [[(4, 6, 8, 8)], [(0, 0, 6, 4), (20, 30, 10, 8)], []]
    objects = []
    for scene, some in enumerate(places):
        boxes = torch.tensor([[(x + w / 2) / 48, (y + h / 2) / 32, w / 48, h / 32] for y, x, h, w in some])
        for y, x, h, w in some:
            pixels[scene, :, y : y + h, x : x + w] = 255
        objects.append(Objects(boxes.view(-1, 4), torch.full((len(some),), scene)))
    return Scenes(pixels, objects, ["one", "other"], [(32, 48)] * 3)


def white(some, side):
    shown = torch.zeros(side, side, dtype=torch.bool)
    for left, top, right, bottom in some.corners(side, side).round().int().tolist():
        shown[top:bottom, left:right] = True
    return shown


def test_windows_to_measure_on_show_an_object_and_stay_the_same():
    scenes = bright_squares()
    windows = to_measure_on(scenes, 16)
    assert [len(objects) > 0 for _, objects in windows] == [True, True, False]
    for index, (pixels, objects) in enumerate(windows):
        assert pixels.shape == (3, 16, 16) and torch.equal(pixels[0] > 0.5, white(objects, 16))
        assert objects.labels.tolist() == [index] * len(objects)
    assert (windows[0][0][0] > 0.5).sum() == 64  # all of it
    again = to_measure_on(scenes, 16)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(windows, again))
    assert (to_measure_on(scenes, 4)[0][0] > 0.5).all()  # larger than the window


def test_windows_to_learn_from_move_their_boxes_and_show_all_classes_alike():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        pixels, objects = Windows(bright_squares(), 16)(200)
    assert pixels.shape == (200, 3, 16, 16)
    labels = [int(some.labels[0]) for some in objects]
    assert 60 < sum(labels) < 140
    off = [((scene[0] > scene[0].mean()) != white(some, 16)).float().mean() for scene, some in zip(pixels, objects)]
    assert torch.tensor(off).mean() < 0.05  # resampled, so edges may differ
    assert len({tuple(some.boxes[0].tolist()) for some in objects}) > 150
