"""Detectors as modules or by name: a folder that transformers' save_pretrained wrote, or one on the hub."""

from typing import Any

from torch import nn

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
        model: Any = AutoModelForObjectDetection.from_pretrained(teacher)
    except Exception as error:  # hub, network and file errors share no base class
        raise RuntimeError(f"No detector {teacher!r}: {_first_line(error)}. {ACCEPTED}") from error
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
    model: Any = AutoModelForObjectDetection.from_config(config)
    tell_apart(model)
    model.pretrained_cfg = {"mean": spec.mean, "std": spec.std}
    return model


def tell_apart(model: Any) -> None:
    """Random queries and places for an untrained YOLOS: transformers makes all of them 0, and queries that start alike
    stay alike for long."""
    embeddings: Any = getattr(getattr(model, "vit", None), "embeddings", None)
    if hasattr(embeddings, "detection_tokens"):
        nn.init.normal_(embeddings.detection_tokens)
        nn.init.normal_(embeddings.position_embeddings, std=0.02)


ACCEPTED = "Give an nn.Module, a folder that save_pretrained wrote, or a name on the Hugging Face hub."


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
