"""What layers read: rows that reproduce every layer's output, sums and Gram matrices against what hooks see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur.criteria.activations as activations_module
from criteria_models import attention, attention_batches
from secateur.criteria import Calibration, layer_grams, layer_inputs
from secateur.criteria.activations import Moments, Use, watching
from secateur.errors import InputError


def uses_of(model: nn.Module, *inputs: Tensor) -> list[tuple[Use, Tensor]]:
    found: list[tuple[Use, Tensor]] = []

    def on_use(use: Use) -> Tensor:
        output = use.run()
        found.append((use, output))
        return output

    with watching(dict(model.named_parameters()), on_use):
        model(*inputs)
    return found


# ---- watching --------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "linear on one row": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 4, 7, 8)),
    "conv2d with dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), (2, 4, 9, 9)),
    "conv2d padded to the same size": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), (2, 4, 7, 8)),
    "conv2d without padding": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 8)),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (3, 4, 5, 5)),
    "conv2d by channel": (lambda: nn.Conv2d(4, 4, 3, groups=4), (3, 4, 5, 5)),
    "conv2d of a single picture": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1)), (2, 2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weight_are_the_layers_output(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make().double()
    ((use, output),) = uses_of(layer, torch.randn(shape, dtype=torch.float64))
    weight, bias = use.arguments["weight"], use.arguments.get("bias")
    groups = use.groups
    by_group = weight.reshape(groups, weight.shape[0] // groups, -1)
    expected = use.inputs() @ by_group.mT
    if bias is not None:
        expected = expected + bias.reshape(groups, 1, -1)
    torch.testing.assert_close(use.outputs(output), expected)
    assert (use.name, use.rows) == ("weight", slice(0, weight.shape[0]))


def test_parameters_used_as_functions_and_by_rows_are_seen() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))
            self.other = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight[2:5]) + F.linear(x, self.weight[:3]) + x @ self.other.T[:, :3]

    found = uses_of(Functional(), torch.randn(2, 4))
    assert [(use.name, use.rows) for use, _ in found] == [("weight", slice(2, 5)), ("weight", slice(0, 3))]


def test_multihead_attention_is_seen_by_the_rows_that_it_uses() -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    query, key = torch.randn(2, 3, 4), torch.randn(2, 5, 4)

    def rows(*inputs: Tensor) -> list[tuple[str, int, int]]:
        return [(use.name, use.rows.start, use.rows.stop) for use, _ in uses_of(model, *inputs)]

    projection = ("out_proj.weight", 0, 4)
    assert rows(query, query, query) == [("in_proj_weight", 0, 12), projection]
    assert rows(query, key, key) == [("in_proj_weight", 0, 4), ("in_proj_weight", 4, 12), projection]
    assert rows(query, key, key.clone()) == [*(("in_proj_weight", 4 * i, 4 * i + 4) for i in range(3)), projection]


def test_what_on_use_returns_is_the_layers_output() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    x = torch.randn(4, 3)
    weight = model[0].weight
    with watching({"0.weight": weight}, lambda use: torch.zeros_like(use.run())):
        found = model(x)
    torch.testing.assert_close(found, model[1](torch.zeros(4, 3)))
    assert not found.requires_grad
    assert model(x).requires_grad


@pytest.mark.parametrize("part", [1, 500, 2**26])
def test_what_a_convolution_reads_comes_in_parts_of_a_size(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations_module, "PART", part)
    ((use, _),) = uses_of(nn.Conv2d(4, 6, 3, groups=2, padding=1), torch.randn(7, 4, 5, 5))
    parts = list(use.parts_of_inputs())
    torch.testing.assert_close(torch.cat(parts, dim=1), use.inputs())
    assert len(parts) == (1 if part == 2**26 else 7)


# ---- moments ---------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_all_rows_together() -> None:
    rows = torch.randn(2, 50, 3, dtype=torch.float64) + 3.0
    moments = Moments.zeros(2, 3, rows.device)
    for part in rows.split([20, 1, 29], dim=1):
        moments.add(part)
    torch.testing.assert_close(moments.mean, rows.mean(1))
    for group in range(2):
        torch.testing.assert_close(moments.covariance[group], torch.cov(rows[group].T, correction=0))
    assert moments.count == 50


class Mixed(nn.Module):
    """A convolution in groups, one of stride two, a linear layer used twice, batch norm, and a counter of forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
        self.twice = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.grouped(self.norm(self.stem(x)).relu()).mean((2, 3))
        return self.twice(self.twice(y).relu())


def mixed_batches(sizes: tuple[int, ...] = (20, 15)) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(sum(sizes), 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(sizes)]


def mixed() -> tuple[Mixed, dict[str, Tensor]]:
    model = Mixed().double()
    return model, {name: p for name, p in model.named_parameters() if p.dim() > 1}


def seen_by_hooks(model: nn.Module, batches: Any) -> dict[str, list[tuple[Tensor, Tensor]]]:
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, out, name=name: seen.setdefault(f"{name}.weight", []).append((args[0], out))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    model.eval()
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_sums_are_those_of_what_hooks_see() -> None:
    model, tensors = mixed()
    batches = mixed_batches()
    seen = seen_by_hooks(model, batches)
    found = layer_inputs(Calibration(model, tensors, batches))
    assert found.num_samples == 35
    assert float(model.calls) == 2  # those of the hooks: calibration counts on copies
    for name in ("grouped.weight", "twice.weight"):
        (activity,) = found.values[name]
        for sums, values in (
            (activity.inputs, [x for x, _ in seen[name]]),
            (activity.outputs, [y for _, y in seen[name]]),
        ):
            every = torch.cat([v.movedim(1, -1).flatten(0, -2) for v in values])
            if name == "twice.weight" or sums is activity.outputs:
                torch.testing.assert_close(sums.mean.flatten(), every.mean(0))
                torch.testing.assert_close(sums.energy.flatten(), every.square().mean(0))
                torch.testing.assert_close(sums.variance.flatten(), every.var(0, correction=0))
            else:  # the kernel's centre sees every position once
                torch.testing.assert_close(sums.mean[:, :, 4].flatten(), every.mean(0))
                assert sums.mean.shape == (2, 2, 9)


def test_gram_matrices_refit_layers_exactly() -> None:
    model, tensors = mixed()
    found = layer_grams(Calibration(model, tensors, mixed_batches(), consumers=("grouped.weight", "twice.weight")))
    assert set(found.values) == {"grouped.weight", "twice.weight"}
    seen = seen_by_hooks(model, mixed_batches())
    x = torch.cat([x for x, _ in seen["grouped.weight"]])
    patches = F.unfold(x, 3, padding=1).unflatten(1, (2, 18)).permute(1, 0, 3, 2).flatten(1, 2)
    (reads,) = found.values["grouped.weight"]
    torch.testing.assert_close(reads.moments.gram, patches.mT @ patches)
    assert not reads.has_bias and found.values["twice.weight"][0].has_bias


def test_statistics_do_not_depend_on_how_samples_are_batched() -> None:
    model, tensors = mixed()
    whole = layer_inputs(Calibration(model, tensors, mixed_batches((35,)))).values["grouped.weight"][0]
    parts = layer_inputs(Calibration(model, tensors, mixed_batches((1, 17, 17)))).values["grouped.weight"][0]
    torch.testing.assert_close(whole.inputs.squares, parts.inputs.squares)
    assert whole.inputs.count == parts.inputs.count == 35 * 9


def test_half_precision_is_summed_in_float64() -> None:
    model = nn.Linear(1, 1, bias=False).half()
    x = torch.full((5000, 1), 30.0, dtype=torch.float16)  # squares add up to far above what float16 holds
    calibration = Calibration(model, {"weight": model.weight}, [(x, torch.zeros(5000))], consumers=("weight",))
    assert float(layer_inputs(calibration).values["weight"][0].inputs.energy) == pytest.approx(900.0)
    assert float(layer_grams(calibration).values["weight"][0].moments.gram) == pytest.approx(4.5e6)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_too_few_samples_say_how_many_are_needed() -> None:
    model = attention()
    tensors = {"proj.weight": model.proj.weight, "head.weight": model.head.weight}
    calibration = Calibration(model, tensors, attention_batches((3,)), consumers=tuple(tensors))
    message = r"'head\.weight' reads 3 values at 1 positions of a sample, .* at least 4 samples; 3 were given"
    with pytest.raises(InputError, match=message):
        layer_grams(calibration)
    calibration = Calibration(model, tensors, attention_batches((4,)), consumers=tuple(tensors))
    assert layer_grams(calibration).num_samples == 4


@pytest.mark.parametrize("statistic", [layer_inputs, layer_grams])
def test_bad_batches_are_named(statistic: Callable[[Calibration], Any]) -> None:
    model = attention()
    tensors = {"proj.weight": model.proj.weight}
    (x, y), _ = attention_batches()
    for batches, message in (
        ([], "batches are empty"),
        ([(x, y), (x * float("nan"), y)], "batch 1: input 0 .* holds NaN"),
        ([(x, y), (x[..., :2], y)], "batch 1: the model or the loss failed"),
    ):
        with pytest.raises(InputError, match=message):
            statistic(Calibration(model, tensors, batches, consumers=("proj.weight",)))


@pytest.mark.parametrize("statistic", [layer_inputs, layer_grams])
def test_values_that_overflow_on_the_way_are_named(statistic: Callable[[Calibration], Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.data.fill_(1e38)
    batches = [(torch.full((4, 2), 1e3), torch.zeros(4))]
    calibration = Calibration(model, {"1.weight": model[1].weight}, batches, consumers=("1.weight",))
    with pytest.raises(InputError, match=r"'1\.weight' reads or gives NaN or infinite"):
        statistic(calibration)
