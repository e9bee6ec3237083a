"""Networks that write on their images, cache, are compiled or scripted, give no gradient or have no classifier."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import QUICK, TinyNet, held_images, smooth_images, tiny_student, tiny_teacher

import vitkd_fast
from vitkd_fast.distill import distill

VisionTransformer = pytest.importorskip("timm.models.vision_transformer").VisionTransformer


class Overwriting(TinyNet):
    """Normalises in place, as torchvision's Normalize(inplace=True) does."""

    def forward(self, images):
        return super().forward(images.sub_(0.1).div_(0.7))


def test_a_network_that_writes_on_its_images_writes_on_a_copy():
    teacher = Overwriting(16)
    teacher.load_state_dict(tiny_teacher().state_dict())
    teacher.norm.momentum = 0.0  # of its averages, which are to stay as they are
    student = copy.deepcopy(teacher)
    images = smooth_images(64)
    before = images.clone()
    options = QUICK | {"student_lr": 1e-12, "weight_decay": 0.0}
    result = distill(teacher, student, steps=10, evaluate=[(images, torch.zeros(64, dtype=torch.long))], **options)
    assert torch.equal(images, before)
    assert result.report.agreement == 1.0 and result.report.teacher_accuracy == result.report.student_accuracy


class Caching(TinyNet):
    """Keeps in eval mode what it made of its weights, and drops it in train(True), as LeViT does its biases."""

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = None
        return self

    def forward_head(self, tokens):
        if self.training:
            return super().forward_head(tokens)
        if getattr(self, "kept", None) is None:
            self.kept = self.head.weight.detach().clone()
        return F.linear(F.gelu(tokens).mean(1), self.kept, self.head.bias)


@pytest.mark.parametrize("method", ["best", "adversarial"])
def test_what_a_network_keeps_in_eval_mode_is_dropped_when_it_learns(method):
    held, plain, caching = held_images(), tiny_student(), Caching(8)
    caching.load_state_dict(plain.state_dict())
    options = QUICK | {"method": method, "evaluate_every": 3, "log_every": 1, "student_lr": 0.01}
    labels = torch.arange(len(held)) % 4
    results = [
        distill(tiny_teacher(), student, steps=10, evaluate=[(held, labels)], **options) for student in (plain, caching)
    ]
    with torch.no_grad():
        assert torch.equal(*(result.student(held) for result in results))
    assert [entry.get("evaluated") for entry in results[0].history] == [
        entry.get("evaluated") for entry in results[1].history
    ]


def small_vit(**options):
    return VisionTransformer(8, 4, 1, 4, embed_dim=16, depth=2, num_heads=2, **options)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("method", ["vitkd", "smi"])
def test_the_inside_of_compiled_networks_is_seen(method, how):
    def compiled(model):
        if how == "wrapped":
            return torch.compile(model, backend="eager")
        model.compile(backend="eager")
        return model

    options = QUICK | {"method": method, "generator_steps": 2, "batch_size": 4}
    result = distill(compiled(small_vit()), compiled(small_vit()), steps=2, **options)
    assert result.report.status == "completed" and not [note for note in result.report.notes if "tapped" in note]


def test_torchscript_is_left_as_it_is():
    scripted = torch.jit.script(small_vit().eval())
    assert "TorchScript runs its own code" in str(vitkd_fast.accelerate(scripted))
    result = distill(scripted, small_vit(), steps=2, image_size=(8, 8), channels=1, **QUICK)
    assert result.report.status == "completed"
    frozen_one = torch.jit.freeze(torch.jit.script(tiny_teacher().eval()))
    assert distill(frozen_one, tiny_student(), steps=2, image_size=(8, 8), channels=1, **QUICK).report.steps == 2


def test_what_has_no_gradient_is_noted():
    class Silent(TinyNet):
        @torch.no_grad()
        def forward(self, images):
            return super().forward(images)

    teacher = Silent(16)
    teacher.load_state_dict(tiny_teacher().state_dict())
    notes = distill(
        teacher, tiny_student(), steps=2, **QUICK | {"method": "deepinversion", "generator_steps": 2}
    ).report.notes
    assert "asked does nothing: what it measures has no gradient" in notes
    assert not [note for note in notes if "total_variation" in note]
    assert not [
        note for note in distill(tiny_teacher(), tiny_student(), steps=2, **QUICK).report.notes if "nothing" in note
    ]


def test_a_student_made_under_inference_mode_is_refused_and_such_a_teacher_taken():
    with torch.inference_mode():
        made = tiny_student(), tiny_teacher()
    with pytest.raises(ValueError, match=r"the student's stem\.weight was made under torch\.inference_mode"):
        distill(tiny_teacher(), made[0], steps=2, **QUICK)
    assert distill(made[1], tiny_student(), steps=2, **QUICK | {"method": "best"}).report.status == "completed"


def test_a_teacher_without_a_classifier_is_noted():
    teacher = VisionTransformer(8, 4, 1, 0, embed_dim=16, depth=1, num_heads=2)
    student = VisionTransformer(8, 4, 1, 16, embed_dim=8, depth=1, num_heads=2)
    notes = distill(teacher, student, steps=2, **QUICK).report.notes
    assert any("its features are taken for logits" in note for note in notes)
