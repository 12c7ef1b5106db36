"""The architectures of torchvision, with random weights: classification, segmentation and detection."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn

from zoo.catalogue import Entry

_CLASSIFICATION, _SEGMENTATION, _DETECTION = (
    torchvision.models,
    torchvision.models.segmentation,
    torchvision.models.detection,
)
_SIZES = {"inception": 299, "googlenet": 299, "vision_transformer": 224, "maxvit": 224, "swin_transformer": 224}
_SIZE = 128

# Random weights are sure of nothing: without a threshold of zero no box, mask or keypoint would ever be computed.
_REGIONS: dict[str, Any] = {
    "min_size": _SIZE,
    "max_size": _SIZE,
    "rpn_pre_nms_top_n_test": 50,
    "rpn_post_nms_top_n_test": 20,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 5,
}
_ANCHORS: dict[str, Any] = {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 20}
_OPTIONS: dict[str, dict[str, Any]] = {
    "inception": {"init_weights": False},
    "googlenet": {"init_weights": False},
    "faster_rcnn": _REGIONS,
    "mask_rcnn": _REGIONS,
    "keypoint_rcnn": _REGIONS,
    "retinanet": _ANCHORS | {"min_size": _SIZE, "max_size": _SIZE},
    "fcos": _ANCHORS | {"min_size": _SIZE, "max_size": _SIZE},
    "ssd": _ANCHORS,
    "ssdlite": _ANCHORS,
}


def image_batch(_: nn.Module, size: int) -> torch.Tensor:
    """Returns two random images in one tensor."""
    return torch.randn(2, 3, size, size)


def image_list(_: nn.Module) -> tuple[list[torch.Tensor]]:
    """Returns two random images as a list, as detectors take them."""
    return ([torch.rand(3, _SIZE, _SIZE) for _ in range(2)],)


def image_list_and_targets(model: nn.Module) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Returns two random images and what there is to see on them, as detectors take them in training mode."""
    targets = [
        {
            "boxes": torch.tensor([[8.0, 8.0, 64.0, 72.0], [40.0, 30.0, 120.0, 100.0]]),
            "labels": torch.tensor([1, 1]),
            "masks": torch.randint(2, (2, _SIZE, _SIZE), dtype=torch.uint8),
            "keypoints": torch.tensor([50.0, 60.0, 1.0]).expand(2, 17, 3).clone(),
        }
        for _ in range(2)
    ]
    return (*image_list(model), targets)


def _entry(name: str, weights: dict[str, None], detects: bool) -> Entry:
    family = torchvision.models.get_model_builder(name).__module__.rsplit(".")[-1]
    build = partial(torchvision.models.get_model, name, **weights, **_OPTIONS.get(family, {}))
    if detects:
        return Entry(name, "torchvision", family, build, image_list, image_list_and_targets)
    return Entry(name, "torchvision", family, build, partial(image_batch, size=_SIZES.get(family, _SIZE)))


def torchvision_architectures() -> Iterator[Entry]:
    """Yields every classification, segmentation and detection model of torchvision; the family is its module."""
    for module in (_CLASSIFICATION, _SEGMENTATION, _DETECTION):
        weights = {"weights": None} if module is _CLASSIFICATION else {"weights": None, "weights_backbone": None}
        for name in torchvision.models.list_models(module=module):
            yield _entry(name, weights, detects=module is _DETECTION)
