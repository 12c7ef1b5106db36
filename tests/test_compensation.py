"""Compensation: what is left of a model after a cut, refitted to what it gave before."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import attention_nets  # noqa: F401  (these fill HARD_NETS)
import picture_nets  # noqa: F401
import secateur
from models import build as build_model
from models import outputs, random_scores
from nets import Net
from nets import build as build_net
from secateur import Scores
from secateur.surgery import drop_branches
from secateur.surgery.regression import PULLS, Regression


def _pictures(count: int, seed: int = 0, size: int = 64) -> Tensor:
    """Returns mixtures of a few patterns: like photographs, and unlike noise, they leave layers much in common."""
    patterns = torch.randn((6, 3, size, size), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weights = torch.randn((count, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.einsum("np,pchw->nchw", weights, patterns)


def _error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    """Returns the error of a model's outputs as a share of what those of the dense one vary by."""
    expected = outputs(dense, x)
    return float((outputs(model, x) - expected).norm() / (expected - expected.mean(0)).norm())


def _scores(network: secateur.Network, useless: dict[tuple[str, int], list[int]]) -> Scores:
    """Returns scores of 1, and 0 for the channels at `useless` indices along (tensor, dimension)."""
    values = np.ones(network.num_channels)
    for (tensor, dim), indices in useless.items():
        values[network.axis(tensor, dim).channels[indices]] = 0.0
    return Scores(values, "planted", False)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)


# --- what must come out exactly


def test_units_that_repeat_others_go_without_a_trace() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 5)).double()
    with torch.no_grad():
        model[0].weight[8:] = model[0].weight[:4]
        model[0].bias[8:] = model[0].bias[:4]
    x = torch.randn(400, 6, dtype=torch.float64)
    network = secateur.trace(model, x[:2])
    plan = secateur.allocate(network, _scores(network, {("0.weight", 0): [8, 9, 10, 11]}), ratio=1 / 3)
    plain = secateur.cut(model, plan)
    pruned = secateur.cut(model, plan, compensate=[x[:300]])
    assert pruned[0].weight.shape == (8, 6)
    assert _error(plain, model, x) > 0.1
    assert _error(pruned, model, x[300:]) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_becomes_the_least_squares_solution(bias: bool) -> None:
    # Not exact: what the removed units gave depends on the kept ones only in part.
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3, bias=bias)).double()
    x = torch.randn(2000, 4, dtype=torch.float64)
    network = secateur.trace(model, x[:2])
    removed = [1, 4, 5, 11]
    plan = secateur.allocate(network, _scores(network, {("0.weight", 0): removed}), ratio=0.25)
    pruned = secateur.cut(model, plan, compensate=[(x, torch.zeros(len(x)))])
    with torch.no_grad():
        hidden = model[1](model[0](x)).numpy()
        y = model(x).numpy()
        found = pruned(x).numpy()
    columns = np.delete(hidden, removed, axis=1)
    if bias:
        columns = np.column_stack([columns, np.ones(len(x))])
    solution = np.linalg.lstsq(columns, y, rcond=None)[0]
    least = np.square(y - columns @ solution).sum()
    before = np.square(y - secateur.cut(model, plan)(x).detach().numpy()).sum()
    assert least <= np.square(y - found).sum() < 1.02 * least < 0.5 * before


@pytest.mark.parametrize("free", [True, False])
def test_regression_is_ridge_with_the_pull_that_does_best_on_rows_held_out(free: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8)) + 3.0
    y = x @ rng.normal(size=(8, 2)) + rng.normal(size=(60, 2)) * 8 + 1.0
    weight, bias = rng.normal(size=(2, 8)), rng.normal(size=2)

    def ridge(rows: slice, pull: float) -> tuple[np.ndarray, np.ndarray]:
        a, b = x[rows], y[rows]
        at, to = (a.mean(0), b.mean(0)) if free else (np.zeros(8), bias)
        scale = np.square(a - at).mean()
        rows_of_pull = np.sqrt(pull * scale * len(a)) * np.eye(8)
        left = np.vstack([a - at, rows_of_pull])
        right = np.vstack([b - to, rows_of_pull @ weight.T])
        new = np.linalg.lstsq(left, right, rcond=None)[0].T
        return new, to - new @ at

    def error(solution: tuple[np.ndarray, np.ndarray]) -> float:
        return float(np.square(y[45:] - x[45:] @ solution[0].T - solution[1]).sum())

    best = min(PULLS, key=lambda pull: error(ridge(slice(0, 45), pull)))
    assert best not in (PULLS[0], PULLS[-1])
    expected = ridge(slice(0, 60), best)
    regression = Regression()
    rows = [torch.from_numpy(v)[None] for v in (x, y)]
    regression.add(*(r[:, :45] for r in rows), held_out=False)
    regression.add(*(r[:, 45:] for r in rows), held_out=True)
    found = regression.fit(torch.from_numpy(weight)[None], torch.from_numpy(bias)[None], torch.tensor([free, free]))
    for value, target in zip(found, expected, strict=True):
        np.testing.assert_allclose(value[0].numpy(), target, rtol=1e-8, atol=1e-10)


def _conv_net(m: Net, x: Tensor) -> Tensor:
    return m.c(torch.relu(m.b(torch.relu(m.norm(m.a(x))))))


@pytest.mark.parametrize("padding", [1, "same"])
def test_grouped_convolutions_are_fitted_group_by_group(padding: int | str) -> None:
    model = Net(
        _conv_net,
        a=nn.Conv2d(3, 8, 3),
        norm=nn.BatchNorm2d(8),
        b=nn.Conv2d(8, 8, 3, padding=padding, groups=2, stride=1 if padding == "same" else 2),
        c=nn.Conv2d(8, 4, 1, bias=False),
    )
    model = model.double().eval()
    with torch.no_grad():
        model.a.weight[[1, 5]] = model.a.weight[[0, 4]]
        model.a.bias[[1, 5]] = model.a.bias[[0, 4]]
    x = _pictures(40, size=10)
    network = secateur.trace(model, x[:2])
    useless = {("a.weight", 0): [1, 5]}
    plan = secateur.allocate(network, _scores(network, useless), ratio=0.0, ratios={network.groups[0].name: 0.25})
    assert [c.removed for c in plan.cuts if c.tensor == "a.weight"] == [(1, 5)]
    pruned = secateur.cut(model, plan, compensate=list(x[:32].split(8)))
    assert _error(secateur.cut(model, plan), model, x[32:]) > 0.01
    assert _error(pruned, model, x[32:]) < 1e-6


def _vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, **options
    )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


def _head_plan(model: nn.Module, x: Tensor, dims: float = 0.5) -> secateur.Plan:
    network = secateur.trace(model, x[:2])
    return secateur.allocate(network, random_scores(network), ratio=0.0, ratios={"head_dims": dims})


def test_dims_of_queries_and_keys_that_depend_on_the_kept_ones_go_without_a_trace() -> None:
    """Half of every head repeats the other half: any four of the eight queries, with the right basis, do."""
    model = _vit()
    with torch.no_grad():
        for block in model.blocks:
            weight, bias = (t.unflatten(0, (3, 3, 8)) for t in (block.attn.qkv.weight, block.attn.qkv.bias))
            for side in (0, 1, 2):  # keys and values follow from four of their dims; so do their offsets
                mix = torch.randn(3, 4, 4, dtype=torch.float64)
                weight[side, :, 4:] = mix @ weight[side, :, :4]
                bias[side, :, 4:] = (mix @ bias[side, :, :4].unsqueeze(2)).squeeze(2)
    x = _pictures(48, size=32)
    plan = _head_plan(model, x)
    assert plan.rescales, "the temperature has to be kept too"
    pruned = secateur.cut(model, plan, compensate=list(x[:40].split(8)))
    assert pruned.blocks[0].attn.qkv.weight.shape == (36, 24)
    assert _error(secateur.cut(model, plan), model, x[40:]) > 0.1
    assert _error(pruned, model, x[40:]) < 1e-6


def _attention(m: Net, x: Tensor) -> Tensor:
    x = torch.tanh(m.first(x))
    q, k, v = (t.reshape(*x.shape[:2], m.heads, -1).transpose(1, 2) for t in (m.q(x), m.k(x), m.v(x)))
    return m.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_constant_that_goes_is_made_up_for_by_biases_and_matters_to_no_key() -> None:
    linear = {name: nn.Linear(8, 8, bias=name != "k") for name in ("q", "k", "v", "out")}
    model = Net(_attention, first=nn.Linear(6, 8), heads=2, **linear).double()
    with torch.no_grad():
        model.first.weight[7] = 0.0
        model.first.bias[7] = 1.0
        model.k.weight *= 4.0
    x = torch.randn(96, 5, 6, dtype=torch.float64)
    network = secateur.trace(model, x[:2])
    useless = {("first.weight", 0): [7]}
    group = network.select("first")[0].name
    plan = secateur.allocate(network, _scores(network, useless), ratio=0.0, ratios={group: 1 / 8})
    pruned = secateur.cut(model, plan, compensate=list(x[:64].split(16)))
    assert pruned.k.weight.shape == (8, 7)
    assert _error(secateur.cut(model, plan), model, x[64:]) > 0.1
    assert _error(pruned, model, x[64:]) < 1e-6


class _Rotary(nn.Module):
    """Attention that turns queries and keys by position: their dims are no basis to choose."""

    def __init__(self, turns: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.heads, self.turns = 2, turns

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.turns:
            steps = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
            q, k = (t * steps.cos() + t.flip(-1) * steps.sin() for t in (q, k))
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("turns", [True, False])
def test_bases_are_changed_only_where_that_has_no_effect(turns: bool) -> None:
    from secateur.surgery.bases import pairs_of, try_out
    from secateur.surgery.lockstep import Inputs
    from secateur.surgery.survey import survey

    model = _Rotary(turns).double().eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    inputs = Inputs(0, (x,), {})
    with torch.no_grad():
        found = survey(model, inputs)
        network = secateur.trace(_Rotary(False), x.float())
        pairs = pairs_of(network, found)
        try_out(model, inputs, pairs)
    by_kind = {p.is_qk: p for p in pairs}
    assert by_kind[False].free, "values are not turned"
    assert by_kind[True].free is not turns
    assert by_kind[True].shiftable == (frozenset() if turns else {1})


# --- how much it helps


@pytest.mark.parametrize("name", ["vit", "beit", "swin", "resnet18", "convnext", "hf_vit"])
def test_outputs_on_unseen_pictures_come_much_nearer(name: str) -> None:
    model = build_model(name)
    network = secateur.trace(model, _pictures(2))
    ratios = {"heads": 0.0, "head_dims": 0.5} if "head_dims" in {g.kind for g in network.groups} else None
    plan = secateur.allocate(network, random_scores(network), ratio=0.5, ratios=ratios, scope="local")
    plain = secateur.cut(model, plan)
    pruned = secateur.cut(model, plan, compensate=list(_pictures(96).split(12)))
    held_out = _pictures(16, seed=1)
    assert _error(pruned, model, held_out) < min(0.75, 0.5 * _error(plain, model, held_out))


@pytest.mark.parametrize("name", ["mha_self", "mha_cross", "grouped_queries_repeated", "cosine_attention"])
def test_attention_of_every_form_comes_nearer(name: str) -> None:
    model, inputs = build_net(name)
    network = secateur.trace(model, inputs)
    plan = secateur.allocate(network, random_scores(network), ratio=0.4, ratios={"head_dims": 0.4})
    batches = [(tuple(torch.randn_like(t) for t in inputs), None) for _ in range(16)]
    pruned, plain = build_net(name)[0], build_net(name)[0]
    secateur.cut_(plain, plan)
    report = secateur.cut_(pruned, plan, compensate=batches[:12])
    assert report is not None and report.layers

    def error(other: nn.Module) -> float:
        with torch.no_grad():
            return sum(float((other(*x) - model(*x)).square().sum()) for x, _ in batches[12:])

    assert error(pruned) < 0.7 * error(plain)
    if name == "cosine_attention":
        assert any("keep their basis" in note for note in report.notes)


def test_the_joined_bias_of_beit_is_fitted_in_its_parameters() -> None:
    model = build_model("beit")
    plan = secateur.allocate(network := secateur.trace(model, _pictures(1)), random_scores(network), ratio=0.3)
    plain, pruned = secateur.cut(model, plan), copy.deepcopy(model)
    report = secateur.cut_(pruned, plan, compensate=list(_pictures(32).split(8)))
    assert report is not None and report.layers[-1].name == "head.weight"
    # what went on behind each layer during the pass is what the model gives afterwards
    assert report.layers[-1].after == pytest.approx(_error(pruned, model, _pictures(32)) ** 2, rel=1e-6)
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} <= set(report.changed)
    assert torch.equal(pruned.blocks[0].attn.k_bias, plain.blocks[0].attn.k_bias)


def test_branches_that_are_dropped_are_made_up_for() -> None:
    model = _vit()
    x = _pictures(160, size=32)
    network = secateur.trace(model, x[:2])
    name = next(r.name for r in network.residuals if "blocks.1" in r.name and not r.reason)
    network = drop_branches(network, model, [name])
    plan = secateur.allocate(network, random_scores(network), ratio=0.3)
    pruned = secateur.cut(model, plan, compensate=list(x[:128].split(32)))
    assert _error(pruned, model, x[128:]) < 0.5 * _error(secateur.cut(model, plan), model, x[128:])


# --- what is left alone


def _twice(m: Net, x: Tensor) -> Tensor:
    return m.out(torch.relu(m.a(torch.relu(m.a(torch.relu(m.first(x)))))))


def _read_elsewhere(m: Net, x: Tensor) -> Tensor:
    return m.out(torch.relu(m.a(torch.relu(m.first(x)))) / m.a.weight.norm())


@pytest.mark.parametrize(("run", "why"), [(_twice, "several times"), (_read_elsewhere, "norm reads it as well")])
def test_weights_that_serve_for_more_are_left_as_they_were_cut(run: Callable[..., Tensor], why: str) -> None:
    model = Net(run, first=nn.Linear(4, 12), a=nn.Linear(12, 12), out=nn.Linear(12, 3)).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    network = secateur.trace(model, x[:2])
    plan = secateur.allocate(network, random_scores(network), ratio=0.3)
    plain, pruned = secateur.cut(model, plan), copy.deepcopy(model)
    report = secateur.cut_(pruned, plan, compensate=[x])
    assert report is not None and [n for n in report.notes if n.startswith("a.weight") and why in n]
    assert torch.equal(pruned.a.weight, plain.a.weight) and torch.equal(pruned.a.bias, plain.a.bias)
    assert not torch.equal(pruned.out.weight, plain.out.weight)


def test_nothing_is_touched_before_the_first_cut_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    network = secateur.trace(model, x[:2])
    plan = secateur.allocate(network, random_scores(network), ratio=0.5, keep=["0"])
    pruned = copy.deepcopy(model)
    report = secateur.cut_(pruned, plan, compensate=[x])
    assert report is not None and report.changed == ("4.weight", "4.bias")
    assert torch.equal(pruned[2].weight, secateur.cut(model, plan)[2].weight)


# --- the rest of the model's state, and failures


def test_modes_gradients_flags_buffers_and_random_state_stay() -> None:
    model = build_model("resnet18")
    model.train()
    model.bn1.eval()
    modes = [m.training for m in model.modules()]
    model.fc.bias.requires_grad_(False)
    x = _pictures(16)
    model(x[:4]).sum().backward()
    with_gradient = [p.grad is not None for p in model.parameters()]
    plan = secateur.allocate(network := secateur.trace(model, x[:1]), random_scores(network), ratio=0.3)
    plain = secateur.cut(model, plan)
    in_eval_mode = secateur.cut(copy.deepcopy(model).eval(), plan, compensate=[x[:8], x[8:]])
    random = torch.get_rng_state()
    parameters = list(map(id, model.parameters()))
    secateur.cut_(model, plan, compensate=[x[:8], x[8:]])
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert list(map(id, model.parameters())) == parameters
    assert torch.equal(torch.get_rng_state(), random)
    for (name, new), old in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(new, old), name
    assert [None if p.grad is None else p.grad.shape for p in model.parameters()] == [
        p.shape if had else None for p, had in zip(model.parameters(), with_gradient, strict=True)
    ]
    assert torch.equal(model.fc.weight, in_eval_mode.fc.weight)
    assert torch.backends.mha.get_fastpath_enabled() is False  # as the tests set it


def test_both_ways_to_compensate_give_the_same_and_do_so_again() -> None:
    model = _vit()
    x = _pictures(24, size=32)
    plan = secateur.Plan.from_json(_head_plan(model, x).to_json())
    pruned, before = secateur.cut(model, plan), _state(model)
    report = secateur.compensate_(pruned, model, plan, iter([x[:12], x[12:]]))
    assert _same(model, before)
    assert _same(secateur.cut(model, plan, compensate=[x[:12], x[12:]]), pruned.state_dict())
    assert all(layer.after <= layer.before + 1e-12 for layer in report.layers)
    assert "layers refitted" in str(report)


def test_prune_compensates_too() -> None:
    model, x = _vit(), _pictures(24, size=32)
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    secateur.prune_(plain, x[:1], ratio=0.4)
    plan = secateur.prune_(model, x[:1], ratio=0.4, compensate=[x])
    assert sum(p.numel() for p in model.parameters()) == plan.params
    assert _error(model, dense, x) < _error(plain, dense, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_fitted_in_a_wide_one_and_kept(dtype: torch.dtype) -> None:
    model, x = _vit().to(dtype), _pictures(48, size=32).to(dtype)
    plan = _head_plan(model, x)
    pruned = secateur.cut(model, plan, compensate=list(x[:40].split(10)))
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert _error(pruned, model, x[40:]) < 0.6 * _error(secateur.cut(model, plan), model, x[40:])


class _Fails(nn.Module):
    """Fails on batches of three, when earlier layers have been refitted already."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(x))
        if x.shape[0] == 3:
            raise ValueError("three are too few")
        return y


def test_a_failure_on_the_way_leaves_all_as_it_was() -> None:
    model = _Fails().double()
    x = torch.randn(40, 4, dtype=torch.float64)
    plan = secateur.allocate(network := secateur.trace(model, x), random_scores(network), ratio=0.4)
    before, threads = _state(model), threading.active_count()
    with pytest.raises(secateur.InputError, match=r"batch 1 .*\(3, 4\).*three are too few"):
        secateur.cut_(model, plan, compensate=[x, x[:3]])
    assert _same(model, before)
    pruned = secateur.cut(model, plan)
    before = _state(pruned)
    with pytest.raises(secateur.InputError, match="three are too few"):
        secateur.compensate_(pruned, model, plan, [x, x[:3]])
    assert _same(pruned, before)
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches are empty"),
        (torch.ones(4, 4, dtype=torch.float64), "goes in a list"),
        (3, "expected an iterable"),
        ([torch.full((4, 4), torch.nan, dtype=torch.float64)], "batch 0: input 0 .*NaN"),
        ([torch.ones(0, 4, dtype=torch.float64)], "batch 0: input 0 is empty"),
        ([("a", "b")], "holds no tensor"),
        ([torch.ones(2, 5, dtype=torch.float64)], "batch 0 .*the model failed"),
        ([torch.ones(1, 4, dtype=torch.float64)], "reads 1 rows.*at least 4 samples"),
    ],
)
def test_batches_that_cannot_be_used_are_refused(batches: object, message: str) -> None:
    model = _Fails().double()
    x = torch.randn(8, 4, dtype=torch.float64)
    plan = secateur.allocate(network := secateur.trace(model, x), random_scores(network), ratio=0.4)
    before = _state(model)
    with pytest.raises(secateur.InputError, match=message):
        secateur.cut_(model, plan, compensate=batches)  # type: ignore[arg-type]
    assert _same(model, before)


def test_models_that_do_not_belong_together_are_refused() -> None:
    model = _Fails().double()
    x = torch.randn(8, 4, dtype=torch.float64)
    plan = secateur.allocate(network := secateur.trace(model, x), random_scores(network), ratio=0.4)
    with pytest.raises(secateur.PlanError, match="pruned is not the dense model after this plan"):
        secateur.compensate_(copy.deepcopy(model), model, plan, [x])
    with pytest.raises(secateur.PlanError, match="another architecture"):
        secateur.compensate_(model, secateur.cut(model, plan), plan, [x])
    with pytest.raises(secateur.InputError, match="on meta"):
        secateur.cut_(model.to("meta"), plan, compensate=[x])


def test_inputs_that_never_vary_change_no_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x = torch.randn(1, 4, dtype=torch.float64).expand(16, 4).clone()
    plan = secateur.allocate(network := secateur.trace(model, x), random_scores(network), ratio=0.4)
    pruned, plain = secateur.cut(model, plan, compensate=[x]), secateur.cut(model, plan)
    assert torch.allclose(pruned[2].weight, plain[2].weight, atol=1e-6)
    assert _error_of_constant(pruned, model, x) < 1e-9


def _error_of_constant(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    return float((outputs(model, x) - outputs(dense, x)).abs().max())
