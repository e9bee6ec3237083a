"""`vitkd doctor`: what this machine offers, and which implementation each op will use on it."""

import platform
from dataclasses import asdict, dataclass

import torch

from vitkd_fast import backends
from vitkd_fast._version import __version__
from vitkd_fast.ops._library import OPS


@dataclass
class Report:
    """What `doctor` found; `str` of it is the text that `vitkd doctor` prints, `asdict` the same as data."""

    versions: dict[str, str]
    devices: dict[str, str]
    libraries: dict[str, str]
    ops: dict[str, dict[str, str]]  # op -> device type -> implementation and reason

    asdict = asdict

    def __str__(self) -> str:
        lines = []
        for title, rows in (("versions", self.versions), ("devices", self.devices), ("libraries", self.libraries)):
            lines += [title, *(f"  {name:<12} {text}" for name, text in rows.items())]
        lines.append("ops")
        for op, choices in self.ops.items():
            lines += [f"  {op:<20} {device:<5} {text}" for device, text in choices.items()]
        return "\n".join(lines)


def doctor() -> Report:
    """Look at torch, devices, instruction sets and libraries, and at what every op will run here and why."""
    cuda = torch.cuda.is_available()
    devices = {"cpu": _cpu()}
    for index in range(torch.cuda.device_count()) if cuda else ():
        facts = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
    if not cuda:
        devices["cuda"] = "no device" if torch.version.cuda else "this torch is built without CUDA"
    return Report(
        versions={"vitkd_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
        | {name: _version(name) for name in ("triton", "timm")},
        devices=devices,
        libraries={name: f"not used: {why}" if why else "loaded" for name, why in backends.libraries().items()}
        | {"built with": _build()},
        ops={op: {device: _choice(op, device) for device in ("cpu", "cuda")} for op in OPS},
    )


def _choice(op: str, device: str) -> str:
    name, reason = backends.implementation(op, device)
    return f"{name}: {reason}"


def _cpu() -> str:
    text = f"{platform.machine()}, {torch.get_num_threads()} threads"
    try:
        from vitkd_fast import _facts
    except ImportError:
        return text
    sets = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in _facts.cpu().items())
    return f"{text}; {sets}"


def _build() -> str:
    try:
        from vitkd_fast import _facts
    except ImportError as error:
        return f"unknown: {error}"
    facts = _facts.build()
    cuda = facts["cuda_architectures"].replace("·", " ") or "none"
    return f"torch {facts['torch']}, compiler {facts['compiler']}, CUDA architectures: {cuda}"


def _version(package: str) -> str:
    """Without importing it: timm takes seconds, and fails beside a torch that its torchvision does not match."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
