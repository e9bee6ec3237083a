"""The smallest detectors of transformers that the tests need, with random weights and nothing downloaded."""

import pytest
import torch
from torch import nn

from vitkd_fast.detection.adaptors import look
from vitkd_fast.detection.objects import Objects
from vitkd_fast.detection.task import objects_of

SIZE, CLASSES, QUERIES = 16, 3, 5


def yolos(
    width: int = 16,
    depth: int = 2,
    queries: int = QUERIES,
    seed: int = 0,
    size: int = SIZE,
    channels: int = 1,
    classes: int = CLASSES,
):
    """A YOLOS of (B, 1, 16, 16) images in patches of 4×4."""
    transformers = pytest.importorskip("transformers")
    config = transformers.YolosConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=2 * width,
        image_size=[size, size],
        patch_size=4,
        num_channels=channels,
        num_detection_tokens=queries,
        use_mid_position_embeddings=False,
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = transformers.YolosForObjectDetection(config)
        nn.init.normal_(model.vit.embeddings.detection_tokens)
        nn.init.normal_(model.vit.embeddings.position_embeddings)
        for name, weight in model.named_parameters():
            if name.endswith("weight") and weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    model.pretrained_cfg = {"mean": (0.5,), "std": (0.25,)}
    return model.eval()


def detr(queries: int = QUERIES, seed: int = 0, kind: str = "Detr", **options):
    """A DETR, or one of its kin, of (B, 3, 32, 32) images with a timm-free convolutional backbone."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": backbone,
        "num_queries": queries,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "num_labels": CLASSES,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes | options)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForObjectDetection")(config)
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,), "std": (0.25,)}
    return model.eval()


QUICK = {
    "task": "detection",
    "steps": 6,
    "batch_size": 4,
    "pool": 32,
    "width": 8,
    "latent": 8,
    "log_every": 3,
    "progress": False,
}


def teacher(**options):
    return yolos(width=16, depth=2, seed=0, **options)


def student(**options):
    return yolos(width=8, depth=1, seed=1, **options)


def objects(*boxes, labels=None):
    labels = [0] * len(boxes) if labels is None else labels
    return Objects(torch.tensor(boxes).view(-1, 4), torch.tensor(labels))


def real(count=40):
    """Images, and what the teacher finds in them."""
    torch.manual_seed(5)
    model, pixels = teacher(), torch.rand(count, 1, SIZE, SIZE)
    with torch.no_grad():
        found = objects_of(look(model, (pixels - 0.5) / 0.25), least=0.5)
    return [(image, Objects(some.boxes, some.labels)) for image, some in zip(pixels, found)]
