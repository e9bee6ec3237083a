"""What the build finds on this machine: the torch to compile against, and what the package must therefore require.

torch is found as files, not imported: under pip's build isolation it is not importable, yet the environment being
installed into is still where `sysconfig` says, and a compiler needs its headers only. The Stable ABI makes the result
load under other versions of torch as well.
"""

import re
import sys
import sysconfig
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

MINIMUM_TORCH = (2, 10)


@dataclass
class Torch:
    root: Path  # the folder of the package
    version: str
    cuda: bool  # a build with CUDA: its torchvision can be had from PyPI


def find_torch() -> Torch | None:
    """The torch of the environment being installed into, else one on sys.path; None if there is none new enough."""
    return _torch_in([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path])


def _torch_in(places: list[str]) -> Torch | None:
    spec = PathFinder.find_spec("torch", places)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    facts = root / "version.py"
    if not facts.exists() or not (root / "include/torch/csrc/stable/library.h").exists():
        return None
    text = facts.read_text()
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    if version is None or _release(version[1]) < MINIMUM_TORCH:
        return None
    return Torch(root, version[1], re.search(r"^cuda\b.*= '", text, re.MULTILINE) is not None)


def runtime_requirements() -> list[str]:
    """What `pip install .` brings. A torch that is already there must survive it.

    timm needs torchvision, and each torchvision pins one torch: left to itself, pip takes the newest torchvision and
    replaces the torch. So beside an installed torch the matching torchvision is named; and beside a CPU-only torch,
    for which PyPI has no torchvision that imports, timm is left out.
    """
    requirements = [
        f"torch>={'.'.join(map(str, MINIMUM_TORCH))}",
        "numpy>=1.24",
        "pillow>=9",
        "safetensors>=0.4",
        "scikit-learn>=1.3",
        "tqdm>=4.64",
        "tyro>=0.9.1",
    ]
    site_packages = Path(sysconfig.get_path("purelib"))
    # pip beside it: a person's environment, not a throw-away one made for this build
    torch = _torch_in([str(site_packages)]) if (site_packages / "pip").is_dir() else None
    if torch is not None and not (site_packages / "torchvision").is_dir():
        if not torch.cuda:
            return requirements
        requirements.append(f"torchvision=={torchvision_release(torch.version)}.*")
    return [*requirements, "timm>=1.0.15"]


def torchvision_release(torch_version: str) -> str:
    """torchvision 0.(n + 15) is made for torch 2.n (since torch 2.0)."""
    return f"0.{_release(torch_version)[1] + 15}"


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
