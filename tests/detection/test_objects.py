"""Objects: sound ones pass, others are refused by name and number, and clipping keeps what is inside."""

import pytest
import torch

from vitkd_fast.detection.objects import Objects, clipped, no_objects


def objects(*boxes, labels=None, scores=None):
    labels = [0] * len(boxes) if labels is None else labels
    return Objects(
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        None if scores is None else torch.tensor(scores),
    )


def test_sound_objects_pass_and_none_is_sound():
    some = objects((0.5, 0.5, 0.2, 0.0), (1.0, 0.0, 3.0, 0.5), labels=[0, 2], scores=[0.5, 1.0])
    assert some.checked(3) is some and len(some) == 2
    assert len(no_objects().checked(1)) == len(no_objects().checked()) == 0
    assert len(clipped(no_objects())) == 0 and no_objects().corners(4, 4).shape == (0, 4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (objects((0, 0, 1, 1), labels=[3]), r"1 of 1 labels .* number 0, 3; accepted: 0 to 2\."),
        (objects((0, 0, 1, 1), (0, 0, 1, 1), labels=[0, -1]), r"1 of 2 labels .* number 1, -1; accepted: 0 to 2\."),
        (objects((0, 0, 1, 1), (0, 0, -1, 1), (0, 0, 1, -1)), r"2 of 3 boxes .* number 1, .*no negative size"),
        (objects((0, 0, 1, float("nan"))), r"1 of 1 boxes .*nan.*accepted: finite numbers"),
        (objects((0, 0, 1, float("inf"))), r"1 of 1 boxes .*inf.*accepted: finite numbers"),
        (objects((0, 0, 1, 1), scores=[float("nan")]), r"1 of 1 scores .*accepted: finite numbers"),
        (Objects(torch.zeros(4), torch.zeros(1)), r"boxes are \(4,\), float32; accepted: \(n, 4\)"),
        (Objects(torch.zeros(1, 4).long(), torch.zeros(1).long()), r"boxes are \(1, 4\), int64; accepted"),
        (
            Objects(torch.zeros(2, 4), torch.zeros(1).long()),
            r"labels are \(1,\), int64 beside 2 boxes; .*\(2,\), int64",
        ),
        (Objects(torch.zeros(1, 4), torch.zeros(1)), r"labels are \(1,\), float32"),
        (Objects(torch.zeros(1, 4), torch.zeros(1).long(), torch.zeros(2)), r"scores are \(2,\), float32 beside 1"),
    ],
)
def test_what_is_not_sound_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        bad.checked(3)


def test_without_a_number_of_classes_only_negative_labels_are_refused():
    objects((0, 0, 1, 1), labels=[1000]).checked()
    with pytest.raises(ValueError, match=r"labels .*accepted: 0 or more"):
        objects((0, 0, 1, 1), labels=[-1]).checked()


def test_clipping_keeps_what_is_inside():
    some = objects(
        (0.3, 0.7, 0.1, 0.2),  # inside
        (0.9, 0.5, 0.4, 0.2),  # 0.7 to 1.1
        (1.5, 0.5, 0.2, 0.2),  # outside
        (0.5, 0.5, 3.0, 3.0),  # all around
        (1.1, 0.5, 0.2, 0.2),  # touches from outside
        (0.5, 0.5, 0.2, 0.0),  # empty
        (0.9, 0.9, 0.2, 0.2),  # touches from inside
        labels=[0, 1, 2, 3, 4, 5, 6],
        scores=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
    )
    kept = clipped(some)
    assert kept.labels.tolist() == [0, 1, 3, 6]
    torch.testing.assert_close(kept.scores, torch.tensor([0.1, 0.2, 0.4, 0.7]))
    expected = [(0.3, 0.7, 0.1, 0.2), (0.85, 0.5, 0.3, 0.2), (0.5, 0.5, 1, 1), (0.9, 0.9, 0.2, 0.2)]
    torch.testing.assert_close(kept.boxes, torch.tensor(expected))
    assert kept.boxes[0].equal(some.boxes[0])
    assert clipped(objects((0.5, 0.5, 1, 1))).scores is None


def test_corners_are_in_pixels():
    assert objects((0.5, 0.25, 0.5, 0.5)).corners(100, 200).tolist() == [[50, 0, 150, 50]]


def test_picking_and_moving_take_all_along():
    some = objects((0.1, 0, 1, 1), (0.2, 0, 1, 1), labels=[0, 1], scores=[0.3, 0.4])
    last = some[torch.tensor([False, True])].to("cpu")
    assert last.labels.tolist() == [1] and last.boxes.equal(some.boxes[1:]) and last.scores.equal(some.scores[1:])
    assert objects((0.1, 0, 1, 1)).to("cpu").scores is None
