"""The accuracy benchmark's teachers and students, and how they are trained on real images."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import digit_vit

from vitkd_fast.config import Config
from vitkd_fast.generator import GENERATORS, SUPPLIED, GeneratorSettings
from vitkd_fast.models import digest, image_spec

pytest.importorskip("timm")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy_data
import accuracy_models
import accuracy_pair


def test_a_given_teacher_is_loaded_strictly_with_its_own_normalisation(tmp_path):
    from safetensors.torch import save_file

    sizes = {"patch_size": 4, "embed_dim": 14, "depth": 1, "num_heads": 2, "final_norm": False}
    model = accuracy_models.vit(8, 1, sizes)
    told = {"img_size": 8, "in_chans": 1, "num_classes": 10, **sizes, "norm_eps": 1e-5, "mean": [0.13], "std": [0.31]}
    (tmp_path / "other.json").write_text(json.dumps(told))
    with pytest.raises(FileNotFoundError, match="no weights beside"):
        accuracy_models.given_teacher(tmp_path / "other.json")
    save_file(model.state_dict(), tmp_path / "other.safetensors")
    given = accuracy_models.given_teacher(tmp_path / "other.json")
    assert digest(given) == digest(model) and not given.training
    assert given.blocks[0].norm1.eps == 1e-5
    spec = image_spec(given, Config())
    assert spec.mean == (0.13,) and spec.std == (0.31,)
    pixels = torch.rand(4, 1, 8, 8)
    assert torch.allclose(spec.normalised(pixels), (pixels - 0.13) / 0.31)
    (tmp_path / "other.json").write_text(json.dumps({**told, "depth": 2}))
    with pytest.raises(ValueError, match=r"missing: blocks\.1"):
        accuracy_models.given_teacher(tmp_path / "other.json")


def test_a_given_resnet_may_lack_the_counts_of_its_batchnorms(tmp_path):
    model = accuracy_models.ResNet(8)
    state = {f"module.{name}": value for name, value in model.state_dict().items() if "num_batches" not in name}
    torch.save({"state_dict": state, "best_prec1": 93.0}, tmp_path / "resnet.th")
    (tmp_path / "resnet.json").write_text(
        json.dumps({"architecture": "resnet", "depth": 8, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]})
    )
    given = accuracy_models.given_teacher(tmp_path / "resnet.json")
    assert digest(given) == digest(model)
    assert image_spec(given, Config()).mean == (0.5, 0.4, 0.3)


def test_resnets_have_the_published_sizes():
    assert accuracy_models.parameters(accuracy_models.ResNet(20)) == 269_722
    assert accuracy_models.parameters(accuracy_models.ResNet(56)) == 853_018


@pytest.mark.parametrize("name", list(accuracy_models.TASKS))
def test_students_are_as_small_as_they_must_be(name):
    task = accuracy_models.TASKS[name]
    teacher, student = (accuracy_models.vit(task.side, task.channels, size) for size in (task.teacher, task.student))
    ratio = accuracy_models.parameters(teacher) / accuracy_models.parameters(student)
    assert ratio >= (4 if name == "cifar10" else 6)


def test_real_images_are_a_generator_inside_and_unknown_outside():
    data = accuracy_data.Labelled(torch.randint(17, (5, 1, 8, 8), dtype=torch.uint8), torch.arange(5), 16)
    spec = image_spec(digit_vit(), Config())
    with accuracy_models.real_images(data, accuracy_models.Augmentation()) as name:
        made = GENERATORS[name](spec, GeneratorSettings()).sample(40)
    known = spec.normalised(data.pixels(slice(None))).flatten(1)
    assert torch.cdist(made.flatten(1), known).amin(1).max() < 1e-5
    assert SUPPLIED not in GENERATORS


def test_augmentations_stay_in_range_and_do_what_they_are_called():
    pixels = torch.zeros(64, 3, 16, 16)
    pixels[:, :, 4:12, 2:8] = 0.8
    strong = accuracy_models.Augmentation(rotate=0.3, scale=0.2, shift=0.1, flip=True, colour=0.4, erase=0.5)
    changed = strong(pixels)
    assert changed.shape == pixels.shape and changed.min() >= 0 and changed.max() <= 1
    assert (changed - pixels).abs().amax((1, 2, 3)).min() > 0
    assert torch.equal(accuracy_models.Augmentation()(pixels), pixels)
    mirrored = accuracy_models.Augmentation(flip=True)(pixels)
    flipped = [torch.allclose(one, pixels[0].flip(-1), atol=1e-5) for one in mirrored]
    assert 10 < sum(flipped) < 54
    assert all(flip or torch.allclose(one, pixels[0], atol=1e-5) for flip, one in zip(flipped, mirrored))
    moved = accuracy_models.Augmentation(shift=0.25)(pixels)
    centre = (moved.sum((1, 2)) * torch.arange(16)).sum(1) / moved.sum((1, 2, 3))
    assert 1.5 < centre.max() - centre.min() < 8.1


def test_cutmix_takes_its_share_from_the_neighbour():
    torch.manual_seed(0)
    pixels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 10, 10)
    mixed, others, share = accuracy_models.cut_and_mixed(pixels, torch.arange(4))
    assert others.tolist() == [3, 0, 1, 2] and 0 <= share < 1
    assert torch.allclose((mixed == pixels).float().mean((1, 2, 3)), torch.tensor(share))
    assert set(mixed[1].unique().tolist()) <= {0.0, 1.0}


def test_training_on_labels_learns_and_leaves_the_random_state():
    data = accuracy_data.read("digits").train
    model = digit_vit(32, 1)
    spec, before = image_spec(model, Config()), torch.get_rng_state()
    recipe = accuracy_models.Recipe(150, 64, 4e-3, accuracy_models.Augmentation(shift=0.05))
    assert accuracy_models.train_on_labels(model, data, spec, recipe, seed=0) > 0
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    found = accuracy_pair.predictions(model, data, spec)
    assert (found == data.labels).float().mean() > 0.8
