"""Calibration objects: each statistic once, the scores of plain batches, refused where they do not belong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from criteria_models import CRITERION_NAMES, attention, attention_batches, attention_network
from secateur.criteria import CRITERIA, calibrate, rank_mean, score
from secateur.errors import InputError
from secateur.graph.network import Network


def case() -> tuple[nn.Module, Network, Any]:
    return attention().double(), attention_network(), attention_batches((20, 13), torch.float64)


def test_a_calibration_computes_each_statistic_once() -> None:
    model, net, batches = case()
    plain = {name: score(net, model, name, batches) for name in CRITERION_NAMES}
    forwards = []
    model.head.register_forward_hook(lambda *_: forwards.append(1))
    calibration = calibrate(net, model, batches)
    assert not forwards
    for name in ("taylor", "hessian", "activation", "obs"):
        score(net, model, name, calibration)
        assert forwards, name
        forwards.clear()
    for name in CRITERION_NAMES:
        again = score(net, model, name, calibration)
        np.testing.assert_array_equal(again.values, plain[name].values)
        assert again.num_samples == plain[name].num_samples
    score(net, model, rank_mean(["taylor", "obs"]), calibration)
    assert not forwards


def test_a_calibration_keeps_the_batches_of_an_iterator() -> None:
    model, net, batches = case()
    calibration = calibrate(net, model, iter(batches))
    for name in ("taylor", "activation"):
        expected = score(net, model, name, batches).values
        np.testing.assert_array_equal(score(net, model, name, calibration).values, expected)
    both = score(net, model, rank_mean(["taylor", "hessian"]), iter(batches))
    np.testing.assert_array_equal(both.values, score(net, model, rank_mean(["taylor", "hessian"]), batches).values)


def test_a_calibration_is_refused_where_it_does_not_belong() -> None:
    model, net, batches = case()
    calibration = calibrate(net, model, batches)
    with pytest.raises(InputError, match="made for another model or network"):
        score(net, attention().double(), "taylor", calibration)
    with pytest.raises(InputError, match="pass loss= to calibrate"):
        score(net, model, "taylor", calibration, loss=lambda output, labels: output.sum())
    score(net, model, "taylor", calibration)
    with torch.no_grad():
        model.proj.weight.mul_(2.0)
    with pytest.raises(InputError, match=r"'proj\.weight' was changed after the model was calibrated"):
        score(net, model, "taylor", calibration)


def test_a_calibration_has_its_loss() -> None:
    model, net, batches = case()

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return output[:, 0].mean()

    expected = score(net, model, "taylor", batches, loss=loss).values
    found = score(net, model, "taylor", calibrate(net, model, batches, loss=loss)).values
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", [name for name, c in CRITERIA.items() if c.needs_batches])
def test_no_samples_are_an_error(name: str) -> None:
    model, net, batches = case()
    (x, y), _ = batches
    for given, message in (
        (None, f"criterion '{name}' needs calibration batches"),
        ([], "batches are empty"),
        (calibrate(net, model, []), "batches are empty"),
        ([(x, y), (x * float("nan"), y)], "batch 1: input 0 .* holds NaN"),
    ):
        with pytest.raises(InputError, match=message):
            score(net, model, name, given)
