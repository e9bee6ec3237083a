"""Instance discrimination: the formula, crops that keep the image, a bank of earlier rounds that no NaN gets into."""

import math

import pytest
import torch
from test_methods import vits
from test_synthesis import make

from vitkd_fast import contrast as module
from vitkd_fast.contrast import cropped, info_nce
from vitkd_fast.objectives import Scene

pytestmark = pytest.mark.usefixtures("seeded")


def contrast_of(made):
    return made.terms.functions["contrast"]


def test_info_nce_follows_its_formula():
    queries, keys = (torch.nn.functional.normalize(torch.randn(n, 6).double(), dim=1) for n in (3, 5))
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        scores = [math.exp((queries[i] @ keys[j]).item() / 0.2) for j in range(5)]
        expected -= math.log(scores[i] / sum(scores)) / 3
    torch.testing.assert_close(info_nce(queries, keys), expected)


def test_images_apart_cost_less_than_images_alike():
    apart, alike = torch.eye(8), torch.eye(8)[[0] * 8]
    assert info_nce(apart, apart) < 0.1
    assert info_nce(alike, alike).item() == pytest.approx(math.log(8))


def test_a_crop_is_a_part_of_its_own_image_enlarged():
    ramp = torch.linspace(-1, 1, 32).expand(32, 32)
    images = torch.stack((ramp, ramp.mT)).expand(64, 2, 32, 32).clone().requires_grad_()
    crops = cropped(images)
    assert crops.shape == images.shape
    widths = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert widths.min() > 2 * 0.55 and widths.max() <= 2.001 and widths.std() > 0.1
    assert crops.min() >= -1 - 1e-6 and crops.max() <= 1 + 1e-6
    (gradient,) = torch.autograd.grad(crops[3].sum(), images)
    assert gradient[3].abs().sum() > 0 and gradient[4].abs().sum() == 0


def test_the_objective_is_info_nce_of_crops_among_images_and_bank(monkeypatch):
    made = make(*vits(), method="cmi")
    contrast, pair = contrast_of(made), made.pair
    monkeypatch.setattr(module, "cropped", lambda images: images.flip(-1))
    images, earlier = torch.randn(2, 8, 1, 8, 8)
    teacher = pair.teacher
    value = contrast(Scene(earlier, pair.look(teacher, earlier), None, pair, made.config))
    contrast.end_round()
    assert contrast.count == 8
    value = contrast(Scene(images, pair.look(teacher, images), None, pair, made.config))
    crop, whole, bank = (teacher.forward_features(x).mean(1) for x in (images.flip(-1), images, earlier))
    torch.testing.assert_close(contrast.bank[:8], bank)
    units = [torch.nn.functional.normalize(contrast.head(rows), dim=1) for rows in (crop, whole, bank)]
    torch.testing.assert_close(value, info_nce(units[0], torch.cat(units[1:])))


def test_the_bank_is_of_earlier_rounds_and_a_ring(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 20)
    made = make(*vits(), method="cmi")
    contrast = contrast_of(made)
    counts = []
    for _ in range(4):
        made.round(0.0)
        counts.append((contrast.count, contrast.cursor))
    assert counts == [(8, 8), (16, 16), (16, 8), (16, 16)]
    before = contrast.bank.clone()
    made.round(0.0)
    assert not torch.equal(contrast.bank[:8], before[:8]) and torch.equal(contrast.bank[8:], before[8:])
    assert not contrast.bank.requires_grad


def test_no_nan_gets_into_the_bank():
    made = make(*vits(), method="cmi")
    contrast = contrast_of(made)
    contrast.latest = torch.ones(8, 16)
    contrast.latest[3, 2] = math.nan
    contrast.end_round()
    assert contrast.bank.isfinite().all() and contrast.bank[:8].sum() == 7 * 16


def test_the_head_learns_with_the_generator():
    made = make(*vits(), method="cmi")
    before = [weight.detach().clone() for weight in contrast_of(made).head.parameters()]
    made.round(0.0)
    after = list(contrast_of(made).head.parameters())
    assert len(after) == 4 and all(not torch.equal(old, new) for old, new in zip(before, after))


def test_autocast_does_not_reach_the_similarities():
    queries, keys = (torch.nn.functional.normalize(torch.randn(n, 6), dim=1) for n in (3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(queries, keys)
    assert torch.equal(found, info_nce(queries, keys))
