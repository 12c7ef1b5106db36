"""What the library promises on the published architectures at full size; all on meta, so without any arithmetic."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secateur
from models import random_scores
from secateur import Network

IMAGE = (1, 3, 224, 224)
CLASSES = 1000


def _hf(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(num_labels=CLASSES, **options))

    return build


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm.create_model("vit_base_patch16_224"),
    "deit": lambda: timm.create_model("deit_base_patch16_224"),
    "deit_distilled": lambda: timm.create_model("deit_base_distilled_patch16_224"),
    "beit": lambda: timm.create_model("beit_base_patch16_224"),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224"),
    "convnext": lambda: timm.create_model("convnext_tiny"),
    "resnet18": lambda: timm.create_model("resnet18"),
    "resnet50": lambda: timm.create_model("resnet50"),
    "mobilenetv2": lambda: timm.create_model("mobilenetv2_100"),
    "hf_vit": _hf("ViTForImageClassification"),
    "hf_beit": _hf("BeitForImageClassification", use_relative_position_bias=True),
    "hf_deit": _hf("DeiTForImageClassification"),
    "hf_deit_teacher": _hf("DeiTForImageClassificationWithTeacher"),
    "hf_swin": _hf("SwinForImageClassification"),
    "hf_dinov2": _hf("Dinov2ForImageClassification", image_size=224, patch_size=16),
    "torchvision_vit": torchvision.models.vit_b_16,
    "torchvision_swin": torchvision.models.swin_t,
    "torchvision_resnet50": torchvision.models.resnet50,
}


@functools.cache
def model_of(name: str) -> nn.Module:
    """Returns a model of full size on meta."""
    with torch.device("meta"):
        return BUILDERS[name]().eval()


@functools.cache
def network_of(name: str) -> Network:
    """Returns its network."""
    return secateur.trace(model_of(name), torch.empty(IMAGE, device="meta"))


def transformer_macs(tokens: int, heads: int) -> int:
    """Returns the MACs of a base-size vision transformer with `heads` classifiers, counted by hand."""
    width, hidden, blocks, patches = 768, 4 * 768, 12, 14 * 14
    patch_embedding = patches * width * (3 * 16 * 16)
    projections = tokens * width * (3 * width) + tokens * width * width
    products = 2 * (tokens * tokens * width)  # queries by keys, weights by values: 12 heads of 64 each
    mlp = tokens * width * hidden + tokens * hidden * width
    return patch_embedding + blocks * (projections + products + mlp) + heads * width * CLASSES


def transformer_params(tokens: int, special: int, heads: int) -> int:
    """Returns the parameters of a base-size vision transformer with `special` extra tokens, counted by hand."""
    width, attention, hidden, blocks = 768, 768, 4 * 768, 12
    block = (
        3 * attention * (width + 1) + width * (attention + 1) + hidden * (width + 1) + width * (hidden + 1) + 4 * width
    )
    patch_embedding = width * (3 * 16 * 16 + 1)
    return (
        patch_embedding + tokens * width + special * width + blocks * block + 2 * width + heads * CLASSES * (width + 1)
    )


def beit_params() -> int:
    """Returns the parameters of BEiT-B: no key bias, no position embedding, but layer scales and bias tables."""
    width, hidden, blocks = 768, 4 * 768, 12
    attention = 3 * width * width + 2 * width + width * (width + 1)
    table = ((2 * 14 - 1) ** 2 + 3) * 12
    mlp = hidden * (width + 1) + width * (hidden + 1)
    block = attention + table + mlp + 2 * (2 * width) + 2 * width
    return width * (3 * 16 * 16 + 1) + width + blocks * block + 2 * width + CLASSES * (width + 1)


BASES: dict[str, tuple[int, int, float]] = {
    # MACs and parameters by hand, and the published parameters in millions
    "vit": (transformer_macs(197, 1), transformer_params(197, 1, 1), 86.568),
    "hf_vit": (transformer_macs(197, 1), transformer_params(197, 1, 1), 86.568),
    "torchvision_vit": (transformer_macs(197, 1), transformer_params(197, 1, 1), 86.568),
    "deit_distilled": (transformer_macs(198, 2), transformer_params(198, 2, 2), 87.338),
    "hf_deit_teacher": (transformer_macs(198, 2), transformer_params(198, 2, 2), 87.338),
    "beit": (transformer_macs(197, 1), beit_params(), 86.531),
    "hf_beit": (transformer_macs(197, 1), beit_params(), 86.531),
}


@pytest.mark.parametrize("name", BASES)
def test_dense_costs_are_those_counted_by_hand(name: str) -> None:
    network = network_of(name)
    macs, params, published = BASES[name]
    assert network.macs == macs
    assert network.params == params == sum(p.numel() for p in model_of(name).parameters())
    assert round(params / 1e6, 3) == published


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("resnet18", 11_689_512, 1.814e9),
        ("resnet50", 25_557_032, 4.089e9),
        ("torchvision_resnet50", 25_557_032, 4.089e9),
        ("mobilenetv2", 3_504_872, 0.3008e9),
        ("swin", 28_288_354, 4.491e9),
        ("hf_swin", 28_288_354, 4.491e9),
        ("torchvision_swin", 28_288_354, 4.491e9),
        ("convnext", 28_589_128, 4.456e9),
    ],
)
def test_dense_costs_are_the_published_ones(name: str, params: int, macs: float) -> None:
    network = network_of(name)
    assert network.params == params
    assert network.macs == pytest.approx(macs, rel=1e-3)


QKV = {
    "vit": r"blocks\.\d+\.attn\.qkv\.weight",
    "deit_distilled": r"blocks\.\d+\.attn\.qkv\.weight",
    "beit": r"blocks\.\d+\.attn\.qkv\.weight",
    "hf_vit": r".*\.\d+\..*\.(q_proj|k_proj|v_proj|query|key|value)\.weight",
    "hf_beit": r".*\.\d+\..*\.(q_proj|k_proj|v_proj|query|key|value)\.weight",
    "hf_deit_teacher": r".*\.\d+\..*\.(q_proj|k_proj|v_proj|query|key|value)\.weight",
    "torchvision_vit": r".*in_proj_weight",
}


@pytest.mark.parametrize("name", QKV)
def test_half_of_everything_leaves_at_most_three_tenths_of_the_macs(name: str) -> None:
    model, network = model_of(name), network_of(name)
    plan = secateur.allocate(network, random_scores(network), ratio=0.5, scope="local")
    assert plan.dense_macs == network.macs
    assert plan.macs <= 0.30 * plan.dense_macs

    pruned = secateur.cut(model, plan)
    dense = {n: p.shape for n, p in model.named_parameters() if re.fullmatch(QKV[name], n)}
    assert len(dense) == (36 if "hf" in name else 12)
    for tensor, shape in dense.items():
        assert pruned.get_parameter(tensor).shape == tuple(n // 2 for n in shape)

    assert sum(p.numel() for p in pruned.parameters()) == plan.params
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        pruned(torch.empty(IMAGE, device="meta"))
    assert counter.get_total_flops() == 2 * plan.macs


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "hf_vit", "hf_beit", "hf_deit_teacher"])
def test_global_ratio_of_a_half_takes_72_of_144_heads_of_64(name: str) -> None:
    network = network_of(name)
    plan = secateur.allocate(network, random_scores(network), ratio=0.5, scope="global")
    heads = [g for g in plan.groups if g.kind == "heads"]
    dims = [g for g in plan.groups if g.kind == "head_dims"]
    assert [g.before for g in heads] == [(1, 12)] * 12 and [g.before for g in dims] == [(12, 64)] * 24
    assert sum(g.after[1] for g in heads) == 72
    assert all(g.after[1] == 64 for g in dims)


_TABLE = r".*relative_position_bias_table"
STAYS: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    # the layer that reads the image, the layers that give the logits, and where positions (of tokens) are counted
    "vit": (r"patch_embed\.proj", "head", {"pos_embed": (1,)}),
    "deit": (r"patch_embed\.proj", "head", {"pos_embed": (1,)}),
    "deit_distilled": (r"patch_embed\.proj", "head(_dist)?", {"pos_embed": (1,)}),
    "beit": (r"patch_embed\.proj", "head", {_TABLE: (0,)}),
    "swin": (r"patch_embed\.proj", r"head\.fc", {_TABLE: (0,), r".*\.attn_mask": (0, 1, 2)}),
    "convnext": (r"stem\.0", r"head\.fc", {}),
    "resnet18": ("conv1", "fc", {}),
    "resnet50": ("conv1", "fc", {}),
    "mobilenetv2": ("conv_stem", "classifier", {}),
    "hf_vit": (r".*\.patch_embeddings\.projection", "classifier", {r".*\.position_embeddings": (1,)}),
    "hf_beit": (r".*\.patch_embeddings\.projection", "classifier", {_TABLE: (0,)}),
    "hf_deit": (r".*\.patch_embeddings\.projection", "classifier", {r".*\.position_embeddings": (1,)}),
    "hf_deit_teacher": (
        r".*\.patch_embeddings\.projection",
        "(cls|distillation)_classifier",
        {r".*\.position_embeddings": (1,)},
    ),
    "hf_swin": (r".*\.patch_embeddings\.projection", "classifier", {_TABLE: (0,)}),
    # the mask token is for training without labels: classification never reads it
    "hf_dinov2": (
        r".*\.patch_embeddings\.projection",
        "classifier",
        {r".*\.position_embeddings": (1,), r".*\.mask_token": (1,)},
    ),
    "torchvision_vit": ("conv_proj", r"heads\.head", {r"encoder\.pos_embedding": (1,)}),
    "torchvision_swin": (r"features\.0\.0", "head", {_TABLE: (0,)}),
    "torchvision_resnet50": ("conv1", "fc", {}),
}


def expected_to_stay(name: str) -> set[tuple[str, int]]:
    """Returns the axes that are no channels: inputs, outputs, positions of tokens (kernels have no labels at all)."""
    first, last, positions = STAYS[name]
    model = model_of(name)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = set()
    for tensor_name, tensor in tensors.items():
        module = tensor_name.rpartition(".")[0]
        if re.fullmatch(first, module) and tensor.ndim == 4:
            found.add((tensor_name, 1))
        if re.fullmatch(last, module):
            found.add((tensor_name, 0))
        found |= {(tensor_name, d) for p, dims in positions.items() if re.fullmatch(p, tensor_name) for d in dims}
    return found


@pytest.mark.parametrize("name", STAYS)
def test_nothing_prunable_is_left_frozen(name: str) -> None:
    network = network_of(name)
    stays = {}
    for axis in network.axes:
        still = (axis.channels < 0) & (axis.owners < 0)
        if still.any():
            stays[axis.tensor, axis.dim] = bool(still.all())
    assert set(stays) == expected_to_stay(name)
    assert all(stays.values())  # no axis stays in part
    assert {(f.tensor, f.dim) for f in network.frozen} == set(stays)
    assert all(f.reason for f in network.frozen)
    assert not network.unknown_operators


@pytest.mark.parametrize("name", STAYS)
def test_every_channel_is_in_one_group_and_every_layer_shrinks(name: str) -> None:
    network = network_of(name)
    members = sorted(c for g in network.groups for c in g.channels.ravel().tolist())
    assert members == list(range(network.num_channels))
    plan = secateur.allocate(network, random_scores(network), ratio=0.5, scope="local")
    cut = {(c.tensor, c.dim) for c in plan.cuts}
    never = expected_to_stay(name)
    for layer_name, layer in model_of(name).named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            for dim in (0, 1):
                weight = f"{layer_name}.weight"
                depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1 and dim == 1
                assert ((weight, dim) in cut) != ((weight, dim) in never or depthwise), (weight, dim)
