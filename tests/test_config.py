"""Config: one name for each setting everywhere, wrong values refused with what would be right."""

import json
from pathlib import Path

import pytest

from vitkd_fast.config import Config


def test_round_trip_through_json():
    config = Config(steps=7, out="runs/x", image_size=(8, 6), mean=(0.1, 0.2, 0.3), student_loss="kl", temperature=4.0)
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
        ("balance", -1),
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


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(TypeError, match="no argument 'batchsize'; did you mean batch_size"):
        Config.of({"batchsize": 3})
    with pytest.raises(TypeError, match="no argument 'zzz'; accepted: steps, "):
        Config.of({"zzz": 3})


def test_temperature_needs_a_loss_that_uses_it():
    with pytest.raises(ValueError, match="set student_loss or disagreement to kl"):
        Config(temperature=2.0)
    assert Config(temperature=2.0, student_loss="kl").temperature == 2
