"""Which teachers and students go together: what they learn by, what is off and why, what is refused."""

import copy

import pytest
import torch
from tiny import CLASSES, QUICK, SIZE, TinyNet, same, state, tiny_student, tiny_teacher
from torch import nn

from vitkd_fast.distill import distill


def test_networks_without_tokens_distil_with_a_note():
    def plain(width):
        network = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, width), nn.ReLU(), nn.Linear(width, CLASSES))
        network.default_cfg = {"input_size": (1, SIZE, SIZE)}
        return network

    result = distill(plain(16), plain(8), steps=12, **QUICK)
    assert "tokens" not in result.history[-1]
    assert result.report.notes[1:] == ["tokens is off: the student has no forward_features that gives (B, N, D) tokens"]
    assert result.report.settings["student_objectives"] == {"logits": 1.0, "tokens": 1.0}  # what was asked


def test_timm_vits_of_other_sizes_share_tokens_and_are_accelerated():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    def vit(dim, patch_size):
        return VisionTransformer(
            img_size=SIZE, patch_size=patch_size, in_chans=1, num_classes=3, embed_dim=dim, depth=2, num_heads=1
        )

    result = distill(vit(32, 4), vit(16, 4), steps=6, **QUICK)
    assert "tokens" in result.history[-1]
    assert any(note.startswith("teacher: 2 of 2 attention blocks") for note in result.report.notes)
    asked = {"attention": 1.0, "blocks": 1.0}
    result = distill(vit(32, 4), vit(16, 2), steps=6, accelerate=False, student_objectives=asked, **QUICK)
    assert {"tokens", "blocks"} < result.history[-1].keys()
    assert result.report.notes[1:] == ["attention is off: the student has 4×4 patches and the teacher 2×2"]


def test_networks_that_do_not_fit_are_refused_before_the_run(tmp_path):
    wrong_classes = tiny_student()
    wrong_classes.head = nn.Linear(8, CLASSES + 1)
    with pytest.raises(ValueError, match="student knows 5 classes and teacher 4"):
        distill(tiny_teacher(), wrong_classes, steps=5, **QUICK)
    with pytest.raises(ValueError, match=r"teacher TinyNet cannot take images of shape \(2, 3, 8, 8\)"):
        distill(tiny_teacher(), tiny_student(), steps=5, channels=3, **QUICK)
    with pytest.raises(ValueError, match="teacher gives shape"):
        distill(nn.Flatten(2), tiny_student(), image_size=(8, 8), channels=1, **QUICK)
    with pytest.raises(ValueError, match="no weight with requires_grad=True"):
        distill(tiny_teacher(), tiny_student().requires_grad_(False), steps=5, **QUICK)
    with pytest.raises(TypeError, match="did you mean steps"):
        distill(tiny_teacher(), tiny_student(), step=5)
    with pytest.raises(TypeError, match="evaluate is a int; accepted: batches"):
        distill(tiny_teacher(), tiny_student(), evaluate=3)


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (lambda: tiny_teacher().bfloat16(), tiny_student, r"weights are bfloat16, .* teacher.float\(\)"),
        (tiny_teacher, lambda: tiny_student().double(), r"weights are float64, .* student.float\(\)"),
        (lambda: nn.Sequential(tiny_teacher(), nn.Linear(CLASSES, 1)), tiny_student, "teacher gives one logit"),
    ],
)
def test_networks_that_cannot_be_used_as_they_are_say_what_to_do(teacher, student, message):
    with pytest.raises(ValueError, match=message):
        distill(teacher(), student(), steps=3, image_size=(SIZE, SIZE), **QUICK)


@pytest.mark.parametrize("student", [None, len])
def test_a_student_is_a_module_or_a_name(student):
    with pytest.raises(TypeError, match=r"student is a .*; accepted: an nn\.Module, or the name of a model"):
        distill(tiny_teacher(), student, steps=3, **QUICK)


def test_a_teacher_is_not_its_own_student():
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match="teacher and student are the same module"):
        distill(teacher, teacher, steps=2, **QUICK)


def test_a_student_made_of_the_teachers_parts_is_refused():
    teacher, student = tiny_teacher(), tiny_student()
    student.head = teacher.head
    with pytest.raises(ValueError, match=r"student's head\.weight is the teacher's own; give it a copy"):
        distill(teacher, student, steps=5, **QUICK)


def test_a_student_that_recomputes_its_activations_learns_under_every_objective():
    vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    sizes = {"img_size": SIZE, "patch_size": 4, "in_chans": 1, "num_classes": CLASSES, "depth": 1, "num_heads": 1}
    students = [vit(**sizes, embed_dim=16) for _ in range(2)]
    students[1].load_state_dict(students[0].state_dict())
    students[1].set_grad_checkpointing(True)
    for student in students:
        distill(tiny_teacher(), student, steps=6, generator_steps=2, **QUICK)
    assert same(state(students[0]), state(students[1]))


def test_a_convolution_of_one_pixel_in_two_learns():
    """Of RepVGG, MobileOne and FastViT: on images that are not contiguous torch's own gradient of it crashes."""

    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(1, 48, 3, 2, 1), nn.Conv2d(1, 48, 1, 2)
            self.head = nn.Linear(48, CLASSES)

        def forward(self, images):
            assert images.is_contiguous()
            return self.head((self.wide(images) + self.narrow(images)).relu().mean((2, 3)))

    for shift in (0.0, 0.25):
        distill(tiny_teacher(), Strided(), steps=4, shift=shift, **{**QUICK, "method": "best"})


def test_a_student_that_drops_patches_is_not_compared_by_tokens():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": SIZE, "patch_size": 2, "in_chans": 1, "num_classes": 3, "num_heads": 1, "depth": 2}
    teacher, student = (
        VisionTransformer(embed_dim=32, **sizes),
        VisionTransformer(embed_dim=16, patch_drop_rate=0.5, **sizes),
    )
    result = distill(teacher, student, steps=3, **QUICK)
    assert "tokens is off: the student drops patches while it trains (patch_drop_rate)" in result.report.notes


def test_a_student_of_one_block_has_no_blocks_to_compare():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": SIZE, "patch_size": 2, "in_chans": 1, "num_classes": 3, "num_heads": 1}
    teacher, student = (VisionTransformer(embed_dim=dim, depth=depth, **sizes) for dim, depth in ((32, 3), (16, 1)))
    asked = {"blocks": 1.0, "tokens": 0.0, "logits": 0.0}
    with pytest.raises(ValueError, match=r"nothing to minimise.*blocks is off: the student has one block"):
        distill(teacher, student, steps=3, student_objectives=asked, **QUICK)


def test_a_traced_student_is_a_student():
    student = torch.jit.trace(tiny_student().eval(), torch.zeros(2, 1, SIZE, SIZE))
    result = distill(tiny_teacher(), student, steps=2, accelerate=False, **QUICK)
    assert result.report.status == "completed"


class TwoHeads(nn.Module):
    """Gives, in training, auxiliary logits beside its own, as Inception does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.auxiliary = tiny_student(), tiny_student()
        self.pretrained_cfg = self.inner.pretrained_cfg

    def forward(self, images):
        logits = self.inner(images)
        return (logits, self.auxiliary(images), logits) if self.training else logits


def test_of_logits_and_auxiliary_ones_the_first_are_learned():
    student = TwoHeads()
    before = copy.deepcopy(student.auxiliary.state_dict())
    distill(tiny_teacher(), student, steps=3, **QUICK)
    learned = {name: weight for name, weight in student.auxiliary.named_parameters()}
    assert all(torch.equal(before[name], weight) for name, weight in learned.items())


def test_a_student_that_records_no_gradient_is_refused():
    class Silent(TinyNet):
        @torch.no_grad()
        def forward(self, images):
            return super().forward(images)

    with pytest.raises(ValueError, match=r"student's output has no gradient: its forward runs under torch.no_grad"):
        distill(tiny_teacher(), Silent(8), steps=3, **QUICK)


def test_a_teacher_may_answer_in_inference_mode():
    teacher = tiny_teacher()
    teacher.forward = torch.inference_mode()(teacher.forward)
    result = distill(teacher, tiny_student(), steps=3, **{**QUICK, "method": "best"})
    assert result.report.status == "completed"
