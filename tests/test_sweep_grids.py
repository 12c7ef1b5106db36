"""Grids expand to complete configurations, and say by file and key what is wrong with them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.errors import DataError, InputError
from secateur.experiments.config import RunConfig
from secateur.experiments.grid import expand, load_grid, shipped_grids
from secateur.training import FinetuneConfig

SMALL: dict[str, Any] = {
    "models": "vit_digits",
    "criteria": ["l1", "taylor"],
    "scopes": ["isomorphic", "global"],
    "ratios": [0.5, 0.75, 0.95],
    "datasets": "digits-dg",
    "unseen": ["thick", "sketch"],
    "seeds": [0, 1],
}


def test_a_product_has_all_its_combinations_and_one_baseline_for_each_start() -> None:
    runs = expand(SMALL, "g.yaml")
    dense = [run for run in runs if run.prune is None]
    assert len(runs) - len(dense) == 2 * 2 * 3 * 2 * 2
    assert {(run.split.unseen, run.seed) for run in dense} == {(u, s) for u in ("thick", "sketch") for s in (0, 1)}
    assert len(dense) == 4
    assert len({run.hash for run in runs}) == len(runs)
    assert all(run.finetune.seed == run.seed for run in runs)
    met = set()
    for run in runs:
        met.add(run.hash)
        assert run.dense.hash in met, "a baseline comes before what is compared with it"


def test_runs_that_start_alike_stand_together() -> None:
    keys = [run.base_key for run in expand(SMALL | {"models": ["beit_digits", "vit_digits"], "unseen": "thick"}, "g")]
    changes = sum(a != b for a, b in itertools.pairwise(keys))
    assert changes == len(set(keys)) - 1 == 3


def test_exclude_takes_away_and_include_adds() -> None:
    content = SMALL | {
        "exclude": [{"criteria": "taylor", "ratios": [0.75, 0.95]}, {"unseen": "sketch", "seeds": 1}],
        "include": [{"criteria": "hessian", "ratios": 0.25, "seeds": [2, 3], "unseen": "sketch"}],
    }
    pruned = [run for run in expand(content, "g.yaml") if run.prune]
    found = Counter((r.prune.criterion, r.split.unseen, r.seed) for r in pruned if r.prune)
    assert found == {
        **{("l1", unseen, seed): 6 for unseen, seed in (("thick", 0), ("thick", 1), ("sketch", 0))},
        **{("taylor", unseen, seed): 2 for unseen, seed in (("thick", 0), ("thick", 1), ("sketch", 0))},
        ("hessian", "sketch", 2): 2,
        ("hessian", "sketch", 3): 2,
    }


def test_budgets_baselines_alone_and_data_sets_with_settings_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "pacs").mkdir()
    content = {
        "models": "resnet18",
        "datasets": [
            {"data": str(tmp_path / "pacs"), "unseen": ["photo", "sketch"], "split": {"val_fraction": 0.3}},
            {"data": "digits-dg", "split": {"split": "iid_pooled"}},
        ],
        "unseen": "thick",
        "split": {"seed": 3, "image_size": 64},
    }
    dense = expand(content, "g.yaml")
    assert [(run.split.unseen, run.split.val_fraction) for run in dense][:2] == [("photo", 0.3), ("sketch", 0.3)]
    assert (dense[2].split.unseen, dense[2].split.split) == (None, "iid_pooled")
    assert all(run.split.seed == 3 and run.split.image_size == 64 and run.prune is None for run in dense)
    assert all(run.probe_epochs > 0 for run in dense), "a new head is trained before anything is scored"
    budget = expand(content | {"criteria": "l1", "macs": [0.5, 1000000]}, "g.yaml")
    assert [run.prune.macs for run in budget if run.prune] == [0.5, 1000000] * 3


def test_options_reach_every_run() -> None:
    options = {
        "finetune": {"recipe": "paper", "epochs": 50, "lr": "1e-4", "betas": [0.9, 0.99]},
        "calibration": {"batches": 3},
        "compensate": True,
        "attention": "dims",
        "family_ratios": {"mlp": 0.25},
        "keep": ["embedding"],
    }
    for run in expand(SMALL | options, "g.yaml"):
        assert run.finetune == FinetuneConfig.paper(epochs=50, lr=1e-4, betas=(0.9, 0.99), seed=run.seed)
        if run.prune:
            assert run.prune.compensate
            assert run.prune.attention == "dims"
            assert run.prune.calibration.batches == 3
            assert run.prune.ratios == {"mlp": 0.25}
            assert run.prune.keep == ("embedding",)


@pytest.mark.parametrize(
    ("change", "complaints"),
    [
        ({"modles": ["vit_digits"]}, ["unknown axis or option 'modles'", "did you mean 'models'"]),
        ({"models": []}, ["models is empty", "no run"]),
        ({"models": None}, ["models[0]", "expected str"]),
        ({"models": ["vit_digits", "vit_digits"]}, ["models[1]", "twice"]),
        ({"models": "vit_digit"}, ["models[0]", "unknown timm model 'vit_digit'"]),
        ({"criteria": ["l1", "l3"]}, ["criteria[1]", "unknown criterion 'l3'"]),
        ({"scopes": "globl"}, ["scopes[0]", "did you mean 'global'"]),
        ({"ratios": [0.5, 1.5]}, ["ratios[1]", "between 0 and 1"]),
        ({"ratios": "half"}, ["ratios[0]", "expected float, found 'half'"]),
        ({"ratios": float("nan")}, ["ratios[0]", "between 0 and 1"]),
        ({"macs": 0.5}, ["ratios and macs are both given"]),
        ({"datasets": "digits"}, ["datasets[0]", "unknown data set", "digits-dg"]),
        ({"datasets": [{"dat": "digits-dg"}]}, ["datasets[0]", "unknown key 'dat'"]),
        ({"seeds": [0, -1]}, ["seeds[1]", "at least 0"]),
        ({"seeds": [True]}, ["seeds[0]", "expected int"]),
        ({"unseen": "scetch"}, ["no weights of vit_digits are shipped", "scetch"]),
        ({"exclude": [{"unseen": "thik"}]}, ["exclude[0]", "unknown value of unseen 'thik'", "did you mean 'thick'"]),
        ({"exclude": [{"domain": "thick"}]}, ["exclude[0]", "unknown axis 'domain'"]),
        ({"exclude": [{"models": "vit_digits"}]}, ["expands to no run"]),
        ({"exclude": {"models": "vit_digits"}}, ["exclude must be a list"]),
        ({"include": [{"criteria": "l9"}]}, ["include[0]: criteria[0]", "unknown criterion"]),
        ({"finetune": {"recipe": "papr"}}, ["finetune.recipe", "did you mean 'paper'"]),
        ({"finetune": {"epoch": 3}}, ["finetune", "unknown key 'epoch'", "did you mean 'epochs'"]),
        ({"finetune": {"epochs": 0}}, ["finetune", "epochs must be at least 1"]),
        ({"finetune": {"epochs": "many"}}, ["finetune.epochs", "expected int"]),
        ({"finetune": {"seed": 3}}, ["finetune.seed", "axis"]),
        ({"finetune": 3}, ["finetune", "found 3"]),
        ({"split": {"unseen": "thick"}}, ["unseen belongs beside split"]),
        ({"without": "sketch"}, ["needs split='domainbed' and unseen"]),
        ({"without": "sketch", "split": {"split": "domainbed"}}, ["saw sketch or thick", "weights: random"]),
        ({"split": {"without": "sketch"}}, ["without belongs beside split"]),
        ({"split": {"val_fraction": 2.0}}, ["val_fraction must lie between 0 and 1"]),
        ({"calibration": {"batches": 0}}, ["calibration", "at least 1"]),
        ({"compensate": "yes please"}, ["compensate", "expected bool"]),
        ({"attention": "both of them"}, ["attention", "both"]),
        ({"scopes": "cost"}, ["scope 'cost'", "macs instead of ratios"]),
        ({"weights": "imagenet"}, ["weights", "pretrained"]),
    ],
)
def test_bad_grids_are_refused_by_file_and_key(change: dict[str, Any], complaints: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        expand(SMALL | change, "some/grid.yaml")
    assert str(refused.value).startswith("some/grid.yaml")
    for complaint in complaints:
        assert complaint in str(refused.value)


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [
        ("models", "models must be given"),
        ("datasets", "datasets must be given"),
        ("unseen", "unseen must be given"),
        ("ratios", "neither ratios nor macs"),
        ("criteria", "no criteria"),
    ],
)
def test_missing_axes_are_named(missing: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        expand({key: value for key, value in SMALL.items() if key != missing}, "g.yaml")


def test_files_that_are_no_grids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown grid .* 'papr'; did you mean 'paper'"):
        load_grid("papr")
    for text, complaint in (("a: [b", "is not YAML"), ("- a\n", "expected the axes"), ("", "expected the axes")):
        (tmp_path / "g.yaml").write_text(text)
        with pytest.raises(InputError, match=complaint):
            load_grid(tmp_path / "g.yaml")


def test_the_configuration_survives_its_file_and_names_itself(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(SMALL | {"family_ratios": {"heads": 0.5}, "keep": ["mlp"]}))
    run = load_grid(tmp_path / "g.yaml").runs[-1]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(run.to_json()))
    assert load_grid(file).runs == (run,)
    code = f"from secateur.experiments.grid import load_grid; print(load_grid({str(file)!r}).runs[0].hash)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == run.hash, "another process gives another name"
    file.write_text(json.dumps(run.to_json() | {"format": 2}))
    with pytest.raises(DataError, match=r"config.json is of format 2, this version .* format 1"):
        load_grid(file)


def test_any_change_gives_another_hash() -> None:
    run = next(run for run in expand(SMALL, "g.yaml") if run.prune)
    assert run.prune is not None
    changed: list[RunConfig] = [
        dataclasses.replace(run, seed=9),
        dataclasses.replace(run, split=dataclasses.replace(run.split, seed=9)),
        dataclasses.replace(run, finetune=dataclasses.replace(run.finetune, lr=9e-4)),
        dataclasses.replace(run, prune=dataclasses.replace(run.prune, compensate=True)),
        dataclasses.replace(run, prune=dataclasses.replace(run.prune, ratio=0.51)),
        run.dense,
    ]
    assert len({run.hash, *(other.hash for other in changed)}) == len(changed) + 1
    same_start = [run, changed[2], changed[3], changed[4], run.dense]
    assert len({other.base_key for other in same_start}) == 1
    assert len({other.base_key for other in (run, changed[0], changed[1])}) == 3


def test_the_papers_study_is_shipped_whole() -> None:
    runs = load_grid("paper").runs
    assert Counter(run.prune is None for run in runs) == {False: 3 * 5 * 3 * 2, True: 3 * 2}
    pruned = [(run.model, run.prune, run.data) for run in runs if run.prune]
    assert {prune.criterion for _, prune, _ in pruned} == {"hessian", "taylor", "random", "l1", "l2"}
    assert {prune.ratio for _, prune, _ in pruned} == {0.5, 0.75, 0.95}
    assert all(prune.ratios == {"heads": 0.5} and prune.scope == "global" for _, prune, _ in pruned)
    for run in runs:
        recipe = run.finetune
        assert (recipe.epochs, recipe.lr, recipe.weight_decay, recipe.warmup_decay) == (300, 1.5e-4, 0.3, 0.033)
        assert run.split.split == "paper"
    assert {run.data for run in runs} == {"data/pacs", "data/office_home"}


def test_the_miniature_is_shipped_whole() -> None:
    runs = load_grid("digits").runs
    found = Counter((run.model, run.seed, run.split.unseen, run.prune is None) for run in runs)
    seeds = [("vit_digits", 0), ("vit_digits", 1), ("vit_digits", 2), ("deit_digits", 0), ("beit_digits", 0)]
    domains = ("plain", "sketch", "texture", "thick")
    assert found == {(*s, d, dense): 1 if dense else 15 for s in seeds for d in domains for dense in (True, False)}
    assert set(shipped_grids()) == {"paper", "digits"}
