"""The CPU's kernel for the density of similarities and its gradient, against the formula in float64; who calls it."""

import importlib

import pytest
import torch
from testing_rules import assert_follows_rule, needs_native

from vitkd_fast.ops import patch_similarity_entropy

module_under_test = importlib.import_module("vitkd_fast.ops.patch_similarity_entropy")  # as an attribute: the function

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = [(1, 1), (3, 2), (2, 15), (5, 513), (2, 1300), (3, 4096), (1, 50_000)]


def draw(shape, bandwidth, dtype=torch.float32):
    """Similarities with -1, 0 and 1 among them, gradients of the points, and how many points there are."""
    generator = torch.Generator().manual_seed(0)
    similarities = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    similarities[:, 0] = 1
    similarities[:, -1] = -1
    similarities[:, shape[1] // 2] = 0
    points = len(module_under_test.similarity_grid(bandwidth, similarities))
    grad = torch.randn(shape[0], points, generator=generator, dtype=torch.float64)
    return similarities.to(dtype), grad.to(dtype), points


def formulas(similarities, grad, points, bandwidth):
    return (
        module_under_test._by_points(similarities, points, bandwidth),
        module_under_test._by_points_backward(grad, similarities, bandwidth),
    )


def kernels(similarities, grad, points, bandwidth):
    return (
        torch.ops.vitkd.similarity_density(similarities, points, bandwidth),
        torch.ops.vitkd.similarity_density_backward(grad, similarities, bandwidth),
    )


@needs_native
def test_the_kernels_are_there():
    for name in ("similarity_density", "similarity_density_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vitkd::{name}", "CPU")


@pytest.mark.parametrize("bandwidth", [0.001, 0.05, 0.07, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_follows_the_rule(shape, bandwidth):
    similarities, grad, points = draw(shape, bandwidth)
    ours, plain = (f(similarities, grad, points, bandwidth) for f in (kernels, formulas))
    exact = formulas(similarities.double(), grad.double(), points, bandwidth)
    for name, one, want, formula in zip(("density", "gradient"), ours, exact, plain, strict=True):
        assert_follows_rule(one, want, formula, name)


@pytest.mark.parametrize("bandwidth", [0.01, 0.05, 1.0])
def test_float64_is_computed_in_float64(bandwidth):
    inputs = *draw((3, 700), bandwidth, torch.float64), bandwidth
    for one, want in zip(kernels(*inputs), formulas(*inputs), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-11, atol=1e-12 * want.abs().max().item())


def test_many_alike_do_not_add_up_their_rounding():
    similarities = torch.full((1, 200_000), 0.3)
    density = torch.ops.vitkd.similarity_density(similarities, 51, 0.05)
    exact = module_under_test._by_points(similarities[:, :1].double(), 51, 0.05)
    torch.testing.assert_close(density.double(), exact, rtol=2e-6, atol=1e-6)


def test_nan_stays_in_its_image():
    similarities, grad, points = draw((3, 50), 0.05)
    similarities[1, 7] = torch.nan
    density, gradient = kernels(similarities, grad, points, 0.05)
    assert density[1].isnan().any() and density[[0, 2]].isfinite().all()
    assert gradient[1, 7].isnan() and gradient.isnan().sum() == 1


def test_no_images_have_no_density():
    density, gradient = kernels(torch.empty(0, 9), torch.empty(0, 51), 51, 0.05)
    assert density.shape == (0, 51) and gradient.shape == (0, 9)


@needs_native
def test_any_number_of_threads_gives_the_same_bits():
    inputs = *draw((5, 5000), 0.05), 0.05
    expected, threads = kernels(*inputs), torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(torch.equal(one, other) for one, other in zip(kernels(*inputs), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_eager_mode_asks_the_kernels_and_second_derivatives_the_formula(monkeypatch):
    asked = []
    for name in ("similarity_density", "similarity_density_backward"):
        op = getattr(torch.ops.vitkd, name)
        monkeypatch.setattr(torch.ops.vitkd, name, lambda *args, op=op, name=name: asked.append(name) or op(*args))
    tokens = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    entropy = patch_similarity_entropy(tokens)
    (grad,) = torch.autograd.grad(entropy, tokens, retain_graph=True)
    assert asked == ["similarity_density", "similarity_density_backward"]
    (again,) = torch.autograd.grad(entropy, tokens, create_graph=True)
    torch.testing.assert_close(again, grad)
    assert again.requires_grad and len(asked) == 2


def test_gradcheck():
    tokens = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: patch_similarity_entropy(x, bandwidth=0.1, reduction="none"), tokens)
    assert torch.autograd.gradgradcheck(lambda x: patch_similarity_entropy(x, bandwidth=0.1), tokens)


def test_wrong_arguments_of_the_ops_are_refused():
    if not torch._C._dispatch_has_kernel_for_dispatch_key("vitkd::similarity_density", "CPU"):
        pytest.skip("the formula stands in for the kernel")
    good = torch.zeros(2, 9)
    for similarities, points, message in [
        (good.bfloat16(), 51, "must be float32 or float64"),
        (good[0], 51, r"must be \(images, M\)"),
        (good.mT, 51, r"must be \(images, M\)"),
        (good, 0, "there must be points"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.vitkd.similarity_density(similarities, points, 0.05)
    with pytest.raises(RuntimeError, match=r"grad must be \(images, points\)"):
        torch.ops.vitkd.similarity_density_backward(torch.zeros(3, 51), good, 0.05)
