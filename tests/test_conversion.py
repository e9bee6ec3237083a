"""Students of other images: renormalised and resized on the way in, in training, in evaluation and in the report."""

import pytest
import torch
from tiny import CLASSES, TinyNet, smooth_images, tiny_student, tiny_teacher
from torch import nn

from vitkd_fast.config import Config
from vitkd_fast.conversion import Conversion
from vitkd_fast.distill import distill
from vitkd_fast.generator import ImageSpec
from vitkd_fast.models import create_student, student_image_spec
from vitkd_fast.pair import make_pair

QUICK = {"method": "adversarial", "batch_size": 16, "width": 16, "latent": 16, "log_every": 10, "progress": False}
TEACHERS = ImageSpec(8, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
CPU = torch.device("cpu")


def test_pixels_stay_what_they_are():
    own = ImageSpec(8, 8, (0.1, 0.2, 0.3), (0.9, 0.8, 0.4))
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(own.pixels(Conversion(TEACHERS, own)(images)), TEACHERS.pixels(images))
    assert Conversion(TEACHERS, TEACHERS)(images) is images
    assert Conversion(TEACHERS, TEACHERS).note() is None


def test_resizing_averages_when_images_become_smaller_and_interpolates_when_larger():
    def spec(side):
        return ImageSpec(side, side, (0.5,), (0.5,))

    checkerboard = (torch.arange(16).view(-1, 1) + torch.arange(16)).remainder(2).float().expand(1, 1, 16, 16)
    smaller = Conversion(spec(16), spec(4))(checkerboard)
    assert smaller.shape == (1, 1, 4, 4)
    torch.testing.assert_close(smaller, torch.full_like(smaller, 0.5), atol=0.02, rtol=0)
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    larger = Conversion(spec(4), spec(8))(ramp)
    torch.testing.assert_close(larger[0, 0, 3], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))


def test_gradients_reach_the_teachers_images():
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    Conversion(TEACHERS, ImageSpec(12, 10, (0.5,) * 3, (0.5,) * 3))(images).square().sum().backward()
    assert images.grad.abs().min() > 0


def test_a_note_says_what_is_done():
    note = Conversion(TEACHERS, ImageSpec(16, 12, (0.485, 0.456, 0.406), (0.25,) * 3)).note()
    assert note == (
        "student: images are resized from the teacher's 8×8 to its own 16×12 and normalised with mean 0.485 0.456 "
        "0.406 and std 0.25, as its pretrained_cfg says, where the teacher has 0.5 0.4 0.3 and 0.2 0.3 0.4; "
        "give it such images from now on, or set its pretrained_cfg to the teacher's before the run"
    )


def spec_of(student, teachers=TEACHERS):
    return student_image_spec(student, nn.Identity(), teachers)


def test_what_a_student_says_of_itself():
    plain = nn.Conv2d(3, 4, 3)
    assert spec_of(plain) == TEACHERS
    plain.default_cfg = {"input_size": (3, 20, 10)}
    assert spec_of(plain) == ImageSpec(20, 10, TEACHERS.mean, TEACHERS.std)
    plain.pretrained_cfg = {"mean": (0.5,), "std": (0.1, 0.2, 0.3)}
    assert spec_of(plain) == ImageSpec(8, 8, (0.5,) * 3, (0.1, 0.2, 0.3))


def test_a_cfg_like_the_teachers_is_overruled_with_the_teachers():
    """As of two timm models whose images are said by image_size=, mean= and std=."""
    student, teacher = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    teacher.pretrained_cfg = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.25,) * 3}
    student.pretrained_cfg = {"input_size": [3, 224, 224], "mean": [0.485, 0.456, 0.406], "std": (0.5,)}
    assert student_image_spec(student, teacher, TEACHERS) == ImageSpec(8, 8, TEACHERS.mean, (0.5,) * 3)


def test_timms_models_say_it_too():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    own = vit.pretrained_cfg
    assert spec_of(vit) == ImageSpec(32, 32, own["mean"], own["std"])
    takes_any = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, dynamic_img_size=True)
    assert spec_of(takes_any) == ImageSpec(8, 8, own["mean"], own["std"])
    resnet = timm.create_model("test_resnet")  # trained at 160×160, and takes any size
    assert spec_of(resnet) == ImageSpec(8, 8, resnet.pretrained_cfg["mean"], resnet.pretrained_cfg["std"])


def test_a_student_by_name_takes_the_teachers_images_and_says_so():
    pytest.importorskip("timm")
    teachers = ImageSpec(32, 32, TEACHERS.mean, TEACHERS.std)
    student = create_student("test_vit", teachers, 7)
    assert spec_of(student, teachers) == teachers
    assert student.pretrained_cfg["architecture"] == "test_vit"
    teacher = create_student("test_vit2", teachers, CLASSES)  # any model of these images
    pair = make_pair(teacher, "test_vit", Config(accelerate=False), CPU)
    assert pair.notes == [] and pair.student_of_teachers_images is pair.student


class Watched(TinyNet):
    """Keeps what it sees."""

    def __init__(self, side, mean, std):
        super().__init__(8)
        self.pretrained_cfg = {"input_size": (1, side, side), "mean": mean, "std": std}
        self.seen = []

    def forward_features(self, images):
        self.seen.append(images.detach())
        return super().forward_features(images)


def test_the_student_sees_its_own_images_in_every_step():
    teacher, student = tiny_teacher(), Watched(16, (0.1,), (2.0,))
    seen = []
    teacher.stem.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    result = distill(teacher, student, steps=12, shift=0, **QUICK)
    assert {tuple(images.shape[1:]) for images in student.seen} == {(1, 16, 16)}
    assert {tuple(images.shape[1:]) for images in seen} == {(1, 8, 8)}
    pixels = [images * 0.25 + 0.5 for images in seen[-12:]]
    own = [images * 2.0 + 0.1 for images in student.seen[-12:]]
    for theirs, ours in zip(pixels, own, strict=True):
        expected = nn.functional.interpolate(theirs, (16, 16), mode="bilinear", align_corners=False)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert any(note.startswith("student: images are resized from the teacher's 8×8") for note in result.report.notes)
    assert (
        result.report.student.flops > 3 * distill(tiny_teacher(), tiny_student(), steps=2, **QUICK).report.student.flops
    )


def test_evaluation_converts_the_teachers_images_for_the_student():
    """A student that is the teacher, but for its normalisation and size, is as good as the teacher."""

    class Enlarged(nn.Module):
        """The teacher, of images three times as large and in another normalisation."""

        def __init__(self):
            super().__init__()
            self.inner = tiny_teacher()
            self.inner.norm.momentum = 0.0  # the one step does not change it
            self.pretrained_cfg = {"input_size": (1, 24, 24), "mean": (0.25,), "std": (0.5,)}

        def forward(self, images):
            pixels = images[..., 1::3, 1::3] * 0.5 + 0.25  # the middle of 3×3 is the pixel that they came from
            return self.inner((pixels - 0.5) / 0.25)

    torch.manual_seed(0)
    images = smooth_images(256)
    with torch.no_grad():
        labels = tiny_teacher()(images).argmax(1)

    def accuracy(model):
        return (model(images).argmax(1) == labels).float().mean().item()

    options = {"steps": 1, "student_lr": 1e-12, **QUICK}
    batches = distill(tiny_teacher(), Enlarged(), evaluate=[(images, labels)], **options).report
    assert batches.teacher_accuracy == 1
    assert batches.student_accuracy == batches.agreement == 1
    function = distill(tiny_teacher(), Enlarged(), evaluate=accuracy, **options).report
    assert function.student_accuracy == function.teacher_accuracy == 1


def test_a_student_that_takes_neither_is_told_how_to_say_its_size():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(100, CLASSES))

        def forward(self, images):
            return self.layers(images)

    with pytest.raises(
        ValueError, match=r"student Fixed cannot take images of shape \(2, 1, 8, 8\).* pretrained_cfg = "
    ):
        distill(tiny_teacher(), Fixed(), steps=2, **QUICK)
    student = Fixed()
    student.pretrained_cfg = {"input_size": (1, 10, 10)}
    assert distill(tiny_teacher(), student, steps=2, **QUICK).report.status == "completed"


@pytest.mark.gpu
def test_conversion_follows_the_student_to_the_gpu():
    result = distill(tiny_teacher().cuda(), Watched(16, (0.1,), (2.0,)), steps=6, **QUICK)
    assert result.report.status == "completed" and next(result.student.parameters()).is_cuda
