"""What all tests share: their order, one thread per worker, GPU skips, hypothesis profiles, some fixtures."""

import ctypes
import importlib
import os
import sys
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / "vitkd_fast/_C_cpu.so").exists():  # `python -m pytest` puts the checkout before the installed package
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != ROOT]

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; more threads than cores cost tenfold
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)

# The same examples in every run, so that a red test is red for everyone; HYPOTHESIS_PROFILE=explore draws new ones.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

M_PERTURB = -6  # mallopt's number for it, from malloc.h


def pytest_configure(config):
    # xdist would start the files with the fewest tests last, and those have the longest.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # what is slow starts first
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def elsewhere(tmp_path_factory):
    """Processes that tests start must import the installed package, not the source tree that pytest is run from."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture
def seeded():
    """The same random numbers in every run of a test, and the caller's untouched."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def poisoned_memory():
    """Fill memory that a kernel has not written yet, so that reading it, or leaving it unwritten, shows.

    Tensors: torch's deterministic mode fills what aten's empty, empty_like, empty_strided, new_empty and resize_ hand
    out with NaN (integers with their maximum), whether Python or C++ asks for it. It does not reach caches that hand
    out a buffer a second time. Scratch memory: where the C library is glibc, it fills blocks above 1 KiB (smaller ones
    come from its per-thread cache, unfilled) with 0x7F bytes, 3.4e38 as float32 or bfloat16.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    was_filled = torch.utils.deterministic.fill_uninitialized_memory
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    if mallopt:
        mallopt(M_PERTURB, 0x80)  # malloc fills with the complement
    yield
    if mallopt:
        mallopt(M_PERTURB, 0)
    torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warning)
    torch.utils.deterministic.fill_uninitialized_memory = was_filled


@pytest.fixture
def convolved(monkeypatch):
    """One entry for each linear layer that `vitkd_fast.ops.linear` computes as a convolution."""
    calls = []
    module = importlib.import_module("vitkd_fast.ops.linear")  # as an attribute it is the function
    output = module._output
    monkeypatch.setattr(module, "_output", lambda *inputs: calls.append(inputs) or output(*inputs))
    return calls


@pytest.fixture
def pretend(monkeypatch):
    """A machine with these entries in its table, kernels and wish, and with a GPU of that name."""
    from pretended_gpu import GPU

    from vitkd_fast import backends, choice

    def pretend(*entries, kernels=("native", "triton"), wish=""):
        monkeypatch.setattr(choice, "table", cache(lambda: entries))
        monkeypatch.setattr(choice, "WISH", wish)
        monkeypatch.setattr(backends, "cuda_kernels", lambda capability=None: kernels)
        monkeypatch.setattr(choice, "_model", lambda device: (GPU["gpu"], GPU["capability"]))
        choice.forget()

    yield pretend
    monkeypatch.undo()
    choice.forget()
