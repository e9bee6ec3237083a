"""Config: one name for each setting everywhere, wrong values refused with what would be right."""

import json
from pathlib import Path

import pytest

from vitkd_fast.config import Config
from vitkd_fast.methods import METHODS, settings_of


def test_round_trip_through_json():
    config = Config(
        **{"steps": 7, "out": "runs/x", "image_size": (8, 6), "mean": (0.1, 0.2, 0.3), "student_loss": "kl"},
        **{"method": "dafl", "generator_objectives": {"one_hot": 0, "total_variation": 0.1}, "temperature": 4.0},
    )
    assert Config(**json.loads(json.dumps(config.to_dict()))) == config
    assert config.out == Path("runs/x")


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", 0),
        ("steps", 2.5),
        ("steps", True),
        ("batch_size", "64"),
        ("seed", -1),
        ("replay", 1.0),
        ("student_lr", 0.0),
        ("temperature", float("nan")),
        ("generator_steps", 0),
        ("generator_objectives", {"balance": -1}),
        ("student_objectives", {"tokens": float("inf")}),
        ("student_objectives", {"tokens": "1"}),
        ("student_objectives", ["tokens"]),
        ("restart", "always"),
        ("images", "old"),
        ("learn_latent", 1),
        ("generator", 3),
        ("weight_decay", -1),
        ("student_loss", "huber"),
        ("precision", "float16"),
        ("image_size", (8,)),
        ("mean", ("a",)),
        ("accelerate", 1),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .*; accepted: "):
        Config(**{name: value})


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    config = Config(seed=numpy.int64(3), student_lr=numpy.float32(0.5), balanced=numpy.bool_(False))
    assert (config.seed, config.student_lr, config.balanced) == (3, 0.5, False)
    assert json.loads(json.dumps(config.to_dict()))["seed"] == 3
    with pytest.raises(ValueError, match="steps is"):
        Config(steps=numpy.ones(2))


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(TypeError, match="no argument 'batchsize'; did you mean batch_size"):
        Config.of({"batchsize": 3})
    with pytest.raises(TypeError, match="no argument 'zzz'; accepted: steps, "):
        Config.of({"zzz": 3})


def test_the_method_decides_what_is_not_given():
    plain, given = Config(method="dafl"), Config(method="dafl", student_steps=7, shift=0.5)
    assert (plain.student_steps, plain.shift, plain.images) == (1, 0, "round")
    assert (given.student_steps, given.shift, given.images) == (7, 0.5, "round")
    assert Config().method == "best" and Config() == Config(method="best")
    decided = settings_of("dafl")
    assert {name: getattr(plain, name) for name in decided} == decided


def test_objectives_are_merged_over_the_methods():
    config = Config(method="dafl", generator_objectives={"balance": 2.0, "one_hot": 0, "total_variation": 0.1})
    expected = {"one_hot": 0, "balance": 2.0, "activation": 0.1, "total_variation": 0.1}
    assert config.generator_objectives == expected
    assert config.student_objectives == {"logits": 1.0}
    config.generator_objectives["balance"] = 9.0
    assert settings_of("dafl")["generator_objectives"]["balance"] == 5.0  # the method's own are not touched


def test_every_method_makes_a_config_and_is_repeated_by_it():
    for name in METHODS:
        config = Config(method=name)
        assert Config(**json.loads(json.dumps(config.to_dict()))) == config
        assert None not in (getattr(config, setting) for setting in settings_of(name))


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(ValueError, match="method is 'daf'; did you mean dafl"):
        Config(method="daf")
