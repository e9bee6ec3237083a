"""What to say of a name that nobody knows."""

import difflib
from collections.abc import Iterable


def suggestion(name: object, known: Iterable[str], word: str = "known") -> str:
    """The nearest known name as a question, else all of them: the end of an error message."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, 1)
    return f"did you mean {near[0]}?" if near else f"{word}: {', '.join(known)}."
