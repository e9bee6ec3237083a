"""The set losses: each against a plain loop, at their ends, and where their gradients go."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("scipy")

from vitkd_fast.detection import objectives
from vitkd_fast.detection.matching import Matched, Wanted, match, wanted_by
from vitkd_fast.detection.set_losses import BACKGROUND, boxes_loss, classes_loss, covering, covering_loss, giou_loss
from vitkd_fast.objectives import GENERATOR_OBJECTIVES, STUDENT_OBJECTIVES, Scene, View

LOSSES = (classes_loss, boxes_loss, giou_loss)


def random_boxes(*shape):
    sides = 0.05 + 0.5 * torch.rand(*shape, 2)
    return torch.cat((sides / 2 + (1 - sides) * torch.rand(*shape, 2), sides), -1)


def random_view(batch, queries, classes, seed):
    torch.manual_seed(seed)
    return View(3 * torch.randn(batch, queries, classes + 1), boxes=random_boxes(batch, queries))


def random_matched(seed, queries=7, objects=5):
    return match(random_view(3, queries, 4, seed), wanted_by(random_view(3, objects, 4, seed + 1000), objects))


def loops(matched):
    """All three, one query and one object at a time."""
    wanted, log_p = matched.wanted, matched.log_p.tolist()
    of_classes = weights = distance = lost = surenesses = 0.0
    for image, rows in enumerate(log_p):
        answers = {}
        for thing, found in enumerate(matched.found[image].tolist()):
            if found:
                answers[int(matched.queries[image, thing])] = thing
        for query, row in enumerate(rows):
            if query not in answers:
                of_classes += BACKGROUND * -row[-1]
                weights += BACKGROUND
                continue
            p = wanted.classes[image, answers[query]].tolist()
            sureness = 1 - p[-1]
            weight = BACKGROUND + (1 - BACKGROUND) * sureness
            of_classes += weight * sum(a * (math.log(a) - b) for a, b in zip(p, row) if a > 0)
            weights += weight
            mine, its = matched.boxes[image, query].tolist(), wanted.boxes[image, answers[query]].tolist()
            distance += sureness * sum(abs(a - b) for a, b in zip(mine, its))
            lost += sureness * (1 - giou(mine, its))
            surenesses += sureness
    return of_classes / weights, distance / max(surenesses, 1), lost / max(surenesses, 1)


def giou(first, second):
    across, down = ([(box[i] - box[i + 2] / 2, box[i] + box[i + 2] / 2) for box in (first, second)] for i in (0, 1))
    both = around = 1.0
    for (low, high), (its_low, its_high) in (across, down):
        both *= max(0, min(high, its_high) - max(low, its_low))
        around *= max(high, its_high) - min(low, its_low)
    union = first[2] * first[3] + second[2] * second[3] - both
    return both / union - (around - union) / around


def in_float64(matched):
    wanted = Wanted(matched.wanted.classes.double(), matched.wanted.boxes.double())
    return replace(matched, wanted=wanted, log_p=matched.log_p.double(), boxes=matched.boxes.double())


@pytest.mark.parametrize("objects", [1, 5, 12])
@pytest.mark.parametrize("seed", range(4))
def test_losses_follow_their_formulas(seed, objects):
    matched = random_matched(seed, objects=objects)
    for loss, expected in zip(LOSSES, loops(matched)):
        assert loss(matched).item() == pytest.approx(expected, rel=1e-4), loss.__name__


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_the_losses_slopes(loss):
    matched = in_float64(random_matched(5, queries=4, objects=3))
    inputs = [matched.log_p, matched.boxes, matched.wanted.classes, matched.wanted.boxes]

    def of(log_p, boxes, classes, wanted_boxes):
        return loss(replace(matched, wanted=Wanted(classes, wanted_boxes), log_p=log_p, boxes=boxes))

    assert torch.autograd.gradcheck(of, [part.clone().requires_grad_() for part in inputs])


def test_a_perfect_student_loses_nothing():
    teacher = random_view(3, 6, 4, seed=0)
    teacher.logits[:, :3, -1] = 40  # nothing there
    teacher.logits[:, 3:, 0] = 40  # certain
    matched = match(View(teacher.logits.flip(1), boxes=teacher.boxes.flip(1)), wanted_by(teacher, 6))
    assert matched.found.sum() == 9
    for loss in LOSSES:
        assert loss(matched).item() == pytest.approx(0, abs=1e-5), loss.__name__


def test_a_worse_student_loses_more():
    teacher = random_view(8, 6, 4, seed=0)
    noise = torch.randn(8, 6, 5), torch.rand(8, 6, 4) - 0.5
    values = []
    for strength in (0.0, 0.1, 0.5):
        logits = teacher.logits + 10 * strength * noise[0]
        boxes = (teacher.boxes + strength * noise[1]).clamp(0.01, 1)
        matched = match(View(logits, boxes=boxes), wanted_by(teacher, 6))
        values.append([loss(matched).item() for loss in LOSSES])
    assert all(first < second < third for first, second, third in zip(*values))


def test_where_there_is_nothing_only_finding_nothing_is_asked():
    student, teacher = random_view(2, 5, 3, seed=0), random_view(2, 5, 3, seed=1)
    teacher.logits[..., -1] = 30
    student.logits.requires_grad_()
    student.boxes.requires_grad_()
    matched = match(student, wanted_by(teacher, 5))
    assert not matched.found.any()
    of_classes, of_boxes, of_overlap = (loss(matched) for loss in LOSSES)
    torch.testing.assert_close(of_classes, -matched.log_p[..., -1].mean())
    assert of_boxes == 0 and of_overlap == 0
    (of_classes + of_boxes + of_overlap).backward()
    assert (student.logits.grad[..., -1] < 0).all() and not student.boxes.grad.any()


def test_an_object_counts_as_much_as_the_teacher_is_sure_of_it():
    sureness = torch.tensor([[0.9, 0.3]])
    classes = torch.stack((sureness, 1 - sureness), -1)
    boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]]])
    there = torch.ones(1, 2, dtype=torch.bool)
    queries = torch.tensor([[0, 1]])
    values = []
    for moved in range(2):
        mine = boxes.clone()
        mine[0, moved, 0] += 0.1
        values.append(boxes_loss(Matched(Wanted(classes, boxes), queries, there, classes.log(), mine)).item())
    assert values == pytest.approx([0.9 * 0.1 / 1.2, 0.3 * 0.1 / 1.2])


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_students_queries_changes_nothing(seed):
    student, teacher = random_view(4, 7, 3, seed), random_view(4, 5, 3, seed + 100)
    order = torch.randperm(7)
    shuffled = View(student.logits[:, order], boxes=student.boxes[:, order])
    for loss in LOSSES:
        torch.testing.assert_close(
            loss(match(shuffled, wanted_by(teacher, 5))), loss(match(student, wanted_by(teacher, 5)))
        )


@pytest.mark.parametrize("sure_of", [0, -1])
def test_gradients_stay_finite_where_probabilities_end_at_zero(sure_of):
    student, teacher = random_view(2, 4, 3, seed=0), random_view(2, 4, 3, seed=1)
    for view in (student, teacher):
        view.logits.fill_(-200)[..., sure_of] = 200
        view.boxes[..., 2:] = 0
        view.logits.requires_grad_()
        view.boxes.requires_grad_()
    matched = match(student, wanted_by(teacher, 3))
    sum(loss(matched) for loss in LOSSES).backward()
    for view in (student, teacher):
        assert view.logits.grad.isfinite().all()
        assert view.boxes.grad is None or view.boxes.grad.isfinite().all()


def scene(student, teacher):
    return Scene(torch.zeros(len(teacher.logits), 1, 8, 8), teacher, student, None, None)


def test_the_students_objectives_are_the_losses_of_one_match():
    student, teacher = random_view(3, 6, 4, seed=0), random_view(3, 5, 4, seed=1)
    both = scene(student, teacher)
    matched = match(student, wanted_by(teacher, 100))
    for name, loss in zip(("found", "placed", "overlap"), LOSSES):
        torch.testing.assert_close(STUDENT_OBJECTIVES[name].function(both), loss(matched))
    assert objectives.matched(both) is objectives.matched(both)


def test_unlike_is_minus_the_distance_and_reaches_both_networks():
    student, teacher = random_view(3, 6, 4, seed=0), random_view(3, 5, 4, seed=1)
    parts = [student.logits, student.boxes, teacher.logits, teacher.boxes]
    for part in parts:
        part.requires_grad_()
    value = GENERATOR_OBJECTIVES["unlike"].function(scene(student, teacher))
    of_classes, distance, lost = loops(match(student, wanted_by(teacher, 5)))
    assert value.item() == pytest.approx(-(of_classes + 5 * distance + 2 * lost), rel=1e-4)
    value.backward()
    assert all(part.grad.isfinite().all() and part.grad.any() for part in parts)


def test_sure_falls_as_the_teacher_comes_to_know_what_it_sees():
    teacher = random_view(3, 6, 4, seed=0)
    sure = GENERATOR_OBJECTIVES["sure"].function
    values = [
        sure(
            scene(None, View(scale * teacher.logits - torch.tensor([0, 0, 0, 0, nothing]), boxes=teacher.boxes))
        ).item()
        for scale, nothing in ((0.1, -9.0), (0.1, 9.0), (9.0, 99.0))
    ]
    assert values[0] > values[1] > values[2] > -1e-6
    assert values[2] < 0.2


def test_a_teacher_that_sees_nothing_is_drawn_towards_something():
    logits = torch.tensor([[[0.0, 1.0, 40.0]]], requires_grad=True)
    GENERATOR_OBJECTIVES["sure"].function(scene(None, View(logits, boxes=torch.rand(1, 1, 4)))).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[[0.0, -1.0, 1.0]]]))


def test_what_is_drawn_to_be_asked_for_is_inside_and_of_all_kinds():
    torch.manual_seed(0)
    asked = objectives.drawn(500, 3, torch.device("cpu"))
    assert asked.classes.shape == (500, objectives.ASKED, 4)
    assert asked.boxes.shape == (500, objectives.ASKED, 4)
    assert (asked.classes.sum(-1) == 1).all() and set(asked.classes.unique().tolist()) == {0, 1}
    counts = asked.sureness.sum(1)
    assert set(counts.tolist()) == {1, 2, 3, 4}
    assert (asked.classes[..., :-1].sum((0, 1)) > 300).all()
    centres, sides = asked.boxes.split(2, -1)
    assert sides.min() >= 0.1 and sides.max() <= 0.5
    assert (centres - sides / 2).min() >= -1e-6 and (centres + sides / 2).max() <= 1 + 1e-6


def test_objects_asks_the_same_for_all_steps_of_a_round():
    teacher = random_view(3, 6, 4, seed=0)
    term = GENERATOR_OBJECTIVES["objects"].function(type("Pair", (), {"classes": 4}))
    first, again = (term(scene(None, teacher)) for _ in range(2))
    assert first == again and first > 0
    term.end_round()
    assert term(scene(None, teacher)) != first


def test_objects_is_least_where_the_teacher_finds_what_is_asked():
    term = GENERATOR_OBJECTIVES["objects"].function(type("Pair", (), {"classes": 4}))
    term(scene(None, random_view(3, 6, 4, seed=0)))
    sees = View((term.asked.classes + 1e-9).log(), boxes=term.asked.boxes)
    assert term(scene(None, sees)).item() == pytest.approx(0, abs=1e-4)


def test_a_patch_shows_the_surest_object_that_covers_its_middle():
    classes = torch.tensor([[[0.5, 0.2, 0.3], [0.0, 0.9, 0.1], [0.0, 0.0, 1.0]]])
    boxes = torch.tensor([[[0.5, 0.25, 0.6, 0.5], [0.75, 0.5, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0]]])
    shown = covering(Wanted(classes, boxes), (4, 4)).unflatten(1, (4, 4))[0]
    for row in range(4):
        for column in range(4):
            expected = 1 if column > 1 else 0 if column == 1 and row < 2 else 2
            assert torch.equal(shown[row, column], classes[0, expected]), (row, column)


@pytest.mark.parametrize("seed", range(3))
def test_covering_follows_its_description(seed):
    wanted, (rows, columns) = wanted_by(random_view(3, 5, 4, seed), 5), (3, 7)
    shown = covering(wanted, (rows, columns))
    for image, patches in enumerate(shown):
        for patch, answer in enumerate(patches):
            x, y = (patch % columns + 0.5) / columns, (patch // columns + 0.5) / rows
            over = [
                thing
                for thing, (cx, cy, width, height) in enumerate(wanted.boxes[image].tolist())
                if (abs(x - cx) < width / 2 and abs(y - cy) < height / 2)
                or (int(cx * columns), int(cy * rows)) == (patch % columns, patch // columns)
            ]
            surest = max(over, key=wanted.sureness[image].tolist().__getitem__, default=None)
            expected = torch.eye(5)[4] if surest is None else wanted.classes[image, surest]
            assert torch.equal(answer, expected), (image, patch)


def test_a_box_between_the_middles_has_the_patch_it_is_in():
    small = Wanted(torch.tensor([[[0.9, 0.1]]]), torch.tensor([[[0.5, 1.0, 0.01, 0.01]]]))
    assert covering(small, (4, 4))[0, :, 0].nonzero().tolist() == [[14]]


def test_patches_that_know_what_covers_them_lose_its_entropy_alone():
    shown = covering(wanted_by(random_view(2, 3, 4, 0), 3), (2, 2))
    entropy = -torch.xlogy(shown, shown).sum(-1).mean()
    assert covering_loss(shown.clamp_min(1e-30).log(), shown).item() == pytest.approx(entropy.item(), rel=1e-5)
    assert covering_loss(torch.zeros(2, 4, 5), shown).item() == pytest.approx(math.log(5), rel=1e-5)
