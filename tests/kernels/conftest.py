"""The CUDA kernels' emulator, and Triton's interpreter made faster."""

import fcntl
import importlib
import inspect
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda_host"))
host = importlib.import_module("emulator")


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The CUDA kernels on the CPU; built by the first worker that needs it, for all of them."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    of_all = tmp_path_factory.getbasetemp()
    folder = (of_all.parent if "PYTEST_XDIST_WORKER" in os.environ else of_all) / "cuda_emulator"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "emulator").exists():
            host.build(folder)
    return host.Emulator(folder / "emulator")


@pytest.fixture(autouse=True, scope="session")
def builtins_found_once():
    """At every call of one jitted function by another it goes through all members of triton.language; half its time."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    is_builtin = importlib.import_module("triton.language.core").is_builtin
    found = {}

    def patch(package, builder, scope):
        if package not in found:  # the first time, none of them is replaced yet
            found[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        for name in found[package]:
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patched:
        if hasattr(interpreter, "_patch_builtin"):
            patched.setattr(interpreter, "_patch_builtin", patch)
        yield
