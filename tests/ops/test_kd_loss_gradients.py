"""The distillation loss as it is called, and its gradients, against torch's own losses and the formula."""

import pytest
import torch
import torch.nn.functional as F
from logits import DTYPES, LOSSES, draw

from vitkd_fast.ops import kd_loss
from vitkd_fast.ops.kd_loss import KINDS, kd_grads_formula, kd_rows_formula

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def torch_loss(student, teacher, kind, temperature, reduction):
    """The same losses from torch.nn.functional alone."""
    if kind in ("l1", "mse"):
        each = {"l1": F.l1_loss, "mse": F.mse_loss}[kind](student, teacher, reduction="none").mean(1)
    else:
        log_q, log_p = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()

        def kl(log_p, log_q):
            return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)

        each = {
            "kl": lambda: kl(log_p, log_q),
            "reverse_kl": lambda: kl(log_q, log_p),
            "js": lambda: (kl(log_p, log_m) + kl(log_q, log_m)) / 2,
        }[kind]() * temperature**2
    return each.mean() if reduction == "batchmean" else each


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize(("kind", "temperature"), LOSSES)
def test_equals_torch_and_its_autograd(kind, temperature, classes, reduction):
    student, teacher = (tensor.double().requires_grad_() for tensor in draw(33, classes, torch.float32))
    weights = torch.linspace(-1, 2, 33, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7).double()
    loss = kd_loss(student, teacher, kind=kind, temperature=temperature, reduction=reduction)
    expected = torch_loss(student, teacher, kind, temperature, reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
    grads = torch.autograd.grad((loss * weights).sum(), (student, teacher))
    expected_grads = torch.autograd.grad((expected * weights).sum(), (student, teacher))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-13)


def test_batchmean_is_torchs():
    student, teacher = draw(33, 10, torch.float32)
    expected = F.kl_div(F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean") * 16
    torch.testing.assert_close(kd_loss(student, teacher, temperature=4.0), expected)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize(("kind", "temperature"), [(kind, 1.0) for kind in KINDS] + [("kl", 4.0), ("js", 0.5)])
def test_gradcheck(kind, temperature, needs):
    logits = [
        tensor.double().requires_grad_(need) for tensor, need in zip(draw(4, 7, torch.float32), needs, strict=True)
    ]
    assert torch.autograd.gradcheck(
        lambda *logits: kd_loss(*logits, kind=kind, temperature=temperature, reduction="none"), logits, nondet_tol=0.0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_public_function_in_every_dtype(device, dtype):
    student, teacher = (tensor.requires_grad_() for tensor in draw(33, 100, dtype, device))
    loss = kd_loss(student, teacher, temperature=4.0)
    assert loss.dtype is torch.float32
    loss.backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (student, teacher)]
    exact = kd_rows_formula(*wide, "kl", 4.0).mean()
    for tensor, exact_grad in zip((student, teacher), torch.autograd.grad(exact, wide), strict=True):
        assert tensor.grad.dtype is dtype
        torch.testing.assert_close(tensor.grad, exact_grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    torch.testing.assert_close(loss, exact.float())


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype", "loss_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_different_dtypes_are_promoted(student_dtype, teacher_dtype, loss_dtype):
    student, teacher = draw(33, 10, torch.float32)
    student = student.to(student_dtype).requires_grad_()
    teacher = teacher.to(teacher_dtype).requires_grad_()
    loss = kd_loss(student, teacher)
    loss.backward()
    assert (loss.dtype, student.grad.dtype, teacher.grad.dtype) == (loss_dtype, student_dtype, teacher_dtype)
    torch.testing.assert_close(loss.double(), kd_rows_formula(student.double(), teacher.double(), "kl", 1.0).mean())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_the_public_function(device, reduction, upstream, dtype):
    """Twice through the same graph: a gradient handed out the first time must not be changed by what becomes of it."""
    student, teacher = (tensor.requires_grad_() for tensor in draw(65, 100, dtype, device))
    loss = kd_loss(student, teacher, kind="js", temperature=2.0, reduction=reduction).sum() * upstream
    double = [tensor.detach().double() for tensor in (student, teacher)]
    share = upstream / (65 if reduction == "batchmean" else 1)
    exact = [grad * share for grad in kd_grads_formula(*double, "js", 2.0)]
    formula = [
        (grad.float() * share).to(dtype) for grad in kd_grads_formula(*(each.float() for each in double), "js", 2.0)
    ]
    for _ in range(2):
        student.grad = teacher.grad = None
        loss.backward(retain_graph=True)
        for side, want, plain in zip((student, teacher), exact, formula, strict=True):
            # stored once before the upstream gradient and once after it: up to two roundings
            bound = 2 * (plain.double() - want).abs().max() + 3 * torch.finfo(dtype).eps * want.abs().max()
            assert (side.grad.double() - want).abs().max() <= bound
            side.grad.mul_(7)
    student.grad = None
    (2 * loss).backward()
    assert (student.grad.double() - 2 * exact[0]).abs().max() <= 6 * torch.finfo(dtype).eps * exact[
        0
    ].abs().max() + 1e-7


def test_what_becomes_of_a_gradient_does_not_change_the_next():
    """A sum into a view, a hook, a change by hand: each in place, on what an earlier backward handed out."""
    student, teacher = draw(4, 10, torch.float32)
    exact = torch.autograd.grad(kd_loss(x := student.clone().requires_grad_(), teacher), x)[0]
    flat = student.flatten().requires_grad_()
    loss = kd_loss(flat.view(4, 10), teacher)
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(flat.grad, 3 * exact.flatten())
    hooked = student.clone().requires_grad_()
    (between := hooked * 1).register_hook(lambda grad: grad.mul_(2))
    loss = kd_loss(between, teacher)
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss, hooked, retain_graph=True)
        torch.testing.assert_close(grad.mul_(1), 2 * exact)
        grad.zero_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "in place, as on a GPU"])
def test_saved_tensors_that_are_others_each_time(dtype, scaled, monkeypatch):
    """As save_on_cpu and checkpointing make them; a factor must not go into one that is thrown away."""
    student, teacher = draw(6, 10, dtype)
    exact = student.double().requires_grad_()
    (kd_loss(exact, teacher.double()) * 5).backward()

    def gradient(loss_of):
        x = student.clone().requires_grad_()
        loss = loss_of(x)
        with monkeypatch.context() as patch:
            if scaled:
                patch.setattr(torch.Tensor, "is_cuda", True)
            loss.backward()
        torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0.02, atol=1e-3)

    def loss_of(x):
        return kd_loss(x, teacher) * 5

    def copied(x):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            return loss_of(x)

    gradient(loss_of)
    gradient(copied)
    gradient(lambda x: torch.utils.checkpoint.checkpoint(loss_of, x, use_reentrant=False))


def test_the_mean_of_many_rows_of_float16_keeps_its_share():
    """1 / B of 200,000 rows is no float16."""
    student, teacher = (side.half().requires_grad_() for side in draw(200_000, 2, torch.float32))
    (kd_loss(student, teacher, kind="js") * 65536).backward(retain_graph=True)
    exact = kd_grads_formula(student.double(), teacher.double(), "js", 1.0)[0] * 65536 / 200_000
    assert (student.grad.double() - exact).abs().max() <= 2e-3 * exact.abs().max()


@pytest.mark.parametrize("kind", ["kl", "js"])
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_a_loss_scale_saves_small_gradients_of_float16(kind, temperature):
    """Unscaled, a third of them would be no float16."""
    torch.manual_seed(0)
    logits = (torch.randn(2, 16, 20000) * 3).half().unbind(0)

    def gradient(student, teacher):
        student = student.clone().requires_grad_()
        (kd_loss(student, teacher, kind=kind, temperature=temperature) * 65536).backward()
        return student.grad.double()

    found, expected = gradient(*logits), gradient(*(side.float() for side in logits))
    assert ((found - expected).abs() / expected.abs()).median() < 1e-3
    assert (found == 0).double().mean() < 0.02


def test_the_mean_of_an_empty_batch_differentiates():
    student, teacher = (tensor.requires_grad_() for tensor in draw(0, 10, torch.float32))
    kd_loss(student, teacher).backward()
    assert student.grad.shape == teacher.grad.shape == (0, 10)
