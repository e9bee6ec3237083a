"""When a kernel is right: its error against exact arithmetic, judged by the error of the plain formula in its dtype.

The maximum rule is flash-attention's. It alone would pass a kernel that is a little wrong everywhere, or wrong in one
direction, so the RMS error and the signed bias are bounded as well.
"""

import math
import os

import numpy as np
import pytest
import torch
from torch import Tensor

# The plain formula, whatever the dispatcher runs on the CPU, and whatever it runs on CUDA.
IMPLEMENTATIONS = ("formula", "cpu", pytest.param("cuda", marks=pytest.mark.gpu))

# For what only the native kernels promise: bits that depend on neither strides nor threads, checks of their own.
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
needs_native = pytest.mark.skipif(bool(os.environ.get("VITKD_NO_NATIVE")), reason="VITKD_NO_NATIVE is set")

SIGMAS = 6.0  # of the signed bias; chance alone goes beyond in 2 of 10⁹ comparisons
NUDGE = 0.3  # flash-attention's: adding and taking it away again costs one rounding of a number of ordinary size


def assert_native(op: str) -> None:
    """Fail unless the CPU tests of this op run the native kernel, or VITKD_NO_NATIVE says that they need not."""
    if not os.environ.get("VITKD_NO_NATIVE"):
        from vitkd_fast import backends

        name, reason = backends.implementation(op, "cpu")
        assert name == "native", f"{op} on the CPU would test the {name} implementation: {reason}"


def assert_follows_rule(
    result: Tensor, exact: Tensor | np.ndarray, formula: Tensor, name: str = "result", correlated: int | None = None
) -> None:
    """Assert that `result` is as close to `exact` as a careful implementation in its dtype can be asked to be.

    With errors taken against `exact`, e of the result and f of the formula:
        max|e| <= 2 max|f| + 2 max|(x + 0.3 - 0.3) - x| + u max|exact|, x being `exact` in the dtype;
        rms(e) <= 2 rms(f) + the RMS of storing `exact` in the dtype + u rms(exact);
        |mean(e)| and |mean(e · sign(exact))| <= 2 times the formula's + 6 standard errors of a mean of unbiased errors
            + u/2 mean|exact|, what rounding a constant (1/C, ln 2) once puts into every element.
    u is one rounding of the accumulator (float32, or float64 for float64). Below float32 it is nothing; in float32,
    where f is itself a few roundings, it keeps chance out of the maxima: without it 2 of 900 comparisons failed for an
    attention kernel of RMS error 0.8 to 1.0 times the formula's. NaN and infinity must stand where `exact` has them.

    Args:
        result: what the kernel gave.
        exact: the same in a wider dtype: a float64 tensor, or a numpy longdouble array to judge float64 results.
        formula: the plain formula computed in result's dtype.
        name: what to call it in messages.
        correlated: how many elements may share one error, so that the standard error counts numel / correlated of
            them; by default the longest dimension (a row shares its softmax's denominator, all keys one query's error).
    """
    assert result.dtype == formula.dtype, f"{name} is {result.dtype}, the formula gives {formula.dtype}"
    assert result.shape == formula.shape == exact.shape, f"{name}: {result.shape}, {formula.shape}, {exact.shape}"
    if result.numel() == 0:
        return
    dtype = result.dtype
    longest = max(result.shape, default=1)
    result, exact, formula = _wide(result), _wide(exact), _wide(formula)
    finite = np.isfinite(exact)
    _assert_same_non_finite(result, exact, finite, name)
    assert np.isfinite(formula[finite]).all(), f"{name}: the formula overflows here, so it cannot judge"
    result, exact, formula = result[finite], exact[finite], formula[finite]
    if exact.size == 0:
        return
    error, formula_error = result - exact, formula - exact
    stored = _to_dtype(exact, dtype)
    nudged = _wide(stored + NUDGE - NUDGE) - _wide(stored)
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = 2 * _peak(formula_error) + 2 * _peak(nudged) + unit * _peak(exact)
    _assert_bound(f"max|{name} - exact|", _peak(error), bound)

    tiny = _rms(_wide(stored) - exact) + unit * _rms(exact)
    _assert_bound(f"rms({name} - exact)", _rms(error), 2 * _rms(formula_error) + tiny)

    standard_error = _rms(error) / math.sqrt(max(1, exact.size // (correlated or longest)))
    for kind, sign in (("mean", 1.0), ("mean towards zero of", np.sign(exact))):
        bias, formula_bias = np.mean(error * sign), np.mean(formula_error * sign)
        bound = 2 * abs(formula_bias) + SIGMAS * standard_error + unit / 2 * float(np.abs(exact).mean())
        _assert_bound(f"{kind} {name} - exact", abs(bias), bound)


def _assert_same_non_finite(result: np.ndarray, exact: np.ndarray, finite: np.ndarray, name: str) -> None:
    expected, got = exact[~finite], result[~finite]
    assert np.isfinite(result[finite]).all(), f"{name} has {(~np.isfinite(result[finite])).sum()} NaN or inf too many"
    assert np.array_equal(got, expected, equal_nan=True), f"{name} should be {expected[:8]}… and is {got[:8]}…"


def _assert_bound(what: str, value: float, bound: float) -> None:
    assert value <= bound, f"{what} is {value:.3g}, the rule allows {bound:.3g}"


def _wide(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().double().cpu().numpy() if isinstance(values, Tensor) else values


def _to_dtype(exact: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(exact.astype(np.float64)).to(dtype)


def _peak(values: np.ndarray) -> float:
    return float(np.abs(values).max())


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
