"""Objectives: each term against its formula written out, and its sign: what the generator and student are after."""

import math

import pytest
import torch

from vitkd_fast.config import Config
from vitkd_fast.objectives import (
    agreement,
    class_imbalance,
    generator_losses,
    one_hot_prior,
    student_losses,
    weighed_sum,
)

CONFIG = Config(tokens=0.5, adversarial=2.0, one_hot=3.0, balance=7.0)


@pytest.fixture
def logits():
    return 3 * torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))


def test_terms_follow_their_formulas(logits):
    student, teacher = logits
    p = teacher.double().softmax(-1)
    losses = generator_losses(student, teacher, CONFIG)
    expected = {
        "adversarial": -(student - teacher).abs().double().mean(),
        "one_hot": -p.amax(-1).log().mean(),
        "balance": (p.mean(0) * p.mean(0).log()).sum(),
    }
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5), name
    total = 2 * expected["adversarial"] + 3 * expected["one_hot"] + 7 * expected["balance"]
    assert weighed_sum(losses, CONFIG).item() == pytest.approx(total.item(), rel=1e-5)


def test_class_imbalance_is_least_when_every_class_is_there():
    every, one = 50 * torch.eye(5), 50 * torch.eye(5)[[0] * 5]
    assert class_imbalance(every).item() == pytest.approx(-math.log(5), abs=1e-5)
    assert class_imbalance(one).item() == pytest.approx(0, abs=1e-5)
    assert one_hot_prior(every).item() == pytest.approx(0, abs=1e-5)
    assert one_hot_prior(torch.zeros(2, 5)).item() == pytest.approx(math.log(5))


def test_class_imbalance_stays_finite_where_a_class_is_impossible():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    class_imbalance(logits).backward()
    assert logits.grad.isfinite().all()


def test_generator_terms_reach_both_networks(logits):
    student, teacher = logits[0].clone().requires_grad_(), logits[1].clone().requires_grad_()
    weighed_sum(generator_losses(student, teacher, CONFIG), CONFIG).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad.abs().sum() > 0


def test_student_terms(logits):
    student, teacher = logits
    tokens = torch.randn(2, 16, 4, 8, generator=torch.Generator().manual_seed(1))
    losses = student_losses(student, teacher, tokens[0], tokens[1], CONFIG)
    difference = (tokens[0] - tokens[1]).abs()
    smooth = torch.where(difference < 1, difference.square() / 2, difference - 0.5).mean()
    assert losses["distillation"].item() == pytest.approx((student - teacher).abs().mean().item(), rel=1e-5)
    assert losses["tokens"].item() == pytest.approx(smooth.item(), rel=1e-5)
    assert weighed_sum(losses, CONFIG).item() == pytest.approx((losses["distillation"] + smooth / 2).item(), rel=1e-5)
    assert student_losses(student, teacher, None, None, CONFIG).keys() == {"distillation"}


def test_temperature_reaches_kl_but_not_l1(logits):
    config = Config(student_loss="kl", temperature=4.0)
    losses = student_losses(*logits, None, None, config)
    log_q, log_p = ((rows.double() / 4).log_softmax(-1) for rows in logits)
    expected = 16 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert losses["distillation"].item() == pytest.approx(expected.item(), rel=1e-5)
    adversarial = generator_losses(*logits, config)["adversarial"]
    assert adversarial.item() == pytest.approx(-(logits[0] - logits[1]).abs().mean().item(), rel=1e-5)


def test_agreement_is_the_share_of_equal_decisions():
    student, teacher = torch.eye(4), torch.eye(4)[[0, 1, 2, 0]]
    assert agreement(student, teacher).item() == 0.75
