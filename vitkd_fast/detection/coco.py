"""Data in COCO's format: a JSON of images, categories and annotations beside the images."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vitkd_fast.detection.objects import Objects, clipped
from vitkd_fast.detection.scenes import ImageFiles, Scenes, decoded
from vitkd_fast.suggest import suggestion


def read_coco(
    annotations: Path | str,
    images: Path | str,
    size: tuple[int, int],
    channels: int = 3,
    classes: Sequence[str] | None = None,
) -> Scenes:
    """All images that the JSON names, held in memory. Crowds (iscrowd) are kept apart; boxes without an area inside the
    image are left out.

    Args:
        annotations: the JSON.
        images: a folder or a .zip, in whose subfolders the images may be.
        size: (height, width) that images are stretched to.
        channels: 3, or 1 for grey.
        classes: names of categories; label i is the i-th of them, and objects of others are left out. None: all, in
            the order of their ids.

    Raises:
        FileNotFoundError: no such JSON, folder or .zip, or an image named in the JSON is not there.
        ValueError: the JSON is not one of instances, something in it is not sound, or there is no such class.
    """
    annotations = Path(annotations)
    content = _content(annotations)
    names, labels = _labels(annotations, content["categories"], classes)
    files = ImageFiles(Path(images))
    paths = [files.find(image["file_name"]) for image in content["images"]]
    named: dict[str, str] = {}  # where each name was found
    for image, path in zip(content["images"], paths):
        if (other := named.setdefault(path, image["file_name"])) != image["file_name"]:
            raise FileNotFoundError(
                f"{annotations} names {other} and {image['file_name']}, of which {str(images)!r} has one alone, {path}."
            )
    said = [_size(image) for image in content["images"]]
    pixels, sizes = decoded(files, paths, size, channels, said)
    # Boxes are in pixels of the size that the JSON says: the images may since have been made smaller.
    sizes = [expected or found for expected, found in zip(said, sizes)]

    here = {image["id"]: (height, width) for image, (height, width) in zip(content["images"], sizes)}
    # Of each image, boxes and labels: of objects, and of crowds.
    found: dict[tuple[Any, bool], list[tuple[list[float], int]]] = defaultdict(list)
    for entry in content["annotations"]:
        which = f"{annotations}: annotation {entry.get('id')}"
        if not _is_id(entry.get("image_id")) or entry["image_id"] not in here:
            raise ValueError(f"{which} is of image {entry.get('image_id')!r}, which is not among the images.")
        if not _is_id(entry.get("category_id")) or entry["category_id"] not in labels:
            raise ValueError(
                f"{which} is of category {entry.get('category_id')!r}; categories: {', '.join(map(str, labels))}."
            )
        label = labels[entry["category_id"]]
        if label is None:
            continue
        height, width = here[entry["image_id"]]
        try:
            if not isinstance(entry.get("bbox"), list):
                raise TypeError
            x, y, w, h = map(float, entry["bbox"])
            if not (math.isfinite(x + y) and 0 <= w < math.inf and 0 <= h < math.inf):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(f"{which} has bbox {entry.get('bbox')!r}; accepted: [left, top, width, height].") from None
        box = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
        found[entry["image_id"], entry.get("iscrowd") in (1, "1")].append((box, label))
    objects, crowds = ([_objects(found[image["id"], crowd]) for image in content["images"]] for crowd in (False, True))
    return Scenes(pixels, objects, names, sizes, crowds)


def _objects(pairs: list[tuple[list[float], int]]) -> Objects:
    boxes = torch.tensor([box for box, _ in pairs], dtype=torch.float32).view(-1, 4)
    return clipped(Objects(boxes, torch.tensor([label for _, label in pairs], dtype=torch.int64)))


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str)


def _content(annotations: Path) -> dict[str, list[dict[str, Any]]]:
    if not annotations.is_file():
        raise FileNotFoundError(f"there is no file of annotations {str(annotations)!r}.")
    try:
        content = json.loads(annotations.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{annotations} is not JSON: {error}") from error
    parts = ("images", "categories", "annotations")
    missing = [part for part in parts if not isinstance(content, dict) or not isinstance(content.get(part), list)]
    if missing:
        raise ValueError(
            f"{annotations} has no list of {' or '.join(missing)}; accepted: COCO's instances, with {', '.join(parts)}."
        )
    if not content["images"]:
        raise ValueError(f"{annotations} names no images.")
    for part in parts:
        for entry in content[part]:
            if not isinstance(entry, dict):
                raise ValueError(f"{annotations} has {entry!r} among its {part}; accepted: objects of JSON.")
    for image in content["images"]:
        if not _is_id(image.get("id")) or not isinstance(image.get("file_name"), str):
            raise ValueError(f"{annotations}: image {image} needs an id and a file_name.")
    _refuse_twins(annotations, "images", content["images"])
    return content


def _refuse_twins(annotations: Path, part: str, entries: list[dict[str, Any]]) -> None:
    """Whose are the annotations of an id that two have?"""
    twice = [key for key, count in Counter(entry["id"] for entry in entries).items() if count > 1]
    if twice:
        raise ValueError(f"{annotations} has several {part} with the id {twice[0]!r}; give each its own.")


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width), where the JSON says."""
    height, width = image.get("height"), image.get("width")
    if not height or not width:
        return None
    try:
        size = int(height), int(width)
        if min(size) < 1:
            raise ValueError
        return size
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"image {image['file_name']} is {height!r} high and {width!r} wide; accepted: pixels."
        ) from None


def _labels(
    annotations: Path, categories: list[dict[str, Any]], classes: Sequence[str] | None
) -> tuple[list[str], dict[Any, int | None]]:
    """The classes' names, and each category's label: None where its objects are left out."""
    if any(not _is_id(category.get("id")) or not _is_id(category.get("name")) for category in categories):
        raise ValueError(f"{annotations}: every category needs an id and a name.")
    _refuse_twins(annotations, "categories", categories)
    if len({type(category["id"]) for category in categories}) > 1:
        raise ValueError(f"{annotations}: the ids of its categories are partly numbers, partly text; make them one.")
    known = {
        category["id"]: str(category["name"]) for category in sorted(categories, key=lambda category: category["id"])
    }
    if classes is None:
        return list(known.values()), {key: label for label, key in enumerate(known)}
    for name in classes:
        if name not in known.values():
            hint = suggestion(name, known.values())
            raise ValueError(f"classes holds {name!r}, which {annotations} does not; {hint}")
    label_of = {name: label for label, name in enumerate(classes)}
    return list(classes), {key: label_of.get(name) for key, name in known.items()}
