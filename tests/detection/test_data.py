"""Data with boxes: both formats read alike from folders and archives, and errors say where and what."""

import json
import zipfile

import pytest
import torch
from PIL import Image

from vitkd_fast.detection.data import read_coco, read_scenes, read_yolo

SIZE = (8, 16)
CATEGORIES = [{"id": 7, "name": "bird"}, {"id": 3, "name": "drone"}]
IMAGES = [
    {"id": 10, "file_name": "a.png", "height": 20, "width": 40},
    {"id": 5, "file_name": "b.png", "height": 10, "width": 10},
    {"id": 6, "file_name": "none.png", "height": 10, "width": 10},
]
ANNOTATIONS = [
    {"id": 1, "image_id": 10, "category_id": 7, "bbox": [10, 5, 20, 10], "iscrowd": 0},
    {"id": 2, "image_id": 5, "category_id": 3, "bbox": [5, 5, 10, 10]},  # half outside
    {"id": 3, "image_id": 10, "category_id": 3, "bbox": [0, 0, 4, 4]},
    {"id": 4, "image_id": 5, "category_id": 7, "bbox": [0, 0, 1, 1], "iscrowd": 1},
]


def picture(path, size=(40, 20), level=255, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, level if mode != "RGB" else (level,) * 3).save(path)


def coco(folder, images=IMAGES, annotations=ANNOTATIONS, categories=CATEGORIES, name="instances.json"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


@pytest.fixture
def drones(tmp_path):
    """The JSON, with images/deep/a.png beside it and two more."""
    picture(tmp_path / "images/deep/a.png")
    picture(tmp_path / "images/b.png", (10, 10), 0)
    picture(tmp_path / "images/none.png", (10, 10), 51)
    return coco(tmp_path)


def check_drones(scenes):
    assert len(scenes) == 3 and scenes.classes == ["drone", "bird"]
    assert scenes.sizes == [(20, 40), (10, 10), (10, 10)]
    (first, a), (second, b), (third, none) = scenes
    assert first.shape == (3, *SIZE) and first.dtype == torch.float32
    assert (first == 1).all() and (second == 0).all() and (third == 0.2).all()
    assert a.labels.tolist() == [1, 0] and b.labels.tolist() == [0] and len(none) == 0
    torch.testing.assert_close(a.boxes, torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.05, 0.1, 0.1, 0.2]]))
    torch.testing.assert_close(b.boxes, torch.tensor([[0.75, 0.75, 0.5, 0.5]]))
    assert none.boxes.shape == (0, 4) and none.labels.dtype == torch.int64
    with pytest.raises(IndexError):
        scenes[3]


def test_coco_from_a_folder(drones):
    check_drones(read_coco(drones, drones.parent / "images", SIZE))
    check_drones(read_scenes(drones, SIZE))
    check_drones(read_scenes(drones.parent, SIZE))


def test_coco_from_a_zip(drones):
    images, archive = drones.parent / "images", drones.parent / "images.zip"
    with zipfile.ZipFile(archive, "w") as content:
        for path in sorted(images.rglob("*.png")):
            content.write(path, f"data/{path.relative_to(images)}")
            path.unlink()
    images.joinpath("deep").rmdir()
    images.rmdir()
    check_drones(read_coco(drones, archive, SIZE))
    check_drones(read_scenes(str(drones), SIZE))


def test_coco_in_its_usual_folders(tmp_path):
    for name, size, level in (("a", (40, 20), 255), ("b", (10, 10), 0), ("none", (10, 10), 51)):
        picture(tmp_path / f"val2017/{name}.png", size, level)
    coco(tmp_path / "annotations", name="instances_val2017.json")
    check_drones(read_scenes(tmp_path, SIZE))


def test_classes_choose_and_order(drones):
    scenes = read_scenes(drones, SIZE, classes=["bird"])
    assert scenes.classes == ["bird"] and [some.labels.tolist() for some in scenes.objects] == [[0], [], []]
    assert read_scenes(drones, SIZE, classes=["bird", "drone"]).objects[0].labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"'brid', which .* does not; did you mean bird"):
        read_scenes(drones, SIZE, classes=["brid"])


def test_boxes_are_shares_of_the_size_that_the_json_says(tmp_path):
    """Images may since have been made smaller."""
    picture(tmp_path / "a.png", (20, 10))
    scenes = read_scenes(coco(tmp_path, IMAGES[:1], ANNOTATIONS[:1]), SIZE)
    torch.testing.assert_close(scenes.objects[0].boxes, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    assert scenes.sizes == [(20, 40)]


@pytest.mark.parametrize(("height", "width", "top"), [(20, 40, False), (40, 20, True)])
def test_an_image_is_turned_as_its_annotations_are(tmp_path, height, width, top):
    image = Image.new("L", (40, 20))
    image.paste(255, (0, 0, 20, 20))  # the left half is white; turned, the upper one
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise to show it
    image.save(tmp_path / "a.png", exif=exif)
    (pixels, _) = read_scenes(coco(tmp_path, [{**IMAGES[0], "height": height, "width": width}], []), (8, 8), 1)[0]
    assert pixels.shape == (1, 8, 8)
    half = pixels[0, :3] if top else pixels[0, :, :3]
    assert (half == 1).all() and pixels.mean() < 0.6


def test_images_are_stretched_smoothly_to_grey_or_colour(tmp_path):
    image = Image.new("RGB", (64, 64))
    image.paste((255, 0, 0), (0, 0, 64, 64))
    for x in range(0, 64, 2):
        image.paste((0, 0, 0), (x, 0, x + 1, 64))
    image.save(tmp_path / "a.png")
    file = coco(tmp_path, IMAGES[:1], [])
    (colour, _), (grey, _) = read_scenes(file, (4, 8))[0], read_scenes(file, (4, 8), 1)[0]
    assert colour.shape == (3, 4, 8) and grey.shape == (1, 4, 8)
    assert (colour[0] - 0.5).abs().max() < 0.05 and colour[1:].max() == 0 and 0.1 < grey.mean() < 0.2
    with pytest.raises(ValueError, match=r"channels is 4; accepted: 1 \(grey\) or 3"):
        read_scenes(file, (4, 8), 4)


def test_a_name_in_several_folders_is_told_apart_by_its_path(tmp_path):
    for part, level in (("train", 0), ("val", 255)):
        picture(tmp_path / f"images/all/{part}/a.png", level=level)
    image = {**IMAGES[0], "file_name": "val/a.png"}
    assert (read_scenes(coco(tmp_path, [image], []), SIZE)[0][0] == 1).all()
    with pytest.raises(ValueError, match=r"'a.png' could be any of all/train/a.png, all/val/a.png"):
        read_scenes(coco(tmp_path, IMAGES[:1], []), SIZE)


@pytest.mark.parametrize("before", ["images/", "./images/", "/data/mine/images/", ""])
def test_a_path_from_wherever_it_begins_tells_images_apart(tmp_path, before):
    for part, level in (("v1", 0), ("v2", 255)):
        picture(tmp_path / f"images/{part}/a.png", level=level)
    image = {**IMAGES[0], "file_name": f"{before}v2/a.png"}
    assert (read_scenes(coco(tmp_path, [image], []), SIZE)[0][0] == 1).all()


def test_an_image_that_is_not_there_is_not_another_of_its_name(tmp_path):
    picture(tmp_path / "images/v1/a.png")
    both = [{**IMAGES[0], "id": index, "file_name": f"v{index}/a.png"} for index in (1, 2)]
    with pytest.raises(FileNotFoundError, match=r"names v1/a.png and v2/a.png, of which .* has one alone, v1/a.png"):
        read_scenes(coco(tmp_path, both, []), SIZE)


def test_crowds_are_kept_apart(drones):
    scenes = read_scenes(drones, SIZE)
    assert [len(some) for some in scenes.objects] == [2, 1, 0]
    assert [some.labels.tolist() for some in scenes.crowds] == [[], [1], []]
    torch.testing.assert_close(scenes.crowds[1].boxes, torch.tensor([[0.05, 0.05, 0.1, 0.1]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["images"].append(content["images"][0]), "several images with the id"),
        (lambda content: content["categories"].append(content["categories"][0]), "several categories with the id"),
        (lambda content: content["categories"].append({"id": "x", "name": "y"}), "partly numbers, partly text"),
        (lambda content: content["annotations"].append([1]), r"has \[1\] among its annotations"),
        (lambda content: content["images"][0].update(file_name=3), "needs an id and a file_name"),
        (lambda content: content["images"][0].update(width="wide", height=3), "'wide' wide; accepted: pixels"),
    ],
)
def test_files_that_say_two_things_or_none_are_refused(drones, change, message):
    content = json.loads(drones.read_text())
    change(content)
    drones.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_scenes(drones, SIZE)


def test_a_byte_order_mark_is_no_part_of_it(drones):
    drones.write_text(drones.read_text(), encoding="utf-8-sig")
    assert len(read_scenes(drones, SIZE)) == len(IMAGES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 11}, "annotation 1 is of image 11"),
        ({"category_id": 4}, "annotation 1 is of category 4; categories: 3, 7"),
        ({"bbox": [1, 2, 3]}, r"annotation 1 has bbox \[1, 2, 3\]; accepted: \[left, top, width, height\]"),
        ({"bbox": None}, "annotation 1 has bbox None"),
        ({"bbox": "1234"}, "annotation 1 has bbox '1234'"),
        ({"bbox": [1, 2, -3, 4]}, r"annotation 1 has bbox \[1, 2, -3, 4\]"),
        ({"bbox": [1, 2, "nan", 4]}, r"annotation 1 has bbox \[1, 2, 'nan', 4\]"),
        ({"image_id": [1]}, r"annotation 1 is of image \[1\]"),
    ],
)
def test_unsound_annotations_are_refused(tmp_path, change, message):
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        read_scenes(coco(tmp_path, IMAGES[:1], [{**ANNOTATIONS[0], **change}]), SIZE)


def test_what_is_not_there_or_not_coco(drones, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file of annotations .*absent.json"):
        read_scenes(tmp_path / "absent.json", SIZE)
    with pytest.raises(FileNotFoundError, match=r"absent.zip', which is neither a folder nor a .zip"):
        read_coco(drones, tmp_path / "absent.zip", SIZE)
    with pytest.raises(FileNotFoundError, match=r"neither a folder nor a .json"):
        read_scenes(tmp_path / "absent", SIZE)
    (tmp_path / "images/deep/a.png").rename(tmp_path / "images/deep/aa.png")
    with pytest.raises(FileNotFoundError, match=r"'a.png' is not in .*did you mean aa.png"):
        read_scenes(drones, SIZE)
    (tmp_path / "images/a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a.png in .* cannot be read as an image"):
        read_scenes(drones, SIZE)
    picture(tmp_path / "images/a.png", level=1000, mode="I;16")
    with pytest.raises(ValueError, match=r"a.png in .* more than 8 bits"):
        read_scenes(drones, SIZE)
    coco(tmp_path, name="instances_2.json")
    with pytest.raises(ValueError, match=r"holds instances.json, instances_2.json; give one"):
        read_scenes(tmp_path, SIZE)
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "no list of images or categories"),
        ('{"images": [], "categories": [], "annotations": []}', "names no images"),
        ('{"images": [{"id": 1}], "categories": [], "annotations": []}', "needs an id and a file_name"),
    ):
        drones.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_scenes(drones, SIZE)


def labelled(folder, image, text, label):
    picture(folder / image)
    if text is not None:
        (folder / label).parent.mkdir(parents=True, exist_ok=True)
        (folder / label).write_text(text)


TWO_LINES = "1 0.5 0.5 0.5 0.25\n\n0 0.95 0.5 0.2 0.5 \n"  # the second is partly outside


def check_yolo(scenes, classes=("drone", "bird")):
    assert len(scenes) == 2 and scenes.classes == list(classes) and scenes.sizes == [(20, 40)] * 2
    (pixels, some), (_, none) = scenes
    assert pixels.shape == (3, *SIZE) and (pixels == 1).all()
    assert some.labels.tolist() == [1, 0] and len(none) == 0
    torch.testing.assert_close(some.boxes, torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.925, 0.5, 0.15, 0.5]]))


@pytest.mark.parametrize("names", ["[drone, bird]", "{0: drone, 1: bird}"])
def test_yolo_with_folders_side_by_side(tmp_path, names):
    pytest.importorskip("yaml")
    labelled(tmp_path, "images/val/a.jpg", TWO_LINES, "labels/val/a.txt")
    labelled(tmp_path, "images/val/b.PNG", None, "")
    (tmp_path / "data.yaml").write_text(f"train: images\nnames: {names}\n")
    check_yolo(read_yolo(tmp_path, SIZE))
    check_yolo(read_scenes(tmp_path, SIZE))
    check_yolo(read_scenes(tmp_path / "images/val", SIZE))


def test_yolo_with_texts_beside_the_images(tmp_path):
    labelled(tmp_path, "a.png", TWO_LINES, "a.txt")
    labelled(tmp_path, "b.png", "", "b.txt")
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves in archives")
    check_yolo(read_yolo(tmp_path, SIZE), ["0", "1"])
    check_yolo(read_yolo(tmp_path, SIZE, classes=["drone", "bird"]))
    (tmp_path / "classes.txt").write_text("drone\nbird\n\n")
    check_yolo(read_yolo(tmp_path, SIZE))
    assert read_yolo(tmp_path, SIZE, classes=["bird"]).objects[0].labels.tolist() == [0]
    with pytest.raises(ValueError, match=r"'brid', which .* does not; did you mean bird"):
        read_yolo(tmp_path, SIZE, classes=["brid"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.5", r"a.txt:2: '0 0.5 0.5 0.5' cannot be read; accepted: label, centre x"),
        ("0 0.5 0.5 0.5 0.5 0.9", "a.txt:2: .* cannot be read"),
        ("0", "a.txt:2: '0' cannot be read"),
        ("0 0.5 0.5 0.5 0.5 0.5 0.5 0.5 0.5", "a.txt:2: .* cannot be read"),
        ("drone 0.5 0.5 0.5 0.5", "a.txt:2: .* cannot be read"),
        ("0.5 0.5 0.5 0.5 0.5", "a.txt:2: .* the label a whole number"),
        ("nan 0.5 0.5 0.5 0.5", "a.txt:2: .* cannot be read"),
        ("inf 0.5 0.5 0.5 0.5", "a.txt:2: .* cannot be read"),
        ("0 120 60 30 20", "a.txt:2: .* accepted: 0 to 1, not pixels"),
        ("0 0.5 0.5 -0.5 0.5", "a.txt:2: .* no negative size"),
        ("0 0.5 0.5 nan 0.5", "a.txt:2: .* accepted: finite numbers"),
        ("2 0.5 0.5 0.5 0.5", r"a.txt:2: .* labels .* 2; accepted: 0 to 1\."),
        ("-1 0.5 0.5 0.5 0.5", r"a.txt:2: .* labels .* -1; accepted: 0 to 1\."),
    ],
)
def test_an_unsound_line_is_refused(tmp_path, line, message):
    labelled(tmp_path, "a.png", f"0 0.5 0.5 0.5 0.5\n{line}\n", "a.txt")
    (tmp_path / "classes.txt").write_text("drone\nbird\n")
    with pytest.raises(ValueError, match=message):
        read_yolo(tmp_path, SIZE)


def test_what_is_not_there_or_not_yolo(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent"):
        read_yolo(tmp_path / "absent", SIZE)
    with pytest.raises(FileNotFoundError, match=r"holds no images"):
        read_scenes(tmp_path, SIZE)
    picture(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"none of the 1 images .* the first's should be 'a.txt'"):
        read_scenes(tmp_path, SIZE)
    with pytest.raises(ValueError, match=r"images='x.zip' is for COCO's annotations"):
        read_scenes(tmp_path, SIZE, images="x.zip")
    pytest.importorskip("yaml")
    (tmp_path / "a.txt").write_text("")
    for content, message in (
        ("names: 3", "names 3; accepted"),
        ("names: {1: a}", "accepted: a list, or one name for each of 0, 1, 2"),
        ("names: [", "is not YAML"),
        ("nc: 3", "names None"),
    ):
        (tmp_path / "data.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_scenes(tmp_path, SIZE)


@pytest.mark.parametrize("size", [-8, 0.5, "wide", float("inf")])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="accepted: pixels"):
        read_scenes(coco(tmp_path, [{**IMAGES[0], "width": size}], ANNOTATIONS[:1]), SIZE)


def test_crowds_are_1(tmp_path):
    picture(tmp_path / "a.png")
    marked = [{**ANNOTATIONS[0], "iscrowd": mark} for mark in (1, "0", "1", 0, None)]
    scenes = read_scenes(coco(tmp_path, IMAGES[:1], marked), SIZE)
    assert (len(scenes.objects[0].labels), len(scenes.crowds[0].labels)) == (3, 2)


def test_names_that_are_numbers_are_text(tmp_path):
    picture(tmp_path / "a.png")
    named = [{**category, "name": 5 + index} for index, category in enumerate(CATEGORIES)]
    assert list(read_scenes(coco(tmp_path, IMAGES[:1], ANNOTATIONS[:1], named), SIZE).classes) == ["6", "5"]
    with pytest.raises(ValueError, match="every category needs an id and a name"):
        read_scenes(coco(tmp_path, IMAGES[:1], ANNOTATIONS[:1], [{**CATEGORIES[0], "name": None}]), SIZE)
