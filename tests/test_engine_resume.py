"""Never losing work: kill -9 at any moment, a full disk, damaged checkpoints, SIGTERM, all of it really done."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import Tensor

from engine_toys import RICH, flat, results, start, toy_split, train, vit
from secateur.errors import CheckpointError, InputError
from secateur.training import (
    EXIT_INTERRUPTED,
    AveragingConfig,
    CheckpointConfig,
    FinetuneConfig,
    Interrupted,
    MachineConfig,
    ObjectiveConfig,
    Tick,
    checkpoint,
    finetune_,
)

STEPS = 4
"""Steps per epoch of `RICH` on 90 images."""
PLAIN = FinetuneConfig(epochs=3, batch_size=24, lr=3e-3, warmup_epochs=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor]:
    """Weights and curve of a run that nothing happened to, and that kept no checkpoints."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    train(out, RICH, dropout=0.2)
    return results(out)


# --- kill -9 ----------------------------------------------------------------------------------------------------


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(out: Path, folder: Path, moment: str, when: int) -> None:
    """Trains until the process kills itself: after a step, or half-way through writing its n-th file."""
    written = 0
    real = checkpoint.write_whole

    def half(path: Path, write: Callable[[BinaryIO], object]) -> None:
        nonlocal written
        written += 1
        if written < when:
            real(path, write)
            return
        with (path.parent / f".{path.name}.half").open("wb") as file:
            write(file)
            file.truncate(file.tell() // 2)
            file.flush()
            die()

    def watch(tick: Tick) -> None:
        if moment == "step" and tick.step == when:
            die()

    if moment == "write":
        checkpoint.write_whole = half
    train(out, RICH, dropout=0.2, checkpoint=CheckpointConfig(folder, every_steps=3), progress=watch)


def test_run_killed_at_every_kind_of_moment_ends_with_the_weights_of_an_undisturbed_one(
    tmp_path: Path, undisturbed: tuple[Tensor, Tensor]
) -> None:
    out, folder = tmp_path / "out", tmp_path / "run"
    # In order: before any checkpoint, in the middle of an epoch, on its last step, in the middle of the first file, in
    # the middle of best weights, in the middle of the checkpoint that follows them, and just before the end.
    moments = [("step", 1), ("step", 4), ("step", 5), ("write", 1), ("write", 2), ("write", 3), ("step", 12)]
    for moment, when in moments:
        (child,) = start(train_and_die, out, folder, moment, when)
        child.join(60)
        assert child.exitcode == -signal.SIGKILL and not out.exists()
    (child,) = start(train_and_die, out, folder, "never", 0)
    child.join(60)
    assert child.exitcode == 0
    weights, curve = results(out)
    assert torch.equal(weights, undisturbed[0]) and torch.equal(curve, undisturbed[1])
    assert not list(folder.glob(".*"))


def test_run_killed_from_outside_at_any_time_ends_with_the_weights_of_an_undisturbed_one(
    tmp_path: Path, undisturbed: tuple[Tensor, Tensor]
) -> None:
    out, folder = tmp_path / "out", tmp_path / "run"
    options: dict[str, Any] = {"dropout": 0.2, "checkpoint": CheckpointConfig(folder, every_steps=1)}
    kills = 0
    while not out.exists():
        (child,) = start(train, out, RICH, **options)
        seen = set(folder.glob("*"))
        while child.is_alive() and not (set(folder.glob("*")) - seen):
            time.sleep(0.001)
        time.sleep(0.03 * kills)
        child.kill()
        child.join(60)
        kills += 1
    assert kills > 2
    assert torch.equal(results(out)[0], undisturbed[0])


# --- the same process ---------------------------------------------------------------------------------------------


class _StoppedError(Exception):
    """Stands for the end of the process."""


def stop_after(step: int) -> Callable[[Tick], None]:
    def watch(tick: Tick) -> None:
        if tick.step == step:
            raise _StoppedError

    return watch


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        replace(PLAIN, averaging=AveragingConfig("swad", {"start_patience": 1, "end_patience": 2})),
        replace(PLAIN, objective=ObjectiveConfig("coral"), machine=MachineConfig(channels_last=True)),
        replace(PLAIN, precision="fp16"),
        replace(PLAIN, precision="bf16", workers=1, accumulate=3),
    ],
    ids=["plain", "swad", "coral", "fp16", "workers"],
)
def test_stopped_run_resumes_to_the_same_weights_under_every_part_of_a_recipe(
    tmp_path: Path, config: FinetuneConfig
) -> None:
    split, keep = toy_split(), CheckpointConfig(tmp_path / "run", every_steps=1)
    whole = vit(dropout=0.2)
    expected = finetune_(whole, split, config)
    with pytest.raises(_StoppedError):
        finetune_(vit(dropout=0.2), split, config, checkpoint=keep, progress=stop_after(7))
    resumed = vit(dropout=0.2)
    record = finetune_(resumed, split, config, checkpoint=keep)
    assert torch.equal(flat(resumed), flat(whole))
    assert (record.epochs, record.best_epoch) == (expected.epochs, expected.best_epoch)
    assert record.val_accuracy == expected.val_accuracy and record.notes == ()


def test_run_that_has_ended_is_not_trained_again(tmp_path: Path) -> None:
    first, again = vit(), vit(seed=1)
    expected = finetune_(first, toy_split(), PLAIN, checkpoint=tmp_path / "run")
    ticks: list[Tick] = []
    record = finetune_(again, toy_split(), PLAIN, checkpoint=tmp_path / "run", progress=ticks.append)
    assert ticks == [] and torch.equal(flat(first), flat(again)) and record.epochs == expected.epochs
    assert record.images_per_second == expected.images_per_second > 0


def test_checkpoints_are_kept_by_policy(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def names() -> list[str]:
        return sorted(p.name for p in folder.glob("*"))

    seen: list[list[str]] = []
    keep = CheckpointConfig(folder, every_steps=2, keep=3)
    record = finetune_(vit(), toy_split(), PLAIN, checkpoint=keep, progress=lambda tick: seen.append(names()))
    steps = [[n for n in found if n.startswith("step")] for found in [*seen, names()]]
    assert max(map(len, steps)) == 3
    assert steps[-1] == [f"step-{n:09d}.safetensors" for n in (8, 10, 12)]
    best = {n for n in names() if n.startswith("best")}
    assert f"best-{record.best_epoch:05d}.safetensors" in best and len(best) <= 2


def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    keep = CheckpointConfig(tmp_path, every_minutes=1e-9, keep=50)
    finetune_(vit(), toy_split(), PLAIN, checkpoint=keep)
    assert len(list(tmp_path.glob("step-*"))) == 3 * STEPS
    assert len(list(finetuned(tmp_path / "rare", every_minutes=60.0).glob("step-*"))) == 2


def finetuned(folder: Path, **options: Any) -> Path:
    """Returns the folder of checkpoints of a whole run."""
    finetune_(vit(), toy_split(), PLAIN, checkpoint=CheckpointConfig(folder, **options))
    return folder


# --- a full disk ----------------------------------------------------------------------------------------------------


def test_full_disk_leaves_the_older_checkpoint_and_says_so(tmp_path: Path) -> None:
    whole = vit()
    finetune_(whole, toy_split(), PLAIN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(tick: Tick) -> None:
        if tick.step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*File too large; the last one is step-000000004"):
            finetune_(vit(), toy_split(), PLAIN, checkpoint=tmp_path / "run", progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(("step", "."))) == [
        "step-000000004.safetensors"
    ]
    resumed = vit()
    finetune_(resumed, toy_split(), PLAIN, checkpoint=tmp_path / "run")
    assert torch.equal(flat(resumed), flat(whole))


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Changes one bit of the last tensor, which no format would notice."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage", [flip, truncate, lambda path: path.write_bytes(b""), lambda path: path.write_text("nonsense" * 100)]
)
def test_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = vit()
    finetune_(whole, toy_split(), PLAIN)
    keep = CheckpointConfig(tmp_path, every_steps=3)
    with pytest.raises(_StoppedError):
        finetune_(vit(), toy_split(), PLAIN, checkpoint=keep, progress=stop_after(7))
    newest, before = sorted(tmp_path.glob("step-*"), reverse=True)
    damage(newest)
    resumed, ticks = vit(), list[Tick]()
    record = finetune_(resumed, toy_split(), PLAIN, checkpoint=keep, progress=ticks.append)
    assert ticks[0].step == int(before.stem[5:]) + 1
    assert torch.equal(flat(resumed), flat(whole))
    assert len(record.notes) == 1 and newest.name in record.notes[0] and "one before" in record.notes[0]
    assert newest.name in capsys.readouterr().err and newest.with_suffix(".damaged").exists()


def test_nothing_sound_left_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    finetuned(tmp_path)
    for path in tmp_path.glob("best-*"):
        flip(path)
    with pytest.raises(CheckpointError, match="no sound checkpoint is left"):
        finetuned(tmp_path)


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    finetuned(tmp_path / "run")
    model = vit()
    before = flat(model)
    with pytest.raises(CheckpointError, match="another recipe"):
        finetune_(model, toy_split(), replace(PLAIN, lr=1e-3), checkpoint=tmp_path / "run")
    assert torch.equal(before, flat(model)) and list((tmp_path / "run").glob("step-*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        finetune_(vit(), toy_split(), PLAIN, checkpoint=tmp_path / "file")


def test_impossible_policies_are_refused(tmp_path: Path) -> None:
    for name, value in (("every_steps", 0), ("every_minutes", 0.0), ("keep", 0)):
        with pytest.raises(InputError, match=name):
            CheckpointConfig(tmp_path, **{name: value})


# --- SIGTERM --------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
from pathlib import Path
from engine_toys import train
from test_engine_resume import RICH, CheckpointConfig

def watch(tick):
    if tick.step == 6:
        os.kill(os.getpid(), signal.SIGTERM)

train(Path(sys.argv[1]), RICH, dropout=0.2, checkpoint=CheckpointConfig(Path(sys.argv[2])), progress=watch)
"""


def test_sigterm_saves_and_ends_the_process_with_its_own_code(
    tmp_path: Path, undisturbed: tuple[Tensor, Tensor]
) -> None:
    out, folder = tmp_path / "out", tmp_path / "run"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_INTERRUPTED == 143, done.stderr
    assert "stopped by SIGTERM after step 7 of 12" in done.stderr and "start the same run again" in done.stderr
    assert (folder / "step-000000007.safetensors").exists() and not out.exists()
    train(out, RICH, dropout=0.2, checkpoint=CheckpointConfig(folder))
    assert torch.equal(results(out)[0], undisturbed[0])


def test_sigterm_during_the_last_step_of_an_epoch_saves_after_validation(tmp_path: Path) -> None:
    def watch(tick: Tick) -> None:
        if tick.step == STEPS:
            signal.raise_signal(signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="after step 4 of 12"):
        finetune_(vit(), toy_split(), PLAIN, checkpoint=tmp_path, progress=watch)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-000000004.safetensors"]
