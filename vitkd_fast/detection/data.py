"""Data with boxes, in whichever of the two common formats."""

from collections.abc import Sequence
from pathlib import Path

from vitkd_fast.detection.coco import read_coco
from vitkd_fast.detection.scenes import Scenes
from vitkd_fast.detection.yolo import read_yolo

__all__ = ["Scenes", "read_coco", "read_scenes", "read_yolo"]


def read_scenes(
    path: Path | str,
    size: tuple[int, int],
    channels: int = 3,
    images: Path | str | None = None,
    classes: Sequence[str] | None = None,
) -> Scenes:
    """What `read_coco` reads from a .json, or from a folder with one `instances*.json` in it or in its `annotations`;
    what `read_yolo` reads from any other folder.

    Args:
        images: of COCO's, a folder or a .zip. None: `images/`, `images.zip` or the folder itself.

    Raises:
        FileNotFoundError, ValueError: theirs; nothing at `path`, or several JSONs in it.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        return read_coco(path, _images_beside(path) if images is None else images, size, channels, classes)
    if not path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is neither a folder nor a .json of annotations.")
    found = sorted([*path.glob("instances*.json"), *path.glob("annotations/instances*.json")])
    if len(found) > 1:
        raise ValueError(f"{str(path)!r} holds {', '.join(file.name for file in found)}; give one of them instead.")
    if found:
        return read_scenes(found[0], size, channels, images, classes)
    if images is not None:
        raise ValueError(
            f"images={str(images)!r} is for COCO's annotations, but {str(path)!r} holds no instances*.json; give the "
            f".json, or for YOLO's only the folder."
        )
    return read_yolo(path, size, channels, classes)


def _images_beside(annotations: Path) -> Path:
    folder = annotations.parent.parent if annotations.parent.name == "annotations" else annotations.parent
    places = [place for place in (folder / "images", folder / "images.zip") if place.exists()]
    return places[0] if places else folder
