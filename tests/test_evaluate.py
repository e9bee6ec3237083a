"""Evaluation: exact shares over uneven batches, functions, and folders of images."""

import copy

import pytest
import torch
from tiny import QUICK, held_images, tiny_student, tiny_teacher
from torch import nn

from vitkd_fast.distill import distill
from vitkd_fast.evaluate import check, evaluate_pair, image_folder, read_image, tried
from vitkd_fast.generator import ImageSpec

CPU = torch.device("cpu")
SPEC = ImageSpec(4, 4, (0.5,) * 3, (0.5,) * 3)


class Fixed(nn.Module):
    """Decides by the brightness of the image's first pixel, shifted."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift, self.anchor = shift, nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return nn.functional.one_hot((images[:, 0, 0, 0].round().long() + self.shift) % 4, 4).float()


def test_shares_are_exact_over_uneven_batches():
    def images(*values):
        return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)

    batches = [(images(0, 1, 2), torch.tensor([0, 1, 3])), (images(3), torch.tensor([0]))]
    result = evaluate_pair(Fixed(0), Fixed(1), batches, SPEC)
    assert result == {"teacher_accuracy": 0.5, "student_accuracy": 0.5, "agreement": 0.0}
    assert evaluate_pair(Fixed(0), Fixed(4), batches, SPEC)["agreement"] == 1.0


def test_a_function_gives_accuracies():
    result = evaluate_pair(Fixed(0), Fixed(1), lambda model: 0.25 + model.shift / 2, SPEC)
    assert result == {"teacher_accuracy": 0.25, "student_accuracy": 0.75, "agreement": None}


def test_a_folder_of_images_is_normalised_as_the_teacher_wants(tmp_path):
    pytest.importorskip("torchvision")
    from PIL import Image

    for label, level in (("cat", 0), ("dog", 255)):
        (tmp_path / label).mkdir()
        Image.new("RGB", (8, 6), (level,) * 3).save(tmp_path / label / "1.png")
    ((images, labels),) = image_folder(tmp_path, SPEC)
    assert images.shape == (2, 3, 4, 4) and labels.tolist() == [0, 1]
    assert (images[0] == -1).all() and (images[1] == 1).all()


def folder_of(path, *names, size=(8, 6)):
    from PIL import Image

    for name in names:
        (path / name).mkdir()
        Image.new("RGB", size).save(path / name / "1.png")
    return path


@pytest.mark.parametrize("names", ["abc", "abcde"])
def test_a_folder_has_a_subfolder_for_each_class(names, tmp_path):
    with pytest.raises(
        ValueError, match=f"has {len(names)} subfolders, and the teacher knows 4 classes; each needs one"
    ):
        tried(Fixed(0), folder_of(tmp_path, *names), SPEC, CPU)


def test_a_class_without_images_has_an_empty_folder(tmp_path):
    folder_of(tmp_path, "a", "c", "d")
    (tmp_path / "b").mkdir()
    data = tried(Fixed(0), tmp_path, SPEC, CPU)
    assert [labels.tolist() for _, labels in data] == [[0, 2, 3]]


@pytest.mark.parametrize("label", [-1, 4, 57])
def test_labels_are_the_teachers_classes(label):
    batches = [(torch.zeros(1, 3, 4, 4), torch.tensor([each])) for each in (0, label)]
    with pytest.raises(ValueError, match=r"1 labels that are no class of the teacher's, 0 to 3"):
        evaluate_pair(Fixed(0), Fixed(1), batches, SPEC)
    with pytest.raises(ValueError, match=rf"labels from {label} to {label}; accepted: the teacher's classes, 0 to 3"):
        tried(Fixed(0), batches[::-1], SPEC, CPU)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    from PIL import Image

    folder_of(tmp_path, *"abcd", size=(64, 64))
    bad = tmp_path / "b" / "2.jpg"
    bad.write_text("no image")
    with pytest.raises(ValueError, match=r"b/2\.jpg cannot be read as an image"):
        tried(Fixed(0), tmp_path, SPEC, CPU)
    whole = (tmp_path / "a" / "1.png").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b/2\.jpg cannot be read as an image"):
        tried(Fixed(0), tmp_path, SPEC, CPU)
    Image.new("I;16", (8, 8)).save(bad.with_suffix(".png"))
    bad.unlink()
    with pytest.raises(ValueError, match=r"b/2\.png has more than 8 bits per channel"):
        tried(Fixed(0), tmp_path, SPEC, CPU)


def test_nothing_to_evaluate_and_wrong_kinds(tmp_path):
    with pytest.raises(ValueError, match="yielded no images"):
        evaluate_pair(Fixed(0), Fixed(1), [], SPEC)
    with pytest.raises(FileNotFoundError, match="one subfolder of images per class"):
        check(tmp_path / "absent")
    with pytest.raises(TypeError, match="evaluate is a int; accepted: batches"):
        check(3)
    check(None)


@pytest.mark.parametrize(
    ("batch", "given"),
    [
        (
            (torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, dtype=torch.long)),
            r"float32 \(2, 3, 4, 4\) and Tensor int64 \(2, 1\)",
        ),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2, 4)), r"Tensor float32 \(2, 4\)"),
        ((torch.zeros(3, 4, 4), 1), "int"),
        ({"images": 1}, "dict"),
        (torch.zeros(2, 3, 4, 4), r"Tensor float32 \(2, 3, 4, 4\)"),
    ],
)
def test_what_is_no_batch_is_named(batch, given):
    for use in (
        lambda data: evaluate_pair(Fixed(0), Fixed(1), data, SPEC),
        lambda data: tried(Fixed(0), data, SPEC, CPU),
    ):
        with pytest.raises(ValueError, match=f"evaluate has a batch of .*{given}; accepted: images"):
            use([batch])


@pytest.mark.parametrize("answer", [None, 87.5, float("nan"), -0.1, "high"])
def test_what_is_no_accuracy_is_named(answer):
    with pytest.raises(ValueError, match=r"evaluate answered .*; accepted: its accuracy, from 0 to 1"):
        tried(Fixed(0), lambda model: answer, SPEC, CPU)


def test_what_can_be_had_only_once_is_not_tried_before():
    batches = iter([(torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.long))])
    assert evaluate_pair(Fixed(0), Fixed(0), tried(Fixed(0), batches, SPEC, CPU), SPEC)["agreement"] == 1


def test_a_function_is_asked_about_the_teacher_once():
    asked, teacher, student = [], Fixed(0), Fixed(1)
    data = tried(teacher, lambda model: asked.append(model) or 0.5, SPEC, CPU)
    for _ in range(2):
        evaluate_pair(teacher, student, data, SPEC)
    assert asked == [teacher, student, student]


def test_a_stream_behind_a_loader_keeps_its_first_batch():
    items = iter([(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 4, 4), 0)])

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return items

    data = tried(Fixed(0), torch.utils.data.DataLoader(Stream()), SPEC, CPU)
    assert len(list(data)) == 2


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (16, 16), (17, 40)])
@pytest.mark.parametrize("photograph", [(50, 50), (120, 40), (30, 90)])
def test_photographs_cover_the_teachers_images(size, photograph, tmp_path):
    from PIL import Image

    (tmp_path / "a").mkdir()
    Image.new("L", photograph, 255).save(tmp_path / "a" / "white.png")
    ((images, _),) = image_folder(tmp_path, ImageSpec(*size, (0.0,), (1.0,)))
    assert images.shape == (1, 1, *size) and images.min() > 0.99


def test_a_folder_without_classes_is_refused_before_the_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no subfolders"):
        check(tmp_path)


def test_a_function_may_leave_models_in_training_mode():
    def measured(model):
        model.eval()
        share = float((model(held_images(32)).argmax(1) == 0).float().mean())
        model.train()
        return share

    teacher = tiny_teacher()
    before = copy.deepcopy(teacher.state_dict())
    seen = []
    teacher.register_forward_hook(lambda module, given, returned: seen.append(module.training))
    options = {**QUICK, "steps": 12, "evaluate": measured, "evaluate_every": 6}
    result = distill(teacher, tiny_student(), **options)
    assert not any(seen)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    alone = distill(tiny_teacher(), tiny_student(), **{**options, "evaluate": None, "evaluate_every": 0})
    state = result.student.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in alone.student.state_dict().items())


def test_a_folder_says_what_it_lacks(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "moving.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"has no images in its subfolders; accepted: \.jpg, "):
        distill(tiny_teacher(), tiny_student(), steps=1, evaluate=tmp_path, **QUICK)
    with pytest.raises(ValueError, match="evaluate is ''; accepted: a folder of images, or None"):
        distill(tiny_teacher(), tiny_student(), steps=1, evaluate="", **QUICK)
    with pytest.raises(ValueError, match=r"channels is 4; accepted with a folder of images: 1 \(grey\) or 3"):
        image_folder(tmp_path, ImageSpec(8, 8, (0.5,) * 4, (0.5,) * 4))


@pytest.mark.parametrize("content", [b"P6 4 4 255\nab", b"P6 90000 90000 255\nab"], ids=["cut off", "bomb"])
def test_a_broken_ppm_is_named(content, tmp_path):
    (tmp_path / "x.ppm").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ppm cannot be read as an image"):
        read_image(tmp_path / "x.ppm", "x.ppm")
