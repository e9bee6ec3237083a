"""Data in the format of Ultralytics' YOLO: beside every image a text file with one object per line."""

from collections.abc import Sequence
from pathlib import Path

import torch

from vitkd_fast.detection.extra import extra
from vitkd_fast.detection.objects import Objects, clipped
from vitkd_fast.detection.scenes import ImageFiles, Scenes, decoded
from vitkd_fast.suggest import suggestion

ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
PIXELS = 2  # a number above it cannot be a share of a side


def read_yolo(
    folder: Path | str, size: tuple[int, int], channels: int = 3, classes: Sequence[str] | None = None
) -> Scenes:
    """All images below the folder, held in memory; one without a text file has no objects.

    The text file of `images/**/x.jpg` is `labels/**/x.txt`, else `x.txt` beside it. Names of classes are in `data.yaml`
    or `classes.txt`, in the folder or, for a part such as `images/train`, up to two folders above.

    Args:
        folder: of the data set, or of a part of it.
        size: (height, width) that images are stretched to.
        channels: 3, or 1 for grey.
        classes: names; label i is the i-th of them, and objects of others are left out. Where no file names the
            classes, these are the names of all, in order. None: all, as numbered in the text files.

    Raises:
        FileNotFoundError: no such folder, no images in it, or no text file for any of them.
        ValueError: a line that cannot be read, a label that has no name, or there is no such class.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}.")
    found = folder.rglob("[!.]*")  # not macOS's ._x.jpg, which is no image
    paths = sorted(path for path in found if path.suffix.lower() in ENDINGS)
    if not paths:
        raise FileNotFoundError(f"{str(folder)!r} holds no images ({', '.join(sorted(ENDINGS))}).")
    texts = [_text_of(path) for path in paths]
    if not any(texts):
        raise FileNotFoundError(
            f"none of the {len(paths)} images below {str(folder)!r} has a text file of objects; the first's should be "
            f"{paths[0].with_suffix('.txt').name!r}, beside it or in the folder labels that is beside images."
        )
    named = _names(folder) or (list(classes) if classes else None)
    read = [_objects(text, named) if text else (torch.zeros(0, 4), []) for text in texts]
    names = named or [str(label) for label in range(max(max(labels, default=-1) for _, labels in read) + 1)]
    wanted = list(classes) if classes is not None else names
    for name in wanted:
        if name not in names:
            raise ValueError(f"classes holds {name!r}, which {str(folder)!r} does not; {suggestion(name, names)}")
    new = torch.tensor([wanted.index(name) if name in wanted else -1 for name in names], dtype=torch.int64)
    objects = []
    for boxes, labels in read:
        one = Objects(boxes, new[torch.tensor(labels, dtype=torch.int64)])
        objects.append(clipped(one[one.labels >= 0]))
    files = ImageFiles(folder)
    pixels, sizes = decoded(files, [path.relative_to(folder).as_posix() for path in paths], size, channels)
    return Scenes(pixels, objects, wanted, sizes)


def _text_of(image: Path) -> Path | None:
    """The text file of an image; None: it has none."""
    parts = image.absolute().with_suffix(".txt").parts
    places = [image.with_suffix(".txt")]
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        places.insert(0, Path(*parts[:last], "labels", *parts[last + 1 :]))
    return next((place for place in places if place.is_file()), None)


def _names(folder: Path) -> list[str] | None:
    """Of the classes; None: no file says."""
    for place in (folder, *folder.absolute().parents[:2]):
        if (place / "data.yaml").is_file():
            with extra():
                import yaml
            try:
                content = yaml.safe_load((place / "data.yaml").read_text(encoding="utf-8-sig"))
            except yaml.YAMLError as error:
                raise ValueError(f"{place / 'data.yaml'} is not YAML: {error}") from error
            names = content.get("names") if isinstance(content, dict) else None
            if isinstance(names, dict) and sorted(names) == list(range(len(names))):
                names = [names[label] for label in range(len(names))]
            if not isinstance(names, list) or not names:
                raise ValueError(
                    f"{place / 'data.yaml'} has names {names!r}; accepted: a list, or one name for each of 0, 1, 2 ..."
                )
            if odd := [name for name in names if not isinstance(name, str | int | float) or isinstance(name, bool)]:
                raise ValueError(f"{place / 'data.yaml'} has {odd[0]!r} among its names; put names like yes in quotes.")
            return [str(name) for name in names]
        if (place / "classes.txt").is_file():
            return [name for name in map(str.strip, _lines(place / "classes.txt")) if name]
    return None


def _objects(text: Path, names: list[str] | None) -> tuple[torch.Tensor, list[int]]:
    """(n, 4) boxes and the labels of one text file."""
    boxes, labels = [], []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        where = f"{text}:{number}: {line.strip()!r}"
        try:
            label, *box = (float(word) for word in line.split())
            one = Objects(torch.tensor([box]), torch.tensor([int(label)]))
            if label != int(label) or len(box) != 4:
                raise ValueError
        except (ValueError, RuntimeError, OverflowError):
            raise ValueError(
                f"{where} cannot be read; accepted: label, centre x, centre y, width, height, the label a whole number."
            ) from None
        if max(map(abs, box)) > PIXELS:
            raise ValueError(f"{where} is not in shares of the image's sides; accepted: 0 to 1, not pixels.")
        try:
            one.checked(len(names) if names else None)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        boxes.append(one.boxes)
        labels.append(int(label))
    return torch.cat(boxes) if boxes else torch.zeros(0, 4), labels


def _lines(text: Path) -> list[str]:
    try:
        return text.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not UTF-8 text: {error}") from error
