"""Parameter groups: every parameter once, decay for matrices only, and learning rates that shrink layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import InputError
from secateur.experiments.base_models import BASE_MODELS, base_model
from secateur.training.parameter_groups import parameter_groups


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Returns learning rate and weight decay of each parameter, after checking that each is there once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in groups:
        assert group["params"]
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = group["lr"], group["weight_decay"]
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found


@pytest.fixture(params=[False, True], ids=["dense", "cut"])
def cut(request: pytest.FixtureRequest) -> bool:
    return request.param


def digits_model(name: str, cut: bool) -> nn.Module:
    model = base_model(name, "thick")
    if cut:
        secateur.prune_(model, torch.zeros(1, 3, 32, 32), criterion="l2", ratio=0.5, scope="local")
    return model


@pytest.mark.parametrize("name", list(BASE_MODELS))
def test_without_layer_decay_there_is_one_rate_and_one_dimension_does_not_decay(name: str, cut: bool) -> None:
    model = digits_model(name, cut)
    groups = parameter_groups(model, 1e-3, 0.05)
    assert len(groups) == 2
    found = by_name(model, groups)
    for key, parameter in model.named_parameters():
        assert found[key] == (1e-3, 0.05 if parameter.ndim > 1 else 0.0)
    assert found["blocks.0.norm1.weight"][1] == found["head.bias"][1] == 0.0


@pytest.mark.parametrize("name", list(BASE_MODELS))
def test_rates_of_timm_models_shrink_towards_the_input(name: str, cut: bool) -> None:
    model = digits_model(name, cut)
    found = by_name(model, parameter_groups(model, 1e-3, 0.05, layer_decay=0.5))
    # Six blocks: the patch embedding is layer 0, block i is layer i + 1, the head layer 7.
    layers = {"patch_embed.proj.weight": 0, "cls_token": 0, "head.weight": 7, "head.bias": 7}
    layers |= {f"blocks.{i}.mlp.fc1.weight": i + 1 for i in range(6)} | {"blocks.0.norm1.bias": 1}
    layers |= {"head_dist.weight": 7, "dist_token": 0} if name == "deit_digits" else {}
    for key, layer in layers.items():
        assert found[key][0] == pytest.approx(1e-3 * 0.5 ** (7 - layer)), key
    for key, parameter in model.named_parameters():
        assert found[key][1] == (0.05 if parameter.ndim > 1 else 0.0)


def test_models_of_hugging_face_are_told_apart_by_their_blocks() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model = transformers.ViTForImageClassification(config)
    found = by_name(model, parameter_groups(model, 1e-3, 0.1, layer_decay=0.5))
    for key, (rate, _) in found.items():
        layer = {"classifier": 4, "layernorm": 4, "embeddings": 0}.get(
            next((p for p in key.split(".") if p in ("classifier", "layernorm", "embeddings")), "")
        )
        block = [int(part) for part in key.split(".") if part.isdigit()]
        expected = block[0] + 1 if block else layer
        assert expected is not None, key
        assert rate == pytest.approx(1e-3 * 0.5 ** (4 - expected)), key


def test_models_of_torchvision_are_told_apart_by_their_blocks() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5)
    found = by_name(model, parameter_groups(model, 1.0, 0.1, layer_decay=0.5))
    assert found["conv_proj.weight"][0] == found["class_token"][0] == 0.5**4
    assert found["encoder.layers.encoder_layer_2.ln_1.weight"][0] == 0.5
    assert found["heads.head.weight"][0] == found["encoder.ln.weight"][0] == 1.0
    resnet = models.resnet18(num_classes=5)
    found = by_name(resnet, parameter_groups(resnet, 1.0, 0.1, layer_decay=0.5))
    assert found["conv1.weight"][0] == 0.5**9
    assert found["layer1.0.conv1.weight"][0] == 0.5**8
    assert found["layer2.0.downsample.0.weight"][0] == 0.5**6
    assert found["layer4.1.conv2.weight"][0] == 0.5
    assert found["fc.weight"][0] == 1.0


def test_blocks_of_which_a_branch_is_left_count_and_those_of_which_nothing_is_left_do_not() -> None:
    for gone, layers in (("blocks.2.mlp", 7), ("blocks.2", 6)):
        model = base_model("vit_digits", "thick")
        network = secateur.trace(model, torch.zeros(1, 3, 32, 32))
        names = [r.name for r in network.residuals if r.name.startswith(gone)]
        left = secateur.drop_branches(network, model, names)
        secateur.cut_(model, secateur.allocate(left, secateur.score(left, model, "l2"), ratio=0.3, scope="local"))
        found = by_name(model, parameter_groups(model, 1.0, 0.05, layer_decay=0.5))
        assert any(name.startswith("blocks.2.") for name in found) == (layers == 7)
        assert found["patch_embed.proj.weight"][0] == 0.5**layers
        assert found["blocks.1.mlp.fc1.weight"][0] == 0.5 ** (layers - 2)
        assert found["blocks.3.mlp.fc1.weight"][0] == 0.5**3
        assert found["head.weight"][0] == 1.0


def test_frozen_parameters_are_left_out() -> None:
    model = base_model("vit_digits", "thick")
    for parameter in model.get_submodule("patch_embed").parameters():
        parameter.requires_grad_(False)
    for layer_decay in (1.0, 0.5):
        found = by_name(model, parameter_groups(model, 1e-3, 0.05, layer_decay=layer_decay))
        assert not any(key.startswith("patch_embed") for key in found)


def test_a_layers_weights_move_as_far_as_its_rate_says(cut: bool) -> None:
    model = digits_model("vit_digits", cut)
    groups = parameter_groups(model, 1e-3, 0.0, layer_decay=0.5)
    rates = by_name(model, groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(groups)
    model(torch.randn(8, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().min() > 1e-6:
            # The first step of Adam is as long as the rate, whatever the gradient.
            assert (parameter - before[name]).abs().max().item() == pytest.approx(rates[name][0], rel=0.02)


def test_values_that_no_run_could_use_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for values, message in (((0.0, 0.1, 1.0), "lr"), ((1.0, -1.0, 1.0), "weight_decay"), ((1.0, 0.1, 1.5), "layer_")):
        with pytest.raises(InputError, match=message):
            parameter_groups(model, *values)
    with pytest.raises(InputError, match="no repeated blocks"):
        parameter_groups(model, 1.0, 0.1, layer_decay=0.9)
    with pytest.raises(InputError, match="no trainable parameters"):
        parameter_groups(model.requires_grad_(False), 1.0, 0.1)
