"""The folder of one run: what was asked, what happened at each log point, what came out."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vitkd_fast.config import Config
from vitkd_fast.guard import Ledger, NonFiniteError
from vitkd_fast.models import unwrapped
from vitkd_fast.report import Report

FILES = ("config.json", "metrics.jsonl", "images.png", "student.safetensors", "report.json")
PRETRAINED = ("student/config.json", "student/model.safetensors")  # one of transformers', for from_pretrained
SAVED = "run.pt"  # what a run that was stopped goes on from


class RunFolder:
    """Writes nothing when `folder` is None.

    Raises:
        FileExistsError: the folder holds a run, and neither is it to be overwritten nor can it be resumed.
        OSError: it cannot be written to.
    """

    def __init__(self, folder: Path | None, overwrite: bool, resume: bool = False) -> None:
        self.folder = None if folder is None else folder.absolute()  # wherever the caller goes meanwhile
        self.overwrite = overwrite
        self.metrics: IO[str] | None = None
        self.logs = True
        if folder is not None:
            _check_writable(folder)
            if not overwrite:
                self._check_free(folder, resume)

    def _check_free(self, folder: Path, resume: bool = False) -> None:
        if (folder / SAVED).exists():
            if not resume:
                raise FileExistsError(
                    f"out={folder} holds a run that was stopped; go on with resume=True (--resume), choose another "
                    f"folder or pass overwrite=True (--overwrite)."
                )
        elif (folder / "report.json").exists():
            raise FileExistsError(
                f"out={folder} holds a finished run; choose another folder or pass overwrite=True (--overwrite)."
            )
        elif lost := self._would_be_lost(folder):
            raise FileExistsError(
                f"out={folder} holds {lost}, which the run would replace; choose another folder or pass overwrite=True "
                f"(--overwrite)."
            )

    @staticmethod
    def _would_be_lost(folder: Path) -> str | None:
        """A file that is more than what is left of a run that came to nothing."""
        there = [name for name in (*FILES, *PRETRAINED) if (folder / name).exists()]
        nothing = ("config.json", "metrics.jsonl") if "metrics.jsonl" in there and _is_of_a_run(folder) else ()
        return next((name for name in there if name not in nothing), None)

    def start(self, settings: dict[str, Any], history: Sequence[dict[str, Any]] | None = None) -> None:
        """Write down what this run was asked, and its history if it goes on; if not, clear away an earlier run.

        Raises:
            FileExistsError: another run is writing there, or has meanwhile.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._lock(self.metrics)
        if history is None:
            if not self.overwrite:
                self._check_free(self.folder)  # another run may have come and gone since
            for name in (*FILES, *PRETRAINED, SAVED):
                if name != "metrics.jsonl":
                    (self.folder / name).unlink(missing_ok=True)
        self.metrics.truncate(0)
        self._write_json("config.json", settings)
        for entry in history or ():
            self.log(entry)

    def _lock(self, file: IO[str]) -> None:
        """Until the file is closed, or the process ends however it does."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"out={self.folder} is being written to by a run that has not ended; choose another folder."
            ) from None
        except OSError:  # a file system without locks
            pass

    def log(self, entry: dict[str, Any]) -> None:
        if self.metrics and self.logs:
            self.logs = self._written(self._write_entry, entry)

    def close(self) -> None:
        """Leave the folder to others."""
        if self.metrics:
            with contextlib.suppress(OSError):  # a loader's workers, which have the file too, would keep the lock
                fcntl.flock(self.metrics, fcntl.LOCK_UN)
            with contextlib.suppress(OSError):  # an entry that could not be written
                self.metrics.close()
            self.metrics = None

    def keep(self, student: nn.Module) -> bool:
        """Save the student. Whether it is saved; if it cannot be, a warning says why, and nothing ends."""
        kept = self.folder is not None and self._written(self._write_student, student)
        if kept and hasattr(getattr(unwrapped(student), "config", None), "save_pretrained"):
            self._written(self._write_pretrained, unwrapped(student))
        return kept

    def finish(self, picture: Callable[[], Any], report: Report) -> bool:
        """Save the PIL image that `picture` makes, then the report: the mark of a finished run. Whether that is."""
        if self.folder is None:
            return False
        self._written(self._write_picture, picture)
        return self._written(self._write_report, report)

    def _written(self, write: Callable, *what: Any) -> bool:
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # it may be gone
            write(self.folder, *what)
        except Exception as error:  # a full disk; but also what safetensors cannot hold, for which it has no one error
            warn(f"out={self.folder} cannot be written to: {error}; the run goes on.")
            return False
        return True

    def _write_entry(self, folder: Path, entry: dict[str, Any]) -> None:
        assert self.metrics is not None
        self.metrics.write(json.dumps(entry) + "\n")
        self.metrics.flush()

    def _write_student(self, folder: Path, student: nn.Module) -> None:
        from safetensors.torch import save_model

        metadata = {"format": "pt"}  # transformers looks for it
        with _draft(folder / "student.safetensors") as draft:
            save_model(unwrapped(student), str(draft), metadata=metadata)

    def _write_pretrained(self, folder: Path, student: Any) -> None:
        weights = folder / PRETRAINED[1]
        weights.parent.mkdir(exist_ok=True)
        student.config.save_pretrained(weights.parent)
        shutil.copyfile(folder / "student.safetensors", weights)

    def _write_picture(self, folder: Path, picture: Callable[[], Any]) -> None:
        picture().save(folder / "images.png")

    def _write_report(self, folder: Path, report: Report) -> None:
        self._write_json("report.json", report.to_dict())

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        if self.folder:
            with _draft(self.folder / name) as draft:
                draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """Where to write what is to be at `path` whole or not at all."""
    draft = path.with_name(f"{path.name}.new")
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def _check_writable(folder: Path) -> None:
    """Before anything is loaded and trained; what does not exist is not made yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"out={folder} cannot be made: {there} is a file. Choose another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"out={folder} cannot be written to: {there} is read-only. Choose another folder.")


def _is_of_a_run(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True  # killed before it was written
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"teacher", "student", "settings"} <= config.keys()


def warn(text: str) -> None:
    """A warning that ends nothing, also where the user makes errors of warnings: what was trained would be lost."""
    with contextlib.suppress(Warning):
        warnings.warn(text, stacklevel=4)


@contextlib.contextmanager
def unstoppable() -> Iterator[None]:
    """Inside, Ctrl-C does nothing: what is being saved is saved."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears of signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)  # None: set by other than Python


def image_grid(pixels: Tensor, smallest: int = 48, columns: int = 8):
    """(B, C, H, W) in [0, 1] as one PIL image of so many columns; small ones are magnified, all but RGB become grey."""
    from PIL import Image

    pixels = nn.functional.pad(magnified(pixels, smallest), (1, 1, 1, 1), value=1.0)
    columns = min(columns, len(pixels))
    pixels = nn.functional.pad(pixels, (0, 0) * 3 + (0, -len(pixels) % columns), value=1.0)
    rows = pixels.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, 3)
    image = rows.reshape(rows.shape[0] * rows.shape[1], -1, 3).clamp(0, 1).mul(255).round()
    return Image.fromarray(image.to(torch.uint8).cpu().numpy())


def magnified(pixels: Tensor, smallest: int) -> Tensor:
    """(B, C, H, W) as (B, 3, H', W'), a whole number of times larger so that no side is below `smallest`."""
    if pixels.shape[1] != 3:
        pixels = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    zoom = -(-smallest // min(pixels.shape[-2:]))
    return pixels.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)


class Log:
    """The run's memory: at every log point, and only there, the host reads what the steps left on the device.

    Raises:
        NonFiniteError: from `step`, when more than `max_skipped` steps had to be skipped.
    """

    def __init__(self, config: Config, folder: RunFolder, ledgers: list[Ledger]) -> None:
        self.config, self.folder, self.ledgers = config, folder, ledgers
        self.history: list[dict[str, Any]] = []
        self.skipped: dict[str, int] = {}
        self.steps = 0
        self.start = self.last = time.perf_counter()
        self.bar = tqdm(total=config.steps, unit="step", dynamic_ncols=True, disable=None if config.progress else True)

    def step(self, evaluated: Callable[[], dict[str, Any]] = dict) -> None:
        """Count one student step; `evaluated` gives figures, and is asked where `evaluate_every` says."""
        self.steps += 1
        every, last = self.config.evaluate_every, self.steps == self.config.steps
        figures = evaluated() if every and self.steps % every == 0 and not last else {}
        if figures or last or self.steps % self.config.log_every == 0:
            self.read(figures)

    def read(self, figures: dict[str, Any] | None = None) -> None:
        unread = self.steps - (self.history[-1]["step"] if self.history else 0)
        means: dict[str, float] = {}
        skipped = 0  # of the generator's steps or the student's, whichever are more
        for ledger in self.ledgers:
            values, bad, steps = ledger.read()
            means |= values
            self.skipped |= bad
            skipped = max(skipped, steps)
        now = time.perf_counter()
        speed = unread * self.config.batch_size / (now - self.last)
        self.last = now
        entry: dict[str, Any] = {
            "step": self.steps,
            **means,
            "images_per_second": speed,
            "skipped": skipped,
            **({"evaluated": figures} if figures else {}),
        }
        self.history.append(entry)
        self.folder.log(entry)
        self.bar.update(unread)
        self.bar.set_postfix_str(_postfix(means, speed), refresh=False)
        if entry["skipped"] > self.config.max_skipped:
            raise NonFiniteError(self._explain())

    def close(self) -> None:
        """Read what an interrupted run left unread, and end the progress bar."""
        if self.steps > (self.history[-1]["step"] if self.history else 0):
            with contextlib.suppress(NonFiniteError):
                self.read()
        self.bar.close()

    def state_dict(self) -> dict[str, Any]:
        now = time.perf_counter()
        return {
            "steps": self.steps,
            "history": self.history,
            "skipped": self.skipped,
            "seconds": now - self.start,
            "seconds_since_entry": now - self.last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now = time.perf_counter()
        self.steps, self.history, self.skipped = state["steps"], state["history"], state["skipped"]
        self.start, self.last = now - state["seconds"], now - state["seconds_since_entry"]
        self.bar.initial = self.bar.n = self.history[-1]["step"] if self.history else 0

    @property
    def seconds(self) -> float:
        return self.last - self.start

    def _explain(self) -> str:
        terms = {name: count for name, count in self.skipped.items() if not name.endswith("_gradient")} or self.skipped
        told = ", ".join(f"{name} ({count} times)" for name, count in terms.items())
        return (
            f"Not finite by step {self.steps}: {told}. Every such step was skipped, and max_skipped is "
            f"{self.config.max_skipped}. Check that the teacher's logits are finite, lower student_lr or generator_lr, "
            f"or use precision='float32'."
        )


def _postfix(means: dict[str, float], speed: float) -> str:
    shown = [f"{name} {value:.3f}" for name, value in means.items() if not name.endswith("_gradient")]
    return ", ".join([*shown, f"{speed:,.0f} images/s"])
