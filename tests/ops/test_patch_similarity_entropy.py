"""patch_similarity_entropy: against the density written out, closed forms, its gradient, its memory, its errors."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from vitkd_fast.ops import patch_similarity_entropy

module_under_test = importlib.import_module("vitkd_fast.ops.patch_similarity_entropy")  # as an attribute: the function


def draw(batch=2, tokens=5, channels=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64).to(dtype)


def naive(tokens, bandwidth, finer=1):
    """The published form: the (B, N, N, C) broadcast, all kernels at once, torch's own density and trapezoids."""
    similarities = F.cosine_similarity(tokens.unsqueeze(1), tokens.unsqueeze(2), dim=-1).flatten(1)
    end = (math.ceil(1 / bandwidth) + 5) * bandwidth
    grid = torch.linspace(-end, end, round(2 * end / bandwidth) * finer + 1, dtype=tokens.dtype)
    kernel = torch.distributions.Normal(grid.view(-1, 1), bandwidth)
    density = kernel.log_prob(similarities.unsqueeze(1)).exp().mean(2)  # (B, G)
    return torch.trapezoid(-density * (density + 1e-30).log(), grid, dim=1)


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bandwidth", [0.05, 0.07, 0.3])
def test_equals_the_naive_formula_and_its_gradient(bandwidth, batch, tokens):
    patches = draw(batch, tokens).requires_grad_()
    entropies = patch_similarity_entropy(patches, bandwidth=bandwidth, reduction="none")
    expected = naive(patches, bandwidth)
    # the end points that trapezoids count by half are e^(-12.5), and densities under 1e-12 count as 0
    torch.testing.assert_close(entropies, expected, rtol=0, atol=3e-5)
    mean = patch_similarity_entropy(patches, bandwidth=bandwidth)
    torch.testing.assert_close(mean, entropies.mean(), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(entropies.sum(), patches)
    (want,) = torch.autograd.grad(expected.sum(), patches)
    torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bandwidth", [0.01, 0.05])
@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 64])
def test_a_finer_grid_gives_the_same(tokens, bandwidth):
    patches = draw(4, tokens, 4)
    entropies = patch_similarity_entropy(patches, bandwidth=bandwidth, reduction="none")
    torch.testing.assert_close(entropies, naive(patches, bandwidth, finer=8), rtol=0, atol=2e-4)


@pytest.mark.parametrize("bandwidth", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_patches_that_all_look_alike(dtype, bandwidth):
    """One Gaussian, whose entropy is log(h √(2πe))."""
    patches = draw(2, 1, dtype=dtype).expand(2, 17, 4)
    expected = math.log(bandwidth * math.sqrt(2 * math.pi * math.e))
    assert patch_similarity_entropy(patches, bandwidth=bandwidth).item() == pytest.approx(expected, abs=2e-5)


def test_two_kinds_of_patches():
    """Half of the pairs at 1, half at 0, far apart: one Gaussian's entropy and log 2."""
    patches = torch.eye(2).repeat(4, 1).unsqueeze(0)
    expected = math.log(0.05 * math.sqrt(2 * math.pi * math.e)) + math.log(2)
    assert patch_similarity_entropy(patches).item() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("chunk", [1, 500, 2**20])
def test_gradcheck(monkeypatch, chunk):
    monkeypatch.setattr(module_under_test, "CHUNK", chunk)
    monkeypatch.setattr(module_under_test, "_has_kernel", lambda similarities: False)
    patches = draw(2, 4, 3).requires_grad_()

    def entropy(patches):
        return patch_similarity_entropy(patches, bandwidth=0.2, reduction="none")

    assert torch.autograd.gradcheck(entropy, (patches,), nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(entropy, (patches,))


@pytest.mark.parametrize("chunk", [1, 300, 5000])
def test_chunks_do_not_change_the_result(monkeypatch, chunk):
    patches = draw(2, 9).requires_grad_()
    expected = patch_similarity_entropy(patches, reduction="none")
    (want,) = torch.autograd.grad(expected.sum(), patches)
    monkeypatch.setattr(module_under_test, "CHUNK", chunk)
    monkeypatch.setattr(module_under_test, "_has_kernel", lambda similarities: False)
    entropies = patch_similarity_entropy(patches, reduction="none")
    (grad,) = torch.autograd.grad(entropies.sum(), patches)
    torch.testing.assert_close(entropies, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-12)


def test_gradient_ascent_makes_patches_more_varied():
    patches = (draw(4, 16, 8, torch.float32) * 0.2 + 1).requires_grad_()
    before = patch_similarity_entropy(patches, reduction="none")
    optimizer = torch.optim.Adam([patches], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        (-patch_similarity_entropy(patches)).backward()
        optimizer.step()
    assert (patch_similarity_entropy(patches, reduction="none") > before + 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    patches = (draw(channels=64, dtype=dtype) * 1e4).requires_grad_()
    wide = patches.detach().float().requires_grad_()
    expected = patch_similarity_entropy(wide)
    entropy = patch_similarity_entropy(patches)
    assert entropy.dtype is torch.float32 and torch.equal(entropy, expected)
    (want,) = torch.autograd.grad(expected, wide)
    assert torch.equal(torch.autograd.grad(entropy, patches)[0], want.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        entropy = patch_similarity_entropy(wide)
    assert torch.equal(entropy, expected) and torch.equal(torch.autograd.grad(entropy, wide)[0], want)


def test_tokens_of_length_zero():
    patches = draw(dtype=torch.float32)
    patches[:, 1:3] = 0
    patches.requires_grad_()
    (grad,) = torch.autograd.grad(patch_similarity_entropy(patches), patches)
    assert grad.isfinite().all() and grad.any() and not grad[:, 1:3].any()


def test_strides_do_not_matter():
    patches = draw(3, 8)
    strided = patches.mT.contiguous().mT
    torch.testing.assert_close(patch_similarity_entropy(strided[:, 1:]), patch_similarity_entropy(patches[:, 1:]))


def test_memory_kept_and_used(monkeypatch):
    """Kept: N² similarities. At work: a chunk of kernels, not one for every pair and grid point."""
    tokens, chunk = 64, 2**12
    monkeypatch.setattr(module_under_test, "CHUNK", chunk)
    monkeypatch.setattr(module_under_test, "_has_kernel", lambda similarities: False)
    used, kernels = [], module_under_test._kernels
    monkeypatch.setattr(
        module_under_test, "_kernels", lambda *args: [used.append(x.numel()) or x for x in kernels(*args)]
    )
    patches = draw(1, tokens, 3).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        entropy = patch_similarity_entropy(patches)
    entropy.backward()
    assert max(kept) == tokens**2 and max(used) <= chunk and len(used) > 100


def test_nothing_is_read_on_the_host():
    """On the meta device there is nothing to read."""
    patches = torch.empty(2, 17, 8, device="meta", requires_grad=True)
    entropy = patch_similarity_entropy(patches, reduction="none")
    entropy.sum().backward()
    assert entropy.shape == (2,) and patches.grad.shape == patches.shape


def test_repeats_bitwise():
    patches = draw(4, 17, 8, torch.float32).requires_grad_()
    (first,) = torch.autograd.grad(patch_similarity_entropy(patches), patches)
    for _ in range(5):
        assert torch.equal(torch.autograd.grad(patch_similarity_entropy(patches), patches)[0], first)


def test_compiles_in_one_graph():
    patches = draw().requires_grad_()
    entropy = torch.compile(patch_similarity_entropy, fullgraph=True, backend="eager")(patches)
    expected = patch_similarity_entropy(patches)
    torch.testing.assert_close(entropy, expected)
    torch.testing.assert_close(torch.autograd.grad(entropy, patches), torch.autograd.grad(expected, patches))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 5), {}, r"tokens must be \(batch, tokens, channels\).*got shape \(2, 5\)"),
        ((2, 0, 4), {}, "at least one token"),
        ((2, 5, 4), {"bandwidth": 0.0}, "bandwidth is 0.0; accepted: 0.001 to 1"),
        ((2, 5, 4), {"bandwidth": math.nan}, "bandwidth is nan"),
        ((2, 5, 4), {"reduction": "sum"}, "reduction is 'sum'; accepted: batchmean, none"),
    ],
)
def test_errors_say_what_to_do(shape, options, message):
    with pytest.raises(ValueError, match=message):
        patch_similarity_entropy(torch.zeros(shape), **options)


def test_wrong_dtype():
    with pytest.raises(TypeError, match="tokens has dtype int64"):
        patch_similarity_entropy(torch.zeros(2, 5, 4, dtype=torch.int64))


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_with_a_bandwidth_that_changes(dynamic):
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    compiled = torch.compile(patch_similarity_entropy, backend="eager", dynamic=dynamic)
    for bandwidth in (0.05, 0.07, 0.11):
        found, expected = (f(tokens, bandwidth=bandwidth) for f in (compiled, patch_similarity_entropy))
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(entropy, tokens)[0] for entropy in (found, expected)]
        torch.testing.assert_close(*grads)


def test_a_bandwidth_that_requires_a_gradient_is_refused():
    with pytest.raises(TypeError, match="bandwidth is a tensor that requires a gradient"):
        patch_similarity_entropy(torch.randn(1, 4, 8), bandwidth=torch.tensor(0.1, requires_grad=True))
