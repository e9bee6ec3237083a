"""Memory that a training loop on the CPU asks for and frees alike in every step."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's numbers for them, from malloc.h
LARGEST = 32 << 20  # bytes; the largest threshold that glibc takes
SETTINGS = (  # with which people tune glibc themselves
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
)


@contextlib.contextmanager
def kept_between_steps() -> Iterator[bool]:
    """Let glibc keep what is freed in one step for the next, and give it back at the end; yields whether it does.

    By itself it hands freed memory to the kernel, which zeroes every page anew in the next step: 7 % of the time of a
    small ViT's training step. Blocks above 32 MiB are not kept. Where the C library is another, or somebody has tuned
    glibc by one of `SETTINGS`, nothing is changed.
    """
    libc = ctypes.CDLL(None)
    tuned = any(name in os.environ for name in SETTINGS)
    if tuned or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield False
        return
    libc.mallopt(MMAP_THRESHOLD, LARGEST)
    libc.mallopt(TRIM_THRESHOLD, -1)  # never
    try:
        yield True
    finally:
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST)  # with the other, what glibc itself comes to after a large block
        libc.malloc_trim(0)
