"""The PEP 517 backend: setuptools', but asking for torch only where there is none to build against."""

import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

sys.path.insert(0, str(Path(__file__).parent))

from environment import MINIMUM_TORCH, find_torch

_TORCH = [] if find_torch() else [f"torch>={'.'.join(map(str, MINIMUM_TORCH))}"]


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_TORCH]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *_TORCH]
