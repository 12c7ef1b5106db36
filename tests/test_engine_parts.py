"""What a recipe is made of: each part does in a run what it does on its own, and bad combinations are refused."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from engine_toys import DOMAINS, flat, images_of, toy_split, vit
from secateur.data import DataConfig, Split
from secateur.data.pictures import Pictures
from secateur.errors import InputError
from secateur.training import (
    AugmentConfig,
    AveragingConfig,
    DistillationConfig,
    FinetuneConfig,
    FinetuneRecord,
    LogConfig,
    MachineConfig,
    ObjectiveConfig,
    Tick,
    evaluate,
    finetune_,
    presented,
)
from secateur.training.averaging import EMA
from secateur.training.loading import GlobalBatches, batches_of

BASE = FinetuneConfig(epochs=2, batch_size=24, lr=3e-3, warmup_epochs=1)


def trained(config: FinetuneConfig, model: nn.Module | None = None, **options: Any) -> tuple[Tensor, FinetuneRecord]:
    model = model or vit()
    record = finetune_(model, toy_split(), config, **options)
    return flat(model), record


# --- the step -------------------------------------------------------------------------------------------------------


def test_run_is_adamw_on_clipped_gradients_in_the_order_of_its_batches() -> None:
    """Writes the recipe out again, with torch alone."""
    config = replace(BASE, epochs=1, clip_grad=0.05, label_smoothing=0.2, weight_decay=0.4, layer_decay=1.0)
    model, split = vit(), toy_split(augmented=False)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = AdamW([{"params": matrices, "weight_decay": 0.4}, {"params": vectors, "weight_decay": 0.0}])
    order = [[key[0] for key in keys] for keys in GlobalBatches(90, 24, seed=config.seed)]
    assert sorted(i for batch in order for i in batch) == list(range(90)) and len(order) == 4
    for step, batch in enumerate(order):
        images = torch.stack([split.train[i][0] for i in batch])
        loss = cross_entropy(model(images), split.train.labels[batch], label_smoothing=0.2)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (0.033 + (1 - 0.033) * step / 4)
        optimizer.step()
        optimizer.zero_grad()
    own = vit()
    finetune_(own, split, config)
    assert torch.allclose(flat(own), flat(model), atol=1e-6)


def test_accumulated_parts_add_up_to_the_whole_batch() -> None:
    whole, record = trained(BASE)
    for parts in (2, 5):
        split_up, same = trained(replace(BASE, accumulate=parts))
        assert torch.allclose(whole, split_up, atol=2e-5)
        assert [e.train_loss for e in same.epochs] == pytest.approx([e.train_loss for e in record.epochs], abs=1e-5)


def test_layer_decay_slows_the_input_down() -> None:
    def moved(decay: float) -> list[float]:
        model, before = vit(), vit()
        finetune_(model, toy_split(), replace(BASE, epochs=1, warmup_epochs=0, layer_decay=decay))
        pairs = [(model.patch_embed, before.patch_embed), (model.head, before.head)]
        return [float((flat(a) - flat(b)).norm()) for a, b in pairs]

    (embedding, head), (slowed, same) = moved(1.0), moved(0.3)
    assert slowed < 0.2 * embedding and same > 0.5 * head


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_full_weights(precision: Any) -> None:
    model = vit()
    record = finetune_(model, toy_split(), replace(BASE, epochs=8, precision=precision))
    assert record.val_accuracy > 60 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(flat(model), trained(replace(BASE, epochs=8))[0])


def test_workers_read_what_the_process_itself_would_read() -> None:
    assert torch.equal(trained(BASE)[0], trained(replace(BASE, workers=2))[0])


def test_channels_last_trains_alike_and_leaves_the_model_as_it_was() -> None:
    model = vit()
    weights, _ = trained(replace(BASE, machine=MachineConfig(channels_last=True)), model)
    assert torch.allclose(weights, trained(BASE)[0], atol=2e-5)
    assert model.patch_embed.proj.weight.is_contiguous()


def test_compiled_models_train_alike_and_show_their_features(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without code generation, which takes a minute; that the engine copes with wrapped models is what is tested.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = vit()
    keys = list(model.state_dict())
    coral = replace(BASE, epochs=1, objective=ObjectiveConfig("coral", {"weight": 5.0}))
    compiled, _ = trained(replace(coral, machine=MachineConfig(compile=True)), model)
    assert torch.allclose(compiled, trained(coral)[0], atol=2e-5)
    assert not torch.allclose(compiled, trained(replace(BASE, epochs=1))[0], atol=1e-3)
    assert list(model.state_dict()) == keys


# --- objectives, averages, teachers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["erm", "coral", "groupdro", "mixup_domains"])
def test_all_objectives_learn(name: str) -> None:
    _, record = trained(replace(BASE, epochs=10, objective=ObjectiveConfig(name)))
    assert record.val_accuracy > 60 and record.last.train_loss < record.epochs[0].train_loss


def test_domains_reach_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.training import objectives

    seen: list[tuple[int, int]] = []
    original = objectives.GroupDRO.__call__

    def watch(self: objectives.GroupDRO, step: objectives.Step) -> Tensor:
        seen.extend(zip(step.targets.tolist(), step.domains.tolist(), strict=True))
        return original(self, step)

    monkeypatch.setattr(objectives.GroupDRO, "__call__", watch)
    split = toy_split()
    finetune_(vit(), split, replace(BASE, epochs=1, objective=ObjectiveConfig("groupdro")))
    expected = zip(split.train.labels.tolist(), (DOMAINS.index(d) for d in split.train.domains), strict=True)
    assert sorted(seen) == sorted(expected)


def test_averaged_weights_are_validated_and_kept() -> None:
    config = replace(BASE, epochs=3, averaging=AveragingConfig("ema", {"decay": 0.8}))
    weights, record = trained(config)
    raw = vit()
    averaging = EMA(decay=0.8)
    steps: list[int] = []

    def watch(tick: Tick) -> None:
        # The last step of an epoch is told after validation, with the raw weights back in the model.
        averaging.update(raw, tick.step)
        steps.append(tick.step)

    plain, _ = trained(replace(config, averaging=AveragingConfig()), raw, progress=watch)
    averaged = vit()
    averaging.apply_(averaged)
    assert len(steps) == 12 and "EMA" in record.selection
    assert evaluate(averaged, toy_split().val, num_classes=3) == record.last.val_accuracy
    assert not torch.equal(plain, weights)
    if record.best_epoch == 3:
        assert torch.allclose(weights, flat(averaged), atol=1e-7)


def test_swad_ends_with_an_average_and_fresh_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    config = replace(BASE, epochs=5, averaging=AveragingConfig("swad", {"start_patience": 1, "end_patience": 2}))
    split = toy_split()
    record = finetune_(model, split, config)
    assert "SWAD" in record.selection
    assert evaluate(model, split.val, num_classes=3) == record.val_accuracy
    images = torch.stack([split.train.plain()[i][0] for i in range(90)])
    with torch.no_grad():
        outputs = model[0](images)
    assert torch.allclose(model[1].running_mean, outputs.mean(dim=(0, 2, 3)), atol=0.02)


def test_students_learn_from_their_teacher() -> None:
    teacher = vit(seed=7)
    finetune_(teacher, toy_split(), replace(BASE, epochs=10))
    before = flat(teacher)
    config = replace(BASE, epochs=6, distillation=DistillationConfig(alpha=1.0, temperature=2.0))
    spoilt = toy_split()
    spoilt.train.labels.zero_()
    student = vit()
    finetune_(student, spoilt, config, teacher=teacher)
    assert torch.equal(flat(teacher), before)
    # The labels said nothing, so all that the student knows is from the teacher.
    assert evaluate(student, spoilt.test, num_classes=3) > 60


def test_distillation_token_learns_from_the_teacher_and_the_class_token_from_labels() -> None:
    torch.manual_seed(0)
    student = VisionTransformerDistilled(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    how = DistillationConfig(mode="token", hard=True)
    record = finetune_(student, toy_split(), replace(BASE, distillation=how), teacher=vit())
    assert not student.distilled_training and len(record.epochs) == 2
    with pytest.raises(InputError, match="no distillation token"):
        trained(replace(BASE, distillation=how), teacher=vit())


def test_teachers_without_distillation_and_the_reverse_are_refused() -> None:
    for config, teacher in ((BASE, vit()), (replace(BASE, distillation=DistillationConfig()), None)):
        with pytest.raises(InputError, match="both"):
            trained(config, teacher=teacher)


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_recipes_are_found_by_name() -> None:
    assert FinetuneConfig.recipe("default") == FinetuneConfig()
    assert FinetuneConfig.recipe("paper", epochs=30) == FinetuneConfig.paper(epochs=30)
    assert FinetuneConfig.recipe("short").averaging.name == "ema"
    with pytest.raises(InputError, match="did you mean 'paper'"):
        FinetuneConfig.recipe("papr")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ObjectiveConfig("coral", {"wieght": 1.0}), "wieght"),
        (lambda: AveragingConfig("emma"), "emma"),
        (lambda: DistillationConfig(alpha=2.0), "alpha"),
        (lambda: DistillationConfig(temperature=0.0), "temperature"),
        (lambda: DistillationConfig(mode="tokens"), "tokens"),  # pyright: ignore[reportArgumentType]
        (lambda: FinetuneConfig(accumulate=65), "accumulate"),
        (lambda: FinetuneConfig(layer_decay=1.5), "layer_decay"),
        (lambda: FinetuneConfig(machine=MachineConfig(shard=True), precision="fp16"), "fp16"),
        (lambda: FinetuneConfig(machine=MachineConfig(shard=True), averaging=AveragingConfig("ema")), "averaged"),
    ],
)
def test_impossible_parts_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


# --- data ----------------------------------------------------------------------------------------------------------


class Squares(Pictures):
    """Grey pictures made when they are asked for; more of them than any machine could hold."""

    def picture(self, index: int) -> Tensor:
        return torch.full((3, 16, 16), 40 * int(self.labels[index]), dtype=torch.uint8)

    def take(self, indices: Any, *, augmented: bool = False) -> Squares:
        ids = [self.ids[i] for i in indices]
        return Squares(ids, self.labels[torch.as_tensor(np.asarray(indices))], self.config, augmented=augmented)


def squares() -> Split:
    labels = torch.arange(24) % 3
    every = Squares([f"{DOMAINS[i % 2]}/{i % 3}/{i}" for i in range(24)], labels, DataConfig(image_size=8))
    parts = {name: every.take(range(24), augmented=name == "train") for name in ("train", "val", "test")}
    return Split(**parts, classes=("r", "g", "b"), domains=DOMAINS, unseen=None, protocol="toy")


def test_augmentation_of_a_recipe_replaces_that_of_the_data_set() -> None:
    split = squares()
    config = replace(BASE, epochs=1, augment=AugmentConfig(random_erasing=1.0, mixup=0.2, eval_crop=0.875))
    shown = presented(split, config.augment)
    assert shown.train.augmented and not shown.val.augmented and not shown.train.plain().augmented
    assert shown.train[0][0].shape == shown.val[0][0].shape == (3, 8, 8)
    assert torch.equal(shown.val[0][0], shown.train.plain()[0][0])
    assert shown.train[0][0].std() > 0.5, "random erasing leaves noise"
    finetune_(vit(), split, config)
    with pytest.raises(InputError, match="come as tensors"):
        finetune_(vit(), toy_split(), config)


def test_augmentation_depends_on_seed_epoch_and_image_alone() -> None:
    images = images_of(30, augmented=True)

    def batches(epoch: int, start: int) -> list[Tensor]:
        sampler = GlobalBatches(30, 8, seed=1)
        sampler.epoch, sampler.start = epoch, start
        return [batch[0] for batch in batches_of(images, sampler, workers=0, device=torch.device("cpu"))]

    state = torch.get_rng_state()
    whole, rest, other = batches(1, 0), batches(1, 2), batches(2, 0)
    assert len(whole) == 4 and all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    assert not torch.equal(whole[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_all_global_random_states_are_left_alone() -> None:
    model, split = vit(), toy_split()
    random.random()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    finetune_(model, split, replace(BASE, epochs=1, augment=AugmentConfig(mixup=0.2)))
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


# --- trackers --------------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class _StoppedError(Exception):
    """Stands for the end of the process."""


def test_curves_go_to_tensorboard_once_even_if_the_run_was_interrupted(tmp_path: Path) -> None:
    log = LogConfig(tmp_path / "log", every_steps=1)

    def stop(tick: Tick) -> None:
        if tick.step == 7:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        trained(BASE, log=log, checkpoint=tmp_path / "run", progress=stop)
    _, record = trained(BASE, log=log, checkpoint=tmp_path / "run")
    found = scalars(tmp_path / "log" / "secateur")
    assert [step for step, _ in found["loss"]] == list(range(1, 9))
    assert [step for step, _ in found["val_accuracy"]] == [4, 8]
    assert [v for _, v in found["val_accuracy"]] == pytest.approx([e.val_accuracy for e in record.epochs])
    assert [v for _, v in found["lr"]][3::4] == pytest.approx([e.lr for e in record.epochs])


def test_tensorboard_is_what_a_folder_alone_means(tmp_path: Path) -> None:
    trained(BASE, log=tmp_path)
    assert set(scalars(tmp_path / "secateur")) >= {"train_accuracy", "val_accuracy", "val_loss"}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_trackers_that_are_not_installed_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else real(wanted))
    with pytest.raises(InputError, match=f"{name} is not installed: pip install {name}"):
        LogConfig(tmp_path, trackers=(name,))
    with pytest.raises(InputError, match="wandb"):
        LogConfig(tmp_path, trackers=("wanbd",))
