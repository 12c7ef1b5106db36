"""The models that the tests run on: real architectures of three libraries, small, with random values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import timm
import torch
import torchvision
import transformers
from torch import nn

from secateur import Network, Scores

IMAGE = (1, 3, 64, 64)


def _timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=7, **options)


def _hf(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(num_labels=7, **options))

    return build


_TOKENS = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "image_size": 64,
}
_SWIN = {"embed_dim": 24, "depths": [2, 1], "num_heads": [3, 6], "window_size": 4, "image_size": 64}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": _timm("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=4),
    "vit_qk_norm": _timm("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=4, qk_norm=True),
    "vit_gap": _timm("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=4, global_pool="avg"),
    "deit": _timm("deit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=4),
    "deit_distilled": _timm("deit_tiny_distilled_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=4),
    "beit": _timm("beit_base_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=4),
    "beitv2": _timm("beitv2_base_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=4),
    "swin": _timm(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(3, 6)
    ),
    "convnext": _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 24, 32, 40)),
    "resnet18": _timm("resnet18", channels=(8, 12, 16, 20)),
    "resnet50": _timm("resnet50", layers=(2, 1, 1, 1)),
    "mobilenetv2": _timm("mobilenetv2_050"),
    "hf_vit": _hf("ViTForImageClassification", **_TOKENS),
    "hf_beit": _hf(
        "BeitForImageClassification", **_TOKENS, use_relative_position_bias=True, use_absolute_position_embeddings=True
    ),
    "hf_deit": _hf("DeiTForImageClassification", **_TOKENS),
    "hf_deit_teacher": _hf("DeiTForImageClassificationWithTeacher", **_TOKENS),
    "hf_swin": _hf("SwinForImageClassification", **_SWIN),
    "hf_dinov2": _hf("Dinov2ForImageClassification", **{**_TOKENS, "mlp_ratio": 2, "patch_size": 16}),
    "torchvision_vit": lambda: torchvision.models.VisionTransformer(64, 16, 2, 4, 48, 80, num_classes=7),
    "torchvision_swin": lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [3, 6], [4, 4], num_classes=7),
    "torchvision_resnet50": lambda: torchvision.models.resnet50(num_classes=7),
}
WITH_HEADS = [n for n in MODELS if not n.startswith(("convnext", "resnet", "mobilenet", "torchvision_resnet"))]


def build(name: str) -> nn.Module:
    """Returns a model in eval mode and float64, every parameter and statistic of which has a random value.

    Values that architectures initialise to 0 or 1 (biases, tables, norms, layer scales) would hide mistakes.
    """
    generator = torch.Generator().manual_seed(len(name))
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "mask" in tensor_name:
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor_name.endswith("running_var"):
                tensor.copy_(1 + noise.abs())
            elif tensor.ndim <= 1:
                tensor.copy_((tensor_name.endswith(("weight", "gamma", "gamma_1", "gamma_2", "lambda1"))) + 0.3 * noise)
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return model


def images(count: int = 2, size: int = IMAGE[-1]) -> torch.Tensor:
    """Returns random images in float64."""
    return torch.randn((count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns all logits of a model, whatever it wraps them in."""
    with torch.no_grad():
        result = model(x)
    if hasattr(result, "keys"):
        return torch.cat([v for v in result.values() if isinstance(v, torch.Tensor)], -1)
    return torch.cat(result, -1) if isinstance(result, (tuple, list)) else result


def random_scores(network: Network, seed: int = 0) -> Scores:
    """Returns scores drawn at random."""
    return Scores(np.random.default_rng(seed).random(network.num_channels), "random", False)


def reference(model: nn.Module, removed: dict[tuple[str, int], list[int]]) -> nn.Module:
    """Returns `model` with what was removed made absent, without making anything smaller: the oracle for cuts.

    Everything removed is zero wherever it stands, and norms over channels take their statistics over the survivors. A
    module of a test whose own statistics run over channels has a method `without`, which takes what it has lost.
    """
    with torch.no_grad():
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for (name, dim), indices in removed.items():
            if dim != 0 or not name.endswith(_DIRECTIONS):
                tensors[name].index_fill_(dim, torch.tensor(indices), 0.0)
    for name, module in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        own = {(k.removeprefix(prefix), d): i for (k, d), i in removed.items() if k.startswith(prefix)}
        if own and hasattr(module, "without"):
            module.without(own)  # type: ignore[operator]
        elif isinstance(module, _NORMS) and module.weight is not None:
            alive = torch.ones_like(module.weight)
            for dim in range(alive.ndim):
                alive.index_fill_(dim, torch.tensor(own.get(("weight", dim), []), dtype=torch.int64), 0.0)
            if not alive.all():
                module.forward = _masked_norm(module, alive)  # type: ignore[method-assign]
    return model


_DIRECTIONS = ("parametrizations.weight.original1", "weight_v")
"""Weights that are divided by their length: a row of zeros would have none, and zero is what it is multiplied by."""
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def _masked_norm(norm: nn.LayerNorm | nn.RMSNorm | nn.GroupNorm, alive: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Returns the forward of `norm` with its statistics over the entries of its weight that are `alive`."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        y, mask, dims = _where_statistics_are_taken(norm, x, alive)
        count = mask.expand_as(y).sum(dims, keepdim=True).clamp(min=1)
        mean = 0 if isinstance(norm, nn.RMSNorm) else (y * mask).sum(dims, keepdim=True) / count
        variance = ((y - mean).square() * mask).sum(dims, keepdim=True) / count
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        normal = ((y - mean) / (variance + eps).sqrt()).reshape(x.shape)
        bias = getattr(norm, "bias", None)
        side = [-1 if i == 1 else 1 for i in range(x.ndim)] if _channels_first(norm) else list(alive.shape)
        shift = 0 if bias is None else bias.view(side)
        return (normal * norm.weight.view(side) + shift) * alive.view(side)

    return forward


def _channels_first(norm: nn.Module) -> bool:
    return isinstance(norm, nn.GroupNorm) or "2d" in type(norm).__name__


def _where_statistics_are_taken(
    norm: nn.Module, x: torch.Tensor, alive: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Returns `x`, the mask of what is alive in it, and the dimensions over which one set of statistics is taken."""
    if isinstance(norm, nn.GroupNorm):
        y = x.reshape(x.shape[0], norm.num_groups, x.shape[1] // norm.num_groups, -1)
        return y, alive.view(1, norm.num_groups, -1, 1), [2, 3]
    if _channels_first(norm):
        return x, alive.view(1, -1, *[1] * (x.ndim - 2)), [1]
    return x, alive, list(range(x.ndim - alive.ndim, x.ndim))
