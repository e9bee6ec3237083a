"""Triton's interpreter, made to look only once for what it has to replace in Triton's language."""

import importlib
import inspect
import os

import pytest


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
