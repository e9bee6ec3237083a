"""Classes by their names: what annotations and a detector call the same is the same, whatever its number."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("scipy")

from vitkd_fast.class_names import name_classes, names_of
from vitkd_fast.detection.names import as_named
from vitkd_fast.detection.objects import Objects
from vitkd_fast.detection.scenes import Scenes


def named(*names):
    model = nn.Module()
    model.config = SimpleNamespace(id2label=dict(enumerate(names)), label2id={})
    return model


def scenes(*classes):
    """One image with an object of each class."""
    boxes = torch.rand(len(classes), 4, generator=torch.Generator().manual_seed(0))
    return Scenes(torch.zeros(1, 1, 4, 4).byte(), [Objects(boxes, torch.arange(len(classes)))], classes, [(4, 4)])


def test_the_same_name_is_the_same_class():
    given = scenes("bird", "Traffic_Light", "cat")
    found, note = as_named(given, ["N/A", "cat", "dog", "traffic light", "bird", "N/A"])
    assert found.objects[0].labels.tolist() == [4, 3, 1] and note is None
    assert torch.equal(found.objects[0].boxes, given.objects[0].boxes)
    assert given.objects[0].labels.tolist() == [0, 1, 2]


def test_objects_that_the_teacher_has_no_class_for_are_left_out_with_a_note():
    given = scenes("truck", "cat", "animals")
    found, note = as_named(given, ["dog", "cat"])
    assert found.objects[0].labels.tolist() == [1] and torch.equal(found.objects[0].boxes, given.objects[0].boxes[1:2])
    assert note == "evaluate: the teacher has no class truck, animals; objects of it are left out"


@pytest.mark.parametrize("names", [None, ["LABEL_0", "LABEL_1"]])
def test_where_one_side_has_no_names_the_order_counts_with_a_note(names):
    given = scenes("cat", "dog")
    found, note = as_named(given, names)
    assert found is given and note == "evaluate: classes are taken in their order, label 0 is 'cat' and so on"


def test_names_that_have_nothing_in_common_are_refused():
    with pytest.raises(ValueError, match=r"evaluate has classes cat, dog, and the teacher one, two: none is the same"):
        as_named(scenes("cat", "dog"), ["one", "two"])


def test_crowds_are_named_as_objects_are():
    given = scenes("truck", "cat")
    given.crowds = given.objects
    found, _ = as_named(given, ["dog", "cat"])
    assert found.crowds[0].labels.tolist() == [1]


def test_no_classes_are_no_names():
    assert as_named(scenes(), ["cat"])[1] is None


def test_names_of_models():
    assert names_of(named("cat", "dog")) == ["cat", "dog"]
    assert names_of(named("LABEL_0", "LABEL_1")) is None
    assert names_of(nn.Linear(1, 1)) is None
    read_as_it_is = named("cat", "dog")
    read_as_it_is.config.id2label = {"0": "cat", "1": "dog"}
    assert names_of(read_as_it_is) == ["cat", "dog"]


def test_a_new_student_calls_its_classes_as_its_teacher_does():
    student = named("LABEL_0", "LABEL_1")
    name_classes(named("cat", "dog"), student)
    assert student.config.id2label == {0: "cat", 1: "dog"} and student.config.label2id == {"cat": 0, "dog": 1}
    name_classes(nn.Linear(1, 1), student)
    assert student.config.id2label == {0: "cat", 1: "dog"}
    assert name_classes(named("cat", "dog"), student) is None


def test_a_student_with_other_names_is_told_the_teachers():
    student = named("dog", "cat")
    assert "in the teacher's order" in name_classes(named("cat", "dog"), student)
    assert student.config.id2label == {0: "cat", 1: "dog"}
