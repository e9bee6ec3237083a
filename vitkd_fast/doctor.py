"""`vitkd doctor`: what this machine offers, which implementations each op has on it, and which of them it will use."""

import platform
from dataclasses import asdict, dataclass

import torch

from vitkd_fast import backends, choice
from vitkd_fast._version import __version__
from vitkd_fast.ops._library import OPS
from vitkd_fast.ops.linear import faster_by_convolution


@dataclass
class Report:
    """What `doctor` found; `str` of it is the text that `vitkd doctor` prints, `asdict` the same as data."""

    versions: dict[str, str]
    devices: dict[str, str]
    libraries: dict[str, str]
    ops: dict[str, dict[str, str]]  # op -> device type -> implementation that the dispatcher has, and why
    choice: dict[str, dict[str, str]]  # GPU -> kind of call -> which of the implementations takes it, and why

    asdict = asdict

    def __str__(self) -> str:
        lines = []
        for title, rows in (("versions", self.versions), ("devices", self.devices), ("libraries", self.libraries)):
            lines += [title, *(f"  {name:<12} {text}" for name, text in rows.items())]
        lines.append("ops")
        for op, choices in self.ops.items():
            lines += [f"  {op:<20} {device:<5} {text}" for device, text in choices.items()]
        for device, choices in self.choice.items():
            lines += [f"choice on {device}", *(f"  {call:<32} {text}" for call, text in choices.items())]
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
        libraries={name: f"not used: {why}" if why else _there(name) for name, why in backends.libraries().items()}
        | {"built with": _build()},
        ops={op: {device: _implementation(op, device) for device in ("cpu", "cuda")} for op in OPS}
        | {"linear": {"cpu": _linear()}},
        choice={device: _choice(torch.device(device)) for device in devices if device != "cpu" and torch.version.cuda},
    )


def _implementation(op: str, device: str) -> str:
    name, reason = backends.implementation(op, device)
    return f"{name}: {reason}"


def _linear() -> str:
    if faster_by_convolution():
        return "oneDNN's convolution in float32, faster than MKL on AMD's Zen 5; else torch"
    return "torch: nothing is known to be faster here"


def _there(library: str) -> str:
    return "registered; imported at the first call" if library == "triton" else "loaded"


def _choice(device: torch.device) -> dict[str, str]:
    rows = {}
    for dtype in (torch.bfloat16, torch.float32):
        kind = choice.dtype_class(dtype)
        for what, widths in _attentions(device, dtype).items():
            for width, ranges in widths:
                which = f"head_dim {width}" if width else "any other head_dim" if len(widths) > 1 else "any head_dim"
                rows[f"{what}, {kind}, {which}"] = _ranges(ranges)
        rows[f"kd_loss, {kind}"] = _ranges(choice.kd_loss(device, dtype))
    return rows


def _attentions(device: torch.device, dtype: torch.dtype) -> dict[str, tuple]:
    training, inference = (choice.attention(device, dtype, gradient) for gradient in (True, False))
    return {"attention": training} | ({} if inference == training else {"attention without gradient": inference})


def _ranges(ranges: tuple[choice.Range, ...]) -> str:
    return "; ".join(f"{name}: {reason}" for _, name, reason in ranges)


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
    cuda = facts["cuda_code"].replace(",", " ") or "none"
    return f"torch {facts['torch']}, compiler {facts['compiler']}, CUDA code: {cuda}"


def _version(package: str) -> str:
    """Without importing it: timm takes seconds, and fails beside a torch that its torchvision does not match."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
