"""Checkpoints: weights out of a file without running what is in it, and into a model without leaving any behind."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model", "model_state_dict", "model_ema")  # keys that training scripts save weights under
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a safetensors or torch.save file, out of the usual wrappers; pickled code is never run."""
    if not path.is_file():
        raise FileNotFoundError(f"teacher_checkpoint {path} is not a file.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"teacher_checkpoint {path} cannot be loaded safely ({type(error).__name__}): it must hold tensors only. "
            f"Save it as torch.save(model.state_dict(), path) or as safetensors."
        ) from error
    while isinstance(state, Mapping):
        inner = next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"teacher_checkpoint {path} holds no state_dict; accepted: names to tensors, or one under "
            f"{', '.join(WRAPPERS)}."
        )
    return _without_prefixes({key: value for key, value in state.items() if isinstance(value, Tensor)})


def load_into(model: nn.Module, state: dict[str, Tensor], name: str, path: Path) -> None:
    """Load every weight of `model`; a key that is missing, left over or of another shape is an error that names it."""
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)}, {name} has {tuple(own[key].shape)}"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {_some(keys)}" for what, keys in problems.items() if keys)
        hint = " Pass image_size= (--image-size) if it was trained at another size." if "pos_embed" in told else ""
        raise ValueError(f"teacher_checkpoint {path} does not fit {name}. {told}.{hint}")
    model.load_state_dict(state)


def _some(keys: list[str], limit: int = 5) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
