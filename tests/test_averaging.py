"""Averages of weights: EMA against its closed form, SWAD against the paper's algorithm run on lists."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn

import secateur
from secateur.data import load_split
from secateur.errors import InputError
from secateur.experiments.base_models import base_model
from secateur.training.averaging import AVERAGINGS, SWAD, Averaging, find_averaging

INTERVAL = 3
"""Steps between validations in these tests."""


class Point(nn.Module):
    """A model with two parameters, of which all values are the number of the step, and a buffer."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.register_buffer("seen", torch.zeros(1, dtype=dtype))

    def set_(self, value: float) -> Point:
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.data.fill_(value)
        return self

    def value(self) -> float:
        values = torch.cat([p.detach().flatten() for p in self.parameters()])
        assert values.max() == values.min()
        return float(values[0])


def weight(step: int) -> float:
    """The weights after a step, of no regular pattern."""
    return math.sin(7.0 * step) * step


def run(averaging: Averaging, losses: Sequence[float], *, first: int = 1) -> None:
    """Trains a `Point` with a validation every `INTERVAL` steps, of the losses given, from a validation on."""
    model = Point()
    for number, loss in enumerate(losses, start=first):
        for step in range((number - 1) * INTERVAL + 1, number * INTERVAL + 1):
            averaging.update(model.set_(weight(step)), step)
        averaging.validated(model, loss, number * INTERVAL)


def averaged(averaging: Averaging) -> float:
    model = Point().set_(-1000.0)
    averaging.apply_(model)
    return model.value()


# --- EMA --------------------------------------------------------------------------------------------------------


def test_ema_has_its_closed_form() -> None:
    averaging = find_averaging("ema", decay=0.9, warmup=False)
    run(averaging, [1.0] * 4)
    steps = 4 * INTERVAL
    expected = 0.9 ** (steps - 1) * weight(1) + sum(0.1 * 0.9 ** (steps - k) * weight(k) for k in range(2, steps + 1))
    assert averaged(averaging) == pytest.approx(expected, rel=1e-12)


def test_ema_warms_up() -> None:
    averaging = find_averaging("ema", decay=0.8)
    run(averaging, [1.0] * 5)
    expected = weight(1)
    for step in range(2, 5 * INTERVAL + 1):
        decay = min(0.8, 1 - step ** (-2 / 3))
        expected = decay * expected + (1 - decay) * weight(step)
    assert averaged(averaging) == pytest.approx(expected, rel=1e-12)


def test_ema_averages_buffers_and_keeps_integers() -> None:
    model = nn.BatchNorm1d(2)
    averaging = find_averaging("ema", decay=0.5, warmup=False)
    assert model.running_mean is not None
    assert model.num_batches_tracked is not None
    for step, value in enumerate((1.0, 3.0), start=1):
        model.running_mean.fill_(value)
        model.num_batches_tracked.fill_(step)
        averaging.update(model, step)
    model.running_mean.fill_(99.0)
    averaging.apply_(model)
    assert model.running_mean.tolist() == [2.0, 2.0]
    assert model.num_batches_tracked == 2


def test_averages_of_coarse_weights_are_held_finely() -> None:
    for name in ("ema", "swad"):
        averaging = find_averaging(name, **({"decay": 0.999, "warmup": False} if name == "ema" else {}))
        model = Point(torch.bfloat16)
        for step in range(1, 513):
            averaging.update(model.set_(1.0 if step == 1 else 1.5), step)
        averaging.apply_(model.set_(0.0))
        expected = 1 + 0.5 * (1 - 0.999**511) if name == "ema" else 1 + 0.5 * 511 / 512
        assert model.value() == pytest.approx(expected, abs=2**-7)
        assert model.a.dtype == torch.bfloat16


# --- SWAD -------------------------------------------------------------------------------------------------------


def algorithm_1(losses: Sequence[float], patience: int, overfit: int, tolerance: float) -> tuple[int, int] | None:
    """Returns t_s and t_e of the paper's algorithm 1, which counts from 1; None if no start is found."""
    start, end, limit = 0, len(losses), None
    at = [math.nan, *losses]
    for i in range(1, len(losses) + 1):
        if limit is None:
            if i >= patience and at[i - patience + 1] == min(at[i - k] for k in range(patience)):
                start = i - patience + 1
                limit = tolerance / patience * sum(at[i - k] for k in range(patience))
        elif i > overfit and limit < min(at[i - k] for k in range(overfit)):
            end = i - overfit
            break
    return None if limit is None else (start, end)


def expected_average(losses: Sequence[float], patience: int, overfit: int, tolerance: float) -> float:
    found = algorithm_1(losses, patience, overfit, tolerance)
    first, last = found or (len(losses), len(losses))
    return float(np.mean([weight(step) for step in range((first - 1) * INTERVAL + 1, last * INTERVAL + 1)]))


VALLEY = [5.0, 3.0, 2.0, 1.0, 1.1, 1.2, 0.9, 1.0, 1.8, 1.0, 1.1, 2.0, 2.1, 1.9, 3.0, 2.5, 2.2, 0.5, 0.5]
"""Falls, has a valley from the 4th validation with one bump that is none, and overfits after the 11th."""


def test_swad_finds_the_valley() -> None:
    averaging = SWAD()
    run(averaging, VALLEY)
    assert algorithm_1(VALLEY, 3, 6, 1.3) == (4, 11)
    assert (averaging.start_step, averaging.end_step) == (4 * INTERVAL, 11 * INTERVAL)
    assert averaging.threshold == pytest.approx(1.3 * 1.1)
    assert averaging.ended
    assert averaged(averaging) == pytest.approx(np.mean([weight(step) for step in range(10, 34)]), rel=1e-12)


@pytest.mark.parametrize("until", range(1, len(VALLEY) + 1))
def test_swad_is_algorithm_1_whenever_training_stops(until: int) -> None:
    averaging = SWAD()
    run(averaging, VALLEY[:until])
    assert averaged(averaging) == pytest.approx(expected_average(VALLEY[:until], 3, 6, 1.3), rel=1e-12)


def test_swad_is_algorithm_1_on_random_curves() -> None:
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        patience = int(generator.integers(1, 4))
        overfit = int(generator.integers(patience, 6))
        tolerance = float(generator.uniform(1.0, 1.3))
        losses = np.exp(0.3 * generator.standard_normal(int(generator.integers(1, 20)))).tolist()
        averaging = SWAD(start_patience=patience, end_patience=overfit, tolerance=tolerance)
        run(averaging, losses)
        assert averaged(averaging) == pytest.approx(expected_average(losses, patience, overfit, tolerance), rel=1e-9)
        found = algorithm_1(losses, patience, overfit, tolerance)
        assert averaging.ended == (found is not None and found[1] < len(losses))
        seen.add((found is None, averaging.ended))
    assert seen == {(True, False), (False, False), (False, True)}


def test_swad_without_validations_is_the_mean_of_all_steps() -> None:
    averaging = SWAD()
    model = Point()
    for step in range(1, 6):
        averaging.update(model.set_(weight(step)), step)
    assert averaged(averaging) == pytest.approx(np.mean([weight(step) for step in range(1, 6)]))


def test_swad_leaves_buffers_to_update_bn() -> None:
    linear, norm = nn.Linear(2, 3), nn.BatchNorm1d(3)
    model = nn.Sequential(linear, norm)
    averaging = SWAD()
    for step in range(1, 4):
        with torch.no_grad():
            linear.weight.fill_(float(step))
        averaging.update(model, step)
    averaging.apply_(model)
    assert linear.weight.unique().tolist() == [2.0]
    images = torch.randn(64, 2)
    assert norm.running_mean is not None
    assert torch.equal(norm.running_mean, torch.zeros(3))
    update_bn([(part, None) for part in images.split(16)], model)
    assert torch.allclose(norm.running_mean, linear(images).mean(0), atol=1e-6)


def test_swad_refuses_what_it_cannot_use() -> None:
    for options in ({"start_patience": 0}, {"start_patience": 4, "end_patience": 3}, {"tolerance": 0.9}):
        with pytest.raises(InputError, match="found"):
            find_averaging("swad", **options)
    averaging = find_averaging("swad")
    with pytest.raises(InputError, match="no update came before"):
        averaging.validated(Point(), 1.0, 0)
    with pytest.raises(InputError, match="nan"):
        averaging.validated(Point(), math.nan, 1)
    averaging.update(Point(), 1)
    other = find_averaging("swad")
    other.load_state_dict(averaging.state_dict())
    with pytest.raises(InputError, match="other shapes"):
        other.update(nn.Linear(2, 2), 2)


# --- all of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(AVERAGINGS))
@pytest.mark.parametrize("cut", [1, 3, 4, 5, 8, 9, 12, 14, 18])
def test_a_resumed_average_is_the_same_bit_for_bit(name: str, cut: int) -> None:
    whole, interrupted, resumed = (find_averaging(name) for _ in range(3))
    run(whole, VALLEY)
    run(interrupted, VALLEY[:cut])
    resumed.load_state_dict({key: value.clone() for key, value in interrupted.state_dict().items()})
    assert averaged(resumed) == averaged(interrupted)
    run(resumed, VALLEY[cut:], first=cut + 1)
    assert averaged(resumed) == averaged(whole)
    left, right = resumed.state_dict(), whole.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key].nan_to_num(-1), right[key].nan_to_num(-1)) for key in left)


@pytest.mark.parametrize("name", list(AVERAGINGS))
def test_an_average_of_nothing_changes_nothing(name: str) -> None:
    model = Point().set_(3.0)
    find_averaging(name).apply_(model)
    assert model.value() == 3.0


def test_none_leaves_the_last_weights_and_names_are_checked() -> None:
    averaging = find_averaging("none")
    run(averaging, [1.0, 2.0])
    assert averaged(averaging) == -1000.0
    with pytest.raises(InputError, match="did you mean 'swad'"):
        find_averaging("swat")
    with pytest.raises(InputError, match="option of the averaging ema 'rate'"):
        find_averaging("ema", rate=0.1)
    with pytest.raises(InputError, match="decay"):
        find_averaging("ema", decay=1.0)


@pytest.mark.parametrize("name", list(AVERAGINGS))
def test_averages_of_a_cut_model_on_digits(name: str) -> None:
    split = load_split("digits-dg")
    images = torch.stack([split.train[i][0] for i in range(0, len(split.train), 8)])
    labels = split.train.labels[::8]
    model = base_model("vit_digits", "thick")
    secateur.prune_(model, images[:1], criterion="l2", ratio=0.4, scope="local")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    averaging = find_averaging(name, **({"decay": 0.5, "warmup": False} if name == "ema" else {}))
    kept: list[dict[str, Tensor]] = []
    for step in range(1, 7):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaging.update(model, step)
        averaging.validated(model, 1.0 + step if step > 1 else 1.0, step)
        kept.append({key: value.detach().clone() for key, value in model.state_dict().items()})
    result = copy.deepcopy(model)
    averaging.apply_(result)
    shares = {"none": [0, 0, 0, 0, 0, 1], "ema": [1 / 32, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2], "swad": [1 / 6] * 6}
    for key, value in result.state_dict().items():
        expected = sum(share * weights[key] for share, weights in zip(shares[name], kept, strict=True))
        assert torch.allclose(value, torch.as_tensor(expected), atol=1e-6)
    assert result(images).isfinite().all()
