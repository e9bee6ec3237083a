"""Models: what a teacher says of its images; names and checkpoints; never a teacher with random weights."""

import pytest
import torch
from tiny import TinyNet, same, state
from torch import nn

from vitkd_fast.config import Config
from vitkd_fast.generator import ImageSpec
from vitkd_fast.models import (
    create_student,
    default_device,
    device_of,
    forward,
    frozen,
    image_spec,
    load_teacher,
    normalisation_note,
)

timm = pytest.importorskip("timm")
TEST_VIT = "test_vit"  # timm's own 0.37 M parameter ViT for tests, 160×160


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return timm.create_model(TEST_VIT, num_classes=7, in_chans=1, img_size=32).eval()


def load(path, **options):
    return load_teacher(TEST_VIT, Config(teacher_checkpoint=path, image_size=(32, 32), **options))


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_are_unwrapped_and_say_classes_and_channels(trained, tmp_path, wrap, prefix):
    weights = {prefix + key: tensor for key, tensor in trained.state_dict().items()}
    torch.save({wrap: weights, "epoch": 3} if wrap else weights, tmp_path / "teacher.pt")
    teacher = load(tmp_path / "teacher.pt")
    assert same(state(teacher), state(trained))
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(teacher.eval()(images), trained(images))


def test_safetensors(trained, tmp_path):
    from safetensors.torch import save_file

    save_file(trained.state_dict(), tmp_path / "teacher.safetensors")
    assert same(state(load(tmp_path / "teacher.safetensors")), state(trained))


def test_keys_that_do_not_fit_are_named(trained, tmp_path):
    weights = trained.state_dict()
    weights["stray.weight"] = weights.pop("norm.weight")
    torch.save(weights, tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"missing: norm\.weight; unexpected: stray\.weight"):
        load(tmp_path / "teacher.pt")


def test_another_image_size_is_explained(trained, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"pos_embed .*Pass image_size="):
        load_teacher(TEST_VIT, Config(teacher_checkpoint=tmp_path / "teacher.pt"))


def test_a_pickle_is_not_run(tmp_path):
    torch.save(TinyNet(4), tmp_path / "module.pt")
    with pytest.raises(ValueError, match="cannot be loaded safely"):
        load(tmp_path / "module.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot be loaded safely"):
        load(tmp_path / "broken.safetensors")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="holds no state_dict"):
        load(tmp_path / "empty.pt")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load(tmp_path / "absent.pt")


def test_a_teacher_without_weights_is_an_error(monkeypatch):
    unweighted = next(name for name in timm.list_models("vit_*") if not timm.is_model_pretrained(name))
    with pytest.raises(RuntimeError, match=f"No pretrained weights for teacher '{unweighted}'"):
        load_teacher(unweighted, Config())

    def no_network(*args, **kwargs):
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(RuntimeError, match=r"hub cannot be reached\. Pass teacher_checkpoint="):
        load_teacher("vit_tiny_patch16_224", Config())


def test_wrong_teachers_and_students():
    with pytest.raises(ValueError, match="did you mean vit_tiny_patch16_"):
        load_teacher("vit_tiny_patch16", Config())
    with pytest.raises(TypeError, match="teacher is a int; accepted: an nn"):
        load_teacher(3, Config())
    with pytest.raises(ValueError, match="goes with a teacher given by name"):
        load_teacher(TinyNet(4), Config(teacher_checkpoint="x.pt"))


def test_a_student_by_name_takes_the_teachers_images_and_classes():
    spec = ImageSpec(32, 48, (0.5,), (0.5,))
    for name in (TEST_VIT, "test_resnet"):
        assert create_student(name, spec, 7)(torch.randn(2, 1, 32, 48)).shape == (2, 7)


def test_image_spec_is_read_from_the_teacher():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), depth=1)
    assert image_spec(vit, Config()) == ImageSpec(32, 48, (0.5,) * 3, (0.5,) * 3)
    resnet = timm.create_model("test_resnet")
    assert image_spec(resnet, Config()).mean == resnet.pretrained_cfg["mean"]
    assert image_spec(TinyNet(4), Config()) == ImageSpec(8, 8, (0.5,), (0.25,))
    grey = timm.create_model("test_resnet", in_chans=1)
    assert image_spec(grey, Config()).mean == pytest.approx((sum(resnet.pretrained_cfg["mean"]) / 3,))


def test_what_a_module_says_of_its_channels_counts_more_than_a_convolution_in_it():
    inner = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(2, 8, 3))  # called in another order
    inner.pretrained_cfg = {"input_size": (2, 8, 8), "mean": (0.5,), "std": (0.5,)}
    assert image_spec(inner, Config()).channels == 2


def test_channels_of_models_that_make_channels_of_pixels(tmp_path):
    model = timm.create_model("tresnet_m", num_classes=3)
    assert image_spec(model, Config(image_size=(64, 64))).channels == 3
    torch.save(timm.create_model("tresnet_m", num_classes=3, in_chans=1).state_dict(), tmp_path / "one.pt")
    loaded = load_teacher("tresnet_m", Config(teacher_checkpoint=tmp_path / "one.pt", image_size=(64, 64)))
    assert loaded(torch.zeros(1, 1, 64, 64)).shape == (1, 3)


def test_image_spec_can_be_given_and_must_be_known():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match="image_size and channels cannot be read from teacher Sequential"):
        image_spec(plain, Config())
    assert image_spec(plain, Config(image_size=(2, 2), channels=3, mean=(0.1, 0.2, 0.3), std=(0.5,))) == ImageSpec(
        2, 2, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)
    )
    with pytest.raises(ValueError, match="mean has 2 values, but the teacher's images have 3 channels"):
        image_spec(plain, Config(image_size=(2, 2), channels=3, mean=(0.1, 0.2)))


def test_forward_gives_tokens_where_there_are_any():
    vit = timm.create_model(TEST_VIT, num_classes=7, img_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    logits, tokens = forward(vit, images)
    assert torch.equal(logits, vit(images))
    assert tokens.shape == (2, 1 + (32 // 16) ** 2, vit.embed_dim)
    assert forward(timm.create_model("test_resnet").eval(), images)[1] is None
    assert forward(nn.Flatten(), images)[1] is None


def test_forward_is_the_call_of_the_model():
    """With a forward of its own and with its hooks; its tokens are those of that call."""

    class Flipped(TinyNet):
        def forward(self, images):
            return super().forward(images).flip(-1)

    images = torch.randn(2, 1, 8, 8)
    model = Flipped(4).eval()
    hooked = TinyNet(4).eval()
    hooked.load_state_dict(model.state_dict())
    plain, tokens = forward(hooked, images)
    hooked.register_forward_hook(lambda module, args, output: output.flip(-1))
    for other in (model, hooked):
        logits, seen = forward(other, images)
        assert torch.equal(logits, other(images)) and torch.equal(logits, plain.flip(-1))
        assert torch.equal(seen, tokens)
        assert "forward_features" not in vars(other)
    model.forward_features = lambda images: tokens * 2
    assert torch.equal(forward(model, images)[1], tokens * 2)
    assert "forward_features" in vars(model)


def test_features_of_a_module_and_of_a_property():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.forward_features = nn.Sequential(nn.Flatten(2), nn.Linear(64, 5))

        def forward(self, images):
            return self.forward_features(images).mean(1)

    class Property(TinyNet):
        @property
        def forward_features(self):
            return super().forward_features

    images = torch.randn(2, 1, 8, 8)
    nested = Nested()
    logits, tokens = forward(nested, images)
    assert torch.equal(tokens.mean(1), logits) and not nested.forward_features._forward_hooks
    assert forward(Property(4).eval(), images)[1] is None


def test_what_a_wrapper_says_of_itself_counts_more_than_what_is_inside():
    wrapped = nn.DataParallel(TinyNet(4))
    wrapped.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.1,), "std": (0.2,)}
    assert (image_spec(wrapped, Config()).mean, image_spec(wrapped, Config()).std) == ((0.1,), (0.2,))


def test_one_number_is_a_square_size():
    model = TinyNet(4)
    model.pretrained_cfg, model.patch_embed = None, nn.Module()
    model.patch_embed.img_size = 24
    spec = image_spec(model, Config())
    assert (spec.height, spec.width) == (24, 24)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
def test_wrapped_models_say_what_is_inside(wrap):
    model = TinyNet(4)
    assert image_spec(wrap(model), Config()) == image_spec(model, Config())
    assert image_spec(model, Config()).std == (0.25,)


def test_a_normalisation_that_nobody_knows_is_noted():
    known, unknown = TinyNet(4), TinyNet(4)
    unknown.pretrained_cfg = {"input_size": (1, 8, 8)}
    assert normalisation_note(known, Config()) is None
    assert "does not say the mean and std" in normalisation_note(unknown, Config())
    assert "does not say the std of" in normalisation_note(unknown, Config(mean=(0.5,)))
    assert normalisation_note(unknown, Config(mean=(0.5,), std=(0.5,))) is None


def test_frozen_gives_back_every_mode_and_flag_even_after_an_error():
    model = nn.Sequential(TinyNet(4), TinyNet(4)).train()
    model[0].norm.eval()
    model[1].head.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [weight.requires_grad for weight in model.parameters()]
    with pytest.raises(KeyboardInterrupt), frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(weight.requires_grad for weight in model.parameters())
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()] == flags


def test_default_device():
    assert default_device(None, "name", TinyNet(4).to("meta"), TinyNet(4)).type == "meta"
    assert default_device("cpu", TinyNet(4).to("meta")).type == "cpu"
    with pytest.raises(ValueError, match="device is 'gpu'; accepted"):
        default_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no CUDA device"):
            default_device("cuda")


def test_weights_that_are_buffers_say_the_device_too():
    exported = nn.Module()
    assert device_of(exported) is None
    exported.register_buffer("weight", torch.ones(2))
    assert device_of(exported) == torch.device("cpu")
    assert default_device(None, "a name", exported) == torch.device("cpu")
