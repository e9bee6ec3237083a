"""How the accuracy benchmark reads data sets."""

import gzip
import lzma
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy_data

X = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8)
Y = np.arange(24) % 10


def assert_holds(data, images, labels):
    """All but the last four as training data, in the order that they were written."""
    assert torch.equal(torch.cat([data.train.images, data.test.images]), torch.from_numpy(images.copy()))
    assert torch.cat([data.train.labels, data.test.labels]).tolist() == list(labels) and len(data.test) == 4


@pytest.mark.parametrize(
    "images", [X, X.transpose(0, 3, 1, 2), X[..., :1], X[..., 0]], ids=["nhwc", "nchw", "n1", "nhw"]
)
def test_npz_of_any_layout(tmp_path, images):
    file = tmp_path / "some.npz"
    np.savez(file, x_train=images[:20], y_train=Y[:20, None], x_test=images[20:], y_test=Y[20:])
    expected = images[:, None] if images.ndim == 3 else X[..., :1].transpose(0, 3, 1, 2) if images.shape[-1] == 1 else X
    expected = X.transpose(0, 3, 1, 2) if expected is X else expected
    for place in (tmp_path, file):
        assert_holds(accuracy_data.read("cifar10", place), expected, Y)


@pytest.mark.parametrize("dot, packed", [("-", True), (".", False)])
def test_idx_files(tmp_path, dot, packed):
    def write(name, array):
        raw = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
        (tmp_path / f"{name}-ubyte{'.gz' if packed else ''}").write_bytes(gzip.compress(raw) if packed else raw)

    for part, chosen in (("train", slice(20)), ("t10k", slice(20, None))):
        write(f"{part}-images{dot}idx3", X[chosen, :28, :28, 0])
        write(f"{part}-labels{dot}idx1", Y[chosen])
    assert_holds(accuracy_data.read("mnist", tmp_path), X[:, None, :28, :28, 0], Y)


def test_idx_files_that_are_cut_off_are_refused(tmp_path):
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(struct.pack(">HBB3I", 0, 8, 3, 2, 28, 28) + bytes(100))
    with pytest.raises(ValueError, match="cut off"):
        accuracy_data.idx(file)
    file.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="not an idx file"):
        accuracy_data.idx(file)


def write_batches(folder):
    folder.mkdir()
    planes = X.transpose(0, 3, 1, 2).reshape(24, -1)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = slice(4 * i, 4 * i + 4)
        batch = {b"data": planes[part], b"labels": Y[part].tolist(), b"filenames": [b"a.png"] * 4}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def test_cifar_batches(tmp_path):
    write_batches(tmp_path / "cifar-10-batches-py")
    for place in (tmp_path, tmp_path / "cifar-10-batches-py"):
        assert_holds(accuracy_data.read("cifar10", place), X.transpose(0, 3, 1, 2), Y)


def test_a_batch_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",))

    write_batches(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    with pytest.raises(ValueError, match=r"arrays and lists; this file wants .*exec"):
        accuracy_data.read("cifar10", tmp_path)
    assert not (tmp_path / "owned").exists()


def test_cifar_planes(tmp_path):
    red, green, blue = X[:20].transpose(3, 0, 1, 2)
    planes = np.stack([green, red - green, blue - green])
    planes = np.diff(planes, axis=-1, prepend=np.uint8(0))
    for part, chosen in (("a", slice(10)), ("b", slice(10, 20))):
        raw = struct.pack("<I", 10) + Y[chosen].astype(np.uint8).tobytes() + planes[:, chosen].tobytes()
        (tmp_path / f"cifar10_train_{part}.xz").write_bytes(lzma.compress(raw))
    np.savez(tmp_path / "cifar10_test.npz", x=X[20:], y=Y[20:])
    assert_holds(accuracy_data.read("cifar10", tmp_path), X.transpose(0, 3, 1, 2), Y)


def test_photographs_for_a_cpu_are_cifar10_at_half_its_size(tmp_path):
    write_batches(tmp_path / "cifar-10-batches-py")
    whole, half = (accuracy_data.read(name, tmp_path) for name in ("cifar10", "cifar16"))
    assert half.test.images.shape[1:] == (3, 16, 16)
    corner = whole.train.images[0, :, :2, :2].float().mean((1, 2))
    assert half.train.images[0, :, 0, 0].tolist() == corner.round().tolist()
    assert half.train.labels.equal(whole.train.labels) and len(half.test) == len(whole.test)


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass --data-dir, with mnist"):
        accuracy_data.read("mnist")
    with pytest.raises(FileNotFoundError, match="holds no cifar10; accepted: cifar10"):
        accuracy_data.read("cifar10", tmp_path)
    for images, labels, told in ((X / 255, Y, "float64"), (X, Y[:5], "5 labels"), (X, Y + 3, "one of 0 to 9")):
        np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=X, y_test=Y)
        with pytest.raises(ValueError, match=told):
            accuracy_data.read("mnist", tmp_path)


def test_the_fingerprint_is_of_every_pixel():
    data = accuracy_data.read("digits")
    before = data.fingerprint()
    assert accuracy_data.read("digits").fingerprint() == before
    data.test.images[-1, 0, 7, 7] += 1
    assert data.fingerprint() != before
