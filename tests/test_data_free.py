"""A data-free method has no way to any data."""

import gzip
import inspect
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from no_data import TouchedError, no_data
from tiny import digit_vit

from vitkd_fast.config import Config
from vitkd_fast.distill import distill
from vitkd_fast.methods import METHODS
from vitkd_fast.models import digest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy_data


def test_the_trap_catches_every_way_to_data(tmp_path):
    from sklearn.datasets import load_digits

    np.savez(tmp_path / "data.npz", x=np.zeros(3))
    torch.save({}, tmp_path / "data.pt")
    ways = (
        lambda: np.load(tmp_path / "data.npz"),
        lambda: torch.load(tmp_path / "data.pt"),
        lambda: (tmp_path / "data.npz").read_bytes(),
        lambda: gzip.open(tmp_path / "data.npz"),
        lambda: load_digits(),
        lambda: accuracy_data.read("digits"),
        lambda: accuracy_data.read("mnist", tmp_path / "data.npz"),
        lambda: list(torch.utils.data.DataLoader([1, 2])),
    )
    for way in ways:
        way_name = inspect.getsource(way)
        with no_data(), pytest.raises(TouchedError):
            way()
            pytest.fail(f"got through: {way_name}")
    assert list(torch.utils.data.DataLoader([1, 2])) and len(load_digits().target) == 1797


@pytest.mark.parametrize("method", list(METHODS))
def test_distill_reads_no_data(method):
    options = {"steps": 4, "batch_size": 8, "width": 16, "generator_steps": 2, "student_steps": 2, "progress": False}
    distill(digit_vit(), digit_vit(8, 1), method=method, **options)  # imports what it imports
    with no_data():
        result = distill(digit_vit(), digit_vit(8, 1), method=method, **options)
    assert result.report.steps == 4 and result.report.teacher_accuracy is None


def test_no_argument_but_evaluate_takes_images(tmp_path):
    assert list(inspect.signature(distill).parameters) == ["teacher", "student", "evaluate", "options"]
    images = torch.rand(8, 1, 8, 8)
    for field in fields(Config):
        for given in (images, [images], {"images": images}, torch.utils.data.DataLoader(images)):
            with pytest.raises((TypeError, ValueError)):  # all other fields have their defaults
                Config(**{field.name: given})
    torch.save({"images": images}, tmp_path / "images.pt")
    with pytest.raises(ValueError, match="teacher_checkpoint goes with a teacher given by name"):
        distill(digit_vit(), digit_vit(8, 1), teacher_checkpoint=tmp_path / "images.pt", progress=False)


def test_evaluating_on_digits_changes_no_weight():
    held = accuracy_data.read("digits").test
    batch = (held.pixels(slice(0, 100)) * 2 - 1, held.labels[:100])
    students = []
    for evaluate in (None, [batch]):
        options = {"steps": 5, "batch_size": 8, "width": 16, "progress": False}
        result = distill(digit_vit(), digit_vit(8, 1), evaluate=evaluate, **options)
        students.append(digest(result.student))
        assert (result.report.student_accuracy is None) == (evaluate is None)
    assert students[0] == students[1]
