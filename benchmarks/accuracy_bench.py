"""What every part of the accuracy benchmark shares: what was asked for, how finished work is kept and progress told."""

import argparse
import hashlib
import json
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from _common import _cpu_name, _git
from accuracy_data import Data
from accuracy_models import Task


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    arguments: argparse.Namespace
    task: Task
    data: Data
    fingerprint: str
    device: torch.device

    @property
    def machine(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _cpu_name()
        return {"device": name, "threads": self.arguments.threads, "precision": self.arguments.precision}


def hash_of(asked: dict[str, Any]) -> str:
    """Names the folder in the cache: whoever asks for anything else looks in another."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:12]


def date_and_commit() -> dict[str, Any]:
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": _git("rev-parse", "HEAD")}


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """All of it or none, so that an interrupted run is not taken for a finished one."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(draft, path)


def say(text: str) -> None:
    print(text, flush=True)
