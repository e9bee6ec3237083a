"""Detectors as modules or by name: a folder that transformers' save_pretrained wrote, or one on the hub."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_fast.config import Config
from vitkd_fast.detection.extra import extra
from vitkd_fast.generator import ImageSpec


def load_teacher(teacher: nn.Module | str, config: Config) -> nn.Module:
    """The module as given, or transformers' detector of that name with its weights and its images' normalisation.

    Raises:
        ValueError: a checkpoint is given; a folder of transformers has its weights in it.
        RuntimeError: there is no such model, or it has no weights.
    """
    if config.teacher_checkpoint is not None:
        raise ValueError(
            "teacher_checkpoint goes with timm's classifiers; give a detector as a module with its weights, or as a "
            "folder that save_pretrained wrote."
        )
    if isinstance(teacher, nn.Module):
        return teacher
    with extra():
        from transformers import AutoImageProcessor, AutoModelForObjectDetection
    try:
        loaded: Any = AutoModelForObjectDetection.from_pretrained(teacher, output_loading_info=True)
    except Exception as error:  # hub, network and file errors share no base class
        raise RuntimeError(f"No detector {teacher!r}: {_first_line(error)}. {ACCEPTED}") from error
    model, info = loaded
    model.float()  # weights may be saved in half precision
    if lacking := sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]):
        raise RuntimeError(
            f"{teacher!r} has no weights of a detector for {', '.join(lacking[:3])}{', …' * (len(lacking) > 3)}: they "
            f"would be random. {ACCEPTED}"
        )
    try:
        processor = AutoImageProcessor.from_pretrained(teacher)
    except Exception:  # a model saved without one: mean= and std= say it, or those of timm's default hold
        return model
    if processor.do_normalize:
        model.pretrained_cfg = {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    else:
        model.pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}
    return model


def create_student(student: nn.Module | str, spec: ImageSpec, classes: int) -> nn.Module:
    """The module as given, or an untrained detector of that name's configuration for the teacher's images.

    Raises:
        RuntimeError: there is no such configuration.
    """
    if isinstance(student, nn.Module):
        return student
    with extra():
        from transformers import AutoConfig, AutoModelForObjectDetection
    try:
        config: Any = AutoConfig.from_pretrained(student)
    except Exception as error:
        raise RuntimeError(f"No detector {student!r}: {_first_line(error)}. {ACCEPTED}") from error
    config.num_labels, config.num_channels = classes, spec.channels
    if hasattr(config, "image_size"):
        config.image_size = [spec.height, spec.width]
    model: Any = AutoModelForObjectDetection.from_config(config).float()
    tell_apart(model)
    model.pretrained_cfg = {"mean": spec.mean, "std": spec.std}
    return model


def tell_apart(model: Any) -> None:
    """Random queries, and places that say where they are, for an untrained YOLOS: transformers makes all of them 0, and
    what starts alike stays alike for long.

    With places drawn from N(0, 0.02²), as timm draws them, boxes were half as far off again after 1,000 steps on scenes
    of digits; from an amplitude of 1 on, the patches' content is lost beside them.
    """
    embeddings: Any = getattr(getattr(model, "vit", None), "embeddings", None)
    if hasattr(embeddings, "detection_tokens"):
        places = embeddings.position_embeddings  # (1, class token + patches + queries, D)
        cut = embeddings.patch_embeddings
        rows, columns = (side // patch for side, patch in zip(cut.image_size, cut.patch_size))
        nn.init.normal_(embeddings.detection_tokens)
        nn.init.normal_(places, std=0.02)
        with torch.no_grad():
            places[0, 1 : 1 + rows * columns] += 0.3 * sines(rows, columns, places.shape[-1])


def sines(rows: int, columns: int, width: int) -> Tensor:
    """(rows · columns, width) sines and cosines of row and column at falling frequencies (Vaswani et al. 2017; in two
    dimensions He et al. 2022, MAE); what is left of a width that 4 does not divide is 0."""
    frequency = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    of_row, of_column = (
        torch.cat((angle.sin(), angle.cos()), 1)
        for angle in (torch.arange(count)[:, None] * frequency for count in (rows, columns))
    )
    both = torch.cat((of_row.repeat_interleave(columns, 0), of_column.repeat(rows, 1)), 1)
    return F.pad(both, (0, width - both.shape[1]))


ACCEPTED = "Give an nn.Module, a folder that save_pretrained wrote, or a name on the Hugging Face hub."


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
