"""Every method runs on what it is given, repeats itself, and a stranger's method, objective and generator join in."""

import importlib
import json
import math

import pytest
import torch
from tiny import SIZE, same, state, tiny_student, tiny_teacher
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitkd_fast import generator, objectives
from vitkd_fast.config import Config
from vitkd_fast.distill import distill
from vitkd_fast.generator import Generator
from vitkd_fast.methods import BASE, METHODS, Method, register, settings_of

QUICK = {"batch_size": 8, "width": 16, "latent": 8, "log_every": 6, "progress": False}
ROUND = {"generator_steps": 3, "student_steps": 4}


def vit(dim: int, depth: int, seed: int, patch_size: int = 2) -> nn.Module:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return vision_transformer.VisionTransformer(
            img_size=SIZE, patch_size=patch_size, in_chans=1, num_classes=3, embed_dim=dim, depth=depth, num_heads=2
        )


def vits() -> tuple[nn.Module, nn.Module]:
    return vit(16, 2, seed=0), vit(8, 1, seed=1)


def assert_finite(result) -> None:
    assert result.report.status == "completed" and result.report.skipped == {}
    entry = result.history[-1]
    assert all(math.isfinite(value) for value in entry.values() if isinstance(value, float)), entry
    assert all(tensor.isfinite().all() for tensor in state(result.student).values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_distils_vits_and_repeats_itself(method):
    runs = []
    for _ in range(2):
        teacher, student = vits()
        before = state(teacher)
        runs.append(distill(teacher, student, method=method, steps=9, seed=4, **ROUND, **QUICK))
        assert_finite(runs[-1])
        assert same(state(teacher), before)
        assert not [
            hook for module in teacher.modules() for hook in (module._forward_hooks, module._forward_pre_hooks) if hook
        ]
    assert same(state(runs[0].student), state(runs[1].student))
    terms = runs[0].history[-1].keys()
    off = {note.partition(" is off: ")[0] for note in runs[0].report.notes if " is off: " in note}
    off -= ROUND.keys()  # where nothing learns
    config = Config(method=method)
    assert off == {"feature_statistics"} & config.generator_objectives.keys()
    assert config.generator_objectives.keys() | config.student_objectives.keys() <= terms | off


@pytest.mark.parametrize("method", METHODS)
def test_every_method_distils_networks_that_are_no_vits(method):
    """What they lack is off, and the notes say so; this teacher has BatchNorm."""
    student = tiny_student()
    before = state(student)
    result = distill(tiny_teacher(), student, method=method, steps=9, **ROUND, **QUICK)
    assert_finite(result)
    assert not torch.equal(before["head.weight"], student.head.weight)
    config = Config(method=method)
    assert ("feature_statistics" in result.history[-1]) == ("feature_statistics" in config.generator_objectives)
    if config.keep_patches < 1:
        assert any(note.startswith("keep_patches is off: the teacher is not a ViT") for note in result.report.notes)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_in_bfloat16(method, device):
    teacher, student = (network.to(device) for network in vits())
    assert_finite(distill(teacher, student, method=method, steps=5, precision="bfloat16", **ROUND, **QUICK))


@pytest.mark.parametrize("method", METHODS)
def test_settings_in_the_report_repeat_the_run(method):
    first = distill(*vits(), method=method, steps=5, **ROUND, **QUICK)
    again = distill(*vits(), **json.loads(json.dumps(first.report.settings)))
    assert same(state(first.student), state(again.student))
    assert {name: first.report.settings[name] for name in settings_of(method)} == {
        **settings_of(method),
        **ROUND,
    }


SYNCS = ("aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default", "aten.nonzero.default")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pair", [vits, lambda: (tiny_teacher(), tiny_student())], ids=["vits", "batchnorm"])
def test_the_host_reads_nothing_within_rounds(method, pair, monkeypatch):
    reads = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if str(func) in SYNCS:
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    kd_loss = importlib.import_module("vitkd_fast.ops.kd_loss")  # vitkd_fast.ops.kd_loss is the function
    monkeypatch.setattr(kd_loss, "_is_one", lambda grad: False)  # it looks on the CPU alone
    consistency = importlib.import_module("vitkd_fast.ops.attention_consistency")
    monkeypatch.setattr(consistency, "_held", lambda saliency: True)  # and so does it
    networks = pair()  # timm reads some when it makes one
    with Watch():
        distill(*networks, method=method, steps=9, **ROUND, **{**QUICK, "log_every": 100})
    assert reads == []


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_no_method_waits_for_a_gpu_within_rounds(method):
    """Rounds begin at steps 0, 4, 8 and 12; what is set up at a first call is set up in the first of them."""
    teacher, student = (network.cuda() for network in vits())
    steps = []

    def hook(module, args):
        if module.training:
            steps.append(1)
            torch.cuda.set_sync_debug_mode("error" if 6 < len(steps) < 14 else "default")

    student.head.register_forward_pre_hook(hook)
    try:
        distill(teacher, student, method=method, steps=15, **ROUND, **{**QUICK, "log_every": 100})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 15


def test_a_method_says_where_it_is_from_and_decides_what_base_lists():
    assert METHODS.keys() == {
        *("best", "adversarial", "vitkd", "dafl", "zskt", "dfad", "cmi"),
        *("fast", "nayer", "deepinversion", "psaq", "smi", "noise"),
    }
    for method in METHODS.values():
        assert len(method.source) > 50
        assert settings_of(method.name).keys() == BASE.keys()


def test_a_wrong_method_is_refused():
    with pytest.raises(ValueError, match="sets 'steps'; a method decides generator,"):
        register(Method("wrong", "", {"steps": 3}))
    with pytest.raises(ValueError, match="there is a method 'dfad' already"):
        register(Method("dfad", ""))
    assert "wrong" not in METHODS
    with pytest.raises(ValueError, match="did you mean nayer"):
        settings_of("nayr")


def test_a_strangers_method_objective_and_generator_join_in(monkeypatch):
    for registry in (METHODS, generator.GENERATORS, objectives.GENERATOR_OBJECTIVES, objectives.STUDENT_OBJECTIVES):
        for name in ("stripes_method", "stripes", "grey", "confident"):
            monkeypatch.setitem(registry, name, None)  # put back, that is removed, after the test
            registry.pop(name)

    @generator.register("stripes")
    class Stripes(Generator):
        def __init__(self, spec, settings):
            super().__init__(spec, settings)
            self.rows = nn.Linear(settings.latent, spec.height)
            self.width = spec.width

        def forward(self, noise, labels=None):
            return self.normalise(self.rows(noise).sigmoid()[:, None, :, None].expand(-1, -1, -1, self.width))

    seen = []

    @objectives.generator_objective()
    def grey(scene):
        seen.append(scene.images.detach())
        return (scene.pair.spec.pixels(scene.images) - 0.5).square().mean()

    @objectives.student_objective()
    class confident(nn.Module):
        def __init__(self, pair):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, scene):
            return (self.scale * scene.student.logits).logsumexp(1).mean()

    register(
        Method(
            "stripes_method",
            "for this test",
            {
                "generator": "stripes",
                "generator_objectives": {"grey": 1.0},
                "student_objectives": {"logits": 1.0, "confident": 0.1},
                "generator_lr": 0.05,
            },
        )
    )
    result = distill(tiny_teacher(), tiny_student(), method="stripes_method", steps=60, student_steps=1, **QUICK)
    assert isinstance(result.generator, Stripes)
    assert len(seen) == 60
    for images in seen:
        assert torch.equal(images, images[..., :1].expand_as(images))
    assert result.history[-1]["grey"] < result.history[0]["grey"] / 2
    assert "confident" in result.history[-1]


def test_patch_entropy_is_of_all_blocks_of_the_teacher_whatever_the_student_has():
    options = {"method": "psaq", "steps": 1, "generator_objectives": {"asked": 0.0, "total_variation": 0.0}}
    values = [
        distill(vit(16, 3, seed=0), vit(8, depth, seed=1), **options, **ROUND, **QUICK).history[0]["patch_entropy"]
        for depth in (1, 3)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
