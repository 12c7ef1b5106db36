"""Pruning in steps: scored anew each time, one plan for all of them in the end."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from torch import nn

import secateur
from secateur.errors import InputError, PlanError


def _vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    size: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **size | options).eval()


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _removed(plan: secateur.Plan) -> dict[tuple[str, int], set[int]]:
    return {(c.tensor, c.dim): set(c.removed) for c in plan.cuts}


@pytest.mark.parametrize(
    "request_",
    [
        {"ratio": 0.6},
        {"ratio": 0.5, "scope": "local", "ratios": {"head_dims": None}},
        {"ratio": 0.5, "scope": "isomorphic", "ratios": {"heads": 0.0, "head_dims": None}, "round_to": 2},
        {"macs": 0.3},
        {"macs": 0.3, "ratios": {"head_dims": None}},
        {"params": 60_000, "scope": "isomorphic"},
    ],
    ids=str,
)
def test_what_has_gone_stays_gone_and_the_last_plan_is_the_whole_cut(request_: dict[str, Any]) -> None:
    dense, model = _vit(), _vit()
    plans = list(secateur.prune_steps_(model, X, 4, **request_))
    assert len(plans) == 4
    for one, next_ in pairwise(plans):
        for place, gone in _removed(one).items():
            assert gone <= _removed(next_)[place]
    # Nothing was trained in between, so the dense model cut by the last plan has the same weights.
    once = secateur.cut(dense, plans[-1])
    for name, tensor in once.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
    torch.testing.assert_close(model(X), once(X), rtol=1e-4, atol=1e-5)
    assert plans[-1].dense_macs == secateur.trace(dense, X).macs
    assert plans[-1].macs == secateur.trace(model, X).macs


def test_one_step_is_prune() -> None:
    one, other = _vit(), _vit()
    (plan,) = secateur.prune_steps_(one, X, 1, criterion="l1", macs=0.5)
    assert plan == secateur.prune_(other, X, criterion="l1", macs=0.5)


def test_the_budget_is_approached_in_equal_steps() -> None:
    model = _vit()
    left = [p.macs / p.dense_macs for p in secateur.prune_steps_(model, X, 3, macs=0.4, ratios={"head_dims": None})]
    for found, wanted in zip(left, (0.8, 0.6, 0.4), strict=True):
        assert wanted - 0.02 <= found <= wanted
    model = _vit()
    dense = sum(p.numel() for p in model.parameters())
    left = [p.params for p in secateur.prune_steps_(model, X, 2, params=dense // 2)]
    assert 0.73 * dense <= left[0] <= 0.75 * dense + 1
    assert 0.48 * dense <= left[1] <= dense // 2


def test_a_resnet_with_its_branches_dropped_first() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    name = next(r.name for r in secateur.trace(model, x).residuals if not r.reason)
    dense = copy.deepcopy(model)
    plans = list(secateur.prune_steps_(model, x, 3, macs=0.3, branches=[name], scope="isomorphic"))
    assert all(p.branches == (name,) for p in plans)
    once = secateur.cut(dense, plans[-1])
    torch.testing.assert_close(model(x), once(x), rtol=1e-3, atol=1e-4)
    assert secateur.trace(model, x).macs == plans[-1].macs


def test_scores_are_those_of_the_trained_weights() -> None:
    """Weights that a training between two steps made small go in the second, whatever they were at first."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(1, 8)
    steps = secateur.prune_steps_(model, x, 2, ratio=0.5)
    first = next(steps)
    assert model[0].weight.shape == (12, 8)
    kept = sorted(set(range(16)) - _removed(first)["0.weight", 0])
    with torch.no_grad():
        model[0].weight[[1, 4, 7, 10]] *= 1e-3
        model[2].weight[:, [1, 4, 7, 10]] *= 1e-3
    last = next(steps)
    assert model[0].weight.shape == (8, 8)
    assert _removed(last)["0.weight", 0] - _removed(first)["0.weight", 0] == {kept[i] for i in (1, 4, 7, 10)}


def test_an_optimizer_goes_on_with_its_state() -> None:
    model = _vit()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    averages = {}
    for _ in secateur.prune_steps_(model, X, 3, macs=0.4, optimizer=optimizer):
        for p, before in averages.items():
            state = optimizer.state[p]["exp_avg"]
            assert state.shape == p.shape
            assert set(state.flatten().tolist()) <= before
        for _ in range(2):
            nn.functional.cross_entropy(model(X), torch.tensor([1, 3])).backward()
            optimizer.step()
            optimizer.zero_grad()
        averages = {p: set(s["exp_avg"].flatten().tolist()) for p, s in optimizer.state.items()}


def test_a_model_pruned_in_steps_is_saved_and_loaded(tmp_path: Any) -> None:
    model = _vit()
    *_, plan = secateur.prune_steps_(model, X, 3, macs=0.4, ratios={"head_dims": None})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5}
    secateur.save(model, plan, tmp_path / "m", source=secateur.ModelSource("timm", "vit_tiny_patch16_224", options))
    loaded = secateur.load(tmp_path / "m")
    torch.testing.assert_close(loaded(X), model(X))


def test_compensation_in_every_step() -> None:
    model, plain = _vit(), _vit()
    samples = [torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    dense = _vit()(samples[0])
    options: dict[str, Any] = {"macs": 0.5, "ratios": {"heads": 0.0, "head_dims": None}}
    for _ in secateur.prune_steps_(model, X, 2, compensate=samples, **options):
        pass
    secateur.prune_(plain, X, **options)
    assert (model(samples[0]) - dense).square().sum() < 0.5 * (plain(samples[0]) - dense).square().sum()


def test_bad_requests_are_told_before_anything_is_cut() -> None:
    model = _vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="out of reach"):
        next(secateur.prune_steps_(model, X, 4, macs=0.0001))
    with pytest.raises(InputError, match="steps"):
        next(secateur.prune_steps_(model, X, 0))
    with pytest.raises(InputError, match="macs"):
        next(secateur.prune_steps_(model, X, 2, macs="half"))
    with pytest.raises(InputError, match="ratio"):
        next(secateur.prune_steps_(model, X, 2, ratio=1.5))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_down_to_one_head_each() -> None:
    """With a single head left, its dimensions look like those of any hidden layer, and are known again all the same."""
    model = _vit()
    dense = copy.deepcopy(model)
    request: dict[str, Any] = {"ratio": 0.9, "ratios": {"head_dims": None}, "min_channels": 1, "scope": "local"}
    plans = list(secateur.prune_steps_(model, X, 5, **request))
    assert model.blocks[0].attn.num_heads == 1
    torch.testing.assert_close(model(X), secateur.cut(dense, plans[-1])(X), rtol=1e-3, atol=1e-4)
