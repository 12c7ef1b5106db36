"""Scores from several domains: each formula by hand, and what cannot be combined."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from criteria_models import (
    attention,
    attention_batches,
    attention_network,
    axis,
    naive_scores,
    network,
    sample_gradients,
)
from secateur.criteria import COMBINATIONS, SignAgreement, calibrate, mean_minus_spread, score
from secateur.errors import InputError
from secateur.graph.network import Network

DOUBLE = torch.float64


def domains() -> dict[str, Any]:
    """Three domains: the second a hundred times as loud, the third with labels of its own."""
    (a, b), (c,) = attention_batches((9, 8), DOUBLE), attention_batches((7,), DOUBLE)
    return {"photo": [a], "art": [(b[0] * 100.0, b[1])], "sketch": [(c[0] - 1.0, (c[1] + 2) % 5)]}


def case() -> tuple[nn.Module, Network, dict[str, Any]]:
    return attention().double(), attention_network(), domains()


def by_domain(model: nn.Module, net: Network, name: str, given: dict[str, Any]) -> np.ndarray:
    rows = []
    for batches in given.values():
        values = score(net, model, name, batches).values.copy()
        for group in net.groups:
            values[group.channels] /= values[group.channels].mean()
        rows.append(values)
    return np.array(rows)


@pytest.mark.parametrize("name", ["taylor", "hessian", "activation", "obs"])
def test_scores_of_domains_are_combined_after_normalisation(name: str) -> None:
    model, net, given = case()
    each = by_domain(model, net, name, given)
    expected = {
        "mean": each.sum(0) / 3,
        "worst": np.array([min(column) for column in each.T]),
        "mean_minus_spread": each.mean(0) - np.sqrt(((each - each.mean(0)) ** 2).sum(0) / 3),
    }
    for combine, values in expected.items():
        found = score(net, model, name, given, combine=combine)
        np.testing.assert_allclose(found.values, values, rtol=1e-9, atol=1e-12)
        assert not found.normalize
        assert found.num_samples == 24
        assert found.criterion == f"{name} ({combine} of photo, art, sketch)"
    np.testing.assert_allclose(score(net, model, name, given).values, expected["mean"], rtol=1e-9)
    wide = score(net, model, name, given, combine=partial(mean_minus_spread, weight=2.0)).values
    np.testing.assert_allclose(wide, 2 * expected["mean_minus_spread"] - expected["mean"], rtol=1e-8, atol=1e-12)
    middle = score(net, model, name, given, combine=lambda scores: np.median(scores, axis=0)).values
    np.testing.assert_allclose(middle, np.sort(each, axis=0)[1], rtol=1e-9)


def test_worst_takes_what_serves_one_domain_alone_first() -> None:
    model = nn.Linear(3, 2, bias=False)
    nn.init.ones_(model.weight)
    net = network(3, [axis("weight", 1, "in", range(3))], [("inputs", range(3))])
    labels = torch.zeros(4, dtype=torch.long)

    def domain(*loudness: float) -> Any:
        return [(torch.tensor(loudness).repeat(4, 1), labels)]

    # channel 0 is a shortcut of one domain, 1 and 2 matter a little in both
    given = {"photo": domain(90.0, 2.0, 1.0), "art": domain(0.0, 2.0, 1.0)}
    order = {way: np.argsort(score(net, model, "activation", given, combine=way).values) for way in ("mean", "worst")}
    assert order["mean"].tolist()[-1] == 0
    assert order["worst"].tolist() == [0, 2, 1]


@pytest.mark.parametrize("threshold", [1.0, 0.3])
@pytest.mark.parametrize("name", ["taylor", "taylor_signed"])
def test_sign_agreement_keeps_gradients_that_agree(name: str, threshold: float) -> None:
    model, net, given = case()
    names = [key for key, p in model.named_parameters() if key.endswith("weight")]
    weights = {key: p.detach().numpy() for key, p in model.named_parameters()}
    product = {}
    gradients = [sample_gradients(model, names, batches) for batches in given.values()]
    kept = 0
    for key in names:
        g = np.stack([of_domain[key].mean(0).numpy() for of_domain in gradients])
        agree = np.abs((g > 0).sum(0) - (g < 0).sum(0)) >= 3 * threshold - 1e-9
        kept += agree.sum()
        product[key] = weights[key] * g.sum(0) * agree
        product[key] = np.abs(product[key]) if name == "taylor" else product[key]
    expected = np.abs(naive_scores(net, product))
    combine = "sign_agreement" if threshold == 1.0 else SignAgreement(threshold)
    found = score(net, model, name, given, combine=combine)
    np.testing.assert_allclose(found.values, expected, rtol=1e-8)
    assert found.normalize and found.num_samples == 24
    assert kept > 0
    if threshold == 0.3:  # of three signs, one is left over at least: all gradients count
        pooled = [pair for batches in given.values() for pair in batches]
        np.testing.assert_allclose(found.values, score(net, model, name, pooled).values, rtol=1e-8)


def test_one_domain_is_its_own_scores() -> None:
    model, net, given = case()
    one = {"photo": given["photo"]}
    expected = by_domain(model, net, "taylor", one)[0]
    for combine in ("mean", "worst", "mean_minus_spread"):
        np.testing.assert_allclose(score(net, model, "taylor", one, combine=combine).values, expected, rtol=1e-12)
    agreed = score(net, model, "taylor", one, combine="sign_agreement").values
    np.testing.assert_array_equal(agreed, score(net, model, "taylor", given["photo"]).values)


def test_domains_may_be_calibrations() -> None:
    model, net, given = case()
    forwards = []
    calibrated = {name: calibrate(net, model, iter(batches)) for name, batches in given.items()}
    expected = {way: score(net, model, "taylor", given, combine=way).values for way in COMBINATIONS}
    score(net, model, "taylor", calibrated)
    model.head.register_forward_hook(lambda *_: forwards.append(1))
    for way, values in expected.items():
        np.testing.assert_array_equal(score(net, model, "taylor", calibrated, combine=way).values, values)
    assert not forwards


def test_criteria_without_batches_do_not_look_at_domains() -> None:
    model, net, given = case()
    found = score(net, model, "l2", given, combine="worst")
    np.testing.assert_array_equal(found.values, score(net, model, "l2").values)
    assert (found.criterion, found.normalize) == ("l2", True)


def test_what_cannot_be_combined_is_named() -> None:
    model, net, given = case()
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (given, {"combine": "best"}, "unknown combination of domains 'best'"),
        (given["photo"], {"combine": "worst"}, "combine= is for batches by domain"),
        ({}, {}, "there are no domains"),
        ({**given, "empty": []}, {}, "domain 'empty': the calibration batches are empty"),
        ({**given, "empty": []}, {"combine": "sign_agreement"}, "domain 'empty': the calibration batches are empty"),
        ({"photo": 5}, {}, "domain 'photo': batches must be an iterable"),
    ]
    for batches, options, message in cases:
        with pytest.raises(InputError, match=message):
            score(net, model, "taylor", batches, **options)
    with pytest.raises(InputError, match="sign_agreement compares gradients, and this criterion asks for mean_squared"):
        score(net, model, "hessian", given, combine="sign_agreement")
    with pytest.raises(InputError, match=r"must lie in \(0, 1\], found 0"):
        SignAgreement(0)
    with pytest.raises(InputError, match=r"shape \(3, 13\), but the network has 13 channels"):
        score(net, model, "taylor", given, combine=lambda scores: scores)


def test_domains_that_never_agree_are_an_error() -> None:
    model, net = nn.Linear(2, 1, bias=False), network(2, [axis("weight", 1, "in", [0, 1])])
    x, y = torch.ones(1, 2), torch.zeros(1)
    with pytest.raises(InputError, match="no gradient has one sign in 100% of the domains"):
        given = {"a": [(x, y)], "b": [(-x, y)]}
        score(net, model, "taylor", given, loss=lambda output, _: output.sum(), combine="sign_agreement")
