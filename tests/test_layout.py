"""Layout: tokens of two ViTs side by side, with other prefix tokens and other patch grids."""

import pytest
import torch
from tiny import CLASSES, SIZE, tiny_student, tiny_teacher

from vitkd_fast.config import Config
from vitkd_fast.distill import distill
from vitkd_fast.generator import ImageSpec
from vitkd_fast.layout import Layout, align, layout_of, why_not_aligned
from vitkd_fast.models import forward
from vitkd_fast.pair import make_pair

QUICK = {"batch_size": 16, "width": 16, "latent": 16, "log_every": 10, "progress": False}
SPEC = ImageSpec(SIZE, SIZE, (0.5,), (0.5,))
CLASS_4 = Layout(5, 1, True, (2, 2))
DISTILLED_4 = Layout(6, 2, True, (2, 2))
REGISTERS_4 = Layout(8, 4, False, (2, 2))
CLASS_16 = Layout(17, 1, True, (4, 4))
BARE_4 = Layout(4, 0, False, (2, 2))


def tokens_of(layout, width=3):
    return torch.randn(2, layout.count, width)


def test_the_same_places_pass_as_they_are():
    student, teacher = tokens_of(CLASS_4), tokens_of(CLASS_4, 5)
    assert align(student, teacher, CLASS_4, CLASS_4) == (student, teacher)
    unknown = Layout(5)
    assert align(student, teacher, unknown, CLASS_4) == (student, teacher)
    assert why_not_aligned(unknown, CLASS_4, resize=True) is None


@pytest.mark.parametrize(
    "student, teacher, paired",
    [
        (CLASS_4, DISTILLED_4, 1),
        (DISTILLED_4, CLASS_4, 1),
        (BARE_4, CLASS_4, 0),
        (REGISTERS_4, CLASS_4, 0),
        (DISTILLED_4, REGISTERS_4, 0),
    ],
)
def test_class_tokens_and_patches_are_compared_where_prefixes_differ(student, teacher, paired):
    own, others = tokens_of(student), tokens_of(teacher)
    left, right = align(own, others, student, teacher)
    assert torch.equal(left, torch.cat((own[:, :paired], own[:, -4:]), 1))
    assert torch.equal(right, torch.cat((others[:, :paired], others[:, -4:]), 1))
    packed = own.view(2, -1, 3, 1, 1)
    assert torch.equal(align(packed, packed, student, student)[0], packed)
    assert why_not_aligned(student, teacher, resize=False) is None


def test_patches_are_resized_to_the_teachers_grid():
    """A plane stays a plane: bilinear weights are exact for it, away from the edges."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    plane = torch.stack((rows, 10 * columns), -1).flatten(0, 1)  # (16, 2)
    student = torch.cat((torch.full((1, 2), 99.0), plane)).unsqueeze(0)
    teacher = tokens_of(DISTILLED_4)[:1]
    left, right = align(student, teacher, CLASS_16, DISTILLED_4)
    assert left.shape == (1, 5, 2) and right.shape == (1, 5, 3)
    assert (left[0, 0] == 99).all()
    assert torch.equal(right[0, 0], teacher[0, 0])
    squares = left[0, 1:].view(2, 2, 2)
    assert (squares[:, 0] == squares[:, 0].flip(1)).sum() == 0  # rows and columns are not confused
    torch.testing.assert_close(squares[..., 0].mean(), plane[:, 0].mean())
    torch.testing.assert_close(squares[0, :, 0], squares[0, :1, 0].expand(2))
    assert (squares[1, :, 0] - squares[0, :, 0] > 1).all() and (squares[:, 1, 1] - squares[:, 0, 1] > 10).all()


def test_what_cannot_be_aligned_says_why():
    assert why_not_aligned(CLASS_16, CLASS_4, resize=True) is None
    assert why_not_aligned(CLASS_16, CLASS_4, resize=False) == "the student has 4×4 patches and the teacher 2×2"
    reason = why_not_aligned(Layout(17), CLASS_4, resize=True)
    assert reason == "the student has 17 tokens and the teacher 5"


def vit(name="VisionTransformer", module="vision_transformer", dim=16, patch_size=4, **options):
    timm_models = pytest.importorskip(f"timm.models.{module}")
    torch.manual_seed(0)
    sizes = {"img_size": SIZE, "in_chans": 1, "num_classes": CLASSES, "embed_dim": dim, "depth": 2, "num_heads": 2}
    return getattr(timm_models, name)(patch_size=patch_size, **sizes, **options)


def distilled(**options):
    return vit("VisionTransformerDistilled", "deit", **options)


@pytest.mark.parametrize(
    "options, layout",
    [
        ({}, CLASS_4),
        ({"patch_size": 2}, CLASS_16),
        ({"class_token": False, "global_pool": "avg"}, BARE_4),
        ({"class_token": False, "reg_tokens": 4, "global_pool": "avg"}, REGISTERS_4),
        ({"dynamic_img_size": True}, CLASS_4),
    ],
)
def test_timms_vits_say_their_layout(options, layout):
    assert layout_of(vit(**options), layout.count, SPEC) == layout
    assert layout_of(vit(**options), layout.count + 1, SPEC) == Layout(layout.count + 1)  # does not add up


def test_other_models_say_nothing_or_little():
    assert layout_of(distilled(), 6, SPEC) == DISTILLED_4
    dynamic = vit(dynamic_img_size=True)
    assert layout_of(dynamic, 1 + 3 * 4, ImageSpec(12, 16, (0.5,), (0.5,))) == Layout(13, 1, True, (3, 4))
    assert layout_of(tiny_teacher(), 4, SPEC) == Layout(4)


EVERYTHING = {"logits": 1.0, "tokens": 1.0, "blocks": 1.0, "relations": 1.0, "attention": 1.0}


def test_deits_distillation_token():
    """As student and as teacher; its two heads are averaged while it trains as they are when it is used."""
    result = distill(vit(dim=32), distilled(), steps=12, student_objectives=EVERYTHING, **QUICK)
    assert EVERYTHING.keys() <= result.history[-1].keys()
    result = distill(distilled(dim=32), vit(), steps=12, student_objectives=EVERYTHING, **QUICK)
    assert EVERYTHING.keys() <= result.history[-1].keys()
    student, images = distilled(), torch.randn(3, 1, SIZE, SIZE)
    student.set_distilled_training(True)
    student.train()
    assert isinstance(student(images), tuple)
    logits, tokens = forward(student, images)
    torch.testing.assert_close(logits, student.eval()(images))
    assert tokens.shape == (3, 6, 16)
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    result = distill(distilled(dim=32), student, steps=12, student_objectives=EVERYTHING, **QUICK)
    assert EVERYTHING.keys() <= result.history[-1].keys()
    for name in ("head.weight", "head_dist.weight", "dist_token"):
        assert not torch.equal(dict(student.named_parameters())[name], before[name])


def test_other_grids_learn_from_the_teachers_tokens():
    """A student of finer and of coarser patches comes nearer to the teacher's tokens."""
    for patch_size, precision in ((2, "float32"), (8, "float32"), (2, "bfloat16")):
        options = {"student_lr": 0.01, "precision": precision}
        asked = {"relations": 1.0, "attention": 1.0, "blocks": 1.0}
        result = distill(
            vit(dim=32), vit(patch_size=patch_size), steps=100, student_objectives=asked, **options, **QUICK
        )
        first, last = result.history[0], result.history[-1]
        assert last["tokens"] < 0.9 * first["tokens"] and {"relations", "blocks"} < last.keys()
        (note,) = [note for note in result.report.notes if "is off" in note]
        patches = SIZE // patch_size
        assert note == f"attention is off: the student has {patches}×{patches} patches and the teacher 2×2"


def test_a_student_of_other_patches_and_images():
    student = vit(patch_size=4)
    larger = pytest.importorskip("timm.models.vision_transformer").VisionTransformer(
        img_size=16, patch_size=8, in_chans=1, num_classes=CLASSES, embed_dim=16, depth=2, num_heads=2
    )
    result = distill(student, larger, steps=12, student_objectives=EVERYTHING, **QUICK)
    assert EVERYTHING.keys() <= result.history[-1].keys()  # 2×2 patches of both
    assert any("resized from the teacher's 8×8 to its own 16×16" in note for note in result.report.notes)


def test_a_student_that_does_not_say_its_layout_is_taken_as_it_is():
    student = tiny_student()
    student.pretrained_cfg = None
    result = distill(vit(), student, steps=6, accelerate=False, **QUICK)
    assert result.report.notes[1:] == ["tokens is off: the student has 4 tokens and the teacher 5"]
    bare = vit(class_token=False, global_pool="avg")
    result = distill(bare, student, steps=6, accelerate=False, **QUICK)
    assert len(result.report.notes) == 1 and "tokens" in result.history[-1]


def test_a_register_is_no_class_token():
    register = Layout(5, 1, False, (2, 2))
    own, others = tokens_of(CLASS_4), tokens_of(register, 5)
    left, right = align(own, others, CLASS_4, register)
    assert torch.equal(left, own[:, 1:]) and torch.equal(right, others[:, 1:])
    assert why_not_aligned(CLASS_4, register, resize=False) is None


@pytest.mark.parametrize("name", ["vitamin_small_224", "vit_tiny_patch16_224"])
def test_patches_of_hybrid_vits_are_as_large_as_their_convolutions_make_them(name):
    timm = pytest.importorskip("timm")
    for side, whole in ((64, True), (72, False)):
        options = {"img_size": side, "num_classes": CLASSES, "in_chans": 1}
        teacher = timm.create_model(name, **options)
        pair = make_pair(teacher, tiny_student(), Config(image_size=(side, side)), torch.device("cpu"))
        assert pair.whole_patches is whole
