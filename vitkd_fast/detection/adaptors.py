"""Detectors of any make, seen alike: class logits with "nothing" last, boxes and, where there are any, patch tokens.

Detectors of transformers (DETR and its family, YOLOS) are known. For one of your own, register a function of the model
and (B, C, H, W) images:

    @adaptor(MyDetector)
    def look(model, images):
        scores, boxes = model(images)  # (B, Q, classes) before their sigmoid, (B, Q, 4) corners in pixels
        boxes = from_corners(boxes, *images.shape[-2:])
        return View(from_sigmoid(scores), boxes=boxes, scores=scores.sigmoid())
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_fast.models import unwrapped
from vitkd_fast.objectives import View

Adaptor = Callable[[Any, Tensor], View]
Given = TypeVar("Given", bound=Adaptor)
ADAPTORS: dict[type[nn.Module], Adaptor] = {}
HOW = "register a function for it, see vitkd_fast.detection.adaptors"


def adaptor(kind: type[nn.Module]) -> Callable[[Given], Given]:
    """Register a function (model, images) -> View for models of this class and its subclasses."""

    def register(function: Given) -> Given:
        ADAPTORS[kind] = function
        return function

    return register


def look(model: nn.Module, images: Tensor) -> View:
    """What a detector finds in (B, C, H, W) images.

    Raises:
        ValueError: its output is not understood.
    """
    known = (ADAPTORS[kind] for kind in type(unwrapped(model)).__mro__ if kind in ADAPTORS)
    view = next(known, of_transformers)(model, images)
    logits, boxes = view.logits, view.boxes
    if boxes is None or logits.dim() != 3 or boxes.shape != (*logits.shape[:2], 4):
        shapes = tuple(logits.shape), None if boxes is None else tuple(boxes.shape)
        raise ValueError(
            f"{type(model).__name__} gives logits and boxes of shapes {shapes[0]} and {shapes[1]}; accepted: (batch, "
            f"queries, classes + 1) and (batch, queries, 4). If they are in another form, {HOW}."
        )
    return view


def of_transformers(model: Any, images: Tensor) -> View:
    """An output with `logits` and `pred_boxes`, as all of transformers' detectors give.

    Their logits are of one class more than the model has where the last is of there being nothing (DETR, YOLOS), and
    before a sigmoid where they are as many (Deformable DETR, RT-DETR, …). The tokens are the patches': YOLOS' last, or
    those that an encoder hands to its decoder.
    """
    output, inner = model(images), unwrapped(model)
    config = getattr(inner, "config", None)
    logits, boxes = (output.get(name) if isinstance(output, dict) else None for name in ("logits", "pred_boxes"))
    if not isinstance(logits, Tensor) or not isinstance(boxes, Tensor):
        given = f"a dict of {', '.join(map(str, output))}" if isinstance(output, dict) else type(output).__name__
        raise ValueError(
            f"{type(model).__name__} gives {given}, not an output with logits and pred_boxes as transformers' "
            f"detectors do; {HOW}."
        )
    classes = getattr(config, "num_labels", None)
    if classes not in (logits.shape[-1], logits.shape[-1] - 1):
        raise ValueError(
            f"{type(model).__name__} gives {logits.shape[-1]} logits per query and its config says {classes} classes, "
            f"so whether one of them is of there being nothing is not known; {HOW}."
        )
    tokens, scores = _patches(output, logits.shape[1]), None
    queries = getattr(config, "num_queries", None)
    if model.training and logits.shape[1] == getattr(config, "group_detr", 1) * (queries or 0):
        logits, boxes = logits[:, :queries], boxes[:, :queries]  # the group that is left when training is over
    earlier = _earlier(inner, output, logits.shape[1]) if torch.is_grad_enabled() else []  # nobody else learns by it
    if classes == logits.shape[-1]:
        logits, scores = from_sigmoid(logits), logits.sigmoid()
    return View(logits, tokens, boxes=boxes, scores=scores, earlier=earlier)


def _earlier(model: Any, output: Any, queries: int) -> list[View]:
    """What the encoder proposes as queries, and what all layers of the decoder but the last make of them, where that
    goes into the answer. Deformable DETR's proposals say by their first logit whether they are anything, and no class.
    """
    found = []
    for names in (("enc_topk_logits", "enc_topk_bboxes"), ("enc_outputs_class", "enc_outputs_coord_logits")):
        logits, boxes = map(output.get, names)
        if isinstance(logits, Tensor) and isinstance(boxes, Tensor):  # of RT-DETR and D-FINE the former
            if getattr(model.config, "two_stage", False):
                logits, boxes = logits[..., :1], boxes.sigmoid()
                surest = logits.topk(min(queries, logits.shape[1]), dim=1).indices
                logits, boxes = logits.gather(1, surest), boxes.gather(1, surest.expand(-1, -1, 4))
            # LW-DETR's and RF-DETR's are boxes already, whatever they are called, and those of several groups.
            found.append((logits[:, :queries], boxes[:, :queries]))
            break
    logits, boxes = map(output.get, ("intermediate_logits", "intermediate_reference_points"))
    if isinstance(logits, Tensor) and isinstance(boxes, Tensor):
        found += list(zip(logits[:, :-1].unbind(1), boxes[:, :-1].unbind(1)))
    elif getattr(model.config, "with_box_refine", False) and hasattr(model, "bbox_embed"):
        found += _refined(model, output)
    return [View(from_sigmoid(logits), boxes=boxes) for logits, boxes in found]


def _refined(model: Any, output: Any) -> list[tuple[Tensor, Tensor]]:
    """Deformable DETR's layers but the last, worked out once more: its output has their boxes without a gradient."""
    first, later = output["init_reference_points"], output["intermediate_reference_points"]
    found = []
    for level, hidden in enumerate(output["intermediate_hidden_states"][:, :-1].unbind(1)):
        reference = torch.logit(first if level == 0 else later[:, level - 1], eps=1e-5)
        moved = model.bbox_embed[level](hidden)
        boxes = moved + F.pad(reference, (0, moved.shape[-1] - reference.shape[-1]))  # or of a point, without a size
        found.append((model.class_embed[level](hidden), boxes.sigmoid()))
    return found


def _patches(output: Any, queries: int) -> Tensor | None:
    """(B, patches, D); the last tokens of YOLOS have a class token before them and the queries after them."""
    encoded, last = output.get("encoder_last_hidden_state"), output.get("last_hidden_state")
    if encoded is None and last is not None and last.shape[1] > queries + 1:
        encoded = last[:, 1:-queries]
    return encoded if isinstance(encoded, Tensor) and encoded.dim() == 3 else None


def from_sigmoid(logits: Tensor) -> Tensor:
    """(B, Q, classes) logits of independent classes as (B, Q, classes + 1) log-probabilities, the last of nothing.

    There is an object as surely as the surest class says; which one it is, the classes share in proportion.
    """
    log_p = F.logsigmoid(logits.float())
    surest, at = log_p.max(-1, keepdim=True)
    nothing = F.logsigmoid(-logits.float().gather(-1, at))
    return torch.cat((surest + log_p - log_p.logsumexp(-1, keepdim=True), nothing), -1)


def from_corners(boxes: Tensor, height: int, width: int) -> Tensor:
    """(…, 4) left, top, right, bottom in pixels of an image as centres and sizes in [0, 1] of its sides."""
    from torchvision.ops import box_convert

    x, y, w, h = box_convert(boxes, "xyxy", "cxcywh").unbind(-1)
    return torch.stack((x / width, y / height, w / width, h / height), -1)  # no tensor of sides: a GPU would wait
