"""Classifiers of transformers as teachers and students: logits, last tokens and their grid, evaluation."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import CLASSES, QUICK, SIZE

pytest.importorskip("transformers")

import transformers

from vitkd_fast.config import Config
from vitkd_fast.distill import distill
from vitkd_fast.generator import ImageSpec
from vitkd_fast.layout import Layout, layout_of
from vitkd_fast.models import forward, image_spec

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": SIZE,
    "patch_size": 4, "num_channels": 1, "num_labels": CLASSES,
}  # fmt: skip
SPEC = ImageSpec(SIZE, SIZE, (0.5,), (0.5,))


def timm_vit(width):
    timm = pytest.importorskip("timm.models.vision_transformer")
    return timm.VisionTransformer(
        img_size=SIZE, patch_size=4, in_chans=1, num_classes=CLASSES, embed_dim=width, depth=1, num_heads=2
    )


def classifier(kind="ViT", **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | options)
    return getattr(transformers, f"{kind}ForImageClassification")(config).eval()


@pytest.mark.parametrize(
    ("kind", "options", "layout"),
    [
        ("ViT", {}, Layout(5, 1, True, (2, 2))),
        ("DeiT", {}, Layout(6, 2, True, (2, 2))),
        ("Dinov2WithRegisters", {"num_register_tokens": 3}, Layout(8, 4, True, (2, 2))),
    ],
)
def test_logits_tokens_and_grid_are_seen(kind, options, layout):
    model = classifier(kind, **options)
    images = torch.randn(3, 1, SIZE, SIZE)
    with torch.no_grad():
        logits, tokens = forward(model, images)
        torch.testing.assert_close(logits, model(images).logits)
    assert tokens.shape == (3, layout.count, 16)
    assert layout_of(model, tokens.shape[1], SPEC) == layout


def test_tokens_that_are_no_plain_grid_have_none():
    model = classifier()
    for count in (3, 40):
        assert layout_of(model, count, SPEC) == Layout(count)


@pytest.mark.parametrize("roles", ["teacher", "student", "both"])
def test_distills(roles):
    teacher = timm_vit(16) if roles == "student" else classifier()
    student = timm_vit(8) if roles == "teacher" else classifier(hidden_size=8, num_hidden_layers=1)
    labels = torch.arange(8) % CLASSES
    batches = [(torch.randn(8, 1, SIZE, SIZE), labels)]
    result = distill(teacher, student, steps=4, evaluate=batches, **QUICK)
    assert {"logits", "tokens"} <= result.history[-1].keys()
    assert not [note for note in result.report.notes if "is off" in note]
    assert 0 <= result.report.student_accuracy <= 1 and 0 <= result.report.agreement <= 1


def test_outputs_of_other_kinds_say_what_to_do():
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = timm_vit(8)

        def forward(self, images):
            return {"classes": self.inner(images)}

    with pytest.raises(ValueError, match=r"gives dict for two images; .* Wrap it so that it gives them alone"):
        distill(Pair(), timm_vit(8), steps=2, image_size=(SIZE, SIZE), channels=1, **QUICK)


def test_a_student_calls_its_classes_what_the_teacher_calls_them(tmp_path):
    names = ["dog", "cat", "owl", "elk"]
    teacher, student = (classifier(id2label=dict(enumerate(order))) for order in (names, names[::-1]))
    result = distill(teacher, student, steps=2, out=tmp_path / "run", **QUICK)
    said = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    assert [said["id2label"][str(label)] for label in range(4)] == names
    assert [said["label2id"][name] for name in names] == [0, 1, 2, 3]
    assert any("calls the classes what the teacher's does" in note for note in result.report.notes)


@pytest.mark.parametrize(("kind", "prefix"), [("Siglip", 0), ("CLIP", 1)])
def test_one_half_of_a_model_of_images_and_text_is_a_vit(kind, prefix):
    sizes = {name: value for name, value in SIZES.items() if name != "num_labels"}
    config = getattr(transformers, f"{kind}Config")(vision_config=sizes, num_labels=CLASSES)
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    assert image_spec(model, Config()) == SPEC
    with torch.no_grad():
        tokens = forward(model, torch.randn(3, 1, SIZE, SIZE))[1]
    assert tokens is not None and tokens.shape == (3, prefix + 4, 16)
    report = distill(model, timm_vit(8), steps=2, **QUICK | {"method": "best"}).report
    assert not [note for note in report.notes if "has no forward_features" in note]


def test_what_a_wrapped_model_of_timm_says_of_its_images_is_read():
    model = torch.nn.Module()
    model.config = SimpleNamespace(
        pretrained_cfg={"input_size": (1, SIZE, SIZE), "mean": (0.1,), "std": (0.4,)}, image_size=None
    )
    assert image_spec(model, Config()) == ImageSpec(SIZE, SIZE, (0.1,), (0.4,))
