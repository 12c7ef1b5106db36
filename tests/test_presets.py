"""The settings of Isomorphic Pruning: what they ask for is what was published, as far as structure decides it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch_pruning
from torch import nn

import secateur
from models import random_scores
from secateur import InputError, Network, Plan, Scores
from secateur.allocation.presets import PRESETS, Preset, find_preset
from secateur.surgery import drop_branches

DEIT = [name for name in PRESETS if name.startswith("deit")]
BY_STAGE = [name for name in PRESETS if name not in DEIT]
IMAGE = (1, 3, 224, 224)
TOKENS = 198


def close(value: float, published: float, tolerance: float = 0.02) -> bool:
    return abs(value / published - 1) <= tolerance


@functools.cache
def network_of(name: str) -> Network:
    """Returns the network that a preset allocates on: traced without weights, of branches to drop every third kept."""
    preset = find_preset(name)
    with torch.device("meta"):
        model = timm.create_model(preset.model)
    network = secateur.trace(model, torch.empty(IMAGE, device="meta"))
    if not preset.num_dropped:
        return network
    prefix = preset.branches.removesuffix("*")
    matching = [r.name for r in network.residuals if r.name.startswith(prefix)]
    dropped = [branch for i, branch in enumerate(matching) if i % 3]
    assert len(dropped) == preset.num_dropped
    return drop_branches(network, model, dropped)


def scores_leaning(network: Network, lean: float, seed: int = 0) -> Scores:
    """Returns scores that are the more unequal the later (lean > 0) or the earlier (lean < 0) a group comes.

    Scores are compared by their share of the group's mean, so a group of unequal ones loses more.
    """
    random = np.random.default_rng(seed)
    values = np.zeros(network.num_channels)
    for i, group in enumerate(network.groups):
        place = i / len(network.groups)
        spread = 0.5 + abs(lean) * (place if lean > 0 else 1 - place)
        values[group.channels] = random.lognormal(0, spread, group.channels.shape)
    return Scores(values, "leaning")


def published_counter(plan: Plan, embedding: int) -> float:
    """Returns MACs of a distilled DeiT as the authors count: biases, norms, activations and softmax too.

    Their counter takes the output projection of an attention for square, as wide as the heads are together.
    """
    after = {g.name: g.after for g in plan.groups}
    total = embedding * (3 * 16 * 16 + 1) * (TOKENS - 2) + 2 * (embedding + 1) * 1000 + 2 * TOKENS * embedding
    for block in range(12):
        heads, dims = after[f"blocks.{block}.attn:dims.qk"]
        hidden = after[f"blocks.{block}.mlp.fc1"][1]
        width = heads * dims
        qkv = 3 * TOKENS * width * (embedding + 1) + TOKENS * width
        attention = heads * TOKENS * TOKENS * (2 * dims + 1) + TOKENS * width * (width + 1)
        mlp = 2 * TOKENS * embedding * hidden + hidden + embedding + TOKENS * hidden
        total += qkv + attention + mlp + 4 * TOKENS * embedding
    return total


@pytest.mark.parametrize(
    ("model", "macs"),
    [("deit_base_distilled_patch16_224", 17.69e9), ("deit_small_distilled_patch16_224", 4.6391e9)],
)
def test_counter_gives_the_published_macs_of_whole_models(model: str, macs: float) -> None:
    with torch.device("meta"):
        network = secateur.trace(timm.create_model(model), torch.empty(IMAGE, device="meta"))
    plan = secateur.allocate(network, random_scores(network), ratio=0.0)
    embedding = next(g.before[1] for g in plan.groups if g.kind == "embedding")
    assert close(published_counter(plan, embedding), macs, 5e-4)


@pytest.mark.parametrize("scores", ["random 0", "random 1", "leaning -1"])
@pytest.mark.parametrize("name", DEIT)
def test_deit_has_the_published_parameters_and_macs_whatever_the_scores(name: str, scores: str) -> None:
    preset, network = find_preset(name), network_of(name)
    kind, number = scores.split()
    drawn = random_scores(network, int(number)) if kind == "random" else scores_leaning(network, float(number))
    plan = secateur.allocate(network, drawn, **preset.request)
    embedding = next(g.after[1] for g in plan.groups if g.kind == "embedding")
    assert preset.params is not None
    assert close(plan.params, preset.params)
    assert close(plan.macs, preset.macs)
    assert close(published_counter(plan, embedding), preset.macs)


@pytest.mark.parametrize("lean", [-0.5, 0.5])
@pytest.mark.parametrize("name", PRESETS)
def test_budget_leaves_the_published_macs_whatever_the_scores(name: str, lean: float) -> None:
    preset, network = find_preset(name), network_of(name)
    plan = secateur.allocate(network, scores_leaning(network, lean), **preset.budget)
    assert 0.99 * preset.macs < plan.macs <= preset.macs
    if name in DEIT and preset.params:
        assert close(plan.params, preset.params)


@pytest.mark.parametrize("name", [n for n in BY_STAGE if n != "convnext-4.2g"])
def test_published_macs_are_within_reach_of_the_ratios(name: str) -> None:
    preset, network = find_preset(name), network_of(name)
    early, late = (secateur.allocate(network, scores_leaning(network, lean), **preset.request) for lean in (-1, 1))
    assert early.macs < preset.macs < late.macs
    assert early.params > (preset.params or early.params - 1) > late.params


@pytest.mark.parametrize("name", ["convnext-8.5g", "swin-4.5g"])
def test_scores_that_lean_a_little_to_late_stages_give_the_published_figures(name: str) -> None:
    preset, network = find_preset(name), network_of(name)
    plan = secateur.allocate(network, scores_leaning(network, 0.25), **preset.request)
    assert preset.params is not None
    assert close(plan.params, preset.params) and close(plan.macs, preset.macs)


def test_convnext_b_without_18_blocks_and_a_quarter_of_all_widths_is_convnext_t() -> None:
    network = network_of("convnext-4.2g")
    request = {**find_preset("convnext-4.2g").request, "scope": "local"}
    plan = secateur.allocate(network, random_scores(network), **request)
    with torch.device("meta"):
        tiny = secateur.trace(timm.create_model("convnext_tiny"), torch.empty(IMAGE, device="meta"))
    assert (plan.params, plan.macs) == (tiny.params, tiny.macs)


def peer(preset: Preset, model: Any, x: torch.Tensor) -> int:
    """Returns the parameters that are left when Torch-Pruning, the authors' library, does what a preset asks, by L2."""
    heads = {m.qkv: m.num_heads for m in model.modules() if isinstance(getattr(m, "qkv", None), nn.Linear)}
    pruner = torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=preset.ratio,
        pruning_ratio_dict={tuple(heads): preset.ratios["head_dims"]} if heads else {},
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000],
        num_heads=heads,
        prune_num_heads=True,
        head_pruning_ratio=preset.ratios.get("heads", preset.ratio),
        round_to=2,
        # The default values are dictionaries that all pruners share.
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "tolerance"),
    # There one ranking over all heads of a block says which of their dimensions go, here one for each head.
    [("resnet50-2.0g", 0), ("mobilenetv2-0.15g", 0), ("deit-0.6g", 0.01)],
)
def test_ratios_take_what_the_authors_library_takes(name: str, tolerance: float) -> None:
    preset, x = find_preset(name), torch.zeros(IMAGE)
    torch.manual_seed(0)
    model = timm.create_model(preset.model).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            nn.init.zeros_(module.weight)  # it does not score depthwise filters
    network = secateur.trace(model, x)
    plan = secateur.allocate(network, secateur.score(network, model, "l2"), **preset.request)
    assert close(plan.params, peer(preset, model, x), tolerance)


def test_preset_in_three_lines() -> None:
    preset = find_preset("deit-0.6g")
    model = timm.create_model(preset.model, num_classes=5).eval()
    plan = secateur.prune_(model, torch.zeros(IMAGE), criterion="l2", **preset.request)
    assert sum(p.numel() for p in model.parameters()) == plan.params < 0.55 * plan.dense_params
    assert model(torch.zeros(IMAGE)).shape == (1, 5)


def test_preset_starts_from_weights_that_timm_has_and_is_found_by_its_name() -> None:
    known = set(timm.list_models(pretrained=True))
    for name, preset in PRESETS.items():
        assert preset.model in known
        assert preset.name == name and find_preset(name) is preset


def test_requests_are_fresh() -> None:
    preset = find_preset("deit-4.2g")
    preset.request["ratios"]["head_dims"] = 0.9
    assert preset.request["ratios"] == {"head_dims": 0.25}


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown preset 'deit-4\.0g'; did you mean 'deit-4\.2g'"):
        find_preset("deit-4.0g")
