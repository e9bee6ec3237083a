"""What detectors are measured on: lists, scenes and COCO folders; and what is refused."""

import json

import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("scipy")
pytest.importorskip("transformers")

from tiny_detectors import CLASSES, QUICK, SIZE, objects, real, student, teacher

from vitkd_fast.detection.data import Scenes
from vitkd_fast.detection.objects import no_objects
from vitkd_fast.distill import distill


def coco_folder(folder, data):
    images, annotations = [], []
    for index, (pixels, some) in enumerate(data):
        name = f"{index}.png"
        Image.fromarray(pixels[0].mul(255).round().byte().numpy()).save(folder / name)
        images.append({"id": index, "file_name": name, "height": SIZE, "width": SIZE})
        for (x, y, w, h), label in zip((some.boxes * SIZE).tolist(), some.labels.tolist()):
            bbox = [x - w / 2, y - h / 2, w, h]
            annotations.append({"id": len(annotations), "image_id": index, "category_id": label, "bbox": bbox})
    categories = [{"id": label, "name": f"thing {label}"} for label in range(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def test_lists_scenes_and_folders_measure_alike(tmp_path):
    data = [(pixels.mul(255).round() / 255, some) for pixels, some in real(12)]
    pixels = torch.stack([image for image, _ in data]).mul(255).round().byte()
    scenes = Scenes(pixels, [some for _, some in data], ["a", "b", "c"], [(SIZE, SIZE)] * len(data))
    folder = coco_folder(tmp_path, data)
    reports = [
        distill(teacher(), student(), evaluate=given, **QUICK).report
        for given in (data, scenes, folder, str(folder / "instances.json"))
    ]
    assert reports[0].teacher_map50 > 0.99
    for report in reports[1:]:
        assert report.agreement == pytest.approx(reports[0].agreement)
        assert report.student_map50 == pytest.approx(reports[0].student_map50, abs=1e-3)
        assert report.teacher_map50 == pytest.approx(reports[0].teacher_map50, abs=0.05)


def test_images_without_objects_and_boxes_partly_outside_are_measured():
    image = torch.rand(1, SIZE, SIZE)
    data = [(image, no_objects()), (image, objects((1.0, 0.5, 0.5, 0.5))), (image, no_objects())]
    report = distill(teacher(), student(), evaluate=data, **QUICK).report
    for value in (report.agreement, report.teacher_map, report.teacher_map50, report.student_map, report.student_map50):
        assert 0 <= value <= 1


def of(image=None, some=None):
    return (
        torch.rand(1, SIZE, SIZE) if image is None else image,
        objects((0.5, 0.5, 0.5, 0.5)) if some is None else some,
    )


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (3, TypeError, r"evaluate is a int; accepted: Scenes"),
        ("", ValueError, "evaluate is ''; accepted"),
        ("/nowhere/at/all", FileNotFoundError, r"evaluate is '/nowhere/at/all', which is not there; accepted"),
        ([], ValueError, "no object in its 0 images"),
        ([of(some=no_objects())], ValueError, "no object in its 1 images"),
        ([of(), torch.rand(1, SIZE, SIZE)], TypeError, "a Tensor as number 1; accepted"),
        ([of(), (torch.rand(1, SIZE, SIZE), torch.zeros(1))], TypeError, "a tuple as number 1; accepted"),
        (
            [of(some=objects((0.5, 0.5, 0.5, 0.5), labels=[3]))],
            ValueError,
            r"image number 0: .*labels.*accepted: 0 to 2",
        ),
        ([of(), of(some=objects((0.5, 0.5, -0.5, 0.5)))], ValueError, "image number 1: .*no negative size"),
        ([of(image=torch.rand(1, 8, 8))], ValueError, r"shape \(1, 8, 8\) as number 0; accepted: .*\(1, 16, 16\)"),
    ],
)
def test_evaluation_data_that_cannot_be_used_are_refused_before_the_run(tmp_path, data, error, message):
    with pytest.raises(error, match=message):
        distill(teacher(), student(), evaluate=data, out=tmp_path, **QUICK)
    assert not list(tmp_path.iterdir())


def test_a_coco_folder_of_more_classes_than_the_teachers_is_refused_before_the_run(tmp_path):
    data = [(torch.rand(1, SIZE, SIZE), objects((0.5, 0.5, 0.5, 0.5), labels=[2]))]
    folder = coco_folder(tmp_path, data)
    with pytest.raises(ValueError, match=r"labels .*accepted: 0 to 1"):
        distill(teacher(classes=2), student(classes=2), evaluate=folder, out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spoil", [lambda pixels: pixels.mul(255).byte(), lambda pixels: pixels * 255, torch.neg])
def test_pixels_that_are_no_shares_are_refused_before_the_run(spoil):
    data = [(spoil(pixels), some) for pixels, some in real(2)]
    with pytest.raises(ValueError, match=r"pixels of dtype .* as number 0; accepted: floats from 0 to 1"):
        distill(teacher(), student(), evaluate=data, **QUICK)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_pixels_of_any_float(dtype):
    data = real(2)
    reports = [
        distill(teacher(), student(), evaluate=given, **QUICK).report
        for given in (data, [(pixels.to(dtype), some) for pixels, some in data])
    ]
    assert reports[1].teacher_map50 == pytest.approx(reports[0].teacher_map50, abs=0.05)


def test_boxes_in_pixels_are_refused_before_the_run():
    data = [of(some=objects((8.0, 8.0, 4.0, 4.0)))]
    with pytest.raises(
        ValueError, match=r"image number 0: boxes with 8 in them; accepted: centres and sizes in \[0, 1\]"
    ):
        distill(teacher(), student(), evaluate=data, **QUICK)


def test_crowds_of_a_folder_do_not_count(tmp_path):
    data = [(pixels.mul(255).round() / 255, some) for pixels, some in real(12)]
    file = coco_folder(tmp_path, data) / "instances.json"
    content = json.loads(file.read_text())
    for entry in content["annotations"][::2]:
        entry["iscrowd"] = 1
    crowded = json.dumps(content)
    content["annotations"] = content["annotations"][1::2]
    found = []
    for text in (crowded, json.dumps(content)):
        file.write_text(text)
        found.append(distill(teacher(), student(), evaluate=tmp_path, **QUICK).report.teacher_map50)
    assert found[0] > 0.99 > 0.9 > found[1]


def test_classes_are_paired_by_name(tmp_path):
    data = [(pixels.mul(255).round() / 255, some) for pixels, some in real(12)]
    known, turned = teacher(), teacher()
    known.config.id2label = {0: "thing 0", 1: "thing 1", 2: "thing 2"}
    turned.config.id2label = {0: "thing 2", 1: "thing 0", 2: "thing 1"}
    reports = [distill(one, student(), evaluate=coco_folder(tmp_path, data), **QUICK).report for one in (known, turned)]
    assert reports[0].teacher_map50 > 0.9 and reports[1].teacher_map50 < 0.5
    assert not any("in their order" in note for report in reports for note in report.notes)
