"""The small base models of the demo: a ViT, a DeiT and a BEiT for digits-dg, trained on its source domains.

They are built from timm's own classes (a pre-norm ViT; a distilled ViT with two tokens and two heads; a BEiT with
relative position biases, layer scale and mean pooling), each with six blocks of width 96, six heads of 16 and an MLP
of 192, on 32 x 32 pixels in patches of 8.

Their weights are shipped with the package, as safetensors of 16-bit floats, one file per model and unseen domain. They
were made by `scripts/train_base_models.py` from the train part of the source domains under split seed 0 alone: neither
the unseen domain nor the source validation images were trained on. Under another split seed the validation part holds
images that a base model has been trained on, and source validation accuracy is too high by that; the test part is
always clean.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from secateur.errors import CheckpointError, InputError, unknown_name

_SHAPE: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 10,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 6,
    "mlp_ratio": 2.0,
}


def _vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**_SHAPE)


def _deit() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**_SHAPE)


def _beit() -> nn.Module:
    from timm.models.beit import Beit

    return Beit(**_SHAPE, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)


BASE_MODELS: dict[str, Callable[[], nn.Module]] = {"vit_digits": _vit, "deit_digits": _deit, "beit_digits": _beit}
"""Builders of the base models, with random weights from torch's global generator."""


def base_model(name: str, unseen: str | None, *, weights: bool = True) -> nn.Module:
    """Returns a base model in eval mode, for images of 3 x 32 x 32 and ten classes.

    `unseen` is the domain that its weights were not trained on; None stands for the pooled split, which leaves out
    none. With `weights=False` they are random, and always the same.

    Raises `InputError` for an unknown name or a domain for which no weights are shipped, `CheckpointError` if the
    shipped file is damaged.
    """
    if name not in BASE_MODELS:
        raise unknown_name("base model", name, BASE_MODELS)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = BASE_MODELS[name]().eval()
    if weights:
        _load_(model, name, unseen)
    return model


def weights_file(name: str, unseen: str | None) -> str:
    """Returns the name of the file that holds the weights of a base model for an unseen domain."""
    return f"{name}-{unseen or 'pooled'}.safetensors"


def check_shipped(name: str, unseen: str | None, without: str | None = None) -> None:
    """Raises `InputError` unless weights of a base model are shipped that saw neither of two domains."""
    if without is not None:
        raise InputError(
            f"all weights of {name} that are shipped saw {without} or {unseen}, so a fold of cross-validation without "
            "both cannot start from them; ask for weights: random"
        )
    _shipped(name, unseen)


def _shipped(name: str, unseen: str | None) -> Traversable:
    folder = files("secateur.experiments") / "weights"
    resource = folder / weights_file(name, unseen)
    if not resource.is_file():
        shipped = [f.name for f in folder.iterdir() if f.name.startswith(f"{name}-")] if folder.is_dir() else []
        known = [each.removeprefix(f"{name}-").removesuffix(".safetensors") for each in shipped]
        wrong = unknown_name("unseen domain", unseen, known) if unseen else "the pooled split has none."
        raise InputError(
            f"no weights of {name} are shipped: {wrong} Make them with scripts/train_base_models.py from the "
            "repository, or ask for weights=False"
        )
    return resource


def _load_(model: nn.Module, name: str, unseen: str | None) -> None:
    with as_file(_shipped(name, unseen)) as path:
        try:
            state = {key: value.float() for key, value in load_file(path).items()}
            model.load_state_dict(state)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"the weights shipped as {path} are damaged or of another model: {error}") from error
