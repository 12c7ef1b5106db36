"""How much goes from where: ratios met, floors held, widths that never grow, requests that contradict each other."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur
from models import IMAGE, MODELS, WITH_HEADS, random_scores
from secateur import InputError, Network, Plan, PlanError, Scores
from secateur.allocation.plan import GroupChange

# In these the code of the model reads one size as the width of the embedding and as heads x width.
TIED = ("beit", "beitv2", "torchvision_vit", "torchvision_swin")
PLAIN = [name for name in MODELS if name not in TIED]
RATIOS = (0.1, 0.3, 0.5, 0.75, 0.95)


@functools.cache
def network_of(name: str) -> Network:
    """Returns the network of a test model; tracing does not depend on its values."""
    return secateur.trace(MODELS[name](), torch.empty(IMAGE))


@functools.cache
def chain_network(*widths: int) -> Network:
    """Returns the network of a chain of linear layers: its groups are the inner widths, in order."""
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return secateur.trace(nn.Sequential(*layers[:-1]), torch.empty(1, widths[0]))


def chain_scores(values: Sequence[Sequence[float]], *, normalize: bool = True) -> Scores:
    """Returns scores of a chain, one list for each of its groups."""
    return Scores(np.concatenate([np.asarray(v, np.float64) for v in values]), "by hand", normalize)


def size(shape: tuple[int, int]) -> int:
    """Returns the number of channels in fibres x width."""
    return shape[0] * shape[1]


def floor_of(group: GroupChange, min_channels: int | None = None) -> int:
    """Returns the least that must stay in each fibre of a group: 5 % of its width, one head, or what was asked."""
    width = group.before[1]
    if min_channels is not None:
        return min(width, min_channels)
    return 1 if group.kind == "heads" else max(1, -(-width // 20))


def kept_of(total: int, ratio: float) -> int:
    """Returns how many of `total` channels stay: the whole part of total x (1 - ratio), in exact arithmetic."""
    return int(total * (1 - Fraction(str(ratio))))


def taking_part(plan: Plan) -> list[GroupChange]:
    """Returns the groups that go by default: all but the dimensions inside heads."""
    return [g for g in plan.groups if g.kind != "head_dims"]


def scopes_of(plan: Plan, scope: str) -> list[list[GroupChange]]:
    """Returns the groups that are ranked together, worked out from names alone."""
    keys: dict[str, Callable[[GroupChange], str]] = {
        "global": lambda g: "heads" if g.kind == "heads" else "default",
        "local": lambda g: g.name,
        "isomorphic": lambda g: g.family,
    }
    scopes: dict[str, list[GroupChange]] = {}
    for group in taking_part(plan):
        scopes.setdefault(keys[scope](group), []).append(group)
    return list(scopes.values())


@pytest.mark.parametrize("scope", ["global", "local", "isomorphic"])
@pytest.mark.parametrize("name", PLAIN)
def test_every_scope_loses_exactly_its_ratio_down_to_the_floors(name: str, scope: Any) -> None:
    network = network_of(name)
    for seed, ratio in enumerate(RATIOS):
        plan = secateur.allocate(network, random_scores(network, seed), ratio=ratio, scope=scope)
        for members in scopes_of(plan, scope):
            total = sum(size(g.before) for g in members)
            assert sum(g.after[1] for g in members) == max(kept_of(total, ratio), sum(map(floor_of, members)))
            assert all(floor_of(g) <= g.after[1] <= g.before[1] for g in members)


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_width_tied_to_heads_loses_its_ratio_but_for_part_of_a_head(name: str, scope: Any) -> None:
    network = network_of(name)
    for seed, ratio in enumerate(RATIOS):
        plan = secateur.allocate(network, random_scores(network, seed), ratio=ratio, scope=scope)
        (head_width,) = {g.before[1] for g in plan.groups if g.kind == "head_dims"}
        for members in scopes_of(plan, scope):
            if members[0].kind == "heads":
                continue
            total = sum(size(g.before) for g in members)
            least = sum(head_width if g.kind == "embedding" else floor_of(g) for g in members)
            kept = sum(g.after[1] for g in members)
            assert max(kept_of(total, ratio), least) <= kept < max(kept_of(total, ratio), least) + head_width


@pytest.mark.parametrize("name", ["beit", "beitv2", "torchvision_vit"])
def test_where_code_ties_them_embedding_and_heads_go_together(name: str) -> None:
    network = network_of(name)
    for ratio in RATIOS:
        plan = secateur.allocate(network, random_scores(network), ratio=ratio)
        (embedding,) = (g.after[1] for g in plan.groups if g.kind == "embedding")
        heads = {g.after[1] for g in plan.groups if g.kind == "heads"}
        assert {h * 12 for h in heads} == {embedding}
        assert embedding >= 12
    assert embedding == 12


@pytest.mark.parametrize("name", ["vit", "swin", "hf_beit", "hf_dinov2"])
def test_head_dimensions_instead_of_heads(name: str) -> None:
    network = network_of(name)
    for ratio in RATIOS:
        for scope in ("local", "global"):
            plan = secateur.allocate(
                network, random_scores(network), ratio=0.2, scope=scope, ratios={"heads": 0, "head_dims": ratio}
            )
            assert all(g.after == g.before for g in plan.groups if g.kind == "heads")
            dims = [g for g in plan.groups if g.kind == "head_dims"]
            assert all(g.after[0] == g.before[0] and g.after[1] >= floor_of(g) for g in dims)
            by_block: dict[str, set[int]] = {}
            for g in dims:
                by_block.setdefault(g.name.rsplit(":")[0], set()).add(g.after[1])
            if not name.startswith("hf"):  # the code reads one attribute for q, k and v
                assert all(len(widths) == 1 for widths in by_block.values())
            if scope == "local":
                assert all(abs(g.after[1] - max(floor_of(g), g.before[1] * (1 - ratio))) < 1 for g in dims)
            else:
                # one step takes a dimension of every head of a block, of q, k and v at once
                step = max(2 * g.before[0] for g in dims)
                total, floors = (sum(g.before[0] * n(g) for g in dims) for n in (lambda g: g.before[1], floor_of))
                wanted = max(floors, kept_of(total, ratio))
                assert wanted <= sum(size(g.after) for g in dims) < wanted + step


def test_heads_and_their_dimensions_at_once() -> None:
    network = network_of("vit")
    plan = secateur.allocate(network, random_scores(network), ratio=0.5, scope="local", ratios={"head_dims": 0.5})
    assert {g.after for g in plan.groups if g.kind == "heads"} == {(1, 2)}
    assert {g.after for g in plan.groups if g.kind == "head_dims"} == {(2, 6)}


def test_ratios_by_kind_family_and_name_the_narrowest_wins() -> None:
    network = network_of("swin")
    named = "layers.0.blocks.0.mlp.fc1"
    plan = secateur.allocate(
        network,
        random_scores(network),
        ratio=0.5,
        scope="local",
        ratios={"mlp": 0.25, named: 0.75, "embedding": 0.5, "embedding.2": 0.0, "*.attn:heads": 0.34},
    )
    after = {g.name: g.after[1] for g in plan.groups}
    assert after[named] == 24 and after["layers.0.blocks.1.mlp.fc1"] == 72
    assert after["patch_embed.proj"] == 12 and after["layers.1.downsample.reduction"] == 48
    assert after["layers.0.blocks.0.attn:heads"] == 1 and after["layers.1.blocks.0.attn:heads"] == 3


def test_ratio_set_by_name_is_met_in_a_scope_of_its_own() -> None:
    network = chain_network(4, 40, 60, 100, 3)
    scores = random_scores(network)
    plan = secateur.allocate(network, scores, ratio=0.5, ratios={"0": 0.9, "2": 0.1})
    assert [g.after[1] for g in plan.groups] == [4, 54, 50]
    both = secateur.allocate(network, scores, ratio=0.5, ratios={"[02]": 0.25})
    assert [sum(g.after[1] for g in both.groups[:2]), both.groups[2].after[1]] == [75, 50]


@pytest.mark.parametrize("pattern", ["mlp", "embedding", "heads", "blocks.1.*", "blocks.0.mlp.fc1"])
def test_what_is_kept_is_left_alone_and_does_not_count(pattern: str) -> None:
    network = network_of("vit")
    kept_names = {g.name for g in network.select(pattern)}
    plan = secateur.allocate(network, random_scores(network), ratio=0.5, keep=[pattern])
    assert all(g.after == g.before for g in plan.groups if g.name in kept_names and g.kind != "head_dims")
    for members in scopes_of(plan, "global"):
        free = [g for g in members if g.name not in kept_names]
        assert sum(g.after[1] for g in free) == kept_of(sum(size(g.before) for g in free), 0.5)


def test_keep_outweighs_a_ratio_by_name() -> None:
    network = network_of("vit")
    plan = secateur.allocate(network, random_scores(network), ratios={"mlp": 0.9}, keep=["blocks.0.mlp.fc1"])
    after = {g.name: g.after[1] for g in plan.groups}
    assert after["blocks.0.mlp.fc1"] == 192 and after["blocks.1.mlp.fc1"] == 19


@pytest.mark.parametrize("name", ["vit", "swin", "hf_vit", "convnext", "resnet18"])
@pytest.mark.parametrize("least", [1, 3, 7, 1000])
def test_min_channels_holds_and_what_it_saves_is_taken_elsewhere(name: str, least: int) -> None:
    network = network_of(name)
    for seed in range(3):
        plan = secateur.allocate(network, random_scores(network, seed), ratio=0.8, min_channels=least)
        for members in scopes_of(plan, "global"):
            total = sum(size(g.before) for g in members)
            floors = sum(floor_of(g, least) for g in members)
            assert sum(g.after[1] for g in members) == max(kept_of(total, 0.8), floors)
            assert all(g.after[1] >= floor_of(g, least) for g in members)


@pytest.mark.parametrize("name", ["vit", "beit", "torchvision_swin", "mobilenetv2"])
@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_round_to_makes_kept_widths_the_next_lower_multiples(name: str, multiple: int) -> None:
    network = network_of(name)
    for ratio in RATIOS:
        rounded = secateur.allocate(network, random_scores(network), ratio=ratio, round_to=multiple)
        free = secateur.allocate(network, random_scores(network), ratio=ratio)
        for group, unrounded in zip(rounded.groups, free.groups, strict=True):
            if group.kind in ("heads", "head_dims"):
                continue
            whole, wanted = group.before[1], unrounded.after[1]
            unit = {"beit": 12, "torchvision_swin": 8}.get(name, 1) if group.kind == "embedding" else 1
            allowed = [w for w in range(unit, whole + 1, unit) if w % multiple == 0 and w >= floor_of(group)]
            lower = [w for w in allowed if w <= wanted]
            assert group.after[1] == (whole if wanted == whole else max(lower) if lower else min(allowed))


WIDTH_REQUESTS: dict[str, dict[str, Any]] = {
    "global": {},
    "local": {"scope": "local"},
    "isomorphic": {"scope": "isomorphic"},
    "rounded": {"round_to": 8},
    "floored": {"min_channels": 5},
}


@pytest.mark.parametrize("request_name", WIDTH_REQUESTS)
@pytest.mark.parametrize("name", ["vit", "beit", "swin", "torchvision_vit", "torchvision_swin", "mobilenetv2"])
def test_kept_widths_never_grow_with_the_ratio(name: str, request_name: str) -> None:
    network = network_of(name)
    for seed in range(2):
        scores = random_scores(network, seed)
        previous: Plan | None = None
        for ratio in np.linspace(0.0, 0.99, 23).tolist():
            plan = secateur.allocate(network, scores, ratio=ratio, **WIDTH_REQUESTS[request_name])
            if previous is not None:
                pairs = list(zip(previous.groups, plan.groups, strict=True))
                assert all(a.after[0] >= b.after[0] and a.after[1] >= b.after[1] for a, b in pairs)
                assert plan.macs <= previous.macs and plan.params <= previous.params
                assert previous.removed is not None and np.isin(previous.removed, plan.removed).all()
            previous = plan


@pytest.mark.parametrize("name", ["vit", "swin", "hf_swin"])
def test_kept_widths_never_grow_with_the_ratio_of_heads_and_their_dimensions(name: str) -> None:
    network = network_of(name)
    previous: list[tuple[int, int]] = []
    for ratio in np.linspace(0.0, 0.99, 23).tolist():
        plan = secateur.allocate(network, random_scores(network), ratio=ratio, ratios={"head_dims": ratio})
        now = [g.after for g in plan.groups]
        assert all(a[0] >= b[0] and a[1] >= b[1] for a, b in zip(previous, now, strict=False))
        previous = now


def test_ratio_zero_removes_nothing() -> None:
    network = network_of("vit")
    plan = secateur.allocate(network, random_scores(network), ratio=0.0)
    assert not plan.cuts and not plan.attributes and not plan.rescales
    assert (plan.params, plan.macs) == (plan.dense_params, plan.dense_macs)


def test_least_scores_go_first() -> None:
    network = chain_network(4, 10, 20, 3)
    scores = chain_scores([range(1, 11), np.linspace(3, 1, 20)], normalize=False)
    plan = secateur.allocate(network, scores, ratio=0.5, min_channels=1)
    removed = {c.tensor: c.removed for c in plan.cuts if c.dim == 0}
    # of 1..10 and 3.00, 2.89 … 1.00, the 15 least are 1, 2 and the last 13 (those below 2.3)
    assert removed["0.weight"] == removed["0.bias"] == (0, 1)
    assert removed["2.weight"] == tuple(range(7, 20))
    assert {c.tensor: c.removed for c in plan.cuts if c.dim == 1} == {
        "2.weight": (0, 1),
        "4.weight": tuple(range(7, 20)),
    }


def test_floor_is_given_by_the_groups_own_best_channels() -> None:
    network = chain_network(4, 40, 60, 3)
    low = np.random.default_rng(0).permutation(40) / 1e6
    plan = secateur.allocate(network, chain_scores([low, 1 + low.mean() + np.arange(60)], normalize=False), ratio=0.7)
    assert [g.after[1] for g in plan.groups] == [2, 28]
    best = sorted(np.argsort(low)[-2:].tolist())
    (removed,) = (c.removed for c in plan.cuts if c.tensor == "0.weight")
    assert sorted(set(range(40)) - set(removed)) == best


@pytest.mark.parametrize("factor", [1e-9, 1e9])
@pytest.mark.parametrize("name", ["vit", "resnet18", "beit"])
def test_one_group_of_other_scale_is_neither_emptied_nor_left_whole(name: str, factor: float) -> None:
    network = network_of(name)
    values = random_scores(network).values
    expected = secateur.allocate(network, Scores(values, "l1", True), ratio=0.6)
    for group in network.groups:
        scaled = values.copy()
        scaled[group.channels] *= factor
        plan = secateur.allocate(network, Scores(scaled, "l1", True), ratio=0.6)
        assert [g.after for g in plan.groups] == [g.after for g in expected.groups]
        assert all(g.after[1] < g.before[1] for g in taking_part(plan))


def test_powers_of_two_in_the_scale_of_a_group_change_nothing_at_all() -> None:
    network = network_of("swin")
    values = random_scores(network).values
    expected = secateur.allocate(network, Scores(values, "l2", True), ratio=0.6)
    scaled = values.copy()
    for i, group in enumerate(network.groups):
        scaled[group.channels] *= 2.0 ** (i % 7 - 3)
    assert secateur.allocate(network, Scores(scaled, "l2", True), ratio=0.6) == expected


@pytest.mark.parametrize("name", ["vit", "mobilenetv2"])
def test_scores_that_are_not_normalised_are_taken_as_they_are(name: str) -> None:
    network = network_of(name)
    target = next(g for g in network.groups if g.kind in ("mlp", "conv"))
    for factor, extreme in ((1e-9, "floor"), (1e9, "whole")):
        values = random_scores(network).values.copy()
        values[target.channels] *= factor
        plan = secateur.allocate(network, Scores(values, "random", False), ratio=0.5)
        (group,) = (g for g in plan.groups if g.name == target.name)
        assert group.after[1] == (floor_of(group) if extreme == "floor" else group.before[1])
        default = [g for g in taking_part(plan) if g.kind != "heads"]
        assert sum(g.after[1] for g in default) == kept_of(sum(size(g.before) for g in default), 0.5)


@pytest.mark.parametrize("name", ["vit", "swin", "resnet18", "beit"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_scores_take_the_same_share_of_every_group(name: str, value: float) -> None:
    network = network_of(name)
    plan = secateur.allocate(network, Scores(np.full(network.num_channels, value), "flat", True), ratio=0.5)
    for members in scopes_of(plan, "global"):
        for group in members:
            assert abs(group.after[1] - group.before[1] / 2) <= (12 if name in TIED else 1), group


def test_group_without_any_score_keeps_its_floor() -> None:
    network = chain_network(4, 40, 60, 3)
    plan = secateur.allocate(network, chain_scores([np.zeros(40), np.arange(1, 61)]), ratio=0.5)
    assert [g.after[1] for g in plan.groups] == [2, 48]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "ratio 1": ({"ratio": 1.0}, r"ratio is 1\.0.*\[0, 1\)"),
    "ratio below 0": ({"ratio": -0.1}, r"ratio is -0\.1"),
    "ratio NaN": ({"ratio": float("nan")}, "ratio is nan"),
    "ratio in words": ({"ratio": "half"}, "ratio is 'half'"),
    "ratio by name": ({"ratios": {"mlp": 1.5}}, r"ratios\['mlp'\] is 1\.5"),
    "family": ({"ratios": {"mpl": 0.5}}, r"unknown group or family 'mpl'; did you mean 'mlp'"),
    "keep": ({"keep": ["embeding"]}, r"unknown group or family 'embeding'; did you mean 'embedding'"),
    "scope": ({"scope": "locale"}, r"unknown scope 'locale'; did you mean 'local'"),
    "min_channels 0": ({"min_channels": 0}, "min_channels is 0"),
    "min_channels part": ({"min_channels": 0.5}, r"min_channels is 0\.5"),
    "round_to 0": ({"round_to": 0}, "round_to is 0"),
    "round_to part": ({"round_to": 2.5}, r"round_to is 2\.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_one_clear_error(case: str) -> None:
    network = network_of("vit")
    request, message = BAD[case]
    with pytest.raises(InputError, match=message):
        secateur.allocate(network, random_scores(network), **request)


def test_scores_that_do_not_fit_are_refused() -> None:
    network = network_of("vit")
    values = random_scores(network).values.copy()
    with pytest.raises(InputError, match=f"network has {network.num_channels} channels"):
        secateur.allocate(network, Scores(values[:-1], "short"))
    for bad in (np.nan, np.inf):
        values[network.groups[3].channels.ravel()[:2]] = bad
        with pytest.raises(InputError, match=f"NaN or infinite for 2 channels, in group '{network.groups[3].name}'"):
            secateur.allocate(network, Scores(values, "broken"))


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("beit", {"embedding": 0.25, "heads": 0.5}),
        ("torchvision_vit", {"embedding": 0.25, "heads": 0.5}),
        ("torchvision_swin", {"embedding.1": 0.3, "features.1.0.attn:heads": 0.6}),
        ("vit", {"head_dims.qk": 0.25, "head_dims.v": 0.5}),
    ],
)
def test_different_ratios_for_what_one_size_ties_are_refused_by_name(name: str, ratios: dict[str, float]) -> None:
    network = network_of(name)
    with pytest.raises(PlanError) as caught:
        secateur.allocate(network, random_scores(network), ratios=ratios)
    assert all(repr(pattern) in str(caught.value) for pattern in ratios)
    same = dict.fromkeys(ratios, 0.5)
    assert secateur.allocate(network, random_scores(network), ratios=same).macs < network.macs


@pytest.mark.parametrize(
    ("name", "request_", "named"),
    [
        ("beit", {"keep": ["embedding"]}, "embedding"),
        ("beit", {"keep": ["heads"]}, "heads"),
        ("torchvision_vit", {"ratios": {"embedding": 0.0}}, "embedding"),
        ("vit", {"ratios": {"head_dims.qk": 0.5}}, "dims.qk"),
    ],
)
def test_what_is_tied_to_something_kept_stays_and_the_plan_says_so(
    name: str, request_: dict[str, Any], named: str
) -> None:
    network = network_of(name)
    plan = secateur.allocate(network, random_scores(network), **request_)
    tied = ("head_dims",) if name == "vit" else ("embedding", "heads", "head_dims")
    assert all(g.after[1] == g.before[1] for g in plan.groups if g.kind in tied)
    assert any(named in note for note in plan.notes)
    assert all(note in str(plan) for note in plan.notes)
    assert plan.macs < plan.dense_macs


def test_same_request_gives_the_same_plan_in_another_process_with_another_hash_seed() -> None:
    names = ("beit", "swin", "torchvision_swin", "hf_beit")
    code = (
        "import hashlib, sys, torch, secateur\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from models import MODELS, IMAGE, random_scores\n"
        f"for name in {names!r}:\n"
        "    network = secateur.trace(MODELS[name](), torch.empty(IMAGE))\n"
        "    plan = secateur.allocate(network, random_scores(network), ratio=0.6)\n"
        "    print(hashlib.sha256(plan.to_json().encode()).hexdigest())\n"
    )
    source = str(Path(secateur.__file__).parents[1])
    environment = {"PYTHONHASHSEED": "12345", "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    here = []
    for name in names:
        network = network_of(name)
        plan = secateur.allocate(network, random_scores(network), ratio=0.6)
        here.append(hashlib.sha256(plan.to_json().encode()).hexdigest())
    assert done.stdout.split() == here


@pytest.mark.parametrize("name", MODELS)
def test_plan_survives_json(name: str) -> None:
    network = network_of(name)
    request: dict[str, Any] = {"ratios": {"head_dims": 0.4}} if name in set(WITH_HEADS) - set(TIED) else {}
    plan = secateur.allocate(network, random_scores(network), ratio=0.6, keep=[network.groups[0].name], **request)
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert read.to_json() == plan.to_json()
    assert plan.cuts and read.network is None


GARBAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "not JSON": (lambda _: "{", "not a plan"),
    "empty": (lambda _: "", "not a plan"),
    "a list": (lambda _: [1, 2], "not a plan"),
    "null": (lambda _: None, "not a plan"),
    "no format": (lambda p: {k: v for k, v in p.items() if k != "format"}, "format"),
    "other format": (lambda p: {**p, "format": 99}, "format 99"),
    "no cuts": (lambda p: {k: v for k, v in p.items() if k != "cuts"}, "cuts"),
    "cut without size": (lambda p: {**p, "cuts": [{"tensor": "a", "dim": 0, "removed": "1"}]}, "size"),
    "indices in words": (lambda p: {**p, "cuts": [{**p["cuts"][0], "removed": "few"}]}, "few"),
    "indices as a list": (lambda p: {**p, "cuts": [{**p["cuts"][0], "removed": [1]}]}, "not a plan"),
    "unknown field": (lambda p: {**p, "groups": [{**p["groups"][0], "colour": 1}]}, "colour"),
    "group in words": (lambda p: {**p, "groups": ["embedding"]}, "not a plan"),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_text_that_is_no_plan_is_refused(case: str) -> None:
    network = chain_network(4, 8, 3)
    good = json.loads(secateur.allocate(network, random_scores(network)).to_json())
    change, message = GARBAGE[case]
    changed = change(good)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(changed if isinstance(changed, str) else json.dumps(changed))


def test_plan_prints_costs_families_and_notes() -> None:
    network = network_of("beit")
    plan = secateur.allocate(network, random_scores(network), keep=["heads"])
    text = str(plan)
    assert f"{plan.dense_params:,} -> {plan.params:,}" in text and f"{plan.dense_macs:,} -> {plan.macs:,}" in text
    assert "mlp: 384 ->" in text and "note: " in text
    assert max(map(len, text.splitlines())) < 200


def test_network_with_nothing_to_remove_gives_an_empty_plan_that_prints() -> None:
    for model in (nn.Linear(3, 2), nn.Identity()):
        network = secateur.trace(model, torch.empty(1, 3))
        plan = secateur.allocate(network, Scores(np.zeros(0), "none"), ratio=0.9)
        assert not plan.cuts and str(plan)


def test_a_ratio_of_none_is_the_common_one() -> None:
    network = network_of("vit")
    scores = random_scores(network, 3)
    plan = secateur.allocate(network, scores, ratio=0.5, scope="local", ratios={"heads": 0, "head_dims": None})
    kept = {g.kind: g.kept for g in plan.groups}
    assert kept["heads"] == 1.0
    assert kept["head_dims"] == pytest.approx(0.5, abs=0.1)
    same = secateur.allocate(network, scores, ratio=0.5, scope="local", ratios={"heads": 0, "head_dims": 0.5})
    assert plan.cuts == same.cuts
    under = secateur.allocate(network, scores, macs=0.4, scope="isomorphic", ratios={"heads": 0, "head_dims": None})
    assert 0.395 * under.dense_macs <= under.macs <= 0.4 * under.dense_macs
    assert {g.kind: g.kept for g in under.groups}["head_dims"] < 1.0


def test_a_name_within_another_can_take_the_common_ratio_back() -> None:
    network = network_of("vit")
    first = next(g.name for g in network.groups if g.kind == "mlp")
    plan = secateur.allocate(
        network, random_scores(network, 3), ratio=0.5, scope="local", ratios={"mlp": 0.0, first: None}
    )
    kept = {g.name: g.kept for g in plan.groups if g.kind == "mlp"}
    assert kept.pop(first) == pytest.approx(0.5, abs=0.1)
    assert set(kept.values()) == {1.0}
