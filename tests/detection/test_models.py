"""Detectors by name: folders that transformers wrote."""

import math

import pytest
import torch
from tiny_detectors import CLASSES, SIZE, yolos

from vitkd_fast.config import Config
from vitkd_fast.detection.models import create_student, load_teacher, sines
from vitkd_fast.generator import ImageSpec


def test_a_teacher_comes_from_a_folder_with_its_weights(tmp_path):
    saved = yolos()
    saved.save_pretrained(tmp_path)
    images = torch.randn(2, 1, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(load_teacher(str(tmp_path), Config(task="detection"))(images).logits, saved(images).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_was_saved_in_half_precision_is_loaded_in_single(tmp_path, dtype):
    yolos().to(dtype).save_pretrained(tmp_path)
    spec = ImageSpec(SIZE, SIZE, (0.5,), (0.5,))
    for model in (load_teacher(str(tmp_path), Config(task="detection")), create_student(str(tmp_path), spec, 3)):
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_folder_without_a_detectors_heads_is_refused(tmp_path):
    yolos().vit.save_pretrained(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"has no weights of a detector for bbox_predictor.*, …: they would be random"
    ):
        load_teacher(str(tmp_path), Config(task="detection"))


def test_a_student_is_made_anew_for_the_teachers_images_with_queries_that_differ(tmp_path):
    yolos(classes=7).save_pretrained(tmp_path)
    spec = ImageSpec(24, 32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    student = create_student(str(tmp_path), spec, CLASSES).eval()
    assert student.pretrained_cfg == {"mean": spec.mean, "std": spec.std}
    with torch.no_grad():
        output = student(torch.randn(1, 3, 24, 32))
    assert output.logits.shape[-1] == CLASSES + 1
    assert student.vit.embeddings.detection_tokens[0].std(0).min() > 0.1
    places = student.vit.embeddings.position_embeddings[0, 1:49].unflatten(0, (6, 8)).detach()
    apart = (places[0, 0] - places).norm(dim=-1)
    assert apart[0, 1] < apart[0, 4] and apart[1, 0] < apart[3, 0] and apart.flatten()[1:].min() > 0.2


@pytest.mark.parametrize("width", [16, 18])
def test_places_are_sines_and_cosines_of_row_and_column(width):
    places = sines(3, 5, width).view(3, 5, width)
    for row in range(3):
        for column in range(5):
            angles = [[place * 10_000 ** (-i / 4) for i in range(4)] for place in (row, column)]
            expected = [wave(angle) for part in angles for wave in (math.sin, math.cos) for angle in part]
            torch.testing.assert_close(places[row, column, :16], torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert not places[..., 16:].any()


def test_a_name_that_is_nothing_says_what_is_accepted(tmp_path):
    for load in (lambda name: load_teacher(name, Config(task="detection")), lambda name: create_student(name, None, 3)):
        with pytest.raises(RuntimeError, match="a folder that save_pretrained wrote"):
            load(str(tmp_path / "missing"))
