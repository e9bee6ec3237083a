"""Images with objects in them, decoded once and kept in memory as bytes."""

import difflib
import io
import itertools
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitkd_fast.detection.objects import Objects, no_objects
from vitkd_fast.evaluate import read_image

MODES = {1: "L", 3: "RGB"}  # Pillow's name of so many channels


class Scenes(Dataset[tuple[Tensor, Objects]]):
    """Item i is its pixels, (C, H, W) float32 in [0, 1], and its objects."""

    def __init__(
        self,
        pixels: Tensor,
        objects: Sequence[Objects],
        classes: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        crowds: Sequence[Objects] | None = None,
    ) -> None:
        self.pixels = pixels
        """(N, C, H, W) uint8: stretched to one size."""
        self.objects = list(objects)
        self.classes = list(classes)
        """Their names, in the order of the labels."""
        self.sizes = list(sizes)
        """(height, width) in pixels of each original."""
        self.crowds = [no_objects() for _ in self.objects] if crowds is None else list(crowds)
        """Places of each image with more objects than anybody has counted."""

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Objects]:
        return self.pixels[index].float().div_(255), self.objects[index]


class ImageFiles:
    """The files below a folder or in a .zip, found by their path or, where that is enough, by their name.

    Raises:
        FileNotFoundError: `place` is neither.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.zip: zipfile.ZipFile | None = None
        if place.is_dir():
            paths = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
        elif zipfile.is_zipfile(place):
            self.zip = zipfile.ZipFile(place)
            paths = [path for path in self.zip.namelist() if not path.endswith("/")]
        else:
            raise FileNotFoundError(f"images are to be in {str(place)!r}, which is neither a folder nor a .zip.")
        self.paths: dict[str, list[str]] = defaultdict(list)  # those of each name
        for path in sorted(paths):
            self.paths[PurePosixPath(path).name].append(path)

    def find(self, wanted: str) -> str:
        """The path here of `wanted`, a name or a path of which only the end need be the same.

        Raises:
            FileNotFoundError: there is none.
            ValueError: there are several.
        """
        wanted = wanted.replace("\\", "/").removeprefix("./")
        name = PurePosixPath(wanted).name
        found = self.paths.get(name, [])
        if wanted in found:
            return wanted
        if len(found) > 1:
            common = {path: _common_end(path, wanted) for path in found}
            longest = max(common.values())
            found = [path for path in found if common[path] == longest]
        if len(found) > 1:
            raise ValueError(
                f"{wanted!r} could be any of {', '.join(found[:3])} in {str(self.place)!r}; say which by its path."
            )
        if not found:
            near = difflib.get_close_matches(name, self.paths, 1)
            hint = f"did you mean {near[0]}?" if near else f"of the {len(self.paths)} names there none is like it."
            raise FileNotFoundError(f"{wanted!r} is not in {str(self.place)!r}; {hint}")
        return found[0]

    def read(self, path: str) -> bytes:
        return self.zip.read(path) if self.zip else (self.place / path).read_bytes()


def _common_end(first: str, second: str) -> int:
    """How many names at the end of two paths are the same."""
    ends = zip(reversed(PurePosixPath(first).parts), reversed(PurePosixPath(second).parts))
    return sum(1 for _ in itertools.takewhile(lambda names: names[0] == names[1], ends))


def decoded(
    files: ImageFiles,
    paths: Sequence[str],
    size: tuple[int, int],
    channels: int,
    annotated: Sequence[tuple[int, int] | None] | None = None,
) -> tuple[Tensor, list[tuple[int, int]]]:
    """(N, C, H, W) bytes, stretched to `size` (height, width), and the (height, width) of each original.

    Args:
        annotated: the sizes that annotations give; an image whose EXIF says to turn it stays unturned where only that
            fits them.

    Raises:
        ValueError: an image that cannot be read, or of more than 8 bits; channels other than 1 and 3.
    """
    from PIL import Image, ImageOps

    if channels not in MODES:
        raise ValueError(f"channels is {channels}; accepted: 1 (grey) or 3 (RGB).")
    pixels = torch.empty(len(paths), channels, *size, dtype=torch.uint8)
    sizes = []
    for index, (path, expected) in enumerate(zip(paths, annotated or [None] * len(paths))):
        image = read_image(io.BytesIO(files.read(path)), f"{path} in {str(files.place)!r}")
        turned = ImageOps.exif_transpose(image)
        if not image.size[::-1] == expected != turned.size[::-1]:
            image = turned
        sizes.append((image.height, image.width))
        image = image.convert(MODES[channels]).resize((size[1], size[0]), Image.Resampling.BILINEAR)  # antialiased
        plane = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels[index] = plane.view(*size, channels).permute(2, 0, 1)
    return pixels, sizes
