"""Criteria of layer inputs, ranks and groups against slow loops, and optimal brain surgeon against least squares."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur.criteria.criterion as criterion_module
import secateur.criteria.layerwise as layerwise
from criteria_models import (
    attention,
    attention_batches,
    attention_network,
    axis,
    naive_scores,
    network,
    sample_gradients,
)
from secateur import allocate, trace
from secateur.criteria import CRITERIA, calibrate, rank_mean, score
from secateur.errors import InputError
from secateur.graph.network import Network

READS = ("activation", "variance", "obs")
DOUBLE = torch.float64


def seen_by_hooks(model: nn.Module, batches: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What each linear layer reads and gives, [samples x positions, width], by the name of its weight."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, out, name=name: seen.setdefault(f"{name}.weight", []).append((args[0], out))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model.eval()
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return {
        name: tuple(torch.cat([pair[i].flatten(0, -2) for pair in pairs]).numpy() for i in (0, 1))
        for name, pairs in seen.items()
    }


def refit_error(x: np.ndarray, weight: np.ndarray, gone: list[int], bias: bool, damping: float) -> float:
    """The mean squared error, added up over outputs, without columns `gone` after a ridge regression of the others."""
    damping *= np.mean(x.var(0) if bias else (x**2).mean(0))
    rest = [j for j in range(x.shape[1]) if j not in gone]
    root = np.sqrt(len(x))
    design = np.concatenate([x[:, rest] / root, np.sqrt(damping) * np.eye(len(rest))])
    if bias:
        intercept = np.concatenate([np.ones(len(x)) / root, np.zeros(len(rest))])
        design = np.column_stack([design, intercept])
    error = 0.0
    for row in weight:
        target = np.concatenate([x[:, gone] @ row[gone] / root, np.zeros(len(rest))])
        change, *_ = np.linalg.lstsq(design, target, rcond=None)
        error += float(((design @ change - target)[: len(x)] ** 2).sum())
    return error


def output_energy(x: np.ndarray, weight: np.ndarray, bias: bool) -> float:
    output = x @ weight.T
    return float(((output - output.mean(0) * bias) ** 2).mean(0).sum())


def case() -> tuple[nn.Module, Network, Any, dict[str, tuple[np.ndarray, np.ndarray]]]:
    model, net, batches = attention().double(), attention_network(), attention_batches((20, 13), DOUBLE)
    return model, net, batches, seen_by_hooks(model, batches)


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


EMBEDDING, QUERY_KEY, VALUE, HEADS = range(3), range(3, 7), range(7, 11), (11, 12)

# ---- layer inputs ----------------------------------------------------------------------------------------------------


def test_activation_is_weight_times_input_norm() -> None:
    model, net, batches, seen = case()
    weights = weights_of(model)
    saliency = {
        name: np.abs(weights[name]) * np.sqrt((seen[name][0] ** 2).sum(0) / 33)
        for name in ("qkv.weight", "proj.weight", "head.weight")
    }
    values = score(net, model, "activation", batches).values
    for channel in EMBEDDING:
        expected = np.mean([saliency[name][:, channel].sum() for name in ("qkv.weight", "head.weight")])
        assert values[channel] == pytest.approx(expected, rel=1e-9)
    for number, channel in enumerate(VALUE):
        assert values[channel] == pytest.approx(saliency["proj.weight"][:, number].sum(), rel=1e-9)
    for number, head in enumerate(HEADS):
        expected = saliency["proj.weight"][:, 2 * number : 2 * number + 2].sum()
        assert values[head] == pytest.approx(expected, rel=1e-9)


def test_variance_is_that_of_the_consumers_input() -> None:
    model, net, batches, seen = case()
    values = score(net, model, "variance", batches).values
    read = {name: x.var(0) for name, (x, _) in seen.items()}
    expected = [np.mean([read["qkv.weight"][c], read["head.weight"][c]]) for c in EMBEDDING]
    np.testing.assert_allclose(values[list(EMBEDDING)], expected, rtol=1e-9)
    np.testing.assert_allclose(values[list(VALUE)], read["proj.weight"], rtol=1e-9)
    np.testing.assert_allclose(values[list(HEADS)], read["proj.weight"].reshape(2, 2).sum(1), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "amount"),
    [
        ("activation", lambda y: np.sqrt((y**2).mean(0))),
        ("variance", lambda y: y.var(0)),
        ("obs", lambda y: (y**2).mean(0)),
    ],
)
def test_query_key_dimensions_have_the_product_of_both(name: str, amount: Callable[[np.ndarray], np.ndarray]) -> None:
    model, net, batches, seen = case()
    each = amount(seen["qkv.weight"][1])
    values = score(net, model, name, batches).values
    np.testing.assert_allclose(values[list(QUERY_KEY)], each[:4] * each[4:8], rtol=1e-9)
    model.qkv.weight.data[:4] *= 7.0  # queries up and keys down leave attention as it was
    model.qkv.bias.data[:4] *= 7.0
    model.qkv.weight.data[4:8] /= 7.0
    model.qkv.bias.data[4:8] /= 7.0
    np.testing.assert_allclose(score(net, model, name, batches).values[list(QUERY_KEY)], values[list(QUERY_KEY)])


def test_query_key_dimensions_of_all_heads_together_add_up_their_products() -> None:
    model, _, batches, seen = case()
    shared = [0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 4, 5]
    net = network(
        8, [axis("qkv.weight", 0, "out", shared, [6, 6, 7, 7] * 3), axis("proj.weight", 1, "in", [2, 3, 4, 5])]
    )
    each = np.sqrt((seen["qkv.weight"][1] ** 2).mean(0))
    values = score(net, model, "activation", batches).values
    expected = [each[d] * each[4 + d] + each[2 + d] * each[6 + d] for d in (0, 1)]
    np.testing.assert_allclose(values[:2], expected, rtol=1e-9)


# ---- optimal brain surgeon -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.01, 1e-10])
def test_obs_is_the_error_after_a_least_squares_refit(damping: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "DAMPING", damping)
    model, net, batches, seen = case()
    weights = weights_of(model)

    def relative(name: str, gone: list[int]) -> float:
        x, weight = seen[name][0], weights[name]
        return refit_error(x, weight, gone, True, damping) / output_energy(x, weight, True)

    values = score(net, model, "obs", batches).values
    for number, channel in enumerate(VALUE):
        assert values[channel] == pytest.approx(relative("proj.weight", [number]), rel=1e-5)
    for number, head in enumerate(HEADS):
        assert values[head] == pytest.approx(relative("proj.weight", [2 * number, 2 * number + 1]), rel=1e-5)
    for channel in EMBEDDING:
        expected = np.mean([relative(name, [channel]) for name in ("qkv.weight", "head.weight")])
        assert values[channel] == pytest.approx(expected, rel=1e-5)


def test_obs_of_a_layer_without_bias_has_no_mean_to_refit() -> None:
    model = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(50, 4, dtype=DOUBLE) + 2.0
    net = network(4, [axis("weight", 1, "in", range(4))])
    values = score(net, model, "obs", [(x, torch.zeros(50))]).values
    weight = model.weight.detach().numpy()
    expected = [
        refit_error(x.numpy(), weight, [j], False, 0.01) / output_energy(x.numpy(), weight, False) for j in range(4)
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-9)


def test_obs_finds_what_others_can_stand_in_for() -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(200, 3, dtype=DOUBLE)
    x[:, 2] = x[:, 0] + 1e-3 * x[:, 2]  # loud, but the same as another
    net = network(3, [axis("weight", 1, "in", range(3))])
    batches = [(x, torch.zeros(200))]
    assert np.argmax(score(net, model, "obs", batches).values) == 1
    assert score(net, model, "obs", batches).values[2] < 0.02 * score(net, model, "obs", batches).values[1]


def test_inputs_that_are_never_anything_cost_nothing() -> None:
    model = nn.Linear(3, 2).double()
    net = network(3, [axis("weight", 1, "in", range(3))])
    x = torch.randn(20, 3, dtype=DOUBLE)
    x[:, 0] = 0.0
    for name in READS:
        assert score(net, model, name, [(x, torch.zeros(20))]).values[0] == pytest.approx(0.0, abs=1e-12), name
    assert not score(net, model, "obs", [(x * 0.0, torch.zeros(20))]).values.any()


class Convolutions(nn.Module):
    """Channels read by a kernel of nine, then by a convolution in groups, then flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.c = nn.Conv2d(6, 8, (1, 3), groups=2, bias=False)
        self.d = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.a(x).relu()).relu()).relu()
        return self.d(y.flatten(1))


def columns_of(model: Convolutions, x: Tensor) -> dict[str, np.ndarray]:
    """What each layer reads at each position, [groups, positions, columns], by torch's own unfold."""
    with torch.no_grad():
        a = model.a(x).relu()
        b = model.b(a).relu()
        c = model.c(b).relu()
    unfold = nn.functional.unfold
    rows = {
        "b.weight": unfold(a, 3, stride=2, padding=1).movedim(1, 2).flatten(0, 1)[None],
        "c.weight": unfold(b, (1, 3)).movedim(1, 2).flatten(0, 1).unflatten(1, (2, 9)).movedim(1, 0),
        "d.weight": c.flatten(1)[None],
    }
    return {name: values.numpy() for name, values in rows.items()}


@pytest.mark.parametrize("name", READS)
def test_convolutions_are_scored_by_the_columns_that_go(name: str) -> None:
    model = Convolutions().double()
    x = torch.randn(60, 2, 4, 10, dtype=DOUBLE)
    net = trace(model, torch.zeros(1, 2, 4, 10, dtype=DOUBLE))
    found = score(net, model, name, [(x, torch.zeros(60))]).values
    weights = weights_of(model)
    for layer, rows in columns_of(model, x).items():
        groups = rows.shape[0]
        weight = weights[layer].reshape(groups, -1, rows.shape[2])
        kernel = rows.shape[2] // weights[layer].shape[1]
        bias = layer != "c.weight"
        energy = sum(output_energy(x_g, w_g, bias) for x_g, w_g in zip(rows, weight, strict=True))
        channels = net.axis(layer, 1).channels
        assert (channels >= 0).all()
        for channel in set(channels.tolist()):
            gone = [i * kernel + k for i in np.flatnonzero(channels == channel) for k in range(kernel)]
            each = []
            for x_g, w_g in zip(rows, weight, strict=True):
                if name == "obs":
                    each.append(refit_error(x_g, w_g, gone, bias, 0.01) / energy)
                elif name == "variance":
                    each.append(x_g[:, gone].var(0).sum() / kernel)
                else:
                    norms = np.sqrt((x_g[:, gone] ** 2).sum(0) / 60)
                    each.append((np.abs(w_g[:, gone]) * norms).sum())
            assert found[channel] == pytest.approx(sum(each), rel=1e-8)


def test_what_no_layer_call_reads_is_named() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) @ self.b

    model = Product()
    net = trace(model, torch.zeros(2, 3))
    with pytest.raises(InputError, match="what 'b' reads cannot be seen"):
        score(net, model, "activation", [(torch.randn(5, 3), torch.zeros(5))])


def test_obs_of_too_few_samples_says_how_many_it_takes() -> None:
    with pytest.raises(InputError, match=r"'head\.weight' reads 3 values .* at least 4 samples; 3 were given"):
        score(attention_network(), attention(), "obs", attention_batches((3,)))


# ---- weights and gradients -------------------------------------------------------------------------------------------


def test_taylor_signed_cancels_inside_a_channel() -> None:
    model, net, batches, _ = case()
    names = [name for name, p in model.named_parameters() if name.endswith("weight")]
    gradients = sample_gradients(model, names, batches)
    weights = weights_of(model)
    sizes = [len(y) for _, y in batches]
    product = {
        name: weights[name] * sum(part.mean(0) for part in gradients[name].split(sizes)).numpy() for name in names
    }
    values = score(net, model, "taylor_signed", batches).values
    np.testing.assert_allclose(values, np.abs(naive_scores(net, product)), rtol=1e-8)
    assert (values <= score(net, model, "taylor", batches).values * (1 + 1e-9)).all()


def test_lamp_is_the_share_of_what_is_left() -> None:
    model, net = attention().double(), attention_network()
    squares = score(net, model, "l2").values
    scores = score(net, model, "lamp")
    assert not scores.normalize
    for group in net.groups:
        for channel in group.channels.ravel():
            left = sum(squares[c] for c in group.channels.ravel() if squares[c] >= squares[channel])
            assert scores.values[channel] == pytest.approx(squares[channel] / left, rel=1e-9)
        assert scores.values[group.channels].max() == 1.0


def test_lamp_of_equal_and_of_empty_channels() -> None:
    model = nn.Linear(2, 4, bias=False)
    model.weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    net = network(4, [axis("weight", 0, "out", range(4))], [("a", (0, 1)), ("b", (2, 3))])
    np.testing.assert_array_equal(score(net, model, "lamp").values, [0.5, 1.0, 0.0, 0.0])


def test_fpgm_is_the_distance_to_the_others_of_the_group() -> None:
    model, net = attention().double(), attention_network()
    weights = weights_of(model)
    values = score(net, model, "fpgm").values
    qkv = weights["qkv.weight"]
    query_key = [d + offset for d in range(4) for offset in (0, 4)]
    for number, channel in enumerate(QUERY_KEY):
        rows = (number, number + 4)
        expected = sum(np.linalg.norm(qkv[row] - qkv[other]) for row in rows for other in query_key)
        assert values[channel] == pytest.approx(expected, rel=1e-9)
    inside = [sum(np.linalg.norm(qkv[8 + d] - qkv[8 + other]) for other in range(4)) for d in range(4)]
    np.testing.assert_allclose(values[list(VALUE)], inside, rtol=1e-9)
    np.testing.assert_allclose(values[11], inside[0] + inside[1] + values[3] + values[4], rtol=1e-9)
    proj = weights["proj.weight"]
    expected = [sum(np.linalg.norm(proj[c] - proj[other]) for other in range(3)) for c in EMBEDDING]
    np.testing.assert_allclose(values[list(EMBEDDING)], expected, rtol=1e-9)


def test_fpgm_of_equal_filters_is_zero() -> None:
    model = nn.Conv2d(3, 5, 3)
    model.weight.data[:] = model.weight.data[:1]
    net = network(5, [axis("weight", 0, "out", range(5))], [("a", range(5))])
    np.testing.assert_allclose(score(net, model, "fpgm").values, 0.0, atol=1e-6)


def test_rank_mean_is_the_mean_of_ranks_of_normalised_scores() -> None:
    model, net, batches, _ = case()
    found = score(net, model, rank_mean(["l2", "taylor"]), batches)
    ranks = []
    for name in ("l2", "taylor"):
        values = score(net, model, name, batches).values.copy()
        for group in net.groups:
            values[group.channels] /= values[group.channels].mean()
        ranks.append([sum(v <= value for v in values) / 13 for value in values])
    np.testing.assert_allclose(found.values, np.mean(ranks, axis=0), rtol=1e-12)
    assert (found.criterion, found.normalize, found.num_samples) == ("rank_mean(l2, taylor)", False, 33)
    assert not rank_mean(["l1", "l2"]).needs_batches


def test_rank_mean_of_one_criterion_gives_its_plan() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    net = trace(model, torch.zeros(1, 4))
    plans = [allocate(net, score(net, model, c), ratio=0.5, scope="global") for c in ("l2", rank_mean(["l2"]))]
    np.testing.assert_array_equal(plans[0].removed, plans[1].removed)


def test_equal_scores_share_their_rank() -> None:
    model = nn.Linear(1, 3, bias=False)
    model.weight.data = torch.tensor([[1.0], [1.0], [2.0]])
    net = network(3, [axis("weight", 0, "out", range(3))])
    np.testing.assert_allclose(score(net, model, rank_mean(["l1"])).values, [0.5, 0.5, 1.0])
    with pytest.raises(InputError, match="at least one criterion"):
        rank_mean([])
    with pytest.raises(InputError, match="unknown criterion 'l3'"):
        rank_mean(["l3"])


# ---- everything together ---------------------------------------------------------------------------------------------


def timm_vit() -> tuple[nn.Module, Any]:
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes), torch.randn(20, 3, 16, 16)


def timm_beit() -> tuple[nn.Module, Any]:
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8}
    return timm.create_model("beit_base_patch16_224", num_classes=5, **sizes), torch.randn(20, 3, 16, 16)


def torchvision_vit() -> tuple[nn.Module, Any]:
    models = pytest.importorskip("torchvision.models.vision_transformer")
    model = models.VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5)
    nn.init.normal_(model.heads[0].weight)
    return model, torch.randn(20, 3, 16, 16)


def timm_swin() -> tuple[nn.Module, Any]:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes), torch.randn(20, 3, 32, 32)


@pytest.mark.parametrize("make", [timm_vit, timm_beit, torchvision_vit, timm_swin])
def test_every_channel_of_real_models_gets_a_score_of_its_own(make: Callable[[], tuple[nn.Module, Any]]) -> None:
    model, x = make()
    net = trace(model, x[:1])
    calibration = calibrate(net, model, [(x, torch.arange(20) % 5)])
    for name in (*READS, "fpgm", "lamp", "taylor_signed"):
        scores = score(net, model, name, calibration)
        for group in net.groups:
            values = scores.values[group.channels].ravel()
            assert (values > 0).all(), (name, group.name)
            assert np.unique(values).size > 0.9 * values.size, (name, group.name)
        assert allocate(net, scores, ratio=0.5).params < net.params


def test_convolutional_networks_with_gates_are_scored() -> None:
    timm = pytest.importorskip("timm")
    model, x = timm.create_model("mobilenetv3_small_050", num_classes=5), torch.randn(20, 3, 32, 32)
    net = trace(model, x[:1])
    for name in ("activation", "variance"):
        values = score(net, model, name, [(x, torch.arange(20) % 5)]).values
        assert (values > 0).mean() > 0.7  # some channels are never above zero
        assert all(values[group.channels].any() for group in net.groups if group.size > 8)


def test_hidden_neurons_of_a_real_vit_are_scored_by_what_hooks_see() -> None:
    model, x = timm_vit()
    net = trace(model, x[:1])
    seen: list[Tensor] = []
    model.blocks[1].mlp.fc2.register_forward_hook(lambda _, args, __: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model.eval()(x)
    hidden, weight = seen[0].double(), model.blocks[1].mlp.fc2.weight.detach().double()
    channels = net.axis("blocks.1.mlp.fc2.weight", 1).channels
    batches = [(x, torch.zeros(20, dtype=torch.long))]
    expected = weight.abs().sum(0) * (hidden.square().sum(0) / 20).sqrt()
    np.testing.assert_allclose(score(net, model, "activation", batches).values[channels], expected, rtol=1e-4)
    np.testing.assert_allclose(
        score(net, model, "variance", batches).values[channels], hidden.var(0, correction=0), rtol=1e-3
    )


def test_own_criterion_of_the_documentation_runs() -> None:
    found = doctest.DocTestSuite(criterion_module)
    assert not doctest.testmod(criterion_module).failed and found.countTestCases() > 0
    names: dict[str, Any] = {}
    for example in doctest.DocTestParser().get_examples(criterion_module.__doc__ or ""):
        exec(example.source, names)
    model, net, batches, seen = case()
    values = score(net, model, names["constant"], batches).values
    np.testing.assert_allclose(values[list(VALUE)], seen["proj.weight"][0].mean(0) ** 2, rtol=1e-9)
    assert not values[list(QUERY_KEY)].any()


def test_a_criterion_must_say_that_it_needs_batches() -> None:
    model, net, batches, _ = case()
    silent = criterion_module.ByChannel("silent", "", CRITERIA["activation"].values)
    with pytest.raises(InputError, match="must have needs_batches=True"):
        score(net, model, silent, batches)
