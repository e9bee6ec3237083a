"""Rounds of synthesis: what begins anew and what stays, which images the student gets."""

import pytest
import torch
from rounds import SMALL, make, term
from test_methods import vit, vits
from tiny import SIZE, tiny_student, tiny_teacher
from torch import nn

from vitkd_fast import generator_objectives as _registers  # noqa: F401
from vitkd_fast import synthesis
from vitkd_fast.distill import distill
from vitkd_fast.generator import GENERATORS, GeneratorSettings, ImageSpec, Pixels
from vitkd_fast.synthesis import Synthesis, richest, rolled

pytestmark = pytest.mark.usefixtures("seeded")


def test_pixels_change_and_the_pool_gets_what_they_became():
    made = make(*vits(), method="deepinversion", generator_steps=40)
    pixels, seen = made.generator, watched(made)
    assert isinstance(pixels, Pixels)
    for batch in range(2):
        made.round(0.0)
        began, ended = seen[40 * batch][2], pixels.images.detach()
        assert began.std().item() == pytest.approx(0.718, abs=0.05)  # of Gaussian noise clamped to ±1
        assert (began - ended).abs().mean() > 0.3
        kept = made.pool.bytes[8 * batch : 8 * batch + 8]
        assert torch.equal(kept, (255 * pixels.pixels(ended.clamp(-1, 1))).round().byte())
    assert made.pool.count == 16 and not torch.allclose(seen[0][2], seen[40][2])


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_pixels_learn_what_they_are_asked_for(clip):
    """However small the gradient is clipped: Adam divides by what it was clipped by."""
    options = {"generator_objectives": {"total_variation": 0.0, "feature_statistics": 0.0}, "jitter": 0}
    made = make(tiny_teacher(), tiny_student(), method="deepinversion", generator_steps=60, clip=clip, **options)
    seen = watched(made)
    made.round(0.0)
    labels = seen[0][1]
    assert term("asked", made, seen[0][2], labels) > 1
    assert term("asked", made, made.generator(torch.zeros(8, 8)), labels) < 0.1


def watched(made: Synthesis) -> list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Noise, labels and images of all steps to come."""
    seen, judge = [], made._judge

    def watch(noise, labels, step):
        loss, values, images = judge(noise, labels, step)
        seen.append((noise, labels, images.clone()))
        return loss, values, images

    made._judge = watch
    return seen


@pytest.mark.parametrize(
    "options, fresh",
    [
        ({"restart": "never", "images": "fresh"}, True),
        ({"restart": "never", "images": "pool"}, False),
        ({"restart": "round", "images": "fresh"}, False),
        ({"restart": "never", "images": "fresh", "learn_latent": True}, False),
    ],
)
def test_labels_and_noise_stay_for_a_round_whose_images_are_wanted(options, fresh):
    made = make(tiny_teacher(), tiny_student(), method="dfad", conditional=True, **options)
    seen = watched(made)
    made.round(0.0)
    made.round(0.5)
    labels = [labels for _, labels, _ in seen]
    assert torch.equal(labels[0], labels[2]) != fresh
    assert not torch.equal(labels[0], labels[3])  # another round
    assert all((noise is made.latent) == bool(options.get("learn_latent")) for noise, _, _ in seen)


def test_a_learned_latent_begins_anew_and_learns():
    made = make(tiny_teacher(), tiny_student(), method="cmi")
    drawn = []
    normal = made.latent.normal_
    made.latent.normal_ = lambda: drawn.append(normal().clone())
    made.round(0.0)
    made.round(0.5)
    assert not torch.equal(drawn[0], drawn[1])
    moved = (made.latent.detach() - drawn[1]).abs()
    assert 0 < moved.max() <= 3.1 * made.config.latent_lr  # three steps of Adam, whose averages began at 0 too


def test_meta_weights_move_half_way_to_where_the_round_ended():
    made = make(tiny_teacher(), tiny_student(), method="fast")
    before = [weight.clone() for weight in made.start]
    made.round(0.0)
    ended = [weight.detach().clone() for weight in made.generator.parameters()]
    for start, old, end in zip(made.start, before, ended, strict=True):
        torch.testing.assert_close(start, (old + end) / 2)
    assert any(not torch.equal(start, old) for start, old in zip(made.start, before))
    expected = [start.clone() for start in made.start]
    seen = []
    judge = made._judge
    made._judge = lambda *given: seen.append([w.detach().clone() for w in made.generator.parameters()]) or judge(*given)
    made.round(0.5)
    assert all(map(torch.equal, seen[0], expected))


def test_a_generator_lives_for_some_rounds():
    made = make(tiny_teacher(), tiny_student(), method="dfad", life=2)
    weights = made.generator.seed[0].weight
    jumps = []
    for _ in range(5):
        before = weights.detach().clone()
        made.round(0.5)
        jumps.append((weights - before).abs().mean().item())
    assert min(jumps[2], jumps[4]) > 5 * max(jumps[0], jumps[1], jumps[3])


def test_several_generators_take_turns_and_only_the_one_whose_turn_it_is_learns():
    made = make(tiny_teacher(), tiny_student(), method="adversarial", generators=3)
    assert not torch.equal(*(part.to_pixels.weight for part in made.generator.parts[:2]))
    for turn in (1, 2, 0, 1):
        before = [part.to_pixels.weight.detach().clone() for part in made.generator.parts]
        made.round(0.5)
        moved = [not torch.equal(*pair) for pair in zip((p.to_pixels.weight for p in made.generator.parts), before)]
        assert made.generator.turn == turn and moved == [part == turn for part in range(3)]
        torch.manual_seed(0)
        images = made.generator.sample(4)
        torch.manual_seed(0)
        assert torch.equal(images, made.generator.parts[turn].sample(4))
    asked = []
    for part in made.generator.parts:
        part.register_forward_hook(lambda _module, _inputs, images: asked.append(len(images)))
    assert len(made.generator.eval().sample(8)) == 8 and asked == [3, 3, 2]


def test_what_begins_anew_loses_its_averages_and_the_rest_keeps_them():
    made = make(*vits(), method="cmi")
    made.round(0.0)
    states = made.learner.optimizer.state
    steps = []
    judge = made._judge

    def watched(*given):
        steps.append(
            [states[weight]["step"].item() for weight in (made.latent, *made.generator.parameters())]
            + [states[weight]["step"].item() for weight in made.terms.modules.parameters()]
        )
        return judge(*given)

    made._judge = watched
    made.round(0.5)
    count = 1 + len([*made.generator.parameters()])
    assert steps[0][:count] == [0] * count
    assert set(steps[0][count:]) == {3} and len(steps[0]) > count  # the head of contrast


@pytest.mark.parametrize("restart, expected", [("never", [0.4] * 3), ("round", [0.25, 0.5, 0.75]), ("meta", [0.3] * 3)])
def test_the_learning_rates_cycle(restart, expected):
    made = make(tiny_teacher(), tiny_student(), method="dfad", restart=restart)
    seen = []
    step = made.learner.step
    made.learner.step = lambda loss, values, progress: seen.append(progress) or step(loss, values, progress)
    made.round(0.4)
    assert seen == pytest.approx(expected)


def test_the_student_sees_the_pool_the_round_or_fresh_images():
    pool = make(tiny_teacher(), tiny_student(), method="fast", shift=0)
    pool.round(0.0)
    rows = {tuple(image.flatten().tolist()) for image in pool.generator.normalise(pool.pool.bytes[:8] / 255)}
    assert all(tuple(image.flatten().tolist()) in rows for image in pool.batch(0))
    this_round = make(tiny_teacher(), tiny_student(), method="zskt")
    this_round.round(0.0)
    assert this_round.batch(0) is this_round.batch(1) is this_round.images
    fresh = make(tiny_teacher(), tiny_student(), method="dfad")
    fresh.round(0.0)
    with torch.no_grad():
        assert not torch.equal(fresh.batch(0), fresh.batch(1))


def test_images_that_nobody_learns_to_make_fill_the_pool_too_balanced_by_the_teachers_classes():
    made = make(tiny_teacher(), tiny_student(), method="best", batch_size=50, shift=0)
    assert made.learner is None
    for _ in range(6):
        made.round(0.0)
    pool, teacher = made.pool, made.pair.teacher
    assert pool.count == 300
    kept = pool.generator.normalise(pool.bytes[:300] / 255)
    with torch.no_grad():
        known = teacher(kept).argmax(-1)
        drawn = teacher(torch.cat([made.batch(step) for step in range(40)])).argmax(-1)
    assert (pool.classes[:300] == known).float().mean() > 0.98  # told before they were made bytes
    before, after = (torch.bincount(labels, minlength=4) / len(labels) for labels in (known, drawn))
    assert before.max() - before.min() > 0.2 and (after - 0.25).abs().max() < 0.06


def test_a_generator_all_of_whose_objectives_are_off_is_refused():
    """BatchNorm is missing as well."""
    with pytest.raises(ValueError, match="'pixels' has nothing to minimise under method 'deepinversion'"):
        make(*vits(), method="deepinversion", generator_objectives={"asked": 0.0, "total_variation": 0.0})


def test_rolled_moves_all_images_alike_and_passes_the_gradient_back():
    images = torch.arange(2 * 36.0).view(2, 1, 6, 6).requires_grad_()
    offsets = set()
    for _ in range(60):
        moved = rolled(images, 0.2)
        offset = next(
            (dy, dx)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if torch.equal(torch.roll(images, (dy, dx), (-2, -1)), moved)
        )
        offsets.add(offset)
    assert len(offsets) == 9
    (moved * moved.detach()).sum().backward()
    torch.testing.assert_close(images.grad, images.detach())
    assert rolled(images, 0) is images


def test_teacher_and_student_see_the_rolled_images(monkeypatch):
    monkeypatch.setattr(synthesis, "rolled", lambda images, share: images + share)
    made = make(tiny_teacher(), tiny_student(), method="dfad", jitter=0.5, generator_steps=1)
    seen = []
    look = made.pair.look
    monkeypatch.setattr(
        made.pair,
        "look",
        lambda model, images, *rest, **more: seen.append(images) or look(model, images, *rest, **more),
    )
    made.round(0.0)
    assert len(seen) == 2
    for images in seen:
        torch.testing.assert_close(images.detach(), made.images + 0.5)


def test_robust_means_that_the_networks_judge_moved_images(monkeypatch):
    moved = []
    monkeypatch.setattr(synthesis, "augmented", lambda images, *by: moved.append(by) or images)
    made = make(tiny_teacher(), tiny_student(), method="dfad", shift=0.25, turn=0.1)
    made.round(0.5)
    assert moved == []
    made.batch(0)
    assert moved == [(0.25, 0.1)]
    robust = {"robust": True, "generator_steps": 2}
    make(tiny_teacher(), tiny_student(), method="dfad", shift=0.25, turn=0.1, **robust).round(0.5)
    assert moved == [(0.25, 0.1)] * 3


def test_no_network_runs_more_often_than_the_method_needs():
    """Forwards of teacher and student in one round of three generator steps."""
    expected = {"deepinversion": (3, 0), "psaq": (3, 0), "smi": (3, 0), "fast": (3, 3), "nayer": (3, 3), "cmi": (6, 3)}
    for method, counts in {**expected, "vitkd": (6, 3)}.items():
        teacher, student = vits()
        made = make(teacher, student, method=method)
        calls = {"teacher": 0, "student": 0}
        for name, model in (("teacher", teacher), ("student", student)):

            def count(module, args, output, name=name, calls=calls):
                calls[name] += 1

            model.blocks[-1].register_forward_hook(count)
        made.round(0.0)
        calls.update(teacher=0, student=0)  # what can be tapped is tried once
        made.round(0.5)
        assert tuple(calls.values()) == counts, method


@pytest.mark.parametrize("balanced", [False, True])
def test_of_several_candidates_the_pool_gets_those_in_which_the_teacher_finds_most(balanced):
    drawn = []

    class Known(nn.Module):
        """Surer of brighter images, all of class 3."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([0.0, 0.0, 0.0, 2.0]))
            self.pretrained_cfg = {"input_size": (1, SIZE, SIZE), "mean": (0.0,), "std": (1.0,)}

        def forward(self, images):
            return images.mean((1, 2, 3))[:, None] * self.scale

    class Kept(GENERATORS["procedural"]):
        def forward(self, noise, labels=None):
            drawn.append(super().forward(noise))
            return drawn[-1]

    GENERATORS["kept"] = Kept
    try:
        made = make(Known(), tiny_student(), method="best", generator="kept", candidates=3, balanced=balanced)
        made.round(0.0)
    finally:
        del GENERATORS["kept"]
    assert [len(batch) for batch in drawn] == [8, 8, 8] and made.pool.count == 8
    brightness = torch.cat(drawn).mean((1, 2, 3)).sort(descending=True).values
    kept = made.pool.bytes[:8].float().div(255).mean((1, 2, 3)).sort(descending=True).values
    torch.testing.assert_close(kept, brightness[:8], atol=0.5 / 255, rtol=0)  # bytes
    assert (made.pool.classes[:8] == 3).all() == balanced


def test_what_is_found_of_a_rare_class_counts_more():
    found = torch.tensor([[9.0, 0, 0], [8, 0, 0], [0, 0.5, 0], [0, 0.4, 0], [1, 0.3, 0]])
    shares = [9 / 18, 8 / 18, 0.5 / 1.2, 0.4 / 1.2, 1 / 18 + 0.3 / 1.2]
    assert richest(found, 5).tolist() == sorted(range(5), key=lambda image: -shares[image])
    found[:, 2] = torch.tensor([0, 0, 0, 0, 1e-6])  # as good as nothing
    assert richest(found, 2).tolist() == [0, 1]
    assert len(richest(torch.zeros(4, 3), 2)) == 2


def test_contradicting_settings_are_refused():
    for settings in ({"images": "fresh", "replay": 0.0}, {"generator": "convolutional"}):
        objectives = {"balance": 1.0} if "generator" in settings else {}
        options = {"balanced": False, "generator_objectives": objectives, **settings}
        with pytest.raises(ValueError, match="candidates is 2; several are drawn for one where"):
            make(tiny_teacher(), tiny_student(), method="best", candidates=2, **options)
    with pytest.raises(ValueError, match="balanced is True, which goes with images='pool'; images is 'fresh'"):
        make(tiny_teacher(), tiny_student(), method="dfad", balanced=True)
    with pytest.raises(ValueError, match="'procedural' has nothing to learn, so generator_objectives balance would do"):
        make(tiny_teacher(), tiny_student(), method="best", generator_objectives={"balance": 1.0})
    with pytest.raises(ValueError, match="'convolutional' has nothing to minimise under method 'best'; give"):
        make(tiny_teacher(), tiny_student(), method="best", generator="convolutional")
    with pytest.raises(ValueError, match="generators is 2; several take turns only where they go on learning"):
        make(tiny_teacher(), tiny_student(), method="cmi", generators=2)
    with pytest.raises(ValueError, match="robust is True; dropped patches stay"):
        make(tiny_teacher(), tiny_student(), method="smi", robust=True)
    with pytest.raises(ValueError, match=r"keep_patches is 0\.24 and jitter 0\.2"):
        distill(*vits(), method="smi", jitter=0.2, steps=2, **SMALL)
    with pytest.raises(ValueError, match="goes with restart='round'"):
        distill(*vits(), method="smi", restart="never", steps=2, **SMALL)
    with pytest.raises(ValueError, match="noisy generator makes images of a class: set conditional=True"):
        distill(*vits(), method="nayer", conditional=False, steps=2, **SMALL)


def test_pixels_stay_within_what_an_image_can_be():
    spec = ImageSpec(SIZE, SIZE, (0.5,), (0.1,))
    pixels = GENERATORS["pixels"](spec, GeneratorSettings(batch_size=4))
    images = pixels(torch.zeros(4, 8))
    assert images.std().item() == pytest.approx(1, abs=0.2)
    with torch.no_grad():
        pixels.images.fill_(100)
    torch.testing.assert_close(pixels.pixels(pixels(torch.zeros(2, 8))), torch.ones(2, 1, SIZE, SIZE))
    pixels(torch.zeros(9, 8)).sum().backward()  # more than it has: they come again
    torch.testing.assert_close(pixels.images.grad[:, 0, 0, 0], torch.tensor([3.0, 2.0, 2.0, 2.0]))


def test_a_deeper_teacher_is_dropped_on_its_last_block():
    made = make(vit(16, 3, seed=0), vit(8, 1, seed=1), method="smi")
    assert made.patches is not None and made.pair.followed[-1] == 2


class Fixed(Pixels):
    """A pretrained generator, of which nothing learns."""

    def __init__(self, spec, settings):
        super().__init__(spec, settings)
        self.net = nn.Linear(settings.latent, SIZE * SIZE)
        self.requires_grad_(False)

    def forward(self, noise, labels=None):
        return self.normalise(self.net(noise).sigmoid().view(-1, 1, SIZE, SIZE))

    def restart(self):
        pass


def test_noise_can_learn_where_a_generator_cannot(monkeypatch):
    monkeypatch.setitem(GENERATORS, "fixed", Fixed)
    made = make(tiny_teacher(), tiny_student(), method="cmi", generator="fixed", restart="never")
    assert made.learner is not None
    made.round(0.0)
    first = made.images
    made.round(0.0)
    assert made.images.std(0).max() > 0 and not torch.equal(first, made.images)
    with pytest.raises(ValueError, match="learn_latent is True, but nothing says"):
        make(tiny_teacher(), tiny_student(), method="best", generator="fixed", learn_latent=True)


def test_several_generators_are_to_learn():
    with pytest.raises(ValueError, match="several would make the same images"):
        make(tiny_teacher(), tiny_student(), method="best", generators=2)


def test_dropped_patches_have_no_mirror_image():
    with pytest.raises(ValueError, match="attention_consistency compares all patches"):
        make(*vits(), method="smi", generator_steps=20, generator_objectives={"attention_consistency": 1.0})


@pytest.mark.parametrize(
    "method, learn_latent, message",
    [
        ("fast", False, "restart is 'meta', and generator 'procedural' has no weights to start from"),
        ("psaq", True, "learn_latent is True, but generator 'procedural' takes nothing from the noise"),
    ],
)
def test_what_a_drawing_cannot_learn_is_refused(method, learn_latent, message):
    with pytest.raises(ValueError, match=message):
        make(*vits(), method=method, generator="procedural", learn_latent=learn_latent)


def test_what_is_set_in_vain_is_noted():
    networks, vain = (tiny_teacher(), tiny_student()), {"robust": True, "restart": "round", "generator_lr": 0.1}
    notes = make(*networks, method="best", **vain).pair.notes
    for name in ("robust", "restart", "generator_lr"):
        assert f"{name} is off: the generator does not learn" in notes
    notes = make(*networks, method="best", replay=0.5, latent_lr=0.1).pair.notes
    assert "replay is off: it goes with images='fresh'; images is 'pool'" in notes
    assert "latent_lr is off: learn_latent is False" in notes
    for method in ("adversarial", "cmi"):
        assert not [note for note in make(*vits(), method=method, robust=True).pair.notes if "robust" in note]
    with pytest.raises(ValueError, match=r"images is 'round', .* generator 'procedural' learns nothing; set"):
        make(*networks, method="best", images="round", candidates=1, balanced=False)
