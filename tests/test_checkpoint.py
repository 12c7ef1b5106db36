"""Saved models: the same to the last bit in a fresh process, whole or not at all, and nothing but data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import secateur
from models import build as build_test_model
from models import images, outputs, random_scores
from secateur import CheckpointError, InputError, ModelSource, Plan, SecateurError

CLASSES = 7
_VIT_OPTIONS = {"num_classes": CLASSES, "img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 4}
_HF_OPTIONS = {
    "num_labels": CLASSES,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "image_size": 64,
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """How a model is built, its source where the model itself cannot say it, and the type of its weights."""

    build: Callable[[], nn.Module]
    source: ModelSource | None = None
    dtype: torch.dtype = torch.float32


def _hf(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(**{**_HF_OPTIONS, **options}))

    return build


_VIT = ModelSource("timm", "vit_tiny_patch16_224", _VIT_OPTIONS)
_BEIT = ModelSource("timm", "beit_base_patch16_224", _VIT_OPTIONS)
SUBJECTS: dict[str, Subject] = {
    "timm vit": Subject(lambda: timm.create_model(_VIT.name, **_VIT.options), _VIT),
    "timm vit in float64": Subject(lambda: timm.create_model(_VIT.name, **_VIT.options), _VIT, torch.float64),
    "timm beit": Subject(lambda: timm.create_model(_BEIT.name, **_BEIT.options), _BEIT),
    "timm beit in bfloat16": Subject(lambda: timm.create_model(_BEIT.name, **_BEIT.options), _BEIT, torch.bfloat16),
    "timm resnet, which says itself what it is": Subject(lambda: timm.create_model("resnet18", num_classes=CLASSES)),
    "hf vit": Subject(_hf("ViTForImageClassification")),
    "hf vit in bfloat16": Subject(_hf("ViTForImageClassification"), None, torch.bfloat16),
    "hf beit": Subject(_hf("BeitForImageClassification", use_relative_position_bias=True)),
    "torchvision resnet": Subject(
        lambda: torchvision.models.resnet18(num_classes=CLASSES),
        ModelSource("torchvision", "resnet18", {"num_classes": CLASSES}),
    ),
}


def prepared(subject: Subject) -> tuple[nn.Module, Plan]:
    """Returns a cut model with random values everywhere, and its plan."""
    torch.manual_seed(1)
    model = subject.build().to(subject.dtype).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(tensor + 0.05 * torch.rand_like(tensor))
    network = secateur.trace(model, torch.empty(1, 3, 64, 64))
    plan = secateur.allocate(network, random_scores(network), ratio=0.5)
    secateur.cut_(model, plan)
    return model, plan


def _logits(model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    return outputs(model, images().to(dtype))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Returns a directory of saved models, and what they give."""
    root, expected = tmp_path_factory.mktemp("saved"), {}
    for number, (name, subject) in enumerate(SUBJECTS.items()):
        model, plan = prepared(subject)
        secateur.save(model, plan, root / str(number), source=subject.source)
        expected[name] = _logits(model, subject.dtype)
    return root, expected


def test_loaded_in_a_fresh_process_all_give_the_same_bits(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    root, expected = saved
    save_file({"x": images()}, root / "images.safetensors")
    code = (
        "import sys, torch, secateur\n"
        "from pathlib import Path\n"
        "from safetensors.torch import load_file, save_file\n"
        "root = Path(sys.argv[1])\n"
        "x, results = load_file(root / 'images.safetensors')['x'], {}\n"
        "torch.set_num_threads(1)\n"
        "for number in range(int(sys.argv[2])):\n"
        "    model = secateur.load(root / str(number))\n"
        "    assert not model.training\n"
        "    dtype = next(model.parameters()).dtype\n"
        "    with torch.no_grad():\n"
        "        result = model(x.to(dtype))\n"
        "    results[str(number)] = result if isinstance(result, torch.Tensor) else result.logits\n"
        "save_file(results, root / 'results.safetensors')\n"
    )
    source = str(Path(secateur.__file__).parents[1])
    environment = {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), str(len(SUBJECTS))], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    results = load_file(root / "results.safetensors")
    for number, (name, subject) in enumerate(SUBJECTS.items()):
        assert results[str(number)].dtype == subject.dtype
        assert torch.equal(results[str(number)], expected[name]), name


@pytest.mark.parametrize("name", SUBJECTS)
def test_directory_holds_safetensors_and_json_and_nothing_that_can_run(
    name: str, saved: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    directory = saved[0] / str(list(SUBJECTS).index(name))
    assert sorted(p.name for p in directory.iterdir()) == ["model.safetensors", "plan.json", "secateur.json"]
    weights = load_file(directory / "model.safetensors")
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {SUBJECTS[name].dtype}
    assert Plan.from_json((directory / "plan.json").read_text()).cuts
    manifest = json.loads((directory / "secateur.json").read_text())
    assert ModelSource.from_dict(manifest["source"]).name
    raw = b"".join(p.read_bytes()[:2] for p in directory.iterdir())
    assert b"\x80\x04" not in raw and b"PK" not in raw  # neither a pickle nor the archive that torch.save writes


def test_saving_and_loading_leave_the_random_state_and_the_model_alone(tmp_path: Path) -> None:
    subject = SUBJECTS["timm vit"]
    model, plan = prepared(subject)
    model.train()
    state = torch.get_rng_state()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    secateur.save(model, plan, tmp_path / "a", source=subject.source)
    secateur.load(tmp_path / "a")
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_loaded_model_trains_and_can_be_cut_and_saved_again(tmp_path: Path) -> None:
    subject = SUBJECTS["hf vit"]
    model, plan = prepared(subject)
    secateur.save(model, plan, tmp_path / "a")
    loaded = secateur.load(tmp_path / "a")
    loaded.train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(images().float()).logits.square().mean().backward()
    optimizer.step()
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    secateur.save(loaded, plan, tmp_path / "b", source=ModelSource.from_dict(_manifest(tmp_path / "a")["source"]))
    again = secateur.load(tmp_path / "b")
    assert torch.equal(_logits(again, torch.float32), _logits(loaded.eval(), torch.float32))
    assert not torch.equal(_logits(again, torch.float32), _logits(model, torch.float32))


def _manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "secateur.json").read_text())


def _edit_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda d: (d / "secateur.json").write_text(json.dumps(change(_manifest(d)))) and None


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Returns what changes a file and its checksum with it, as somebody would who knows the format."""

    def apply(directory: Path) -> None:
        content = change((directory / name).read_bytes())
        (directory / name).write_bytes(content)
        manifest = _manifest(directory)
        manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
        (directory / "secateur.json").write_text(json.dumps(manifest))

    return apply


def _rewrite_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / "model.safetensors"
        save_file(change(load_file(file)), file)
        _rewrite("model.safetensors", lambda content: content)(directory)

    return apply


def _without_first(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(tensors.items())[1:])


def _first_transposed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(n for n, t in tensors.items() if t.ndim == 2 and t.shape[0] != t.shape[1])
    return {**tensors, name: tensors[name].T.contiguous()}


def _other_plan(content: bytes) -> bytes:
    plan = json.loads(content)
    plan["cuts"] = plan["cuts"][1:]
    return json.dumps(plan).encode()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "incomplete: model.safetensors is missing"),
    "no plan": (lambda d: (d / "plan.json").unlink(), "incomplete: plan.json is missing"),
    "no manifest": (lambda d: (d / "secateur.json").unlink(), "not a model saved by secateur"),
    "weights cut short": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]) and None,
        "model.safetensors is corrupt",
    ),
    "one bit of the weights": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1] + b"\x7f") and None,
        "model.safetensors is corrupt",
    ),
    "plan edited": (lambda d: (d / "plan.json").write_text("{}") and None, "plan.json is corrupt"),
    "manifest cut short": (lambda d: (d / "secateur.json").write_text("{") and None, "secateur.json is corrupt"),
    "manifest is binary": (lambda d: (d / "secateur.json").write_bytes(b"\xff\xfe\x80") and None, "corrupt"),
    "manifest is a list": (lambda d: (d / "secateur.json").write_text("[]") and None, "corrupt"),
    "manifest without checksums": (_edit_manifest(lambda m: {**m, "sha256": None}), "corrupt"),
    "manifest without source": (_edit_manifest(lambda m: {k: v for k, v in m.items() if k != "source"}), "source"),
    "other format": (_edit_manifest(lambda m: {**m, "format": 99}), "format 99"),
    "source in words": (_edit_manifest(lambda m: {**m, "source": "vit"}), "source"),
    "source of another kind": (_edit_manifest(lambda m: {**m, "source": {**m["source"], "kind": "keras"}}), "keras"),
    "unknown model": (
        _edit_manifest(lambda m: {**m, "source": {**m["source"], "name": "vit_tiny_patch16_223"}}),
        "vit_tiny_patch16_223",
    ),
    "another model": (
        _edit_manifest(lambda m: {**m, "source": {**m["source"], "name": "deit_tiny_distilled_patch16_224"}}),
        "deit_tiny_distilled_patch16_224",
    ),
    "unknown option": (
        _edit_manifest(lambda m: {**m, "source": {**m["source"], "options": {"colour": "red"}}}),
        "colour",
    ),
    "other options": (
        _edit_manifest(lambda m: {**m, "source": {**m["source"], "options": {**_VIT_OPTIONS, "depth": 3}}}),
        "another architecture",
    ),
    "plan is no plan": (_rewrite("plan.json", lambda _: b"[]"), "not a plan"),
    "plan is binary": (_rewrite("plan.json", lambda _: b"\xff\xfe\x80"), ""),
    "plan with a cut less": (_rewrite("plan.json", _other_plan), ""),
    "weights are no safetensors": (_rewrite("model.safetensors", lambda _: b"nonsense" * 9), "weights of this model"),
    "weights are empty": (_rewrite("model.safetensors", lambda _: b""), "weights of this model"),
    "a tensor is missing": (_rewrite_weights(_without_first), "weights of this model"),
    "a tensor too many": (_rewrite_weights(lambda t: {**t, "extra": torch.zeros(2)}), "extra"),
    "a tensor of another shape": (_rewrite_weights(_first_transposed), "weights of this model"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_directory_is_one_clear_error(
    case: str, saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    original = saved[0] / str(list(SUBJECTS).index("timm vit"))
    directory = tmp_path / "model"
    directory.mkdir()
    for file in original.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    damage, message = DAMAGE[case]
    damage(directory)
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    with pytest.raises((CheckpointError, InputError)) as caught:
        secateur.load(directory)
    assert message in str(caught.value) and len(str(caught.value)) < 600
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


def test_no_manifest_can_make_loading_run_code(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    original, witness = saved[0] / str(list(SUBJECTS).index("timm vit")), tmp_path / "ran"
    trap = tmp_path / "trap"
    trap.mkdir()
    for file in original.iterdir():
        (trap / file.name).write_bytes(file.read_bytes())
    config = {"model_type": "trap", "auto_map": {"AutoConfig": "configuration_trap.TrapConfig"}}
    (trap / "config.json").write_text(json.dumps(config))
    (trap / "configuration_trap.py").write_text(
        f"open({str(witness)!r}, 'w').close()\n"
        "from transformers import PretrainedConfig\n"
        "class TrapConfig(PretrainedConfig):\n    model_type = 'trap'\n"
    )
    for options in ({}, {"trust_remote_code": True}):
        source = {"kind": "transformers", "name": str(trap), "options": options}
        _edit_manifest(lambda m, source=source: {**m, "source": source})(trap)
        with pytest.raises(SecateurError):
            secateur.load(trap)
        assert not witness.exists()


def test_foreign_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"")
    (tmp_path / "file").write_text("text")
    for place in ("foreign", "file", "missing"):
        with pytest.raises(CheckpointError, match="not a model saved by secateur"):
            secateur.load(tmp_path / place)


def test_target_in_use_is_left_alone(tmp_path: Path) -> None:
    model, plan = prepared(SUBJECTS["timm vit"])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("used", "file"):
        with pytest.raises(InputError, match="exists and is not empty"):
            secateur.save(model, plan, tmp_path / place, source=_VIT)
    with pytest.raises(InputError, match="cannot be written"):
        secateur.save(model, plan, tmp_path / "file" / "below", source=_VIT)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "notes.txt", "used"]


def test_new_and_empty_targets_are_filled(tmp_path: Path) -> None:
    model, plan = prepared(SUBJECTS["timm vit"])
    (tmp_path / "empty").mkdir()
    for place in ("empty", "deep/er/new"):
        secateur.save(model, plan, tmp_path / place, source=_VIT)
        assert torch.equal(_logits(secateur.load(tmp_path / place), torch.float32), _logits(model, torch.float32))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "empty"]


def test_what_load_could_not_read_again_is_not_written(tmp_path: Path) -> None:
    model, plan = prepared(SUBJECTS["timm vit"])
    whole = timm.create_model(_VIT.name, **_VIT.options)
    network = secateur.trace(whole, torch.empty(1, 3, 64, 64))
    other = secateur.allocate(network, random_scores(network, 5), ratio=0.7)
    bespoke = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    cases: list[tuple[nn.Module, Plan, ModelSource | None, str]] = [
        (whole, plan, _VIT, "was not cut by this plan"),
        (model, other, _VIT, "was not cut by this plan"),
        (model, plan, None, "not the architecture"),  # timm does not keep depth and width
        (model, plan, _BEIT, "not the architecture"),
        (model, plan, ModelSource("timm", "vit_tinny_patch16_224"), "vit_tinny_patch16_224"),
        (model, plan, ModelSource("timm", _VIT.name, {"colour": 1}), "colour"),
        (bespoke, plan, None, "does not say how it was made"),
    ]
    for subject, with_plan, source, message in cases:
        with pytest.raises(SecateurError, match=message):
            secateur.save(subject, with_plan, tmp_path / "target", source=source)
        assert not list(tmp_path.iterdir())


def test_interrupted_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = prepared(SUBJECTS["timm vit"])
    for interruption in (KeyboardInterrupt, OSError, RuntimeError):

        def fail(*_: object, error: type[BaseException] = interruption, **__: object) -> None:
            raise error("stop")

        for step in ("save_file", "_digest"):
            with monkeypatch.context() as patch:
                patch.setattr(f"secateur.surgery.checkpoint.{step}", fail)
                with pytest.raises(interruption):
                    secateur.save(model, plan, tmp_path / "target", source=_VIT)
            assert not list(tmp_path.iterdir())
    secateur.save(model, plan, tmp_path / "target", source=_VIT)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("name", ["hf_swin", "hf_dinov2", "hf_deit_teacher"])
def test_source_of_a_transformers_model_is_its_own_configuration(name: str, tmp_path: Path) -> None:
    model = build_test_model(name)
    network = secateur.trace(model, torch.empty(1, 3, 64, 64))
    plan = secateur.allocate(network, random_scores(network), ratio=0.5, scope="local")
    secateur.cut_(model, plan)
    secateur.save(model, plan, tmp_path / "model")
    assert torch.equal(outputs(secateur.load(tmp_path / "model"), images()), outputs(model, images()))
