"""A run that was stopped goes on: all that its next step depends on, in one file of its folder."""

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from vitkd_fast.config import Config
from vitkd_fast.models import digest, digest_of_learning
from vitkd_fast.pair import Pair
from vitkd_fast.run import SAVED

DRAFT = ".new"  # what a save is called until all of it is written
FREE = (  # settings that may change on the way: no step depends on them
    *("out", "overwrite", "resume", "save_minutes", "progress", "log_every", "evaluate_every", "max_skipped"),
    *("device", "teacher_checkpoint"),  # the teacher is known by its weights
)


class Stateful(Protocol):
    """torch's way of saying what a thing remembers."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Saves:
    """Writes the state of the `parts` of a run to its folder, whole or not at all, and reads it back.

    Nothing is written where the run has no folder, or `save_minutes` is 0.
    """

    def __init__(self, config: Config, pair: Pair, parts: Mapping[str, Stateful]) -> None:
        self.config, self.pair, self.parts = config, pair, parts
        self.path = config.out.absolute() / SAVED if config.out is not None else None
        self.identity: dict[str, Any] | None = None
        self.last = time.monotonic()
        self.proven = False

    def restore(self) -> bool:
        """Bring the parts to where the run in the folder was saved; without one, False, they stay as they are.

        Raises:
            ValueError: it is another run, by its settings or networks, or its file cannot be read.
        """
        if self.path is None or not self.config.resume or not self.path.exists():
            return False
        try:
            saved = torch.load(self.path, self.pair.device, weights_only=True)
            was, state, random = saved["identity"], saved["state"], saved["random"]
        except Exception as error:
            raise ValueError(
                f"{self.path} cannot be read ({type(error).__name__}: {error}), so the run cannot go on; "
                f"pass overwrite=True (--overwrite) instead of resume to begin anew."
            ) from error
        self._check(was)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(random["cpu"].cpu())
        if random["cuda"] is not None and self.pair.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"].cpu(), self.pair.device)
        return True

    def step(self) -> None:
        """Save if it is time to."""
        if self.config.save_minutes and time.monotonic() - self.last >= 60 * self.config.save_minutes:
            self.save()

    def save(self) -> bool:
        """Whether the run is now saved. If it cannot be, a note says why; that must not end the run."""
        if self.path is None or not self.config.save_minutes:
            return False
        device, draft = self.pair.device, self.path.with_suffix(DRAFT)
        try:
            content = {
                "identity": self._identity(),
                "state": {name: part.state_dict() for name, part in self.parts.items()},
                "random": {
                    "cpu": torch.get_rng_state(),
                    "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                },
            }
            torch.save(content, draft)
            self._prove(draft)
            os.replace(draft, self.path)
        except Exception as error:  # a full disk; but also what pickle says of a part of the user's own
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            why = error.__context__  # of torch's "unexpected pos"
            cause = why if isinstance(why, OSError) else error
            note = "the run could not be saved: "
            if not any(told.startswith(note) for told in self.pair.notes):
                self.pair.notes.append(note + (str(cause) or type(cause).__name__).splitlines()[0])
            return False
        finally:
            self.last = time.monotonic()
        return True

    def _prove(self, draft: Path) -> None:
        """Read the first save back: what a part of the user's own remembers may be more than plain data and tensors."""
        if not self.proven:
            torch.load(draft, "cpu", weights_only=True, mmap=True)
            self.proven = True

    def there(self) -> bool:
        """Whether this run has been saved: a new one begins by clearing away what another left."""
        return self.path is not None and self.path.exists()

    def discard(self) -> None:
        """Of a run that is complete there is nothing to go on with."""
        if self.path is not None:
            for path in (self.path, self.path.with_suffix(DRAFT)):
                path.unlink(missing_ok=True)

    def _identity(self) -> dict[str, Any]:
        if self.identity is None:
            facts = self.pair.teacher_facts, self.pair.student_facts
            settings = {name: value for name, value in self.config.to_dict().items() if name not in FREE}
            self.identity = settings | {
                "teacher": f"{facts[0].name} with weights {digest(self.pair.teacher)}",
                "student": f"{facts[1].name} with {facts[1].parameters:,} parameters",
                "student's images": str(self.pair.convert.student),
                "weights that learn": digest_of_learning(self.pair.student),
            }
        return self.identity

    def _check(self, was: dict[str, Any]) -> None:
        now = self._identity()
        differing = [name for name in (*now, *was) if now.get(name) != was.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{self.path} is of a run whose {name} was {was.get(name)}, and now it is {now.get(name)}; to go on "
                f"it must be the same. Choose another folder, or pass overwrite=True instead of resume to begin anew."
            )
