"""Random networks, random plans: whatever runs, runs after the cut, and computes what it should."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import random_scores, reference
from nets import Attention
from torch import nn

import secateur


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Concatenated(nn.Module):
    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([p(x) for p in self.parts], -1)


class Gated(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.gelu(a) * b)


class Convolved(nn.Module):
    """Tokens as a picture: depthwise or grouped convolution between two plain ones."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        middle = math.lcm(8, groups)
        self.a, self.c = nn.Conv2d(width, middle, 1), nn.Conv2d(middle, width, 1)
        self.b = nn.Conv2d(middle, middle, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(middle)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        picture = x.transpose(1, 2).reshape(n, c, 2, t // 2)
        return self.c(F.relu(self.norm(self.b(self.a(picture))))).flatten(2).transpose(1, 2)


@st.composite
def blocks(draw: st.DrawFn, width: int, depth: int = 2) -> tuple[nn.Module, int]:
    """Draws a block on tokens [n, t, width] and its output width."""
    kind = draw(
        st.sampled_from(["linear", "mlp", "gated", "conv", "attention", "residual", "concatenation", "flatten"])
    )
    if kind == "mlp":
        hidden = draw(st.integers(3, 12))
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)), width
    if kind == "gated":
        return Gated(width, draw(st.integers(3, 8))), width
    if kind == "conv":
        return Convolved(width, draw(st.sampled_from([1, 2, 4, 8]))), width
    if kind == "attention" and width % 4 == 0:
        style = draw(st.sampled_from(["sqrt", "power", "talking", "einsum", "grouped_queries"]))
        return Attention(width, draw(st.sampled_from([2, 4])), style), width
    if kind == "residual" and depth:
        inner, out = draw(blocks(width, depth - 1))
        return Residual(inner if out == width else nn.Sequential(inner, nn.Linear(out, width))), width
    if kind == "concatenation" and depth:
        parts = [draw(blocks(width, depth - 1)) for _ in range(2)]
        return Concatenated([p for p, _ in parts]), sum(w for _, w in parts)
    out = draw(st.sampled_from([4, 8, 12]))
    return nn.Sequential(nn.Linear(width, out), nn.GELU()), out


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Draws a network from tokens [n, 4, 6] to logits."""
    width = 8
    layers: list[nn.Module] = [nn.Linear(6, width)]
    for _ in range(draw(st.integers(1, 4))):
        block, width = draw(blocks(width))
        layers.append(block)
    layers += [nn.Flatten(), nn.Linear(4 * width, 3)] if draw(st.booleans()) else [nn.Linear(width, 3)]
    torch.manual_seed(draw(st.integers(0, 99)))
    model = nn.Sequential(*layers).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(model=networks(), seed=st.integers(0, 9), ratio=st.sampled_from([0.2, 0.5, 0.8]), dims=st.booleans())
def test_random_network_after_a_random_cut(model: nn.Module, seed: int, ratio: float, dims: bool) -> None:
    x = torch.randn((2, 4, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    network = secateur.trace(model, x)
    has_dims = any(g.kind == "head_dims" for g in network.groups)
    scores = random_scores(network, seed)
    plan = secateur.allocate(network, scores, ratio=ratio, ratios={"head_dims": 0.4} if has_dims and dims else None)
    pruned = secateur.cut(model, plan)
    expected = reference(copy.deepcopy(model), {(c.tensor, c.dim): list(c.removed) for c in plan.cuts})
    with torch.no_grad():
        a, b = pruned(x), expected(x)
    assert (a - b).abs().max() <= 1e-9 * b.abs().max()
    assert sum(p.numel() for p in pruned.parameters()) == plan.params
    pruned.train()(x).sum().backward()
