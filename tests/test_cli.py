"""The command line does what it says on real models, and meets bad input with one line and exit code 2."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import secateur
from secateur.cli import main
from secateur.experiments import running
from secateur.report import read_results

TINY = ("vit_tiny_patch16_224", "--random-weights", "--img-size", "32")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Returns the complaint about `arguments`, after checking that it is one line and nothing else."""
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("secateur: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def test_trace_shows_families_groups_cost_and_what_stays_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "trace", *TINY)
    assert code == 0
    words = out.split()
    assert {"embedding", "heads", "mlp", "head_dims.qk", "head_dims.v"} <= set(words)
    assert "blocks.*.mlp.fc1" in words
    assert "768 (12x)" in out
    model = secateur.surgery.build_model(secateur.ModelSource("timm", TINY[0], {"img_size": 32}), "random")
    network = secateur.trace(model, torch.zeros(1, 3, 32, 32))
    assert f"{network.params:,} parameters" in out
    assert f"{network.macs:,} MACs per example" in out
    assert "head.weight[dim 0]" in out
    assert "output of the model" in out


@pytest.mark.parametrize("name", ["hf:ViTForImageClassification", "torchvision:vit_b_16", "resnet18"])
def test_trace_takes_names_of_three_libraries(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = run(capsys, "trace", name, "--random-weights", "--img-size", 64)
    assert code == 0
    assert "parameters" in out


def test_trace_explains_in_words_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "trace", *TINY, "--explain")
    assert code == 0
    assert "blocks.0-11 (12 alike)" in out
    assert "1 of blocks.0.mlp.fc2.weight[dim 1]" in out
    assert "keep equal widths" in out
    assert "\x1b" not in out
    assert "drawn to vit_tiny_patch16_224.svg" in out
    assert "blocks.0-11" in (tmp_path / "vit_tiny_patch16_224.svg").read_text()
    code, out, _ = run(capsys, "trace", "hf:ViTForImageClassification", *TINY[1:], "--drawing", "sub/vit.png")
    assert code == 0
    assert "alike" not in out
    assert (tmp_path / "sub" / "vit.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = run(capsys, "trace", *TINY, "--explain-axis", "blocks.3.attn.qkv.weight", 0)
    assert code == 0
    assert "192 of blocks.3.attn.qkv.weight[dim 0]" in out
    assert "sets blocks.3.attn.num_heads, 3 now" in out
    assert {p.name for p in tmp_path.iterdir()} == {"vit_tiny_patch16_224.svg", "sub"}


def test_prune_saves_a_model_that_trace_and_load_open_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "prune", *TINY, "--ratio", 0.5, "--scope", "local", "--out", tmp_path / "small")
    assert code == 0
    assert "768 (12x)" in out
    assert "384 (12x)" in out
    model = secateur.load(tmp_path / "small")
    plan = json.loads((tmp_path / "small" / "plan.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == plan["params"] < plan["dense_params"]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)
    code, out, _ = run(capsys, "trace", tmp_path / "small")
    assert code == 0
    assert f"{plan['params']:,} parameters" in out


def test_prune_of_a_transformers_model_can_be_loaded_without_any_hub(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, _ = run(
        capsys, "prune", "hf:ViTForImageClassification", "--random-weights", "--img-size", 32, "--out", tmp_path / "vit"
    )
    assert code == 0
    with torch.inference_mode():
        assert secateur.load(tmp_path / "vit")(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)


def test_prune_with_gradients_takes_images_of_the_source_domains(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    taylor = ("--criterion", "taylor", "--data", "digits-dg", "--calibration-batches", 1, "--batch-size", 16)
    assert "has 10: pass a model" in refused(capsys, "prune", *TINY, *taylor, "--out", tmp_path / "a")
    code, _, _ = run(capsys, "prune", *TINY, *taylor, "--num-classes", 10, "--out", tmp_path / "a")
    assert code == 0
    assert json.loads((tmp_path / "a" / "plan.json").read_text())["request"]["criterion"] == "taylor"


def test_prune_to_a_budget_refits_by_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = (
        "--num-classes",
        10,
        "--data",
        "digits-dg",
        "--calibration-batches",
        1,
        "--batch-size",
        16,
        "--macs",
        0.6,
    )
    plans = {}
    for name, more in {"refitted": (), "plain": ("--no-compensate", "--attention", "dims")}.items():
        code, _, _ = run(capsys, "prune", *TINY, *options, *more, "--out", tmp_path / name)
        assert code == 0
        plans[name] = secateur.Plan.from_json((tmp_path / name / "plan.json").read_text())
    assert 0.595 * plans["plain"].dense_macs <= plans["plain"].macs <= 0.6 * plans["plain"].dense_macs
    assert plans["plain"].cuts == plans["refitted"].cuts
    assert {g.kind: g.kept for g in plans["plain"].groups}["heads"] == 1.0
    weights = [secateur.load(tmp_path / name).state_dict() for name in plans]
    assert any(not torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_prune_in_steps_without_the_least_useful_branches(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, _ = run(capsys, "trace", "vit_tiny_patch16_224", "--random-weights", "--explain", "--img-size", 32)
    # qkv 192 x 576 + 576, proj 192 x 192 + 192, norm 2 x 192
    assert code == 0 and "blocks.0-11.attn (12x): 148,608 parameters" in text
    options = ["--random-weights", "--img-size", 32, "--branches", "blocks.3.mlp", "--drop", 2, "--steps", 2]
    code, text, _ = run(capsys, "prune", "vit_tiny_patch16_224", "--out", tmp_path / "p", "--macs", 0.4, *options)
    assert code == 0 and "residual branches dropped: " in text
    plan = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert len(plan["branches"]) == 3 and "blocks.3.mlp" in plan["branches"]
    assert plan["request"]["steps"] == 2
    assert 0.38 * plan["dense_macs"] < plan["macs"] <= 0.4 * plan["dense_macs"]


def test_prune_by_domain_and_benefit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = [
        "--data",
        "digits-dg",
        "--num-classes",
        10,
        "--img-size",
        32,
        "--random-weights",
        "--calibration-batches",
        3,
    ]
    options = ["--criterion", "taylor", "--combine", "worst", "--drop", 1, "--batch-size", 8, "--no-compensate"]
    code, _, error = run(capsys, "prune", "vit_tiny_patch16_224", "--out", tmp_path / "p", *data, *options)
    assert code == 0, error
    assert len(json.loads((tmp_path / "p" / "plan.json").read_text())["branches"]) == 1
    common = ["prune", "vit_tiny_patch16_224", "--out", tmp_path / "q", "--combine", "worst"]
    assert "--data" in refused(capsys, *common)
    assert "nothing to --combine" in refused(capsys, *common, "--data", "digits-dg", "--criterion", "l1")


def test_prune_chooses_by_the_images_that_there_are_unless_told_otherwise(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = ("--num-classes", 10, "--calibration-batches", 1, "--batch-size", 8, "--no-compensate")
    for domain in ("ink", "paint"):
        for label in range(10):
            folder = tmp_path / "pictures" / domain / str(label)
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (20 * label, 100 * i, 0)).save(folder / f"{i}.png")
    pictures = ("--data", tmp_path / "pictures", "--unseen", "ink", *few)
    expected: dict[str, tuple[tuple[object, ...], str]] = {
        "without images": ((), "lamp"),
        "several domains": (("--data", "digits-dg", *few), "taylor (worst of plain, sketch, texture)"),
        "one domain": (pictures, "hessian"),
        "one domain, combined": ((*pictures, "--combine", "worst"), "taylor (worst of paint)"),
        "named": (("--data", "digits-dg", *few, "--criterion", "variance"), "variance"),
    }
    for name, (options, criterion) in expected.items():
        code, _, error = run(capsys, "prune", *TINY, *options, "--out", tmp_path / name)
        assert code == 0, error
        assert json.loads((tmp_path / name / "plan.json").read_text())["request"]["criterion"] == criterion, name


def test_prune_by_a_preset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ["prune", "deit_tiny_distilled_patch16_224", "--out", tmp_path / "p", "--preset", "deit-0.6g"]
    assert "scope" in refused(capsys, *common, "--scope", "local")
    assert "preset" in refused(capsys, *common[:-1], "deit-0.5g")
    data = [
        "--data",
        "digits-dg",
        "--num-classes",
        10,
        "--random-weights",
        "--calibration-batches",
        1,
        "--batch-size",
        4,
    ]
    code, _, error = run(capsys, *common, *data, "--no-compensate")
    assert code == 0, error
    plan = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert plan["request"]["scope"] == "isomorphic" and plan["request"]["round_to"] == 2
    # The published 0.62 G of MACs, of a head with 1000 classes; here it has 10.
    assert 0.6e9 < plan["macs"] < 0.63e9


def test_prune_refuses_two_targets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "one of them" in refused(capsys, "prune", *TINY, "--ratio", 0.5, "--macs", 0.5, "--out", tmp_path / "a")


def test_prune_is_deterministic(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run(capsys, "prune", *TINY, "--criterion", "random", "--seed", 3, "--out", tmp_path / name)[0] == 0
    first, second = ((tmp_path / name / "secateur.json").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("trace", "vit_tiny_patch16_225", "--random-weights"), "did you mean 'vit_tiny_patch16_224'"),
        (("trace", "hf:ViTForImageClasification", "--random-weights"), "did you mean 'ViTForImageClassification'"),
        (("trace", "torchvision:vit_b_17", "--random-weights"), "did you mean 'vit_b_16'"),
        (("trace", "vit_tiny_patch16_224"), "--random-weights"),
        (("trace", "google/vit-base-patch16-224"), "hf:ViTForImageClassification --random-weights"),
        (("trace", "hf:ViTForImageClassification"), "--random-weights"),
        (("trace", "vit_giant_patch14_224"), "--random-weights"),
        (("trace", *TINY[:2], "--img-size", "-4"), "img-size is -4"),
        (("trace", *TINY[:2], "--img-size", "7"), "inputs of shape (1, 3, 7, 7)"),
        (("trace", *TINY, "--drawing", "{used}/net.pdf"), "does not end in .svg or .png"),
        (("trace", *TINY, "--explain-axis", "blocks.3.attn.qkv.weigth", "0"), "mean 'blocks.3.attn.qkv.weight'"),
        (("trace", *TINY, "--explain-axis", "blocks.3.attn.qkv.weight", "7"), "it has 0 (576 indices) and 1 (192"),
        (("prune", *TINY, "--criterion", "hesian", "--out", "{new}"), "did you mean 'hessian'"),
        (("prune", *TINY, "--ratio", "1.5", "--out", "{new}"), "must lie in [0, 1)"),
        (("prune", *TINY, "--ratio", "nan", "--out", "{new}"), "must lie in [0, 1)"),
        (("prune", *TINY, "--ratios", "mpl", "0.5", "--out", "{new}"), "did you mean 'mlp'"),
        (("prune", *TINY, "--keep", "mpl", "--out", "{new}"), "did you mean 'mlp'"),
        (("prune", *TINY, "--criterion", "taylor", "--out", "{new}"), "pass --data"),
        (("prune", *TINY, "--criterion", "taylor", "--data", "digits", "--out", "{new}"), "'digits-dg'"),
        (("prune", *TINY, "--out", "{used}"), "exists and is not empty"),
        (("prune", "{saved}", "--out", "{new}"), "holds a pruned model"),
        (("trace", "{saved}"), "is corrupt or was changed"),
        (("trace", "{used}"), "cannot be had"),
        (("report", "{new}"), "no results at"),
        (("report", "{used}/results.jsonl"), "line 1"),
        (("report",), "name at least one folder"),
        (("demo", "--out", "{used}/results.jsonl"), "is a file; name a folder for the runs"),
        (("demo", "--criteria", "l3", "--out", "{new}"), "unknown criterion 'l3'"),
        (("demo", "--ratios", "1.0", "--out", "{new}"), "between 0 and 1"),
        (("demo", "--unseen", "scetch", "--out", "{new}"), "did you mean 'sketch'"),
        (("demo", "--epochs", "0", "--out", "{new}"), "epochs must be at least 1"),
    ],
)
def test_bad_input_ends_with_one_line_exit_code_2_and_nothing_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    used, saved = tmp_path / "used", tmp_path / "saved"
    used.mkdir()
    (used / "results.jsonl").write_text('{"model": ')
    saved.mkdir()
    for name in ("model.safetensors", "plan.json"):
        (saved / name).write_text("{}")
    (saved / "secateur.json").write_text(
        json.dumps({"format": 1, "source": {"kind": "timm", "name": TINY[0], "options": {}}, "sha256": {}})
    )
    before = sorted(tmp_path.rglob("*"))
    places = {"{new}": str(tmp_path / "new"), "{saved}": str(saved)}
    line = refused(capsys, *(places.get(a, a.replace("{used}", str(used))) for a in arguments))
    assert complaint in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_wrong_flag_is_refused_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["trace", "vit_tiny_patch16_224", "--nonsense"])
    assert stopped.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_demo_ends_in_table_results_and_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    quick = ("--criteria", "l2", "hessian", "--ratios", 0.5, "--epochs", 1)
    code, shown, _ = run(capsys, "demo", *quick, "--unseen", "thick", "--seed", 1, "--out", out)
    assert code == 0
    results = read_results(out)
    assert [(r.criterion, r.ratio, r.status) for r in results] == [
        (None, 0.0, "ok"),
        ("hessian", 0.5, "ok"),
        ("l2", 0.5, "ok"),
    ]
    for result in results:
        assert (result.unseen, result.seed, result.data) == ("thick", 1, "digits-dg")
        assert result.dense_test_acc == results[0].test_acc
        assert result.delta_acc is not None
        assert result.latency_ratio is not None
        assert result.command == f"secateur sweep {out / result.run / 'config.json'} --out NEW"
    assert all((r.macs_ratio or 0) > 1.5 for r in results[1:])
    assert "ΔAcc" in shown
    assert "hessian" in shown
    assert (out / "report" / "table.md").read_text().count("| 50 % |") == 2
    png = (out / "report" / "accuracy.png").read_bytes()
    assert png[:4] == b"\x89PNG"
    assert min(struct.unpack(">II", png[16:24])) > 400
    assert "hessian" in (out / "report" / "report.html").read_text()
    assert sorted(read_results(out / "report"), key=lambda r: r.criterion or "") == list(results)
    records = {r.run: (out / r.run / "record.jsonl").read_bytes() for r in results}
    code, again, _ = run(capsys, "demo", *quick, "--unseen", "thick", "--seed", 1, "--out", out)
    assert code == 0
    assert "3 of 3 runs ended before" in again
    assert {r.run: (out / r.run / "record.jsonl").read_bytes() for r in results} == records


def test_data_writes_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "data", "picture", "--out", tmp_path / "digits.png")
    assert code == 0
    assert "digits.png" in out.replace("\n", "")
    assert (tmp_path / "digits.png").read_bytes()[:4] == b"\x89PNG"


def test_a_failed_run_is_recorded_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(network: secateur.Network, scores: secateur.Scores, **request: Any) -> secateur.Plan:
        if scores.criterion == "l1":
            raise secateur.PlanError("no such luck")
        return secateur.allocate(network, scores, **request)

    monkeypatch.setattr(running, "allocate", allocate)
    quick = ("--criteria", "l1", "l2", "--ratios", 0.5, "--epochs", 1)
    code, _, err = run(capsys, "demo", *quick, "--out", tmp_path / "run")
    assert code == 2
    assert err.startswith("secateur: error: 1 of 3 runs failed, the first (vit_digits, l1 0.5 isomorphic, ")
    assert "seed 0) with: no such luck; everything is on record in" in err
    results = read_results(tmp_path / "run")
    assert [(r.criterion, r.status, r.error) for r in results] == [
        (None, "ok", None),
        ("l1", "failed", "no such luck"),
        ("l2", "ok", None),
    ]
    assert "l1 at 50% failed: no such luck" in (tmp_path / "run" / "report" / "table.md").read_text()
    assert (tmp_path / "run" / "report" / "accuracy.png").exists()
    monkeypatch.undo()
    code, _, _ = run(capsys, "demo", *quick, "--out", tmp_path / "run")
    assert code == 0
    assert [r.status for r in read_results(tmp_path / "run")] == ["ok", "ok", "ok"], "the one that failed ran again"
