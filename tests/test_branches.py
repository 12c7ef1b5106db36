"""Depth: a dropped branch is a branch that gives zero, costs go as said, and what cannot be dropped says why."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secateur
from models import IMAGE, MODELS, build, images, outputs, random_scores, reference
from secateur import CheckpointError, CutError, InputError, ModelSource, Network, Plan, PlanError
from secateur.surgery import block_benefit, branch_scores, drop_branches
from secateur.surgery.branches import Absent

LAST = {
    "convnext": ".mlp",
    "resnet18": ".bn2",
    "resnet50": ".bn3",
    "torchvision_resnet50": ".bn3",
    "mobilenetv2": ".bn3",
}
"""Where a branch has the name of its block: the module inside that makes its result."""
PROJECTED = {
    "resnet18": ["layer1.0", "layer2.0", "layer3.0", "layer4.0"],
    "resnet50": ["layer1.0", "layer2.0", "layer3.0", "layer4.0"],
    "torchvision_resnet50": ["layer1.0", "layer2.0", "layer3.0", "layer4.0"],
}
"""The blocks whose skip is a convolution."""


def traced(model: nn.Module) -> Network:
    return secateur.trace(model, torch.empty(IMAGE))


def droppable(network: Network) -> list[str]:
    return [r.name for r in network.residuals if not r.reason]


def depth_plan(network: Network, model: nn.Module, names: list[str], **request: Any) -> Plan:
    """Returns the plan that drops branches and, if asked for, channels by random scores."""
    left = drop_branches(network, model, names)
    return secateur.allocate(left, random_scores(left), **{"ratio": 0.0, **request})


def zero(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


@contextmanager
def zeroed(model: nn.Module, names: list[str], last: str = "") -> Iterator[None]:
    """Makes the modules that make the results of branches give zeros."""
    handles = [model.get_submodule(name + last).register_forward_hook(zero) for name in names]
    yield
    for handle in handles:
        handle.remove()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def counted(model: nn.Module) -> tuple[int, int]:
    """Returns parameters and multiply-accumulates per example, counted while the model runs."""
    counter = FlopCounterMode(display=False)
    with counter:
        outputs(model, images(1))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize("name", MODELS)
def test_each_dropped_branch_is_a_branch_that_gives_zero(name: str) -> None:
    model = build(name)
    network, x = traced(model), images()
    assert [r.name for r in network.residuals if r.reason] == PROJECTED.get(name, [])
    removable = [r for r in network.residuals if not r.reason]
    assert removable
    for residual in removable[:: -(-len(removable) // 5)]:  # of many, some of each depth
        plan = depth_plan(network, model, [residual.name])
        pruned = secateur.cut(model, plan)
        with zeroed(model, [residual.name], LAST.get(name, "")):
            expected = outputs(model, x)
        assert difference(outputs(pruned, x), expected) < 1e-9
        assert plan.branches == (residual.name,)
        assert counted(pruned) == (plan.params, plan.macs)
        assert (plan.dense_params - plan.params, plan.dense_macs - plan.macs) == (residual.params, residual.macs)
    assert counted(model) == (network.params, network.macs)


@pytest.mark.parametrize("name", MODELS)
def test_depth_and_width_in_one_plan(name: str) -> None:
    model = build(name)
    network, x = traced(model), images()
    names = droppable(network)[::2]
    plan = depth_plan(network, model, names, ratio=0.5)
    pruned = secateur.cut(model, plan)
    removed = {(c.tensor, c.dim): list(c.removed) for c in plan.cuts}
    absent = reference(copy.deepcopy(model), removed)
    with zeroed(absent, names, LAST.get(name, "")):
        expected = outputs(absent, x)
    assert difference(outputs(pruned, x), expected) < 1e-9
    assert counted(pruned) == (plan.params, plan.macs)
    assert plan.dense_macs == network.macs
    assert plan.macs < drop_branches(network, model, names).macs


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_any_branch_trains(name: str) -> None:
    model = build(name).float()
    network = traced(model)
    secateur.cut_(model, depth_plan(network, model, droppable(network), ratio=0.3))
    model.train()
    result = model(images().float())
    logits = [v for v in (result.values() if hasattr(result, "keys") else [result]) if isinstance(v, torch.Tensor)]
    sum(v.square().mean() for v in logits).backward()  # type: ignore[union-attr]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


def test_a_block_without_branches_goes_as_a_whole_with_what_it_holds_itself() -> None:
    model = build("beit")
    network = traced(model)
    both = secateur.cut(model, depth_plan(network, model, ["blocks.1.*"]))
    assert isinstance(both.get_submodule("blocks.1"), Absent)
    assert not [n for n, _ in both.named_parameters() if n.startswith("blocks.1.")]
    one = secateur.cut(model, depth_plan(network, model, ["blocks.1.mlp"]))
    assert "blocks.1.gamma_2" in dict(one.named_parameters())  # the block multiplies nothing by it
    saved = sum(r.params for r in network.residuals if r.where == "blocks.1")
    assert counted(model)[0] - counted(both)[0] == saved + 2 * 48


def test_branches_dropped_one_after_another_are_those_dropped_at_once() -> None:
    model = build("vit")
    network = traced(model)
    first = drop_branches(network, model, ["blocks.0.mlp"])
    assert droppable(first) == ["blocks.0.attn", "blocks.1.attn", "blocks.1.mlp"]
    second = drop_branches(first, model, ["blocks.0.attn"])
    at_once = drop_branches(network, model, ["blocks.0.*"])
    assert second.dropped == at_once.dropped == ("blocks.0.attn", "blocks.0.mlp")
    assert (second.params, second.macs) == (at_once.params, at_once.macs)
    assert drop_branches(second, model, []) is second


def test_a_branch_inside_of_a_dropped_one_goes_with_it() -> None:
    model = Nested().double().eval()
    network = secateur.trace(model, torch.empty(1, 6))
    assert droppable(network) == ["outer.inner", "outer"]
    left = drop_branches(network, model, ["outer"])
    assert left.residuals == ()
    both = drop_branches(network, model, ["outer", "outer.inner"])
    assert both.macs == left.macs == network.macs - 6 * 6 * 3


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.outer, self.last = nn.Linear(6, 6), Outer(), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x + self.outer(x))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        return self.after(x + self.inner(x))


@pytest.mark.parametrize("width", [0.0, 0.5])
def test_saved_and_loaded_by_replaying_the_plan(width: float, tmp_path: Path) -> None:
    options = {"num_classes": 7, "img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 4}
    source = ModelSource("timm", "vit_tiny_patch16_224", options)
    model = timm.create_model(source.name, **options).eval()
    network = traced(model)
    plan = depth_plan(network, model, ["blocks.0.mlp", "blocks.1.*"], ratio=width)
    if not width:
        with pytest.raises(CheckpointError, match=r"was not cut by this plan: it has .* without blocks.0.mlp"):
            secateur.save(model, plan, tmp_path / "early", source=source)
    secateur.cut_(model, plan)
    secateur.save(model, plan, tmp_path / "saved", source=source)
    loaded = secateur.load(tmp_path / "saved")
    assert torch.equal(outputs(loaded, images().float()), outputs(model, images().float()))
    again = Plan.from_json(plan.to_json())
    assert again.branches == plan.branches == ("blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")
    assert "branches dropped: blocks.0.mlp" in str(again)
    older = json.loads(plan.to_json())
    del older["branches"]
    assert Plan.from_json(json.dumps(older)).branches == ()


def test_an_optimizer_forgets_what_is_gone() -> None:
    model = build("vit").float()
    optimizer = torch.optim.AdamW(model.parameters())
    outputs_sum = model(images().float()).sum()
    outputs_sum.backward()
    optimizer.step()
    network = traced(model)
    secateur.cut_(model, depth_plan(network, model, ["blocks.0.mlp"], ratio=0.4), optimizer)
    known = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in known} == {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}
    model(images().float()).sum().backward()
    optimizer.step()


def test_the_plan_says_what_was_wrong() -> None:
    model = build("vit")
    network = traced(model)
    with pytest.raises(PlanError, match=r"unknown branch 'blocks.0.mpl'; did you mean 'blocks.0.mlp'"):
        drop_branches(network, model, ["blocks.0.mpl"])
    with pytest.raises(InputError, match="a sequence of names"):
        drop_branches(network, model, "blocks.0.mlp")
    with pytest.raises(PlanError, match="another architecture"):
        drop_branches(network, build("swin"), ["blocks.0.mlp"])
    resnet = build("resnet18")
    with pytest.raises(PlanError, match=r"'layer2.0' cannot be dropped: both sides of its sum compute"):
        drop_branches(traced(resnet), resnet, ["layer2.0"])


@pytest.mark.parametrize("change", [{"macs": 1}, {"branches": ("blocks.0.attn",)}, {"branches": ("blocks.7.mlp",)}])
def test_a_plan_that_does_not_hold_changes_nothing(change: dict[str, Any]) -> None:
    model = build("vit")
    plan = depth_plan(traced(model), model, ["blocks.0.mlp"])
    wrong = dataclasses.replace(plan, network=None, removed=None, **change)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises((CutError, PlanError)):
        secateur.cut_(model, wrong)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_block_benefit_is_the_loss_without_a_branch_less_the_loss_with_all() -> None:
    model = build("convnext").train()
    network = traced(model)
    labels = torch.tensor([1, 4, 0])
    x = images(3)
    found = block_benefit(network, model, [(x[:2], labels[:2]), (x[2:], labels[2:])])
    assert model.training and not any(m._forward_hooks for m in model.modules())
    model.eval()
    dense = F.cross_entropy(outputs(model, x), labels)
    assert list(found) == droppable(network)
    for name, benefit in found.items():
        with zeroed(model, [name], ".mlp"):
            assert benefit == pytest.approx(float(F.cross_entropy(outputs(model, x), labels) - dense), abs=1e-12)
    with pytest.raises(InputError, match="empty"):
        block_benefit(network, model, [])


def test_branch_scores_are_means_over_the_channels_inside() -> None:
    network = traced(build("vit"))
    scores = random_scores(network)
    found = branch_scores(network, scores)
    assert list(found) == droppable(network)
    (hidden,) = network.select("blocks.1.mlp.fc1")
    assert found["blocks.1.mlp"] == pytest.approx(scores.values[hidden.channels].mean())


class Block(nn.Module):
    """x + f(x), with `compute` as f, between two layers."""

    def __init__(self, compute: Callable[[Block, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.inner, self.second, self.wide = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.gamma = nn.Parameter(torch.ones(8))
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x + self.compute(self, x))


REFUSED: dict[str, tuple[Callable[[Block, torch.Tensor], torch.Tensor], str]] = {
    "weights of its own": (lambda m, x: m.inner(F.linear(x, m.second.weight)), "it multiplies in the model"),
    "a bias behind the last module": (lambda m, x: m.inner(x) + m.gamma, "not what a module does"),
    "parts of a wider layer": (lambda m, x: m.second(m.wide(x).chunk(2, -1)[0]), "wide returns another shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_branches_that_modules_alone_do_not_make_stay(case: str) -> None:
    compute, reason = REFUSED[case]
    network = secateur.trace(Block(compute), torch.empty(1, 8))
    (residual,) = network.residuals
    assert reason in residual.reason
    assert "it stays" in str(residual)


KEPT: dict[str, Callable[[Block, torch.Tensor], torch.Tensor]] = {
    "a scale behind the last module": lambda m, x: m.gamma * m.inner(x),
    "written into in place": lambda m, x: m.second(F.relu_(m.inner(x))),
    "a part written into": lambda m, x: m.second(m.inner(x)[:, :8].mul_(2.0)),
    "a transpose": lambda m, x: m.inner(x.t().contiguous().t()).t().t(),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_the_block_does_around_its_modules_does_not_matter(case: str) -> None:
    model = Block(KEPT[case]).double().eval()
    network = secateur.trace(model, torch.empty(1, 8))
    (name,) = droppable(network)
    plan = depth_plan(network, model, [name], ratio=0.5)
    x = torch.randn(3, 8, dtype=torch.float64)
    removed = {(c.tensor, c.dim): list(c.removed) for c in plan.cuts}
    absent = reference(copy.deepcopy(model), removed)
    with torch.no_grad():
        expected = absent.last(absent.first(x))
        assert difference(secateur.cut(model, plan)(x), expected) < 1e-9


class Shared(nn.Module):
    """One linear layer in two branches, and one in a branch whose weight the classifier shares."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.tied, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.last.weight = self.tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.twice(x)
        x = x + self.twice(x)
        return self.last(x + self.tied(x))


def test_branches_that_share_weights_stay() -> None:
    network = secateur.trace(Shared(), torch.empty(1, 8))
    assert droppable(network) == []
    *_, tied = network.residuals
    assert "share weights with others" in tied.reason


class Scaled(nn.Module):
    """A block that holds the scale of its branch itself."""

    def __init__(self, scale: nn.Parameter) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.inner(x)


@pytest.mark.parametrize("shared", [False, True])
def test_a_block_that_shares_what_it_holds_itself_is_not_taken_out_as_a_whole(shared: bool) -> None:
    one = nn.Parameter(torch.rand(8))
    blocks = [Scaled(one), Scaled(one if shared else nn.Parameter(torch.rand(8)))]
    model = nn.Sequential(nn.Linear(8, 8), *blocks, nn.Linear(8, 3))
    x = torch.randn(2, 8)
    network = secateur.trace(model, x)
    assert [b.module for b in network.blocks] == ([] if shared else ["1", "2"])
    plan = depth_plan(network, model, [network.residuals[1].name])
    pruned = secateur.cut(model, plan)
    assert isinstance(pruned[2], Absent) != shared
    torch.testing.assert_close(pruned(x), model[3](model[1](model[0](x))))
    assert plan.params == sum(p.numel() for p in pruned.parameters())


class Twice(nn.Module):
    """A branch whose result is the model's output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(x)
        y = self.inner(x)
        return self.last(x + y), y


def test_a_branch_that_is_read_elsewhere_stays() -> None:
    (residual,) = secateur.trace(Twice(), torch.empty(1, 8)).residuals
    assert residual.reason == "what it computes is read by more than its sum"


def test_torchs_own_encoder_layer_stays() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    network = secateur.trace(nn.Sequential(nn.Linear(16, 16), layer, nn.Linear(16, 4)), torch.empty(1, 5, 16))
    assert len(network.residuals) == 2
    assert all("behind their backs" in r.reason for r in network.residuals)


class ClassAttention(nn.Module):
    """A class token that attends to all tokens: what its branch is made from is longer than what it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.mix, self.last = nn.Linear(4, 8), nn.LayerNorm(8), Pool(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        token = x.mean(1, keepdim=True)
        token = token + self.mix(self.norm(torch.cat([token, x], 1)))
        return self.last(token)


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[:, :1] + x.mean(1, keepdim=True))


def test_a_dropped_branch_does_not_spread_what_it_is_added_to() -> None:
    model = ClassAttention().double().eval()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    network = secateur.trace(model, torch.empty(1, 5, 4))
    pruned = secateur.cut(model, depth_plan(network, model, ["mix"]))
    with torch.no_grad(), zeroed(model, ["mix"]):
        expected = model(x)
        assert pruned(x).shape == expected.shape == (2, 1, 3)
        assert difference(pruned(x), expected) < 1e-9
