"""Sizes as they come from the command line; without torch, which not every benchmark needs."""

from collections.abc import Callable


def sizes(count: int) -> Callable[[str], tuple[int, ...]]:
    """A parser of so many whole numbers, with commas between them."""

    def shape(text: str) -> tuple[int, ...]:
        found = tuple(int(part) for part in text.split(","))
        if len(found) != count:
            raise ValueError(text)
        return found

    return shape
