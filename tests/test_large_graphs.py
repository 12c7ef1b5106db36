"""Large architectures and long chains: analysed without weights, in work that grows with the graph and no faster."""

from __future__ import annotations

import cProfile
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import secateur
from secateur.allocation import Plan, allocate
from secateur.criteria import Scores
from secateur.graph import Network
from secateur.graph.labels import tensors_in

LARGEST = {
    "vit_7b_patch16_dinov3": 6.7,
    "eva02_enormous_patch14_clip_224": 4.3,
    "swinv2_cr_giant_224": 2.5,
    "vit_gigantic_patch14_224": 1.8,
    "davit_giant": 1.4,
    "regnety_2560": 1.2,
    "vit_giant_patch14_224": 1.0,
    "densenet201": 0.02,
}
"""The largest timm architectures of several kinds, and the deepest dense net: at least so many billion parameters."""


class WithoutValues(TorchDispatchMode):
    """Adds up the elements of all tensors with values that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.elements += sum(t.numel() for t in tensors_in(output) if not t.is_meta)
        return output


class Block(nn.Module):
    """x + f(x) on feature maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(torch.relu(self.norm(self.conv1(x))))


def chain_of_layers(length: int) -> tuple[nn.Module, torch.Tensor]:
    layers = [layer for _ in range(length) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(16, 10)).eval(), torch.randn(2, 16)


def chain_of_blocks(length: int) -> tuple[nn.Module, torch.Tensor]:
    blocks = [Block(8) for _ in range(length)]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, *pool).eval(), torch.randn(1, 3, 8, 8)


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def half(network: Network) -> Plan:
    """Returns a plan that removes half of each group, at random."""
    values = np.random.default_rng(0).random(network.num_channels)
    return allocate(network, Scores(values, "random"), scope="local")


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_architectures_are_cut_by_half_without_weights(name: str) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(name).eval()
    dense = num_params(model)
    inputs = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    with WithoutValues() as made:
        network = secateur.trace(model, inputs)
        plan = half(network)
        secateur.cut_(model, plan)
    assert network.params == dense > LARGEST[name] * 1e9
    assert plan.params == num_params(model) < 0.75 * dense
    assert not network.unknown_operators
    # of tensors with values there are index tables of windows and what says which indices stay: no weights
    assert made.elements < dense / 50


@pytest.mark.parametrize(
    ("chain", "length"),
    [(chain_of_layers, 1000), (chain_of_layers, 3000), (chain_of_blocks, 1000)],
    ids=["1000 layers", "3000 layers", "1000 residual blocks"],
)
def test_long_chains_are_pruned(chain: Callable[[int], tuple[nn.Module, torch.Tensor]], length: int) -> None:
    model, inputs = chain(length)
    dense, limit = num_params(model), sys.getrecursionlimit()
    plan = secateur.prune_(model, inputs, scope="local")
    # every layer in between loses half of its inputs and half of its outputs
    assert dense / 4 < num_params(model) == plan.params < dense / 3.5
    assert len(plan.groups) == length + (chain is chain_of_blocks)
    assert torch.isfinite(model(inputs)).all()
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize("chain", [chain_of_layers, chain_of_blocks])
def test_the_work_grows_with_the_length_of_a_chain_and_no_faster(
    chain: Callable[[int], tuple[nn.Module, torch.Tensor]],
) -> None:
    """Counted in calls of functions, of Python and of C, which unlike time are the same in every run."""
    calls = []
    for length in (100, 200, 400):
        model, inputs = chain(length)
        profile = cProfile.Profile()
        profile.enable()
        secateur.prune_(model, inputs, scope="local")
        profile.disable()
        calls.append(sum(entry.callcount for entry in profile.getstats()))
    per_layer = (calls[1] - calls[0]) / 100, (calls[2] - calls[1]) / 200
    assert per_layer[1] < 1.05 * per_layer[0]
