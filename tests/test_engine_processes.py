"""Two processes on gloo, as replicas and as shards, train like one process with the same global batches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from engine_toys import flat, results, run, start, toy_split, train, vit
from secateur.training import (
    EXIT_INTERRUPTED,
    AugmentConfig,
    AveragingConfig,
    CheckpointConfig,
    DistillationConfig,
    FinetuneConfig,
    MachineConfig,
    ObjectiveConfig,
    Tick,
    evaluate,
    finetune_,
)
from secateur.training.loading import GlobalBatches
from secateur.training.placement import sharded

SHARD = MachineConfig(shard=True)
BASE = FinetuneConfig(epochs=2, batch_size=24, lr=1e-3, warmup_epochs=1)
ONE = replace(BASE, epochs=1, warmup_epochs=0, lr=3e-3)
RECIPES = {
    "erm, clipped": replace(ONE, clip_grad=0.1),
    "accumulated, averaged": replace(ONE, accumulate=2, averaging=AveragingConfig("ema", {"decay": 0.9})),
    "coral, layers": replace(ONE, objective=ObjectiveConfig("coral"), layer_decay=0.7),
    "groupdro": replace(ONE, objective=ObjectiveConfig("groupdro", {"eta": 1.0})),
    "sharded, clipped, accumulated": replace(ONE, accumulate=2, machine=SHARD, clip_grad=0.1),
    "sharded groupdro": replace(ONE, machine=SHARD, objective=ObjectiveConfig("groupdro", {"eta": 1.0})),
}
IMAGES = 49
"""Two steps of 24 images and one of a single image, of which the second process gets none."""


def train_all(folder: Path) -> None:
    for name, config in RECIPES.items():
        train(folder / name, config, train_images=IMAGES)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders with the results of all recipes in one process and in two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    train_all(one)
    run(train_all, two, world=2)
    return one, two


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_give_the_weights_and_the_record_of_one(name: str, pairs: tuple[Path, Path]) -> None:
    (one, first), (two, second) = (results(folder / name) for folder in pairs)
    moved = (one - flat(vit())).norm()
    assert moved > 0.05
    assert (one - two).norm() < 1e-4 * moved
    assert torch.allclose(first, second, atol=1e-4)


def look_at_shards(out: Path) -> None:
    """Writes how many numbers of the model this process holds, and the number of units they are gathered in."""
    torch.distributed.init_process_group("gloo")
    parts = sharded(vit(), torch.device("cpu"), "fp32")
    held = sum(p.to_local().numel() for p in parts.parameters() if isinstance(p, DTensor))
    units = sum(isinstance(module, FSDPModule) for module in parts.modules())
    Path(f"{out}-{os.environ['RANK']}").write_text(f"{held} {units}")


def test_each_process_holds_half_of_a_sharded_model_block_by_block(tmp_path: Path) -> None:
    run(look_at_shards, tmp_path / "out", world=2)
    told = [(tmp_path / f"out-{rank}").read_text().split() for rank in (0, 1)]
    total = sum(p.numel() for p in vit().parameters())
    assert sum(int(held) for held, _ in told) == total
    assert all(int(held) < 0.6 * total and int(units) == 3 for held, units in told)


def test_shares_of_all_processes_make_up_the_same_global_batches() -> None:
    whole = GlobalBatches(49, 24, accumulate=2, seed=3)
    whole.epoch = 2
    for world in (2, 3, 8):
        shares = [GlobalBatches(49, 24, accumulate=2, seed=3) for _ in range(world)]
        for rank, share in enumerate(shares):
            share.rank, share.world, share.epoch = rank, world, 2
        for part, *own in zip(whole, *shares, strict=True):
            assert sorted(part) == sorted(key for keys in own for key in keys if not key[2])
            assert all(own)


def distil(out: Path) -> None:
    """Trains with a teacher; the last batch is uneven."""
    model = vit()
    how = replace(BASE, distillation=DistillationConfig(alpha=0.7, temperature=2.0))
    finetune_(model, toy_split(train=IMAGES), how, teacher=vit(seed=5))
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(flat(model), out)


def test_distillation_is_the_same_in_two_processes(tmp_path: Path) -> None:
    distil(tmp_path / "one")
    run(distil, tmp_path / "two", world=2)
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    assert (one - two).norm() < 1e-4 * (one - flat(vit())).norm()


def stop_at_seven(tick: Tick) -> None:
    if tick.step == 7:
        os.kill(os.getpid(), signal.SIGTERM)


def interrupted(out: Path, folder: Path, config: FinetuneConfig) -> None:
    """Trains two steps of the second epoch; only the main process is told to stop."""
    first = int(os.environ["RANK"]) == 0
    keep = CheckpointConfig(folder)
    train(out, config, dropout=0.2, checkpoint=keep, progress=stop_at_seven if first else None)


MIXED = replace(BASE, epochs=3, batch_size=24, augment=AugmentConfig(mixup=0.2))


def stopped_by_sigterm(folder: Path, config: FinetuneConfig) -> None:
    """Runs two processes of which one is told to stop; both do."""
    children = start(interrupted, folder / "out", folder / "run", config, world=2)
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [EXIT_INTERRUPTED] * 2
    assert [p.name for p in sorted((folder / "run").glob("step-*"))][-1] == "step-000000008.safetensors"


@pytest.mark.parametrize("machine", [MachineConfig(), SHARD], ids=["replicas", "shards"])
def test_two_processes_that_were_stopped_resume_bit_for_bit(tmp_path: Path, machine: MachineConfig) -> None:
    config = replace(MIXED, machine=machine)
    run(train, tmp_path / "whole", config, dropout=0.2, world=2)
    stopped_by_sigterm(tmp_path, config)
    run(train, tmp_path / "out", config, dropout=0.2, checkpoint=CheckpointConfig(tmp_path / "run"), world=2)
    (weights, curve), (expected, whole) = results(tmp_path / "out"), results(tmp_path / "whole")
    assert torch.equal(weights, expected) and torch.equal(curve, whole)


def test_checkpoint_of_two_shards_is_resumed_by_one_process(tmp_path: Path) -> None:
    config = replace(BASE, epochs=3)
    whole = vit()
    finetune_(whole, toy_split(), config)
    stopped_by_sigterm(tmp_path, replace(config, machine=SHARD))
    resumed = vit()
    record = finetune_(resumed, toy_split(), config, checkpoint=tmp_path / "run")
    assert "resumed by 1 processes from a checkpoint of 2" in record.notes[0]
    # The interrupted run had dropout, so only what follows is alike: that it goes on, and learns.
    assert len(record.epochs) == 3 and record.last.train_loss < record.epochs[0].train_loss


def train_and_evaluate(out: Path) -> None:
    """Evaluates a model when the processes have found each other by training another one, in shards."""
    model = vit()
    finetune_(model, toy_split(train=24), replace(ONE, machine=SHARD))
    # 45 images: the last batch has a single one, of which the second process gets none.
    accuracy = evaluate(vit(seed=3), toy_split().test, num_classes=3, batch_size=11)
    Path(f"{out}-{os.environ['RANK']}").write_text(f"{accuracy} {flat(model).sum().item()!r}")


def test_all_processes_get_the_same_weights_and_the_same_answer_of_a_shared_evaluation(tmp_path: Path) -> None:
    run(train_and_evaluate, tmp_path / "out", world=2)
    expected = evaluate(vit(seed=3), toy_split().test, num_classes=3)
    told = [(tmp_path / f"out-{rank}").read_text().split() for rank in (0, 1)]
    assert [accuracy for accuracy, _ in told] == [str(expected)] * 2
    assert told[0][1] == told[1][1], "all processes end with the same weights"


def wrong(out: Path, folder: Path) -> None:
    """Has a checkpoint folder that is of another run."""
    keep = CheckpointConfig(folder)
    train(out, BASE, checkpoint=keep)
    try:
        train(out, replace(BASE, lr=1.0), checkpoint=keep)
    except Exception as error:  # noqa: BLE001
        Path(f"{out}-{os.environ['RANK']}").write_text(str(error))


def test_errors_of_the_main_process_end_all_processes(tmp_path: Path) -> None:
    run(wrong, tmp_path / "out", tmp_path / "run", world=2)
    assert all("another recipe" in (tmp_path / f"out-{rank}").read_text() for rank in (0, 1))


SCRIPT = """
import sys
from pathlib import Path
from engine_toys import train
from test_engine_processes import BASE, IMAGES
from secateur.training import FinetuneProgress
with FinetuneProgress() as progress:
    train(Path(sys.argv[1]), BASE, train_images=IMAGES, progress=progress.run("toy"))
"""
LAUNCHERS: dict[str, list[str]] = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_real_launchers_start_runs_of_two_processes(
    launcher: str, tmp_path: Path, unused_port: Callable[[], int]
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    extra = ["--main_process_port", str(unused_port())] if launcher == "accelerate" else []
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], *extra, str(script), str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("toy: epoch 2/2") == 1
    train(tmp_path / "one", BASE, train_images=IMAGES)
    (one, _), (two, _) = results(tmp_path / "one"), results(tmp_path / "two")
    assert (one - two).norm() < 1e-4 * (one - flat(vit())).norm()


@pytest.fixture
def unused_port() -> Callable[[], int]:
    import socket

    def find() -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    return find
