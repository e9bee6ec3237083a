"""The data sets of the accuracy benchmark: scikit-learn's digits; MNIST and CIFAR-10 from files that the user has, the
latter also at half its size.

Nothing is downloaded. `--data-dir` is a folder with one of the forms below, or an .npz file itself.
"""

import gzip
import hashlib
import io
import lzma
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

FORMS = {
    "mnist": "mnist.npz with x_train, y_train, x_test, y_test; or the four original idx files, gzipped or not",
    "cifar10": "cifar10.npz with x_train, y_train, x_test, y_test; or the folder cifar-10-batches-py; or "
    "cifar10_train_a.xz, cifar10_train_b.xz and cifar10_test.npz",
}


@dataclass(frozen=True)
class Labelled:
    """Images and what is on them."""

    images: Tensor
    """(N, C, H, W) uint8."""
    labels: Tensor
    """(N,) int64."""
    top: int = 255
    """The brightest value."""

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: Tensor | slice) -> Tensor:
        """(B, C, H, W) float32 in [0, 1]."""
        return self.images[index].float().div_(self.top)

    def to(self, device: torch.device) -> "Labelled":
        return Labelled(self.images.to(device), self.labels.to(device), self.top)


@dataclass(frozen=True)
class Data:
    """What the teacher is trained on, and what everything is measured on."""

    name: str
    train: Labelled
    test: Labelled

    def to(self, device: torch.device) -> "Data":
        return Data(self.name, self.train.to(device), self.test.to(device))

    def fingerprint(self) -> str:
        """Of every image and label: cached results belong to these data and no others."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            for tensor in (part.images, part.labels):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def read(name: str, folder: Path | None = None) -> Data:
    """The data set of that name.

    Raises:
        FileNotFoundError: `folder` is missing, or holds none of the forms in which the data set is read.
        ValueError: the files are not what their names say.
    """
    if name == "digits":
        return digits()
    if name == "cifar16":
        full = read("cifar10", folder)
        return Data(name, halved(full.train), halved(full.test))
    if folder is None:
        raise FileNotFoundError(f"{name} is read from files that you have; pass --data-dir, with {FORMS[name]}.")
    if not folder.exists():
        raise FileNotFoundError(f"--data-dir {folder} does not exist.")
    for reader in READERS[name]:
        arrays = reader(folder, name)
        if arrays is not None:
            x_train, y_train, x_test, y_test = arrays
            return Data(name, _labelled(x_train, y_train, f"{name} train"), _labelled(x_test, y_test, f"{name} test"))
    raise FileNotFoundError(f"--data-dir {folder} holds no {name}; accepted: {FORMS[name]}.")


def halved(full: Labelled) -> Labelled:
    """Every 2×2 pixels as their mean."""
    images = [F.avg_pool2d(part.float(), 2).round().to(torch.uint8) for part in full.images.split(10_000)]
    return Labelled(torch.cat(images), full.labels, full.top)


def digits() -> Data:
    """scikit-learn's 1,797 handwritten digits, 8×8 in 17 shades, split as in `vitkd demo`."""
    from vitkd_fast.demo import digits as split

    def shades(images: Tensor) -> Tensor:
        return ((images + 1) * 8).round().to(torch.uint8)

    (images, labels), (held, held_labels) = split()
    return Data("digits", Labelled(shades(images), labels, 16), Labelled(shades(held), held_labels, 16))


def npz(folder: Path, name: str) -> Arrays | None:
    """One file with the four arrays, images (N, H, W), (N, H, W, C) or (N, C, H, W)."""
    files = [folder] if folder.is_file() else [folder / f"{name}.npz", *sorted(folder.glob("*.npz"))]
    for file in files:
        if file.suffix != ".npz" or not file.is_file():
            continue
        with np.load(file, allow_pickle=False) as arrays:
            if set(ARRAYS) <= set(arrays.files):
                return arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"]
    return None


def idx_files(folder: Path, name: str) -> Arrays | None:
    """train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-…, as such or with .gz (Le Cun, Cortes, Burges)."""
    found = []
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            names = (f"{part}-{kind}-ubyte", f"{part}-{kind.replace('-', '.')}-ubyte")
            files = (folder / f"{stem}{suffix}" for stem in names for suffix in ("", ".gz"))
            file = next((file for file in files if file.is_file()), None)
            if file is None:
                return None
            found.append(idx(file))
    return found[0], found[1], found[2], found[3]


def idx(file: Path) -> np.ndarray:
    """One idx file: two zero bytes, the type (8: uint8), how many dimensions, each as a big-endian uint32, data."""
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    zero, kind, dimensions = struct.unpack_from(">HBB", raw) if len(raw) >= 4 else (1, 0, 0)
    start = 4 + 4 * dimensions
    if zero or kind != 8 or len(raw) < start:
        raise ValueError(f"{file} is not an idx file of bytes.")
    shape = struct.unpack_from(f">{dimensions}I", raw, 4)
    if len(raw) - start != np.prod(shape):
        raise ValueError(f"{file} says {shape} and holds {len(raw) - start:,} bytes; it is cut off or something else.")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def cifar_batches(folder: Path, name: str) -> Arrays | None:
    """data_batch_1 … 5 and test_batch of the python version (Krizhevsky 2009)."""
    for place in (folder / "cifar-10-batches-py", folder):
        files = [place / batch for batch in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
        if all(file.is_file() for file in files):
            *train, test = (_cifar_batch(file) for file in files)
            return np.concatenate([x for x, _ in train]), np.concatenate([y for _, y in train]), *test
    return None


def _cifar_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    batch = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="bytes").load()
    return np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32), np.asarray(batch[b"labels"])


class _ArraysOnly(pickle.Unpickler):
    """A pickle can run any code; this one can make numpy arrays."""

    known: ClassVar[dict[str, Any]] = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": lambda text, encoding: text.encode(encoding),  # how Python 3 writes bytes for Python 2
    }

    def find_class(self, module: str, name: str):
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in self.known:
            raise ValueError(f"a CIFAR-10 batch holds arrays and lists; this file wants {module}.{name}.")
        return self.known[name]


def cifar_planes(folder: Path, name: str) -> Arrays | None:
    """cifar10_train_a.xz and _b.xz, with cifar10_test.npz (x, y) beside them.

    Each xz holds a little-endian uint32 count, that many labels, and three planes of the images, green, red − green,
    blue − green, in which each row is its differences from left to right; all in bytes that wrap around.
    """
    parts, test = [folder / f"cifar10_train_{part}.xz" for part in "ab"], folder / "cifar10_test.npz"
    if not all(file.is_file() for file in (*parts, test)):
        return None
    images, labels = zip(*(_planes(file) for file in parts))
    with np.load(test, allow_pickle=False) as arrays:
        return np.concatenate(images), np.concatenate(labels), arrays["x"], arrays["y"]


def _planes(file: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = lzma.decompress(file.read_bytes())
    (count,) = struct.unpack_from("<I", raw)
    if len(raw) != 4 + count + 3 * count * 32 * 32:
        raise ValueError(f"{file} says {count:,} images and holds {len(raw):,} bytes; it is cut off or something else.")
    differences = np.frombuffer(raw, np.uint8, offset=4 + count).reshape(3, count, 32, 32)
    green, red, blue = np.add.accumulate(differences, axis=-1, dtype=np.uint8)
    return np.stack([red + green, green, blue + green], axis=1), np.frombuffer(raw, np.uint8, count, offset=4)


def _labelled(images: np.ndarray, labels: np.ndarray, what: str) -> Labelled:
    labels = np.asarray(labels).reshape(-1)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{what} has images {images.dtype} {images.shape} and labels {labels.dtype}; accepted: uint8 images "
            f"(N, H, W), (N, H, W, C) or (N, C, H, W), and integer labels."
        )
    if len(images) != len(labels) or len(labels) == 0 or not (0 <= labels.min() and labels.max() < 10):
        raise ValueError(f"{what} has {len(images)} images and {len(labels)} labels; each image needs one of 0 to 9.")
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    return Labelled(torch.from_numpy(np.array(images)), torch.from_numpy(labels.astype(np.int64)))


READERS: dict[str, tuple[Callable[[Path, str], Arrays | None], ...]] = {
    "mnist": (npz, idx_files),
    "cifar10": (npz, cifar_batches, cifar_planes),
}
