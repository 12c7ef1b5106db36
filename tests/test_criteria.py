"""Scores: formulas against naive loops, registry, one clear error for each bad input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from criteria_models import (
    CRITERION_NAMES,
    NEEDS_BATCHES,
    Attention,
    attention,
    attention_batches,
    attention_network,
    axis,
    naive_scores,
    network,
    sample_gradients,
)
from secateur.criteria import (
    CRITERIA,
    ByChannel,
    Calibration,
    Saliency,
    Scores,
    Statistic,
    find_criterion,
    gradient_sum,
    mean_squared_gradient,
    register,
    score,
)
from secateur.errors import InputError

# ---- formulas --------------------------------------------------------------------------------------------------------


def by_formula(name: str, weight: Tensor, per_sample: Tensor, sizes: Sequence[int]) -> np.ndarray:
    batch_gradient = torch.stack([part.mean(0) for part in per_sample.split(list(sizes))]).sum(0)
    formulas = {
        "l1": weight.abs(),
        "l2": weight**2,
        "taylor": (weight * batch_gradient).abs(),
        "hessian": weight**2 * (per_sample**2).mean(0),
    }
    return formulas[name].detach().numpy()


@pytest.mark.parametrize("name", ["l1", "l2", "taylor", "hessian"])
def test_scores_equal_a_naive_loop_over_channels_axes_and_samples(name: str) -> None:
    model, net, batches = attention().double(), attention_network(), attention_batches(dtype=torch.float64)
    weights = dict(model.named_parameters())
    names = [key for key in weights if key.endswith("weight")]
    per_sample = sample_gradients(model, names, batches)
    saliency = {key: by_formula(name, weights[key], per_sample[key], (4, 3)) for key in names}
    scores = score(net, model, name, batches)
    np.testing.assert_allclose(scores.values, naive_scores(net, saliency), rtol=1e-9)
    assert scores.num_samples == (7 if name in NEEDS_BATCHES else 0)
    assert scores.normalize


def test_several_indices_of_one_axis_make_one_member() -> None:
    model = nn.Linear(1, 4, bias=False)
    model.weight.data = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    net = network(2, [axis("weight", 0, "out", [0, 0, 1, -1])])
    np.testing.assert_allclose(score(net, model, "l2").values, [5.0, 9.0])


def test_head_takes_what_lies_inside_it_over_the_distinct_axes() -> None:
    model, net = attention(), attention_network()
    total = model.qkv.weight[[0, 1, 4, 5, 8, 9]].abs().sum() + model.proj.weight[:, :2].abs().sum()
    assert score(net, model, "l1").values[11] == pytest.approx(total.item() / 2, rel=1e-6)


def test_biases_embeddings_and_what_stays_do_not_count() -> None:
    model, net = attention(), attention_network()
    before = score(net, model, "l2").values
    model.norm.bias.data.fill_(100.0)
    model.qkv.bias.data.fill_(100.0)
    np.testing.assert_array_equal(score(net, model, "l2").values, before)


def test_channel_without_scored_axis_has_zero() -> None:
    model = nn.Linear(2, 2)
    net = network(3, [axis("weight", 0, "out", [0, 1]), axis("bias", 0, "other", [2, 2])])
    assert score(net, model, "l1").values[2] == 0.0


def test_weights_larger_than_a_block_are_scored_whole() -> None:
    model = nn.Sequential(nn.Conv2d(70, 300, 3, bias=False), nn.Linear(700, 300, bias=False))
    axes = [axis("0.weight", 0, "out", range(300)), axis("0.weight", 1, "in", range(300, 370))]
    axes += [axis("1.weight", 1, "in", range(370, 1070))]
    values = score(network(1070, axes), model, "l2").values
    conv, linear = model[0].weight.double(), model[1].weight.double()
    expected = torch.cat([conv.square().sum((1, 2, 3)), conv.square().sum((0, 2, 3)), linear.square().sum(0)])
    np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-5)


def test_tied_tensor_is_scored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Tied().double()
    net = network(2, [axis("a.weight", 0, "out", [0, 1]), axis("b.weight", 0, "out", [0, 1])])
    np.testing.assert_allclose(score(net, model, "l1").values, model.a.weight.abs().sum(1).detach())
    batches = [(torch.randn(3, 2, dtype=torch.float64), torch.tensor([0, 1, 1]))]
    curvature = sample_gradients(model, ["a.weight"], batches)["a.weight"].square().mean(0)
    expected = (model.a.weight.square() * curvature).sum(1).detach()
    np.testing.assert_allclose(score(net, model, "hessian", batches).values, expected, rtol=1e-9)


def test_half_precision_is_scored_in_float32() -> None:
    model = nn.Linear(1, 2, bias=False).to(torch.float16)
    model.weight.data = torch.tensor([[300.0], [1e-4]], dtype=torch.float16)
    values = score(network(2, [axis("weight", 0, "out", [0, 1])]), model, "l2").values
    np.testing.assert_allclose(values, [90000.0, 1e-8], rtol=1e-2)


# ---- random, registry, scores ----------------------------------------------------------------------------------------


def test_random_is_uniform_and_the_same_for_a_seed() -> None:
    model, net = nn.Linear(1, 1), network(2000, [])
    first, again = score(net, model, "random", seed=1), score(net, model, "random", seed=1)
    np.testing.assert_array_equal(first.values, again.values)
    assert not np.array_equal(first.values, score(net, model, "random", seed=2).values)
    assert first.values.min() >= 0 and first.values.max() < 1
    assert first.values.mean() == pytest.approx(0.5, abs=0.05)
    assert not first.normalize


def test_registry_holds_all_criteria_and_refuses_a_second_of_a_name() -> None:
    assert tuple(CRITERIA) == CRITERION_NAMES
    with pytest.raises(InputError, match="'l1' is registered already"):
        register(Saliency("l1", "", torch.abs))
    assert find_criterion("l1").about == "Σ|w|"


def test_own_criteria_need_a_formula_only() -> None:
    model, net = nn.Linear(2, 2, bias=False), network(2, [axis("weight", 0, "out", [0, 1])])
    cubic = score(net, model, Saliency("cubic", "", lambda w: w.abs() ** 3))
    np.testing.assert_allclose(cubic.values, model.weight.detach().abs().pow(3).sum(1), rtol=1e-6)
    slope = Saliency("slope", "", lambda w, g: g.abs(), statistic=gradient_sum)
    batch = (torch.randn(3, 2), torch.tensor([0, 1, 1]))
    gradient = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), model.weight)[0]
    np.testing.assert_allclose(score(net, model, slope, [batch]).values, gradient.abs().sum(1), rtol=1e-5)
    ones = score(net, model, ByChannel("ones", "", lambda subject: np.ones(subject.network.num_channels)))
    np.testing.assert_array_equal(ones.values, [1.0, 1.0])


def test_unknown_criterion_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown criterion 'tailor'; did you mean 'taylor' or 'taylor_signed'\?"):
        score(network(1, []), nn.Linear(1, 1), "tailor")


def test_scores_print_what_they_are_and_cannot_be_written() -> None:
    scores = Scores(np.array([1.0, 2.0, 4.0]), "l2", num_samples=640)
    assert str(scores) == "Scores by l2 of 3 channels from 640 samples: least 1, median 2, most 4"
    with pytest.raises(ValueError, match="read-only"):
        scores.values[0] = 0.0


def test_validate_names_the_group_of_scores_that_are_not_finite() -> None:
    net = attention_network()
    scores = Scores(np.ones(13), "mine")
    scores.validate(net)
    values = np.ones(13)
    values[8] = np.nan
    with pytest.raises(InputError, match="NaN or infinite for 1 channels, in group 'v'"):
        replace(scores, values=values).validate(net)
    with pytest.raises(InputError, match=r"shape \(12,\), but the network has 13 channels"):
        replace(scores, values=np.ones(12)).validate(net)


# ---- bad input -------------------------------------------------------------------------------------------------------

X, Y = torch.ones(2, 4, 3), torch.tensor([0, 1])
BAD_BATCHES: dict[str, tuple[Any, str]] = {
    "none": (None, "needs calibration batches"),
    "no batch at all": ([], "batches are empty"),
    "a single pair": ((X, Y), "batch 0: expected a pair"),
    "nothing to iterate over": (5, "batches must be an iterable of pairs"),
    "no labels": ([X], "batch 0: expected a pair"),
    "labels that are no tensor": ([(X, [0, 1])], "batch 0: expected a pair"),
    "an empty batch": ([(X, Y), (X[:0], Y[:0])], "batch 1 is empty"),
    "rows that do not match": ([(X, Y), (X[:1], Y)], r"batch 1: input 0 has shape \(1, 4, 3\), but there are 2 labels"),
    "NaN inputs": ([(X, Y), (X * float("nan"), Y)], "batch 1: input 0 .* holds NaN"),
    "a label too high": ([(X, Y), (X, Y + 4)], "batch 1: label 5 is out of range; the model has 5 classes"),
    "a label below zero": ([(X, Y - 1)], "batch 0: label -1 is out of range"),
    "labels of a wrong shape": ([(X, Y[:, None])], r"labels .* must have shape \(2,\)"),
    "inputs of a wrong shape": ([(X, Y), (X[..., :2], Y)], "batch 1: the model or the loss failed"),
    "an argument that the model lacks": ([({"y": X}, Y)], "batch 0: the model or the loss failed .*TypeError"),
}


@pytest.mark.parametrize("name", NEEDS_BATCHES)
@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches_are_one_clear_error(name: str, case: str) -> None:
    batches, message = BAD_BATCHES[case]
    with pytest.raises(InputError, match=message):
        score(attention_network(), attention(), name, batches)


@pytest.mark.parametrize("name", NEEDS_BATCHES)
def test_an_iterator_that_is_used_up_is_an_error(name: str) -> None:
    model, net, batches = attention(), attention_network(), iter(attention_batches())
    score(net, model, name, batches)
    with pytest.raises(InputError, match="nothing left"):
        score(net, model, name, batches)


@pytest.mark.parametrize("name", NEEDS_BATCHES)
@pytest.mark.parametrize("size", [1, 3])
def test_losses_that_are_no_use_are_named(name: str, size: int) -> None:
    model, net, batches = attention(), attention_network(), attention_batches((3, size))
    cases: list[tuple[Callable[[Any, Tensor], Any], str]] = [
        (lambda output, y: output.sum() * float("inf"), "batch 0: the loss is NaN or infinite"),
        (lambda output, y: F.cross_entropy(output, y, reduction="none"), "the loss must be a scalar tensor"),
        (lambda output, y: 1.0, "the loss must be a scalar tensor, found float"),
        (lambda output, y: torch.zeros(()), "all gradients are zero"),
        (lambda output, y: output.nonsense, "batch 0: the model or the loss failed .*AttributeError"),
    ]
    for loss, message in cases:
        with pytest.raises(InputError, match=message):
            score(net, model, name, batches, loss=loss)


@pytest.mark.parametrize("name", CRITERION_NAMES)
@pytest.mark.parametrize(("tensor", "value"), [("qkv.weight", float("nan")), ("proj.bias", float("inf"))])
def test_weights_that_are_not_finite_are_named(name: str, tensor: str, value: float) -> None:
    model = attention()
    model.get_parameter(tensor).data.view(-1)[1] = value
    with pytest.raises(InputError, match=f"parameter '{tensor}' .* holds NaN or infinite"):
        score(attention_network(), model, name, attention_batches())


def test_saliency_that_overflows_names_the_parameter() -> None:
    model = attention()
    model.proj.weight.data.fill_(1e30)
    with pytest.raises(InputError, match=r"criterion 'l2' gives NaN or infinite values on 'proj\.weight'"):
        score(attention_network(), model, "l2")


def test_statistics_that_are_not_finite_name_the_parameter() -> None:
    def broken(calibration: Calibration) -> Statistic:
        return Statistic({name: torch.full_like(t, float("nan")) for name, t in calibration.tensors.items()}, 1)

    criterion = Saliency("mine", "", lambda w, g: w * g, statistic=broken)
    with pytest.raises(InputError, match=r"gradients of 'norm\.weight' are NaN"):
        score(attention_network(), attention(), criterion, attention_batches())


def test_formula_of_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(InputError, match=r"criterion 'mine' gives \(\) values"):
        score(attention_network(), attention(), Saliency("mine", "", lambda w: w.sum()))


def test_another_model_is_refused_with_both_shapes() -> None:
    net, model = attention_network(), attention()
    model.qkv = nn.Linear(3, 9)
    with pytest.raises(InputError, match=r"'qkv\.weight' has shape \(9, 3\) in the model but \(12, 3\) in the network"):
        score(net, model, "l1")
    with pytest.raises(InputError, match=r"no tensor 'norm\.weight'"):
        score(net, nn.Linear(3, 12), "random")


def test_model_without_values_is_refused() -> None:
    with pytest.raises(InputError, match="meta device"):
        score(attention_network(), attention().to("meta"), "l1")


def test_model_that_cannot_be_vectorised_is_named_and_works_sample_by_sample() -> None:
    class Reads(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * (2.0 if x.sum().item() > 0 else 1.0))

    model, net, (batch, _) = Reads().double(), attention_network(), attention_batches(dtype=torch.float64)
    with pytest.raises(InputError, match=r"under torch\.func\.vmap.* give it batches of one sample"):
        score(net, model, "hessian", [batch])
    singles = list(zip(batch[0].split(1), batch[1].split(1), strict=True))
    names = ["proj.weight"]
    found = mean_squared_gradient(Calibration(model, {"proj.weight": model.proj.weight}, singles)).values
    exact = sample_gradients(model, names, singles)["proj.weight"].square().mean(0)
    torch.testing.assert_close(found["proj.weight"], exact)
