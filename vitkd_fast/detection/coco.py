"""Data in COCO's format: a JSON of images, categories and annotations beside the images."""

import json
from collections import defaultdict
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
    """All images that the JSON names, held in memory; crowds (iscrowd) are left out.

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
    found: dict[Any, list[tuple[list[float], int]]] = defaultdict(list)  # of each image: box and label
    for entry in content["annotations"]:
        which = f"{annotations}: annotation {entry.get('id')}"
        if entry.get("image_id") not in here:
            raise ValueError(f"{which} is of image {entry.get('image_id')!r}, which is not among the images.")
        if entry.get("category_id") not in labels:
            raise ValueError(
                f"{which} is of category {entry.get('category_id')!r}; categories: {', '.join(map(str, labels))}."
            )
        label = labels[entry["category_id"]]
        if label is None or entry.get("iscrowd"):
            continue
        height, width = here[entry["image_id"]]
        try:
            x, y, w, h = (float(number) for number in entry.get("bbox", ()))
        except (TypeError, ValueError):
            raise ValueError(f"{which} has bbox {entry.get('bbox')!r}; accepted: [left, top, width, height].") from None
        found[entry["image_id"]].append(([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height], label))
    objects = []
    for image in content["images"]:
        pairs = found[image["id"]]
        boxes = torch.tensor([box for box, _ in pairs], dtype=torch.float32).view(-1, 4)
        try:
            one = Objects(boxes, torch.tensor([label for _, label in pairs], dtype=torch.int64)).checked(len(names))
        except ValueError as error:
            raise ValueError(f"{annotations}: image {image['file_name']}: {error}") from None
        objects.append(clipped(one))
    return Scenes(pixels, objects, names, sizes)


def _content(annotations: Path) -> dict[str, list[dict[str, Any]]]:
    if not annotations.is_file():
        raise FileNotFoundError(f"there is no file of annotations {str(annotations)!r}.")
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
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
    for image in content["images"]:
        if "id" not in image or "file_name" not in image:
            raise ValueError(f"{annotations}: image {image} needs an id and a file_name.")
    return content


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width), where the JSON says."""
    height, width = image.get("height"), image.get("width")
    return (int(height), int(width)) if height and width else None


def _labels(
    annotations: Path, categories: list[dict[str, Any]], classes: Sequence[str] | None
) -> tuple[list[str], dict[Any, int | None]]:
    """The classes' names, and each category's label: None where its objects are left out."""
    if any("id" not in category or "name" not in category for category in categories):
        raise ValueError(f"{annotations}: every category needs an id and a name.")
    known = {category["id"]: category["name"] for category in sorted(categories, key=lambda category: category["id"])}
    if classes is None:
        return list(known.values()), {key: label for label, key in enumerate(known)}
    for name in classes:
        if name not in known.values():
            hint = suggestion(name, known.values())
            raise ValueError(f"classes holds {name!r}, which {annotations} does not; {hint}")
    label_of = {name: label for label, name in enumerate(classes)}
    return list(classes), {key: label_of.get(name) for key, name in known.items()}
