"""Predicted latency: exact where time is what the table supposes, kept in a file, and a budget for allocation."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secateur
from models import MODELS, random_scores
from secateur import InputError, PlanError
from secateur.cost import LatencyTable
from secateur.cost.latency import call, evaluating
from secateur.cost.layers import Grid, time_layer, uses_of

X = torch.zeros(2, 3, 64, 64)


class FakeTimer:
    """A device on which each multiplication takes a nanosecond and each pass of a whole model 50 microseconds more."""

    def __init__(self) -> None:
        self.layers = self.models = 0

    def __call__(self, models: Mapping[str, nn.Module], inputs: Any, *, rounds: int) -> dict[str, list[float]]:
        alone = list(models) == ["layer"]
        self.layers += alone
        self.models += not alone
        times = {}
        for name, model in models.items():
            with evaluating(model), FlopCounterMode(display=False) as counter, torch.no_grad():
                call(model, inputs)
            times[name] = [counter.get_total_flops() / 2e9 + (0 if alone else 5e-5)] * rounds
        return times


@functools.cache
def table_of(name: str) -> tuple[nn.Module, secateur.Network, LatencyTable]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    network = secateur.trace(model, torch.empty(1, *X.shape[1:]))
    return model, network, LatencyTable.measure(network, model, X, timer=FakeTimer())


@pytest.mark.parametrize("name", ["vit", "beit", "swin", "resnet18", "resnet50", "mobilenetv2", "convnext", "hf_vit"])
def test_prediction_is_exact_on_a_device_whose_time_is_its_macs(name: str) -> None:
    model, network, table = table_of(name)
    for seed, ratio in enumerate((0.0, 0.2, 0.5, 0.7)):
        plan = secateur.allocate(network, random_scores(network, seed), ratio=ratio)
        measured = FakeTimer()({"cut": secateur.cut(model, plan)}, X, rounds=1)["cut"][0]
        assert table.predict(plan) == pytest.approx(measured, rel=1e-6)
    assert table.probes[0][0] == pytest.approx(table.seconds(network.mask()), rel=1e-9)
    assert all(predicted == pytest.approx(measured, rel=1e-6) for measured, predicted in table.probes)
    assert min(table.coefficients) >= 0


@pytest.mark.parametrize("scope", ["global", "cost"])
@pytest.mark.parametrize("name", ["vit", "swin", "resnet18", "mobilenetv2"])
def test_plan_uses_up_a_latency_budget(name: str, scope: Any) -> None:
    _, network, table = table_of(name)
    dense = table.seconds(network.mask())
    for share in (0.8, 0.5):
        by_share, by_seconds = table.within(fraction=share), table.within(seconds=share * dense)
        plan = secateur.allocate(network, random_scores(network), latency=by_share, scope=scope)
        assert 0.98 * share * dense <= table.predict(plan) <= share * dense
        assert plan.request["latency"] == pytest.approx(share * dense)
        same = secateur.allocate(network, random_scores(network), latency=by_seconds, scope=scope)
        assert same.cuts == plan.cuts
    with pytest.raises(PlanError, match=r"e-08 seconds .* out of reach: what must stay costs .* seconds"):
        secateur.allocate(network, random_scores(network), latency=table.within(seconds=5e-8))


def test_times_between_those_measured_are_interpolated_and_never_fall() -> None:
    grid = Grid((16, 64), (32, 96), ((1.0, 3.0), (2.0, 6.0)))
    at = grid.at(np.array([16.0, 64, 64, 40, 4, 128]), np.array([32.0, 32, 96, 64, 8, 128]))
    assert at == pytest.approx([1, 2, 6, 3, 1, 6])
    rows, columns = (a.ravel().astype(float) for a in np.meshgrid(np.arange(1, 80), np.arange(1, 110), indexing="ij"))
    seconds = grid.at(rows, columns).reshape(79, 109)
    assert (np.diff(seconds, axis=0) >= 0).all() and (np.diff(seconds, axis=1) >= 0).all()


def test_awkward_widths_cost_what_they_were_measured_to_cost() -> None:
    (use,) = uses_of(nn.Linear(128, 256), torch.zeros(5, 128))

    def timer(models: Mapping[str, nn.Module], inputs: Any, *, rounds: int) -> dict[str, list[float]]:
        (layer,) = models.values()
        assert isinstance(layer, nn.Linear)
        rows, columns = layer.weight.shape
        assert inputs.shape == (5, columns)
        slow = (1.0 if rows % 16 == 0 else 1.25 if rows % 8 == 0 else 1.5) * (1 if columns % 8 == 0 else 2)
        return {"layer": [9e9, rows * columns * slow]}

    grid = time_layer(use.shape, torch.device("cpu"), timer, rows=True, columns=True)
    for rows, columns, slow in ((160, 96, 1), (168, 96, 1.25), (161, 96, 1.5), (160, 72, 1), (100, 90, 3.0)):
        at = grid.at(np.array([float(rows)]), np.array([float(columns)]))
        assert at[0] == pytest.approx(rows * columns * slow)


def test_slow_spell_during_a_small_layer_does_not_make_it_slower_than_a_larger_one() -> None:
    (use,) = uses_of(nn.Linear(64, 64), torch.zeros(1, 64))
    calls = iter(range(1000))

    def timer(models: Mapping[str, nn.Module], inputs: Any, *, rounds: int) -> dict[str, list[float]]:
        (layer,) = models.values()
        return {"layer": [(100.0 if next(calls) == 0 else 1.0) * layer.weight.numel()]}  # type: ignore[union-attr]

    grid = time_layer(use.shape, torch.device("cpu"), timer, rows=True, columns=True)
    assert (np.diff(grid.seconds, axis=0) >= 0).all() and (np.diff(grid.seconds, axis=1) >= 0).all()


def test_what_was_measured_once_is_read_from_the_file(tmp_path: Path) -> None:
    model, network, _ = table_of("vit")
    file = tmp_path / "new" / "times.json"
    first, second, third = FakeTimer(), FakeTimer(), FakeTimer()
    made = LatencyTable.measure(network, model, X, file=file, timer=first)
    read = LatencyTable.measure(network, model, X, file=file, timer=second)
    assert first.layers > 0 and first.models > 0 and (second.layers, second.models) == (0, 0)
    assert read.coefficients == made.coefficients and read.probes == made.probes
    assert read.seconds(network.mask(np.arange(20))) == made.seconds(network.mask(np.arange(20)))
    # a deeper model of the same layers is measured as a whole only
    torch.manual_seed(0)
    deeper = MODELS["vit_gap"]().eval()
    LatencyTable.measure(secateur.trace(deeper, X[:1]), deeper, X, file=file, timer=third)
    assert third.layers == 0 and third.models > 0
    content = json.loads(file.read_text())
    (machine,) = content["machines"].values()
    assert len(machine["models"]) == 2
    before = file.read_bytes()
    LatencyTable.measure(network, model, X, file=file, timer=FakeTimer())
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == ["times.json"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 99, "machines": {}}', '{"format": 1}'])
def test_file_of_something_else_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    model, network, _ = table_of("vit")
    file = tmp_path / "times.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"times\.json"):
        LatencyTable.measure(network, model, X, file=file, timer=FakeTimer())
    assert file.read_text() == text


def test_measuring_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = MODELS["resnet18"]().train()
    model[0].eval() if isinstance(model, nn.Sequential) else model.get_submodule("layer1").eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    LatencyTable.measure(secateur.trace(model, X[:1]), model, X, timer=FakeTimer())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_real_times_of_a_small_model_are_positive_and_fall_with_its_widths() -> None:
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))
    x = torch.zeros(64, 64)
    network = secateur.trace(model, x[:1])
    table = LatencyTable.measure(network, model, x)
    whole, less = table.seconds(network.mask()), table.seconds(network.mask(np.arange(16 * 40)))
    assert 0 < less <= whole
    assert "latency" in str(table) and "cut copies" in str(table)


def test_other_inputs_than_were_traced_are_refused() -> None:
    model, network, _ = table_of("vit")
    with pytest.raises(InputError, match="was traced on"):
        LatencyTable.measure(network, model, torch.zeros(2, 3, 32, 32), timer=FakeTimer())


def test_plan_of_another_network_is_refused() -> None:
    _, _, table = table_of("vit")
    _, other, _ = table_of("swin")
    with pytest.raises(InputError, match="network of the table"):
        table.predict(secateur.allocate(other, random_scores(other)))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "either fraction="),
        ({"fraction": 0.5, "seconds": 1.0}, "either fraction="),
        ({"fraction": 0.0}, "fraction is 0"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"seconds": -1.0}, "seconds is -1"),
        ({"seconds": float("nan")}, "seconds is nan"),
    ],
)
def test_bad_latency_budget_is_one_clear_error(request_: dict[str, float], message: str) -> None:
    _, _, table = table_of("vit")
    with pytest.raises(InputError, match=message):
        table.within(**request_)
