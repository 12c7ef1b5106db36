"""A small network and data set for the training engine, and processes to train it in, launched as torchrun would."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from secateur.data import Split, TensorImages
from secateur.training import (
    AugmentConfig,
    AveragingConfig,
    CheckpointConfig,
    FinetuneConfig,
    FinetuneRecord,
    ObjectiveConfig,
    Tick,
    finetune_,
)

DOMAINS = ("a", "b")

# The server imports torch and this module once; each of its children is a process of its own, there in an instant.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["engine_toys", "accelerate", "torchmetrics.classification", "timm.data"])


def images_of(count: int, *, start: int = 0, augmented: bool = False) -> TensorImages:
    """Returns pictures of three classes, each bright in a channel of its own, in two domains of different contrast."""
    generator = torch.Generator().manual_seed(start)
    labels = torch.arange(count) % 3
    domains = [DOMAINS[i // 3 % 2] for i in range(count)]
    images = torch.randn(count, 3, 8, 8, generator=generator)
    images[torch.arange(count), labels] += torch.tensor([1.0 if d == "a" else 0.5 for d in domains]).view(-1, 1, 1)
    ids = [f"{d}/{int(c)}/{start + i}" for i, (c, d) in enumerate(zip(labels, domains, strict=True))]
    return TensorImages(images, labels, ids, domains, size=8, augmented=augmented)


def toy_split(*, train: int = 90, augmented: bool = True) -> Split:
    """Returns `train` training images and 45 each for validation and test."""
    parts = {"train": images_of(train, augmented=augmented)}
    parts |= {name: images_of(45, start=start) for name, start in (("val", 1000), ("test", 2000))}
    return Split(**parts, classes=("r", "g", "b"), domains=DOMAINS, unseen=None, protocol="toy")


def vit(*, dropout: float = 0.0, seed: int = 0) -> VisionTransformer:
    """Returns a transformer of two blocks."""
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3, proj_drop_rate=dropout
    )


def flat(model: nn.Module) -> Tensor:
    """Returns all weights and statistics as one vector."""
    return torch.cat([v.detach().double().flatten() for v in model.state_dict().values()])


RICH = FinetuneConfig(
    epochs=3,
    batch_size=24,
    lr=3e-3,
    warmup_epochs=1,
    accumulate=2,
    layer_decay=0.8,
    objective=ObjectiveConfig("groupdro", {"eta": 0.1}),
    averaging=AveragingConfig("ema", {"decay": 0.9}),
    augment=AugmentConfig(mixup=0.2, cutmix=1.0),
)
"""Everything that has a state to be resumed: dropout in the model, augmentation, mixing, q of GroupDRO, an average."""


def train(
    out: Path,
    config: FinetuneConfig,
    *,
    checkpoint: CheckpointConfig | None = None,
    dropout: float = 0.0,
    augmented: bool = True,
    train_images: int = 90,
    progress: Callable[[Tick], None] | None = None,
) -> FinetuneRecord:
    """Trains the toy and writes its final weights to `out`, in the main process."""
    torch.set_num_threads(1)
    model = vit(dropout=dropout)
    split = toy_split(train=train_images, augmented=augmented)
    record = finetune_(model, split, config, checkpoint=checkpoint, progress=progress)
    if int(os.environ.get("RANK", "0")) == 0:
        curve = torch.tensor([[e.train_loss, e.train_accuracy, e.val_accuracy] for e in record.epochs])
        told = {"notes": "\n".join(record.notes), "best": str(record.best_epoch)}
        save_file({"weights": flat(model), "curve": curve}, out, told)
    return record


def results(out: Path) -> tuple[Tensor, Tensor]:
    """Returns the weights and the curve that `train` wrote."""
    found = load_file(out)
    return found["weights"], found["curve"]


def start(function: Callable[..., object], *args: Any, world: int = 1, **options: Any) -> list[BaseProcess]:
    """Starts `world` processes that call the function with the variables that torchrun sets, if there are several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: list[BaseProcess] = []
    for rank in range(world):
        variables = {"OMP_NUM_THREADS": "1"}
        if world > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            variables |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        child = _processes.Process(target=_call, args=(variables, function, args, options))
        child.start()
        children.append(child)
    return children


def run(function: Callable[..., object], *args: Any, world: int = 1, **options: Any) -> None:
    """Calls the function in `world` processes of its own; fails unless all of them end well."""
    children = start(function, *args, world=world, **options)
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * world


def _call(variables: dict[str, str], function: Callable[..., object], args: tuple[Any, ...], options: Any) -> None:
    os.environ.update(variables)
    function(*args, **options)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def replaced(config: FinetuneConfig, **changes: Any) -> FinetuneConfig:
    """Returns the recipe with changes to single fields."""
    return replace(config, **changes)
