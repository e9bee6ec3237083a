"""Objectives: each against its formula written out, and its sign; what each needs; one's own; which are off and why."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import CLASSES, QUICK, SIZE, smooth_images, tiny_student, tiny_teacher
from torch import nn

import vitkd_fast
from vitkd_fast import ops
from vitkd_fast.config import Config
from vitkd_fast.distill import distill
from vitkd_fast.objectives import (
    GENERATOR_OBJECTIVES,
    LOGGED,
    STUDENT_OBJECTIVES,
    Scene,
    Terms,
    View,
    check_names,
    generator_objective,
    student_objective,
)
from vitkd_fast.ops.attention_consistency import HorizontalFlip
from vitkd_fast.pair import make_pair
from vitkd_fast.tasks import Classification

CPU = torch.device("cpu")


@pytest.fixture
def pair():
    return make_pair(tiny_teacher().requires_grad_(False), tiny_student(), Config(), CPU)


@pytest.fixture
def vit_pair():
    """Two blocks against four, three heads against two, on a grid of 2×2 patches."""
    pytest.importorskip("timm")
    return make_pair(vit(24, 4, 2).requires_grad_(False), vit(12, 2, 3), Config(accelerate=False), CPU)


@pytest.fixture
def logits():
    return 3 * torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))


def vit(dim, depth, heads, **options):
    """With attention far from uniform, as timm's initial weights would have it."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(depth)
    sizes = {"img_size": SIZE, "patch_size": 4, "in_chans": 1, "num_classes": CLASSES}
    model = VisionTransformer(embed_dim=dim, depth=depth, num_heads=heads, **sizes, **options).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(20)
    return model


def scene_of(student, teacher, config=None, **more):
    """Of logits alone."""
    return Scene(torch.empty(0), View(teacher), View(student), None, config or Config(), **more)


def seen_by(pair, needs, config=None):
    """A scene of real images, with the inside of both networks."""
    torch.manual_seed(7)
    images = smooth_images(6)
    teacher, student = pair.look(pair.teacher, images, needs), pair.look(pair.student, images, needs)
    return Scene(images, teacher, student, pair, config or Config())


def generator_term(name, scene):
    function = GENERATOR_OBJECTIVES[name].function
    return function(scene.pair)(scene) if isinstance(function, type) else function(scene)


def student_term(name, scene):
    return STUDENT_OBJECTIVES[name].function(scene)


def terms_of(weights, registry, pair, **options):
    return Terms.of(weights, registry, pair, **options)


def test_disagreement_and_logits_are_the_kinds_that_the_configuration_names(logits):
    student, teacher = logits
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    expected = {
        "l1": (student - teacher).abs().double().mean(),
        "mse": (student - teacher).square().double().mean(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
    }
    for kind, distance in expected.items():
        scene = scene_of(student, teacher, Config(disagreement=kind, student_loss="l1", temperature=1.0))
        assert generator_term("disagreement", scene).item() == pytest.approx(-distance.item(), rel=1e-5)
        assert student_term("logits", scene).item() == pytest.approx(expected["l1"].item(), rel=1e-5)
        scene = scene_of(student, teacher, Config(disagreement="l1", student_loss=kind, temperature=1.0))
        assert student_term("logits", scene).item() == pytest.approx(distance.item(), rel=1e-5)


def test_temperature_reaches_kl_but_not_l1(logits):
    scene = scene_of(*logits, Config(student_loss="kl", disagreement="l1", temperature=4.0))
    log_q, log_p = ((rows.double() / 4).log_softmax(-1) for rows in logits)
    rows = 16 * (log_p.exp() * (log_p - log_q)).sum(-1)
    assert student_term("logits", scene).item() == pytest.approx(rows.mean().item(), rel=1e-5)
    difference = (logits[0] - logits[1]).abs().mean()
    assert generator_term("disagreement", scene).item() == pytest.approx(-difference.item(), rel=1e-5)
    alike = logits[0].argmax(-1) == logits[1].argmax(-1)
    assert 0 < alike.sum() < len(alike)
    assert generator_term("boundary", scene).item() == pytest.approx(-(rows * alike).mean().item(), rel=1e-5)


def test_class_priors_follow_their_formulas(logits):
    scene = scene_of(*logits, labels=torch.arange(16) % 5)
    p = logits[1].double().softmax(-1)
    expected = {
        "one_hot": -p.amax(-1).log().mean(),
        "balance": (p.mean(0) * p.mean(0).log()).sum(),
        "asked": -p[torch.arange(16), scene.labels].log().mean(),
    }
    for name, value in expected.items():
        assert generator_term(name, scene).item() == pytest.approx(value.item(), rel=1e-5), name


def test_balance_is_least_when_every_class_is_there():
    every, one = (scene_of(None, 50 * torch.eye(5)[rows]) for rows in (list(range(5)), [0] * 5))
    assert generator_term("balance", every).item() == pytest.approx(-math.log(5), abs=1e-5)
    assert generator_term("balance", one).item() == pytest.approx(0, abs=1e-5)
    assert generator_term("one_hot", every).item() == pytest.approx(0, abs=1e-5)
    assert generator_term("one_hot", scene_of(None, torch.zeros(2, 5))).item() == pytest.approx(math.log(5))


def test_balance_stays_finite_where_a_class_is_impossible():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    generator_term("balance", scene_of(None, logits)).backward()
    assert logits.grad.isfinite().all()


def test_boundary_asks_nothing_of_images_that_the_student_gets_wrong():
    student = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
    generator_term("boundary", scene_of(student, torch.tensor([[3.0, 0.0], [3.0, 0.0]]))).backward()
    assert student.grad[0].abs().min() > 0 and (student.grad[1] == 0).all()


def test_generator_terms_reach_both_networks(logits, pair):
    student, teacher = logits[0].clone().requires_grad_(), logits[1].clone().requires_grad_()
    terms = terms_of({"disagreement": 2.0, "one_hot": 3.0, "balance": 7.0}, GENERATOR_OBJECTIVES, pair)
    loss, values = terms(scene_of(student, teacher))
    weighed = 2 * values["disagreement"] + 3 * values["one_hot"] + 7 * values["balance"]
    assert loss.item() == pytest.approx(weighed.item(), rel=1e-6)
    loss.backward()
    assert student.grad.abs().sum() > 0 and teacher.grad.abs().sum() > 0


def test_activation_rewards_large_tokens(pair):
    scene = seen_by(pair, {"tokens"})
    value = generator_term("activation", scene)
    assert value.item() == pytest.approx(-scene.teacher.tokens.abs().mean().item(), rel=1e-6)
    scene.teacher.tokens = 2 * scene.teacher.tokens
    assert generator_term("activation", scene).item() == pytest.approx(2 * value.item(), rel=1e-6)


def test_total_variation_is_in_units_of_pixels(pair):
    scene = seen_by(pair, ())
    pixels = (scene.images * 0.25 + 0.5).double()
    rows, columns = pixels[:, :, 1:] - pixels[:, :, :-1], pixels[..., 1:] - pixels[..., :-1]
    expected = rows.square().mean() + columns.square().mean()
    assert generator_term("total_variation", scene).item() == pytest.approx(expected.item(), rel=1e-5)
    scene.images = torch.full_like(scene.images, 0.3)
    assert generator_term("total_variation", scene).item() == 0


def test_patch_entropy_is_minus_that_of_every_blocks_patches(vit_pair):
    scene = seen_by(vit_pair, {"attention"})
    entropies = []
    for qkv in scene.teacher.attention:
        query, key, value = qkv.unbind(2)  # (B, N, H, D)
        weights = torch.einsum("bnhd,bmhd->bhnm", query, key).div(qkv.shape[-1] ** 0.5).softmax(-1)
        heads = torch.einsum("bhnm,bmhd->bnhd", weights, value)
        entropies.append(ops.patch_similarity_entropy(heads.mean(2)[:, 1:]).item())  # without the class token
    assert len(entropies) == 2
    assert generator_term("patch_entropy", scene).item() == pytest.approx(-sum(entropies) / 2, rel=1e-4)


def test_total_variation_of_a_single_row(pair):
    images = torch.tensor([[[[0.0, 2.0, 2.0]]]])
    value = generator_term("total_variation", Scene(images, None, None, pair, Config()))
    assert value.item() == pytest.approx(pair.spec.std[0] ** 2 * 2)


def test_attention_consistency_mirrors_the_image(vit_pair):
    scene = seen_by(vit_pair, {"attention"})
    mirrored = vit_pair.look(vit_pair.teacher, scene.images.flip(-1), {"attention"})
    expected = ops.attention_consistency(
        scene.teacher.attention[-1], mirrored.attention[-1], HorizontalFlip(), grid=(2, 2), prefix_tokens=1
    )
    value = generator_term("attention_consistency", scene).item()
    assert value == pytest.approx(expected.item(), rel=1e-6) and value > 0


def test_hard_is_the_cross_entropy_with_the_teachers_decision(logits):
    expected = F.cross_entropy(logits[0].double(), logits[1].argmax(-1))
    assert student_term("hard", scene_of(*logits)).item() == pytest.approx(expected.item(), rel=1e-5)


def smooth_l1(left, right):
    difference = (left - right).abs()
    return torch.where(difference < 1, difference.square() / 2, difference - 0.5).mean()


def test_tokens_are_matched_through_a_projection_that_learns(pair):
    terms = terms_of({"tokens": 0.5, "logits": 1.0}, STUDENT_OBJECTIVES, pair)
    scene = seen_by(pair, terms.needs, Config(student_loss="l1"))
    (module,) = terms.modules
    loss, values = terms(scene)
    assert module.project.weight.shape == (16, 8)
    expected = smooth_l1(module.project(scene.student.tokens), scene.teacher.tokens)
    assert values["tokens"].item() == pytest.approx(expected.item(), rel=1e-5)
    distance = (scene.student.logits - scene.teacher.logits).abs().mean()
    assert loss.item() == pytest.approx((distance + expected / 2).item(), rel=1e-5)
    loss.backward()
    assert module.project.weight.grad.abs().sum() > 0 and pair.student.stem.weight.grad.abs().sum() > 0


def test_relations_need_no_projection(pair):
    terms = terms_of({"relations": 1.0}, STUDENT_OBJECTIVES, pair)
    scene = seen_by(pair, terms.needs)
    student, teacher = (F.normalize(view.tokens.double(), dim=-1) for view in (scene.student, scene.teacher))
    expected = (student @ student.mT - teacher @ teacher.mT).square().mean()
    assert terms(scene)[1]["relations"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert len(terms.modules) == 0


def test_blocks_follow_the_layer_map_and_leave_the_last_to_tokens(vit_pair):
    terms = terms_of({"blocks": 1.0}, STUDENT_OBJECTIVES, vit_pair)
    assert vit_pair.followed == (1, 3)
    scene = seen_by(vit_pair, terms.needs)
    assert [view.shape for view in scene.student.blocks] == [(6, 5, 12)] * 2
    x = vit_pair.teacher.norm_pre(vit_pair.teacher._pos_embed(vit_pair.teacher.patch_embed(scene.images)))
    torch.testing.assert_close(scene.teacher.blocks[0], vit_pair.teacher.blocks[:2](x))
    ((project,),) = (module.project for module in terms.modules)
    expected = smooth_l1(project(scene.student.blocks[0]), scene.teacher.blocks[0])
    assert terms(scene)[1]["blocks"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_attention_is_compared_block_by_block(vit_pair):
    terms = terms_of({"attention": 1.0}, STUDENT_OBJECTIVES, vit_pair)
    scene = seen_by(vit_pair, terms.needs)
    losses = []
    for student, teacher in zip(scene.student.attention, scene.teacher.attention, strict=True):
        maps = []
        for qkv in (student.double(), teacher.double()):
            scores = torch.einsum("bnhd,bmhd->bhnm", qkv[:, :, 0], qkv[:, :, 1]) * qkv.shape[-1] ** -0.5
            maps.append(scores.softmax(-1).mean(1))
        losses.append((maps[1] * (maps[1] / maps[0]).log()).sum(-1).mean())
    assert len(losses) == 2
    assert terms(scene)[1]["attention"].item() == pytest.approx((sum(losses) / 2).item(), rel=1e-4)
    terms(scene)[0].backward()
    assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in vit_pair.student.blocks)


def test_only_what_is_needed_is_looked_at(vit_pair):
    view = vit_pair.look(vit_pair.teacher, smooth_images(2))
    assert view.tokens is not None and view.blocks == () and view.attention == ()
    view = vit_pair.look(vit_pair.teacher, smooth_images(2), {"attention"})
    assert view.blocks == () and [qkv.shape for qkv in view.attention] == [(2, 5, 3, 2, 12)] * 2
    assert terms_of({"logits": 1, "tokens": 1}, STUDENT_OBJECTIVES, vit_pair).needs == {"classes", "tokens"}
    assert terms_of({"disagreement": 1, "patch_entropy": 1}, GENERATOR_OBJECTIVES, vit_pair).needs == {
        *("classes", "student", "attention")
    }


def test_a_weight_of_0_is_off_without_a_note(pair):
    terms = terms_of({"logits": 1.0, "tokens": 0.0}, STUDENT_OBJECTIVES, pair)
    assert terms.names == ["logits"] and terms.needs == {"classes"} and pair.notes == []


def test_what_cannot_be_had_is_off_with_a_note(pair):
    terms = terms_of({"logits": 1.0, "blocks": 1.0, "attention": 1.0}, STUDENT_OBJECTIVES, pair)
    assert terms.names == ["logits"]
    assert pair.notes == [
        f"{name} is off: the student cannot be tapped: TinyNet has no list of blocks as timm's ViTs have (model.blocks)"
        for name in ("blocks", "attention")
    ]
    pair.notes.clear()
    assert terms_of({"asked": 1.0, "patch_entropy": 1.0}, GENERATOR_OBJECTIVES, pair).names == []
    assert "asked is off: images have no labels, unless conditional=True" in pair.notes[0]
    assert "patch_entropy is off: the teacher cannot be tapped" in pair.notes[1]
    assert terms_of({"asked": 1.0}, GENERATOR_OBJECTIVES, pair, labels=True).names == ["asked"]


def test_a_generators_objective_asks_nothing_of_the_students_inside():
    pytest.importorskip("timm")
    pair = make_pair(vit(24, 4, 2), tiny_student(), Config(accelerate=False), CPU)
    assert terms_of({"patch_entropy": 1.0}, GENERATOR_OBJECTIVES, pair).names == ["patch_entropy"]
    assert len(pair.look(pair.teacher, smooth_images(2), {"attention"}).attention) == 4  # every block


def test_blocks_that_give_no_tokens_are_found_out_before_the_run():
    pytest.importorskip("timm")

    class Strange(nn.Module):
        """Tokens at the end, but `blocks` of feature maps."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(nn.Conv2d(1, 8, 4, stride=4))
            self.head = nn.Linear(8, CLASSES)

        def forward_features(self, images):
            return self.blocks(images).flatten(2).mT

        def forward_head(self, tokens):
            return self.head(tokens.mean(1))

        def forward(self, images):
            return self.forward_head(self.forward_features(images))

    pair = make_pair(vit(24, 4, 2, class_token=False, global_pool="avg"), Strange(), Config(accelerate=False), CPU)
    assert terms_of({"tokens": 1.0, "blocks": 1.0}, STUDENT_OBJECTIVES, pair).names == ["tokens"]
    assert pair.notes[1:] == ["blocks is off: the student cannot be tapped: block 0 (Conv2d) gives shape (2, 8, 2, 2)"]


@pytest.fixture
def registries():
    """What a test registers ends with it."""
    kept = [(registry, dict(registry)) for registry in (GENERATOR_OBJECTIVES, STUDENT_OBJECTIVES)]
    yield
    for registry, known in kept:
        registry.clear()
        registry.update(known)


@pytest.mark.usefixtures("registries")
def test_an_objective_of_your_own_is_one_registered_function():
    @vitkd_fast.objectives.generator_objective("student")
    def uncertain(scene):
        return -scene.student.logits.softmax(-1).amax(-1).mean()

    result = distill(tiny_teacher(), tiny_student(), steps=12, generator_objectives={"uncertain": 0.1}, **QUICK)
    assert -1 <= result.history[-1]["uncertain"] <= -1 / CLASSES
    assert result.report.settings["generator_objectives"]["uncertain"] == 0.1
    assert "disagreement" in result.history[-1]  # the method's stay


@pytest.mark.usefixtures("registries")
def test_an_objective_with_weights_is_one_registered_module():
    seen = []

    @student_objective("tokens")
    class rotated(nn.Module):
        def __init__(self, pair):
            super().__init__()
            self.rotation = nn.Linear(pair.student_tokens[-1], pair.teacher_tokens[-1])
            seen.append((self, self.rotation.weight.detach().clone()))

        def forward(self, scene):
            return (self.rotation(scene.student.tokens) - scene.teacher.tokens).square().mean()

    options = {"student_objectives": {"rotated": 1.0, "tokens": 0.0}, "student_lr": 0.03}
    result = distill(tiny_teacher(), tiny_student(), steps=100, **options, **QUICK)
    assert "tokens" not in result.history[-1]
    assert result.history[-1]["rotated"] < result.history[0]["rotated"] / 2
    ((module, before),) = seen
    assert not torch.equal(module.rotation.weight, before)


@pytest.mark.usefixtures("registries")
def test_registration_refuses_what_cannot_work():
    with pytest.raises(
        ValueError, match="cannot need 'token'; accepted: student, classes, boxes, tokens, blocks, attention, labels"
    ):
        generator_objective("token")
    for taken in ("logits", "one_hot", *LOGGED):
        function = type(taken, (), {})
        with pytest.raises(ValueError, match=f"cannot be called '{taken}': the log has that name already"):
            generator_objective()(function)


@pytest.mark.usefixtures("registries")
def test_an_objective_must_give_a_scalar():
    @student_objective()
    def each(scene):
        return scene.student.logits.mean(-1)

    with pytest.raises(ValueError, match=r"objective 'each' gives shape \(32,\); it must give a scalar"):
        distill(tiny_teacher(), tiny_student(), student_objectives={"each": 1.0}, steps=3, **QUICK)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"generator_objectives has no 'onehot'; did you mean one_hot\?$"):
        check_names({"onehot": 1.0}, GENERATOR_OBJECTIVES, "generator_objectives")
    with pytest.raises(ValueError, match="student_objectives has no 'zzz'; known: logits, hard, tokens, "):
        distill(tiny_teacher(), tiny_student(), student_objectives={"zzz": 1.0}, **QUICK)
    with pytest.raises(ValueError, match=r"generator is 'convolution'; did you mean convolutional\?$"):
        distill(tiny_teacher(), tiny_student(), generator="convolution", **QUICK)


def test_a_student_needs_something_to_minimise(tmp_path):
    nothing = {"student_objectives": {"logits": 0, "tokens": 0, "attention": 1}, "out": tmp_path}
    with pytest.raises(ValueError, match=r"nothing to minimise; .*attention is off: the student cannot be tapped"):
        distill(tiny_teacher(), tiny_student(), **nothing, **QUICK)
    assert not any(tmp_path.iterdir())


def test_agreement_is_the_share_of_equal_decisions():
    scene = scene_of(torch.eye(4), torch.eye(4)[[0, 1, 2, 0]])
    assert Classification().agreement(scene).item() == 0.75


@pytest.mark.parametrize("given, said", [(lambda: 1.0, "a float"), (lambda: None, "a NoneType")])
def test_an_objective_that_gives_no_tensor_is_named(pair, given, said):
    terms = Terms([], {"mine": 1.0}, {"mine": lambda scene: given()}, nn.ModuleList())
    with pytest.raises(ValueError, match=f"objective 'mine' gives {said}; it must give a scalar, a tensor"):
        terms(None)
    constant = Terms([], {"mine": 1.0}, {"mine": lambda scene: torch.ones(())}, nn.ModuleList())
    with pytest.raises(ValueError, match="nothing that learns has a part in mine: there is no gradient"):
        constant(None)
