"""The rules that judge the kernels, judged: each must reject what it exists to reject and pass honest rounding."""

import ctypes

import numpy as np
import pytest
import torch
from testing_rules import assert_follows_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def example(dtype):
    """A weighted sum as attention forms it: exact, and by a formula that rounds the weights to dtype first."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(16, 256, 64, generator=generator, dtype=torch.float64)
    values = torch.randn(16, 64, 48, generator=generator).to(dtype).double()
    weights = scores.softmax(-1)
    exact = weights @ values
    return exact, (weights.to(dtype) @ values.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_a_rounded_result(dtype):
    exact, formula = example(dtype)
    assert_follows_rule(exact.to(dtype), exact, formula)
    assert_follows_rule(formula, exact, formula)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_another_order_of_summation(dtype):
    """Two equally good results must not be told apart by chance, on whatever numbers."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 3, 64, 48, generator=generator).to(dtype)
        order = torch.randperm(48, generator=generator)
        exact = a.double() @ b.double().mT
        assert_follows_rule(a[..., order] @ b[..., order].mT, exact, a @ b.mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_one_wrong_element(dtype):
    exact, formula = example(dtype)
    result = exact.to(dtype)
    result[3, 17, 5] += 0.05 if dtype is not torch.float32 else 1e-5
    with pytest.raises(AssertionError, match="max"):
        assert_follows_rule(result, exact, formula)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_errors_three_times_too_large_everywhere(dtype):
    exact, formula = example(dtype)
    error = formula.double() - exact
    noisy = (exact + 3.5 * error.square().mean().sqrt() * error.sign()).to(dtype)
    with pytest.raises(AssertionError, match="rms"):
        assert_follows_rule(noisy, exact, formula)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_an_offset(dtype):
    exact, formula = example(dtype)
    spread = (formula.double() - exact).square().mean().sqrt()
    with pytest.raises(AssertionError, match="mean"):
        assert_follows_rule((exact + spread).to(dtype), exact, formula)


def test_rejects_truncation():
    """Dropping the low 16 bits of a float32 instead of rounding to bfloat16: every value comes out too near zero."""
    exact, formula = example(torch.bfloat16)
    bits = exact.float().view(torch.int32)
    truncated = (bits & ~0xFFFF).view(torch.float32).bfloat16()
    with pytest.raises(AssertionError, match="mean towards zero"):
        assert_follows_rule(truncated, exact, formula)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rejects_a_stray_non_finite_value(bad):
    exact, formula = example(torch.float32)
    result = exact.float()
    result[3, 3, 3] = bad
    with pytest.raises(AssertionError, match="too many"):
        assert_follows_rule(result, exact, formula)


def test_rejects_a_number_where_nan_is_due():
    exact, formula = example(torch.float32)
    result = exact.float()
    exact[3] = float("nan")
    with pytest.raises(AssertionError, match="should be"):
        assert_follows_rule(result, exact, formula)
    result[3] = float("nan")
    assert_follows_rule(result, exact, formula)


def test_rejects_the_wrong_infinity():
    exact, formula = example(torch.float32)
    result = exact.float()
    exact[3], result[3] = float("inf"), float("-inf")
    with pytest.raises(AssertionError, match="should be"):
        assert_follows_rule(result, exact, formula)


def test_rejects_another_dtype_or_shape():
    exact, formula = example(torch.bfloat16)
    with pytest.raises(AssertionError, match=r"torch\.float32"):
        assert_follows_rule(exact.float(), exact, formula)
    with pytest.raises(AssertionError, match="result"):
        assert_follows_rule(exact[:5].bfloat16(), exact, formula)


def test_refuses_to_judge_by_an_overflown_formula():
    exact, formula = example(torch.float16)
    formula[0, 0] = float("inf")
    with pytest.raises(AssertionError, match="cannot judge"):
        assert_follows_rule(exact.half(), exact, formula)


def test_float64_is_judged_by_longdouble():
    exact = np.linspace(-1, 1, 4096, dtype=np.longdouble).reshape(64, 64) / 3
    rounded = torch.from_numpy(exact.astype(np.float64))
    assert_follows_rule(rounded, exact, rounded)
    with pytest.raises(AssertionError):
        assert_follows_rule(rounded * (1 + 1e-15), exact, rounded)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_poison_reaches_every_way_to_allocate(dtype):
    base = torch.zeros(3, 5, dtype=dtype)
    allocated = (
        torch.empty(1000, dtype=dtype),
        torch.empty_like(base),
        torch.empty_strided((3, 5), (5, 1), dtype=dtype),
        base.new_empty(7),
        torch.ops.aten.new_empty(base, [4]),
    )
    assert all(tensor.isnan().all() for tensor in allocated)


@pytest.mark.usefixtures("poisoned_memory")
def test_poison_reaches_malloc():
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("the C library is not glibc")
    libc.malloc.restype = ctypes.c_void_p
    for size in (5000, 10_000_000):
        pointer = libc.malloc(ctypes.c_size_t(size))
        assert ctypes.string_at(pointer, size) == b"\x7f" * size
        libc.free(ctypes.c_void_p(pointer))


def test_poison_ends_with_the_fixture(request):
    request.getfixturevalue("poisoned_memory")
    assert torch.are_deterministic_algorithms_enabled()


def test_poison_is_off_by_default():
    assert not torch.are_deterministic_algorithms_enabled()
