"""Detectors that choose queries of what their encoder proposes: what they make on the way is taught, too."""

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("scipy")
pytest.importorskip("transformers")

import transformers
from tiny_detectors import CLASSES, QUERIES, detr, yolos

from vitkd_fast.detection.adaptors import look
from vitkd_fast.detection.objectives import found, overlap, placed
from vitkd_fast.objectives import Scene, View

SIDE = 128
SEEN = {"RTDetr": 3, "RTDetrV2": 3, "LwDetr": 1, "Deformable DETR": 2, "two-stage Deformable DETR": 3}  # views


def of_kind(kind):
    torch.manual_seed(0)
    if "Deformable" in kind:
        two_stage = kind.startswith("two-stage")
        backbone = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1] * 3, layer_type="basic",
            out_features=["stage1", "stage2", "stage3"],
        )  # fmt: skip
        model = detr(
            kind="DeformableDetr", backbone_config=backbone, d_model=32, two_stage=two_stage, with_box_refine=True,
            two_stage_num_proposals=QUERIES, num_feature_levels=3, decoder_layers=3,
        )  # fmt: skip
    elif kind == "LwDetr":
        vit = transformers.LwDetrViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, pretrain_image_size=SIDE,
            patch_size=16, window_block_indices=[0], num_windows=4, out_features=["stage1", "stage2"],
        )  # fmt: skip
        model = transformers.LwDetrForObjectDetection(
            transformers.LwDetrConfig(
                backbone_config=vit, d_model=16, num_queries=QUERIES, decoder_layers=2, decoder_self_attention_heads=2,
                decoder_cross_attention_heads=2, decoder_ffn_dim=32, group_detr=3, projector_scale_factors=[1.0],
                num_labels=CLASSES,
            )
        )  # fmt: skip
    else:
        resnet = transformers.RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )  # fmt: skip
        config = getattr(transformers, f"{kind}Config")(
            backbone_config=resnet, encoder_hidden_dim=16, encoder_in_channels=[16, 24, 32], feat_strides=[8, 16, 32],
            encoder_layers=1, encoder_ffn_dim=32, encoder_attention_heads=2, d_model=16, num_queries=QUERIES,
            decoder_in_channels=[16] * 3, decoder_ffn_dim=32, decoder_layers=3, decoder_attention_heads=2,
            decoder_n_points=2, num_denoising=4, num_labels=CLASSES, anchor_image_size=None,
        )  # fmt: skip
        model = getattr(transformers, f"{kind}ForObjectDetection")(config)
    model.pretrained_cfg = {"input_size": (3, SIDE, SIDE), "mean": (0.5,), "std": (0.25,)}
    return model


@pytest.mark.parametrize("kind", SEEN)
def test_proposals_and_layers_before_the_last_are_seen(kind):
    model = of_kind(kind)
    seen = look(model.train(), torch.rand(2, 3, SIDE, SIDE))
    assert len(seen.earlier) == SEEN[kind]
    for place, view in enumerate(seen.earlier):
        classes = 1 if kind.startswith("two-stage") and place == 0 else CLASSES
        assert view.logits.shape == (2, QUERIES, classes + 1) and view.boxes.shape == (2, QUERIES, 4)
        assert (view.boxes > -1).all() and (view.boxes < 2).all()
        torch.testing.assert_close(view.logits.exp().sum(-1), torch.ones(2, QUERIES))


@pytest.mark.parametrize("model", [yolos, detr], ids=["YOLOS", "DETR"])
def test_others_have_none(model):
    model = model(channels=3, size=32) if model is yolos else model()
    assert list(look(model, torch.rand(1, 3, 32, 32)).earlier) == []


HEADS = {
    "RTDetr": ("enc_score_head", "enc_bbox_head", "enc_output", "decoder.class_embed", "decoder.bbox_embed"),
    "RTDetrV2": ("enc_score_head", "enc_bbox_head", "enc_output", "decoder.class_embed", "decoder.bbox_embed"),
    "LwDetr": ("enc_out_class_embed.0", "enc_out_bbox_embed.0", "enc_output.0", "enc_output_norm.0"),
    "Deformable DETR": ("decoder.bbox_embed.0", "decoder.bbox_embed.1", "decoder.bbox_embed.2"),
    "two-stage Deformable DETR": (
        "decoder.class_embed.3",
        "decoder.bbox_embed.3",
        "enc_output",
        "decoder.bbox_embed.0",
    ),
}


@pytest.mark.parametrize("kind", SEEN)
def test_what_proposes_and_refines_learns(kind):
    torch.manual_seed(0)
    student, images = of_kind(kind).train(), torch.rand(4, 3, SIDE, SIDE)
    with torch.no_grad():
        teacher = look(yolos(channels=3, size=SIDE, queries=8), images)
    scene = Scene(images, teacher, look(student, images), None, None)
    (found(scene) + placed(scene) + overlap(scene)).backward()
    for head in HEADS[kind]:
        weights = [weight for name, weight in student.named_parameters() if f"model.{head}" in name]
        assert weights and all(weight.grad is not None for weight in weights), head
        assert any(weight.grad.any() for weight in weights), head


def test_layers_of_deformable_detr_are_its_own():
    """Their boxes, which the output has without a gradient."""
    model = of_kind("Deformable DETR").eval()
    images = torch.rand(2, 3, SIDE, SIDE)
    seen, output = look(model, images), model(images)
    for layer, view in enumerate(seen.earlier):
        torch.testing.assert_close(view.boxes, output.intermediate_reference_points[:, layer])
    torch.testing.assert_close(seen.boxes, output.intermediate_reference_points[:, -1])


def test_the_same_is_asked_of_all():
    torch.manual_seed(0)
    teacher, first, last = (View(torch.randn(2, 6, 4), boxes=torch.rand(2, 6, 4)) for _ in range(3))
    alone = [Scene(torch.zeros(2), teacher, view, None, None) for view in (first, last)]
    both = Scene(torch.zeros(2), teacher, View(last.logits, boxes=last.boxes, earlier=[first]), None, None)
    for objective in (found, placed, overlap):
        torch.testing.assert_close(objective(both), objective(alone[0]) + objective(alone[1]))
