"""Libraries that only detection needs, and what to say where one is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra() -> Iterator[None]:
    """Around imports from the extra `detection`; the ImportError says how to get it."""
    try:
        yield
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError when it does not fit the torch
        raise ImportError(
            f'Detection needs a library that cannot be imported here: {error}. pip install "vitkd_fast[detection]"'
        ) from error
