"""Fine-tuning, evaluation, calibration batches, progress, latency, and the base models that are shipped."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from secateur.cost.latency import measure_latency
from secateur.data import DataConfig, Split, TensorImages, load_split
from secateur.errors import CheckpointError, DataError, InputError
from secateur.experiments import base_models
from secateur.experiments.base_models import BASE_MODELS, base_model, weights_file
from secateur.training import (
    FinetuneConfig,
    FinetuneProgress,
    Tick,
    calibration_batches,
    evaluate,
    finetune_,
    logits_of,
)
from secateur.training.parameter_groups import parameter_groups


def images_of(count: int, *, start: int = 0, augmented: bool = False) -> TensorImages:
    """Returns pictures of three classes; each class is bright in a channel of its own, under noise."""
    generator = torch.Generator().manual_seed(start)
    labels = torch.arange(count) % 3
    images = torch.randn(count, 3, 8, 8, generator=generator)
    images[torch.arange(count), labels] += 1.0
    ids = [f"source/{int(c)}/{start + i}" for i, c in enumerate(labels)]
    return TensorImages(images, labels, ids, ["source"] * count, size=8, augmented=augmented)


@pytest.fixture
def split() -> Split:
    parts = {"train": images_of(90), "val": images_of(45, start=1000), "test": images_of(45, start=2000)}
    return Split(**parts, classes=("r", "g", "b"), domains=("source",), unseen=None, protocol="toy")


def network(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(6 * 36, 3)
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([v.detach().float().flatten() for v in model.state_dict().values()])


SHORT = FinetuneConfig(epochs=4, batch_size=32, lr=3e-3, warmup_epochs=1)


# --- logits -----------------------------------------------------------------------------------------------------


class Answer(dict[str, Tensor]):
    """A mapping like the outputs of Hugging Face models."""


def test_logits_are_found_in_tensors_tuples_and_mappings() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])
    assert torch.equal(logits_of(a), a)
    assert torch.equal(logits_of((a, b)), torch.tensor([[2.0, 4.0]]))
    assert torch.equal(logits_of(Answer(logits=b, hidden=a)), b)


def test_logits_are_found_in_a_hugging_face_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    logits = torch.rand(2, 3)
    assert torch.equal(logits_of(outputs.ImageClassifierOutput(logits=logits)), logits)


@pytest.mark.parametrize(
    "output", [None, "logits", (), {"hidden": torch.rand(1)}, (torch.rand(1, 2), torch.rand(1, 3))]
)
def test_outputs_without_clear_logits_are_refused(output: object) -> None:
    with pytest.raises(InputError, match="logits"):
        logits_of(output)


# --- the recipe -------------------------------------------------------------------------------------------------


def test_paper_recipe_is_the_published_one() -> None:
    paper = FinetuneConfig.paper()
    assert (paper.epochs, paper.lr, paper.weight_decay, paper.betas) == (300, 1.5e-4, 0.3, (0.9, 0.999))
    assert paper.warmup_decay == 0.033
    assert FinetuneConfig.paper(epochs=30, warmup_epochs=3.0).lr == paper.lr


def test_learning_rate_warms_up_linearly_and_falls_to_zero_by_a_cosine() -> None:
    config = FinetuneConfig(epochs=10, warmup_epochs=2.0, warmup_decay=0.033)
    at = config.lr_factor
    assert [at(0), at(1), at(2)] == pytest.approx([0.033, (1 + 0.033) / 2, 1.0])
    assert [at(4), at(6), at(10)] == pytest.approx([0.5 + 0.5 * 2**-0.5, 0.5, 0.0])


def test_learning_rate_that_is_used_follows_the_schedule(split: Split) -> None:
    record = finetune_(network(), split, SHORT)
    steps = 3
    expected = [SHORT.lr * SHORT.lr_factor((steps * e - 1) / steps) for e in range(1, 5)]
    assert [e.lr for e in record.epochs] == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"weight_decay": -1.0},
        {"betas": (0.9, 1.0)},
        {"warmup_epochs": 30.0},
        {"warmup_decay": 0.0},
        {"label_smoothing": 1.0},
        {"clip_grad": 0.0},
        {"seed": -1},
        {"workers": -1},
        {"precision": "bf61"},
    ],
)
def test_impossible_recipes_are_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        FinetuneConfig(**changes)


def test_one_dimensional_parameters_do_not_decay() -> None:
    decaying, sparing = parameter_groups(network(), 1e-3, 0.3)
    assert decaying["weight_decay"] == 0.3 and sparing["weight_decay"] == 0.0
    assert [p.ndim for p in decaying["params"]] == [4, 2]
    assert [p.ndim for p in sparing["params"]] == [1, 1, 1, 1]


# --- fine-tuning ------------------------------------------------------------------------------------------------


def test_finetuning_learns_and_records_every_epoch(split: Split) -> None:
    model = network()
    before = evaluate(model, split.test, num_classes=3)
    record = finetune_(model, split, replace(SHORT, epochs=8))
    assert before < 60 < 90 < evaluate(model, split.test, num_classes=3)
    assert [e.epoch for e in record.epochs] == list(range(1, 9))
    assert record.epochs[0].train_loss > record.last.train_loss
    assert record.last.train_accuracy > 90 and record.seconds > 0
    assert "best epoch" in str(record)


def test_best_weights_on_source_validation_are_put_back(split: Split) -> None:
    model = network()
    record = finetune_(model, split, replace(SHORT, epochs=6, lr=0.3, clip_grad=None, warmup_epochs=0))
    assert record.best.val_accuracy == max(e.val_accuracy for e in record.epochs)
    assert evaluate(model, split.val, num_classes=3) == record.best.val_accuracy


def test_weights_of_a_worse_last_epoch_are_dropped(split: Split) -> None:
    spoilt = images_of(90)
    spoilt.labels = (spoilt.labels + 1) % 3
    model = network()
    finetune_(model, split, SHORT)
    record = finetune_(model, replace(split, train=spoilt), replace(SHORT, epochs=6))
    assert record.last.val_accuracy < record.best.val_accuracy - 30
    assert evaluate(model, split.val, num_classes=3) == record.best.val_accuracy


def test_of_equally_good_epochs_the_latest_is_kept(split: Split) -> None:
    record = finetune_(network(), split, replace(SHORT, epochs=8))
    best = max(e.val_accuracy for e in record.epochs)
    assert record.best_epoch == max(e.epoch for e in record.epochs if e.val_accuracy == best)


def test_test_images_are_not_looked_at(split: Split) -> None:
    class Forbidden(TensorImages):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            raise AssertionError("the unseen domain was read")

    test = Forbidden(torch.rand(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64), ["t/0/0"], ["t"], size=8)
    assert finetune_(network(), replace(split, test=test), replace(SHORT, epochs=1)).best_epoch == 1


def test_equal_seeds_give_equal_weights_and_leave_the_global_random_state_alone(split: Split) -> None:
    augmented = replace(split, train=images_of(90, augmented=True))
    models = [network(dropout=0.5) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(seed + 3)
        state = torch.get_rng_state()
        finetune_(model, augmented, replace(SHORT, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(models[2]))


def test_modes_and_attributes_of_the_model_are_left_as_they_were(split: Split) -> None:
    model = network().train()
    model[1].eval()
    attributes = set(vars(model))
    finetune_(model, split, SHORT)
    assert model.training and not model[1].training and model[3].training
    assert set(vars(model)) == attributes


def test_bfloat16_autocast_trains_and_leaves_the_weights_in_float32(split: Split) -> None:
    model = network()
    finetune_(model, split, replace(SHORT, epochs=8, precision="bf16"))
    assert evaluate(model, split.test, num_classes=3) > 85
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_images_that_are_not_finite_stop_the_run_before_the_update(split: Split) -> None:
    split.train.plain()[0][0][0, 0, 0] = float("nan")
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    config = replace(SHORT, batch_size=90)
    with pytest.raises(InputError, match="not finite at step 1, before its update: the images"):
        finetune_(model, split, config)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert model.training


def test_weights_that_are_not_finite_are_named(split: Split) -> None:
    model = network()
    with torch.no_grad():
        model[5].weight[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"not finite at step 1.*5\.weight"):
        finetune_(model, split, SHORT)


def test_labels_out_of_range_wrong_heads_and_empty_data_are_refused(split: Split) -> None:
    with pytest.raises(DataError, match=r"0 … 1, found 0 … 2"):
        finetune_(network(), replace(split, classes=("r", "g")), SHORT)
    with pytest.raises(InputError, match="there are 4 classes"):
        finetune_(network(), replace(split, classes=("r", "g", "b", "k")), SHORT)
    with pytest.raises(DataError, match="empty"):
        finetune_(network(), replace(split, train=split.train.take([])), SHORT)
    with pytest.raises(InputError, match="no trainable parameters"):
        finetune_(network().requires_grad_(False), split, SHORT)


# --- evaluation -------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Answers with the class of the brightest channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def test_accuracy_counts_all_images_alike() -> None:
    images = torch.zeros(5, 3, 8, 8)
    images[:, 0] = 1
    labels = torch.tensor([0, 0, 0, 1, 2])
    data = TensorImages(images, labels, [f"d/{i}/{i}" for i in range(5)], ["d"] * 5, size=8)
    assert evaluate(Fixed(), data, num_classes=3, batch_size=2) == 60.0


def test_evaluation_leaves_mode_statistics_and_random_state_alone(split: Split) -> None:
    model = network(dropout=0.5).train()
    before, state = weights(model), torch.get_rng_state()
    first = evaluate(model, split.test, num_classes=3)
    assert first == evaluate(model, split.test, num_classes=3, batch_size=7)
    assert model.training and torch.equal(weights(model), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_refuses_what_has_no_accuracy(split: Split) -> None:
    with pytest.raises(DataError, match="empty"):
        evaluate(Fixed(), split.test.take([]), num_classes=3)
    with pytest.raises(DataError, match="labels must lie in"):
        evaluate(Fixed(), split.test, num_classes=2)
    with pytest.raises(InputError, match="there are 5 classes"):
        evaluate(Fixed(), split.test, num_classes=5)
    images = images_of(6)
    images.images[4, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="batch 2; the images"):
        evaluate(Fixed(), images, num_classes=3, batch_size=2)


# --- calibration ------------------------------------------------------------------------------------------------


def test_calibration_images_are_plain_training_images_of_the_sources() -> None:
    split = load_split("digits-dg", DataConfig(unseen="plain"))
    batches = calibration_batches(split, batches=3, batch_size=16)
    assert [images.shape for images, _ in batches] == [(16, 3, 32, 32)] * 3
    known = {split.train.plain()[i][0].numpy().tobytes(): int(split.train.labels[i]) for i in range(len(split.train))}
    drawn = [(x.numpy().tobytes(), int(y)) for images, labels in batches for x, y in zip(images, labels, strict=True)]
    assert len(set(drawn)) == 48 and all(known[image] == label for image, label in drawn)


def test_calibration_images_depend_on_the_seed_alone(split: Split) -> None:
    first, same, other = (calibration_batches(split, batches=2, batch_size=8, seed=s)[1][0] for s in (3, 3, 4))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_calibration_ends_with_the_training_images(split: Split) -> None:
    assert [len(labels) for _, labels in calibration_batches(split)] == [64]
    assert [len(labels) for _, labels in calibration_batches(split, batch_size=500)] == [90]
    with pytest.raises(InputError, match="at least 1"):
        calibration_batches(split, batches=0)
    with pytest.raises(DataError, match="empty"):
        calibration_batches(replace(split, train=split.train.take([])))


# --- progress ---------------------------------------------------------------------------------------------------


def test_watchers_see_every_step_and_the_validation_of_every_epoch(split: Split) -> None:
    ticks: list[Tick] = []
    record = finetune_(network(), split, replace(SHORT, epochs=2), progress=ticks.append)
    assert [t.step for t in ticks] == [1, 2, 3, 4, 5, 6] and {t.steps for t in ticks} == {6}
    assert [t.epoch for t in ticks] == [1, 1, 1, 2, 2, 2]
    assert [t.val_accuracy is not None for t in ticks] == [False, False, True] * 2
    assert ticks[-1].loss == record.last.train_loss and ticks[-1].accuracy == record.last.train_accuracy


def test_watching_changes_nothing(split: Split) -> None:
    watched, alone = network(dropout=0.5), network(dropout=0.5)
    finetune_(watched, split, SHORT, progress=lambda tick: None)
    finetune_(alone, split, SHORT)
    assert torch.equal(weights(watched), weights(alone))


def test_without_a_terminal_progress_is_plain_lines(split: Split) -> None:
    out = io.StringIO()
    with FinetuneProgress(2, console=Console(file=out)) as progress:
        for label in ("dense", "l2 50%"):
            finetune_(network(), split, replace(SHORT, epochs=2), progress=progress.run(label))
    printed = out.getvalue().splitlines()
    assert len(printed) == 4 and "\x1b" not in out.getvalue()
    assert printed[0].startswith("[1/2] dense: epoch") and "loss" in printed[0] and "val" in printed[0]
    assert printed[-1].startswith("[2/2] l2 50%: epoch 2/2")


def test_on_a_terminal_bars_show_loss_and_accuracy(split: Split) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140)
    with FinetuneProgress(2, console=console) as progress:
        for label in ("dense", "pruned"):
            finetune_(network(), split, replace(SHORT, epochs=2), progress=progress.run(label))
    assert all(word in out.getvalue() for word in ("dense", "all runs", "loss"))


# --- latency ----------------------------------------------------------------------------------------------------


class Sleeper(nn.Module):
    """Takes a given time and writes down each call."""

    def __init__(self, name: str, seconds: float, calls: list[str]) -> None:
        super().__init__()
        self.name, self.seconds, self.calls = name, seconds, calls

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        self.calls.append(self.name)
        time.sleep(self.seconds)
        return x


def test_latency_is_measured_in_turns_and_in_seconds() -> None:
    calls: list[str] = []
    models = {"slow": Sleeper("slow", 0.02, calls), "fast": Sleeper("fast", 0.005, calls)}
    found = measure_latency(models, torch.rand(1), rounds=4, warmup=1)
    assert 0.02 <= found["slow"] < 0.06 and 0.005 <= found["fast"] < 0.02
    assert calls == ["slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert all(model.training for model in models.values())


def test_latency_takes_tuples_and_mappings_of_arguments() -> None:
    models = {"m": Sleeper("m", 0.0, [])}
    assert measure_latency(models, (torch.rand(1),), rounds=1)["m"] > 0
    assert measure_latency(models, {"x": torch.rand(1)}, rounds=1)["m"] > 0


def test_latency_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no models"):
        measure_latency({}, torch.rand(1))
    with pytest.raises(InputError, match="at least 1"):
        measure_latency({"m": Fixed()}, torch.rand(1, 3, 8, 8), rounds=0)


# --- base models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unseen", "least"), [("plain", 60), ("sketch", 20), ("texture", 55), ("thick", 60)])
@pytest.mark.parametrize("name", BASE_MODELS)
def test_shipped_models_know_their_sources_and_generalise_in_part(name: str, unseen: str, least: int) -> None:
    split = load_split("digits-dg", DataConfig(unseen=unseen))
    model = base_model(name, unseen)
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert evaluate(model, split.val, num_classes=10) > 95
    assert least < evaluate(model, split.test, num_classes=10) < 97


def test_shipped_weights_are_small() -> None:
    folder = Path(str(files("secateur.experiments"))) / "weights"
    sizes = [f.stat().st_size for f in folder.glob("*.safetensors")]
    assert sizes and all(0 < size < 1_000_000 for size in sizes)


def test_random_base_models_are_always_the_same_and_leave_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first = base_model("beit_digits", None, weights=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(weights(first), weights(base_model("beit_digits", None, weights=False)))


def test_base_models_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"did you mean .*vit_digits"):
        base_model("vit_digit", "thick")
    with pytest.raises(InputError, match=r"no weights of vit_digits are shipped: .*'nowhere'.* sketch, texture, thick"):
        base_model("vit_digits", "nowhere")
    with pytest.raises(InputError, match=r"the pooled split has none\. Make them with scripts"):
        base_model("vit_digits", None)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / weights_file("vit_digits", "thick")).write_bytes(b"not a checkpoint")
    monkeypatch.setattr(base_models, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="damaged"):
        base_model("vit_digits", "thick")
