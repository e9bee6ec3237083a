"""Memory kept between steps: what the kernel is asked for, in a process of its own, for malloc has a memory too."""

import ctypes
import os
import subprocess
import sys

import pytest

from vitkd_fast.memory import SETTINGS, kept_between_steps

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")

PROGRAM = """
import resource
import torch
from vitkd_fast.memory import kept_between_steps

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

def step():  # twenty blocks, together 240 MiB
    blocks = [torch.ones(3 << 20) for _ in range(20)]

def asked():
    step()
    before = pages()
    step()
    step()
    return (pages() - before) // 2

torch.set_num_threads(1)
start = resident()
outside = asked()
with kept_between_steps() as kept:
    inside = asked()
    held = resident() - start
print(int(kept), outside, inside, held, resident() - start, asked())
"""


def run(**environment):
    given = {name: value for name, value in os.environ.items() if name not in SETTINGS} | environment
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=given, capture_output=True, text=True, check=True)
    return map(int, ran.stdout.split())


def test_a_step_asks_the_kernel_for_nothing():
    kept, outside, inside, held, after, again = run()
    assert kept
    assert inside < outside / 10  # of 61,000 pages of 4 KiB; of fewer where they are larger
    assert held > 200
    assert after < 100, "MiB that are left when it is over"
    assert again > 10 * inside


def test_who_tunes_glibc_is_left_alone():
    kept, outside, inside, *_ = run(MALLOC_MMAP_THRESHOLD_="65536")
    assert not kept
    assert inside > outside / 2


@pytest.mark.parametrize("name", SETTINGS)
def test_it_says_whether_it_does(name, monkeypatch):
    for other in SETTINGS:
        monkeypatch.delenv(other, raising=False)
    with kept_between_steps() as kept:
        assert kept
    monkeypatch.setenv(name, "1")
    with kept_between_steps() as kept:
        assert not kept


def test_where_the_c_library_has_no_such_thing(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with kept_between_steps() as kept:
        assert not kept
