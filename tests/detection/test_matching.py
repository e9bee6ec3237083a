"""Matching: costs and overlaps against their formulas, the assignment against scipy's, image by image."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torchvision")
pytest.importorskip("scipy")

from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou, generalized_box_iou

from vitkd_fast.detection.matching import (
    CLASS,
    GIOU,
    L1,
    SEEN,
    Wanted,
    assign,
    costs,
    iou,
    match,
    pairwise_giou,
    wanted_by,
)
from vitkd_fast.detection.objects import corners_of
from vitkd_fast.objectives import View


def random_boxes(*shape):
    sides = 0.05 + 0.5 * torch.rand(*shape, 2)
    return torch.cat((sides / 2 + (1 - sides) * torch.rand(*shape, 2), sides), -1)


def random_view(batch, queries, classes, seed=0, spread=3.0):
    torch.manual_seed(seed)
    return View(spread * torch.randn(batch, queries, classes + 1), boxes=random_boxes(batch, queries))


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8), st.integers(0, 10**6), st.sampled_from((0.0, 0.6, 1.0)))
def test_each_image_is_assigned_as_scipy_would(batch, queries, objects, seed, share):
    torch.manual_seed(seed)
    cost, valid = torch.randn(batch, queries, objects), torch.rand(batch, objects) < share
    chosen, found = assign(cost, valid)
    assert chosen.shape == found.shape == (batch, objects)
    assert chosen.dtype == torch.int64 and found.dtype == torch.bool
    for image in range(batch):
        columns = valid[image].nonzero()[:, 0]
        rows, picked = linear_sum_assignment(cost[image][:, columns].numpy())
        expected = {int(columns[column]): int(row) for row, column in zip(rows, picked)}
        assert {column: int(chosen[image, column]) for column in found[image].nonzero()[:, 0].tolist()} == expected


def test_each_found_object_has_a_query_of_its_own():
    torch.manual_seed(0)
    cost = torch.randn(8, 12, 9) + 10 * torch.randn(8, 12, 1)  # all objects like the same queries
    valid = torch.rand(8, 9) < 0.8
    queries, found = assign(cost, valid)
    assert torch.equal(found, valid)
    for image in range(8):
        own = queries[image][found[image]]
        assert len(own.unique()) == len(own) > 0


def test_where_objects_outnumber_queries_the_cheapest_are_found():
    cost = torch.tensor([[[3.0, 1.0, 2.0, -9.0], [3.0, 2.0, 0.0, -9.0]]])
    queries, found = assign(cost, torch.tensor([[True, True, True, False]]))
    assert found.tolist() == [[False, True, True, False]]
    assert queries.tolist() == [[0, 0, 1, 0]]


def test_with_no_object_at_all_nothing_is_found():
    queries, found = assign(torch.randn(3, 4, 5), torch.zeros(3, 5, dtype=torch.bool))
    assert not found.any() and not queries.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_costs_that_are_not_finite_do_not_raise(bad):
    cost = torch.zeros(2, 4, 3)
    cost[0] = bad
    cost[1, 1, 2] = bad
    queries, found = assign(cost, torch.ones(2, 3, dtype=torch.bool))
    assert found.all() and all(len(row.unique()) == 3 for row in queries)


def test_a_query_of_infinite_cost_is_avoided():
    cost = torch.zeros(1, 3, 2)
    cost[0, 0] = math.inf
    queries, _ = assign(cost, torch.ones(1, 2, dtype=torch.bool))
    assert set(queries[0].tolist()) == {1, 2}


def test_overlaps_are_torchvisions():
    torch.manual_seed(0)
    first, second = random_boxes(3, 7), random_boxes(3, 5)
    giou = pairwise_giou(first, second)
    assert giou.shape == (3, 7, 5)
    for image in range(3):
        one, other = corners_of(first[image]), corners_of(second[image])
        torch.testing.assert_close(giou[image], generalized_box_iou(one, other), atol=1e-5, rtol=0)
        torch.testing.assert_close(iou(first[image, :5], second[image]), box_iou(one[:5], other).diagonal())


def test_overlaps_at_their_ends():
    box, apart = torch.tensor([0.2, 0.2, 0.2, 0.2]), torch.tensor([0.8, 0.8, 0.2, 0.2])
    inside, empty = torch.tensor([0.2, 0.2, 0.1, 0.1]), torch.tensor([0.2, 0.2, 0.0, 0.0])
    assert iou(box, box).item() == pytest.approx(1)
    assert iou(box, apart).item() == 0
    assert iou(box, inside).item() == pytest.approx(0.25)
    assert iou(empty, empty).item() == 0
    giou = pairwise_giou(box[None, None], torch.stack((box, apart, inside))[None])[0, 0]
    torch.testing.assert_close(giou, torch.tensor([1.0, 0.08 / 0.64 - 1, 0.25]))


def test_the_surest_queries_are_wanted_as_the_teacher_sees_them():
    view = random_view(4, 9, 3)
    classes = view.logits.softmax(-1)
    wanted = wanted_by(view, 4)
    assert wanted.classes.shape == (4, 4, 4) and wanted.boxes.shape == (4, 4, 4)
    for image in range(4):
        order = (1 - classes[image, :, -1]).argsort(descending=True)[:4]
        torch.testing.assert_close(wanted.classes[image], classes[image, order])
        assert torch.equal(wanted.boxes[image], view.boxes[image, order])
        torch.testing.assert_close(wanted.sureness[image], 1 - classes[image, order, -1])


def test_no_more_is_wanted_than_the_teacher_has_queries():
    assert wanted_by(random_view(2, 3, 2), 100).boxes.shape == (2, 3, 4)


def test_costs_follow_their_formula():
    student, teacher = random_view(2, 5, 3, seed=1), random_view(2, 4, 3, seed=2)
    wanted = wanted_by(teacher, 4)
    classes = student.logits.softmax(-1)
    found = costs(classes, student.boxes, wanted)
    for image in range(2):
        giou = generalized_box_iou(corners_of(student.boxes[image]), corners_of(wanted.boxes[image]))
        for query in range(5):
            for thing in range(4):
                alike = sum(float(classes[image, query, c] * wanted.classes[image, thing, c]) for c in range(3))
                apart = sum(
                    float((student.boxes[image, query, i] - wanted.boxes[image, thing, i]).abs()) for i in range(4)
                )
                expected = -CLASS * alike + L1 * apart + GIOU * (1 - float(giou[query, thing]))
                assert found[image, query, thing].item() == pytest.approx(expected, abs=1e-4)


def test_a_student_that_finds_the_same_elsewhere_in_its_queries_is_matched_one_to_one():
    teacher = random_view(6, 8, 3)
    teacher.logits[..., -1] = -9  # sure of all
    order = torch.stack([torch.randperm(8) for _ in range(6)])
    rows = torch.arange(6)[:, None]
    student = View(teacher.logits[rows, order], boxes=teacher.boxes[rows, order])
    matched = match(student, wanted_by(teacher, 8))
    assert matched.found.all()
    assert torch.equal(matched.of_queries(matched.boxes), matched.wanted.boxes)


def test_what_the_teacher_hardly_sees_is_not_looked_for():
    sureness = torch.tensor([0.9, 2 * SEEN, SEEN / 2])
    classes = torch.stack((sureness, 1 - sureness), -1)[None]
    matched = match(random_view(1, 6, 1), Wanted(classes, random_boxes(1, 3)))
    assert matched.found.tolist() == [[True, True, False]]


def test_where_the_student_has_fewer_queries_the_surest_have_them():
    """Whatever it costs: one that is hardly there, right where a query is, must not take it from one that surely is."""
    sureness = torch.tensor([0.06, 0.99, 0.06, 0.5])
    far, near = torch.tensor([0.9, 0.9, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.1, 0.1])
    wanted = Wanted(torch.stack((sureness, 1 - sureness), -1)[None], torch.stack((near, far, near, far))[None])
    student = View(torch.zeros(1, 2, 2), boxes=torch.stack((near, near))[None])
    matched = match(student, wanted)
    assert matched.found.tolist() == [[False, True, False, True]]
    assert match(View(torch.zeros(1, 5, 2), boxes=random_boxes(1, 5)), wanted).found.all()


def test_wanted_of_any_class():
    wanted = wanted_by(random_view(2, 5, 3), 4)
    anything = wanted.of_any_class()
    assert anything.classes.shape == (2, 4, 2) and torch.equal(anything.boxes, wanted.boxes)
    torch.testing.assert_close(anything.sureness, wanted.sureness)


def test_matching_leaves_gradients_on_both_sides():
    student, teacher = random_view(2, 5, 3, seed=1), random_view(2, 5, 3, seed=2)
    for part in (student.logits, student.boxes, teacher.logits, teacher.boxes):
        part.requires_grad_()
    matched = match(student, wanted_by(teacher, 3))
    assert not matched.queries.requires_grad
    for part in (matched.log_p, matched.boxes, matched.wanted.classes, matched.wanted.boxes):
        assert part.requires_grad


def test_half_precision_is_matched_too():
    student, teacher = random_view(2, 5, 3, seed=1), random_view(2, 5, 3, seed=2)
    halves = [View(view.logits.bfloat16(), boxes=view.boxes.bfloat16()) for view in (student, teacher)]
    with torch.autocast("cpu", torch.bfloat16):
        matched = match(halves[0], wanted_by(halves[1], 3))
    assert matched.found.any() and matched.log_p.dtype == matched.boxes.dtype == torch.float32
