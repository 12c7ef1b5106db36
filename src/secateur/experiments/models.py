"""From a name, as on the command line or in a grid, to a model, an example input, and how its images are normalised."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.allocation.plan import Plan, restore_inputs
from secateur.experiments.base_models import BASE_MODELS
from secateur.surgery import ModelSource, build_model, load, source_of
from secateur.surgery.checkpoint import MANIFEST, PLAN
from secateur.surgery.sources import Weights, parse

Colours = tuple[float, float, float]


@dataclass(frozen=True)
class Opened:
    """A model with an input that it takes; `source` is None for a model that was saved after a cut.

    `mean` and `std` are those of the images that it was trained on, None if nothing is known of them.
    """

    model: nn.Module
    inputs: Any
    source: ModelSource | None
    mean: Colours | None = None
    std: Colours | None = None


def is_saved(name: str) -> bool:
    """Whether a name is a directory written by `secateur.save` (or one that looks like it)."""
    return (Path(name) / MANIFEST).is_file()


def open_model(
    name: str, *, random_weights: bool, img_size: int | None = None, num_classes: int | None = None
) -> Opened:
    """Returns the model that `name` stands for (see `ModelSource`), or the one saved in a directory of that name.

    Raises:
        InputError: The name is unknown, or there are no pretrained weights and `random_weights` was not said.
        CheckpointError: The directory is corrupt.
    """
    if is_saved(name):
        model = load(name)
        return Opened(model, restore_inputs(Plan.from_json((Path(name) / PLAN).read_text("utf-8")).inputs), None)
    if not random_weights or "/" in name:
        go_offline_if_unreachable()
    source = parse(name, img_size=img_size, num_classes=num_classes)
    weights: Weights = "random" if random_weights else "pretrained"
    model = build_model(source, weights)
    shape = _input_shape(model, source, img_size)
    # A configuration is kept whole, so that the saved model can be built without the hub it came from.
    kept = source_of(model) if source.kind == "transformers" else source
    return Opened(model, torch.zeros(1, *shape), kept, *_normalisation(model, source, weights))


def check_name(name: str) -> None:
    """Raises InputError unless `name` stands for a base model or one of a library, as far as that is known offline."""
    if name not in BASE_MODELS:
        parse(name)


def go_offline_if_unreachable() -> None:
    """Tells the Hugging Face client to look into its cache only, if the hub does not answer within seconds.

    It would otherwise try for most of a minute. The variable is read when that client is imported, so this comes first.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if "HF_HUB_OFFLINE" in os.environ:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return  # It answers, if only to refuse this request.
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _input_shape(model: nn.Module, source: ModelSource, img_size: int | None) -> tuple[int, int, int]:
    """Returns channels, height and width of the images that a model takes."""
    channels, sides = 3, (224, 224)
    if source.kind == "timm":
        channels, *sides = getattr(model, "pretrained_cfg", {}).get("input_size", (channels, *sides))
    elif source.kind == "transformers":
        config = getattr(model, "config", None)
        channels = getattr(config, "num_channels", channels)
        size = getattr(config, "image_size", sides[0])
        sides = (size, size) if isinstance(size, int) else size
    else:
        sides = (getattr(model, "image_size", 224),) * 2
    height, width = (img_size, img_size) if img_size else sides
    return channels, height, width


def _normalisation(model: nn.Module, source: ModelSource, weights: Weights) -> tuple[Colours | None, Colours | None]:
    """Returns mean and std per channel (of values in 0..1) that the weights were trained with, as far as it is told."""
    if weights == "random":
        return None, None
    if source.kind == "timm":
        published = getattr(model, "pretrained_cfg", {})
        return published.get("mean"), published.get("std")
    if source.kind == "transformers":
        import transformers

        processor: Any = transformers.AutoImageProcessor.from_pretrained(source.name)
        return tuple(processor.image_mean), tuple(processor.image_std)
    return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
