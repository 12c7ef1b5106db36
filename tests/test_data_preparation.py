"""Preparing a benchmark: bad input, duplicates, interruptions at any moment, and the folder that comes out."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro
from rich.console import Console

import raw_fakes as fakes
from secateur.cli.data import Data
from secateur.data import Benchmark, DataConfig, Manifest, load_split, preparation, prepare
from secateur.data.manifest import Duplicates, Entry
from secateur.errors import DataError, InputError


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here survives a loss of power, and waiting for other programs' disk traffic takes seconds."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw"


@pytest.fixture
def pacs(raw: Path) -> Benchmark:
    """84 images in the layout of PACS, and what is known of them."""
    return fakes.fitting("pacs", fakes.pacs(raw))


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# --- bad input ----------------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_told_at_once_and_written_down(pacs: Benchmark, raw: Path, tmp_path: Path) -> None:
    photo, cartoon = raw / "kfold/photo", raw / "kfold/cartoon"
    truncated = photo / "dog/pic_001.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-40])
    (photo / "dog/pic_002.jpg").write_bytes(b"<html>quota exceeded</html>")
    (photo / "dog/pic_003.jpg").write_bytes(b"")
    (photo / "horse/list.txt").write_text("horse")
    (photo / "stray.jpg").write_bytes(fakes.encoded("stray"))
    for path in (cartoon / "house").iterdir():
        path.unlink()
    (raw / "kfold/sketch").rename(raw / "sketch-moved")
    with pytest.raises(DataError) as caught:
        prepare(pacs, raw, tmp_path / "out", skip_bad=True)
    problems = (tmp_path / "out/problems.txt").read_text().splitlines()
    expected = (
        "domain 'sketch' holds no images",
        "domain 'cartoon' lacks images of 1 classes: house",
        "domain 'photo' lacks images of 1 classes: dog",
        "wrong numbers of images: found art_painting 21, cartoon 18, photo 18, sketch 0; expected art_painting 21",
        "kfold/photo/dog/pic_001.jpg: cannot be decoded: image file is truncated",
        "kfold/photo/dog/pic_002.jpg: cannot be decoded: cannot identify",
        "kfold/photo/dog/pic_003.jpg: cannot be decoded",
        "kfold/photo/horse/list.txt: expected an image",
        "kfold/photo/stray.jpg: expected domain/class/image",
    )
    for part in expected:
        assert part in str(caught.value)
        assert sum(part in line for line in problems) == 1
    assert len(problems) == len(expected) and "cannot be skipped" in str(caught.value)
    assert not (tmp_path / "out/manifest.json").exists()


def test_bad_files_can_be_skipped_and_are_recorded(pacs: Benchmark, raw: Path, tmp_path: Path) -> None:
    broken = raw / "kfold/photo/dog/pic_002.jpg"
    broken.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"2 problem.* go on with --skip-bad"):
        prepare(pacs, raw, tmp_path / "out")
    with pytest.raises(DataError, match=r"was not finished; run the same `secateur data prepare` again"):
        load_split(tmp_path / "out", DataConfig(unseen="photo"))
    manifest = prepare(pacs, raw, tmp_path / "out", skip_bad=True)
    assert len(manifest.images) == 83 and "photo/dog/pic_002.jpg" not in manifest.images
    assert manifest.left_out == ("kfold/photo/dog/pic_002.jpg: cannot be decoded: cannot identify image file it",)
    assert manifest.warnings[0].startswith("wrong numbers of images: found") and manifest.version == ""
    assert "1 bad files were left out" in str(manifest) and not (tmp_path / "out/problems.txt").exists()
    assert len(load_split(tmp_path / "out", DataConfig(unseen="photo", verify=True)).test) == 20


def test_a_repaired_source_is_taken_up_where_it_failed(
    pacs: Benchmark, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = raw / "kfold/photo/dog/pic_002.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    with pytest.raises(DataError):
        prepare(pacs, raw, tmp_path / "out")
    broken.write_bytes(whole)
    placed = spied(monkeypatch)
    assert prepare(pacs, raw, tmp_path / "out").version == "fake"
    assert placed == ["photo/dog/pic_002.jpg"]


def test_wrong_numbers_alone_need_skip_bad(pacs: Benchmark, raw: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found art_painting 21, .*; expected art_painting 2048, cartoon 2344"):
        prepare("PACS", raw, tmp_path / "out")
    assert prepare("pacs", raw, tmp_path / "out", skip_bad=True).warnings


def test_any_published_version_will_do(pacs: Benchmark, raw: Path, tmp_path: Path) -> None:
    benchmark = replace(pacs, counts={"other": {"photo": 1}, **pacs.counts})
    assert prepare(benchmark, raw, tmp_path / "out").version == "fake"


def test_unknown_and_missing_classes_are_named(raw: Path, tmp_path: Path) -> None:
    expected = fakes.pacs(raw, each=1)
    for domain in fakes.PACS_DOMAINS:
        (raw / "kfold" / domain / "dog").rename(raw / "kfold" / domain / "doge")
    with pytest.raises(DataError, match=r"classes lacks: dog\n.*classes unknown: doge"):
        prepare(fakes.fitting("pacs", expected), raw, tmp_path / "out", skip_bad=True)
    with pytest.raises(DataError, match="7 classes, expected 8"):
        prepare(replace(fakes.fitting("pacs", expected), classes=None, num_classes=8), raw, tmp_path / "out2")


def test_two_files_that_would_get_one_name_are_a_problem(raw: Path, tmp_path: Path) -> None:
    expected = fakes.vlcs(raw)
    fakes.put(raw / "VLCS/SUN09/train/0/a.jpg", fakes.encoded("a"))
    fakes.put(raw / "VLCS/SUN09/train/00/a.jpg", fakes.encoded("b"))
    with pytest.raises(
        DataError, match=r"train/00/a.jpg: would become SUN09/bird/train-a.jpg, as .*train/0/a.jpg does"
    ):
        prepare(fakes.fitting("vlcs", expected), raw, tmp_path / "out")


def test_results_go_to_a_new_folder_only(pacs: Benchmark, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine.txt").write_text("x")
    for out, message in (
        (raw, "lie in one another"),
        (raw / "out", "lie in one another"),
        (tmp_path, "lie in one another"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "used", "is not empty"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(pacs, raw, out)
    prepare(pacs, raw, tmp_path / "out")
    (raw / "kfold/photo/dog/pic_001.jpg").rename(raw / "kfold/photo/dog/pic_000.jpg")
    with pytest.raises(DataError, match="prepared from another source"):
        prepare(pacs, raw, tmp_path / "out")
    with pytest.raises(DataError, match="no images of Office-Home"):
        prepare("office_home", raw, tmp_path / "out")


# --- duplicates ---------------------------------------------------------------------------------------------------


def test_duplicates_are_reported_by_what_they_mean(pacs: Benchmark, raw: Path, tmp_path: Path) -> None:
    top = raw / "kfold"
    for source, target in (
        ("photo/dog/pic_001.jpg", "cartoon/dog/pic_003.jpg"),
        ("photo/horse/pic_001.jpg", "photo/house/pic_002.jpg"),
        ("sketch/horse/n0_1-1.png", "sketch/horse/n0_2-1.png"),
    ):
        (top / target).write_bytes((top / source).read_bytes())
    manifest = prepare(pacs, raw, tmp_path / "out")
    assert manifest.duplicates == Duplicates(
        across_domains=(("cartoon/dog/pic_003.jpg", "photo/dog/pic_001.jpg"),),
        across_classes=(("photo/horse/pic_001.jpg", "photo/house/pic_002.jpg"),),
        within_class=(("sketch/horse/n0_1-1.png", "sketch/horse/n0_2-1.png"),),
    )
    assert "1 across domains, 1 across classes, 1 within a class" in str(manifest)
    split = load_split(tmp_path / "out", DataConfig(unseen="photo"))
    assert ("cartoon/dog/pic_003.jpg", "photo/dog/pic_001.jpg") in split.duplicates
    assert ("photo/horse/pic_001.jpg", "photo/house/pic_002.jpg") not in split.duplicates
    assert "in more than one part" in str(split)


# --- interruptions ------------------------------------------------------------------------------------------------


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the list to which every image that is decoded and written is added from now on."""
    placed: list[str] = []
    original = preparation._place

    def place(root: Path, item: Any, content: Any) -> Any:
        placed.append(item.id)
        return original(root, item, content)

    monkeypatch.setattr(preparation, "_place", place)
    return placed


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_before_replacing(number: int) -> None:
    """Kills this process when image `number` is written beside its place, but not yet there."""
    original, done = Path.replace, [0]

    def replace_(self: Path, target: Path) -> Path:
        done[0] += self.name.endswith(".part")
        if done[0] == number:
            kill()
        return original(self, target)

    Path.replace = replace_  # type: ignore[method-assign]


def killed_after_adding(number: int) -> None:
    """Kills this process when `number` images are in the journal, the last of them in a line without its end."""
    original, done = preparation._Journal.add, [0]

    def add(self: Any, key: str, entry: Entry) -> None:
        original(self, key, entry)
        done[0] += 1
        if done[0] == number:
            self.file.write('["photo/dog/pi')
            self.flush()
            kill()

    preparation._Journal.add = add  # type: ignore[method-assign]


def killed_before_manifest(number: int) -> None:
    Manifest.write = lambda self, root: kill()  # type: ignore[method-assign]


def killed_after_manifest(number: int) -> None:
    original = Manifest.write
    Manifest.write = lambda self, root: (original(self, root), kill())  # type: ignore[method-assign]


def prepare_and_die(arrange: Callable[[int], None], number: int, benchmark: Benchmark, source: Path, out: Path) -> None:
    preparation._AT_ONCE = 8
    arrange(number)
    prepare(benchmark, source, out)


@pytest.mark.parametrize(
    ("arrange", "number", "left"),
    [
        (killed_before_replacing, 1, 84),
        (killed_before_replacing, 30, 60),
        (killed_after_adding, 17, 67),
        (killed_before_manifest, 0, 0),
        (killed_after_manifest, 0, 0),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_preparation_goes_on_after_kill_9(
    arrange: Callable[[int], None],
    number: int,
    left: int,
    packed: bool,
    pacs: Benchmark,
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = fakes.tarred(raw, tmp_path / "PACS.tar.gz") if packed else raw
    whole = prepare(pacs, source, tmp_path / "whole")
    context = multiprocessing.get_context("fork")
    child = context.Process(target=prepare_and_die, args=(arrange, number, pacs, source, tmp_path / "out"))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    placed = spied(monkeypatch)
    assert prepare(pacs, source, tmp_path / "out") == whole
    # Threads that were at work when the process died may have finished a few images more or less.
    assert len(placed) <= 84 and abs(len(placed) - left) <= 8
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_kills_at_random_moments_lose_nothing(pacs: Benchmark, raw: Path, tmp_path: Path) -> None:
    whole = prepare(pacs, raw, tmp_path / "whole")
    context = multiprocessing.get_context("fork")
    for delay in (0.005, 0.01, 0.02, 0.03, 0.04):
        child = context.Process(
            target=prepare_and_die, args=(lambda _: None, 0, pacs, raw, tmp_path / "out"), daemon=True
        )
        child.start()
        time.sleep(delay)
        child.kill()
        child.join()
    assert prepare(pacs, raw, tmp_path / "out") == whole
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_kill_before_anything_was_done_is_no_obstacle(pacs: Benchmark, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.preparing.jsonl.new").write_text('{"form')
    assert prepare(pacs, raw, tmp_path / "out") == prepare(pacs, raw, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_images_that_were_damaged_or_taken_away_meanwhile_are_made_again(
    pacs: Benchmark, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    extra = raw / "kfold/photo/dog/pic_009.jpg"
    fakes.put(extra, fakes.encoded("extra"))
    with pytest.raises(DataError, match="wrong numbers"):
        prepare(pacs, raw, out)
    extra.unlink()
    (out / "photo/dog/pic_001.jpg").unlink()
    damaged = out / "photo/dog/pic_002.jpg"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    fakes.put(raw / "kfold/sketch/dog/n0_1-1.png", fakes.encoded("changed", ".png"))
    placed = spied(monkeypatch)
    prepare(pacs, raw, out)
    assert sorted(placed) == ["photo/dog/pic_001.jpg", "photo/dog/pic_002.jpg", "sketch/dog/n0_1-1.png"]
    assert not (out / "photo/dog/pic_009.jpg").exists()
    assert (out / "sketch/dog/n0_1-1.png").read_bytes() == fakes.encoded("changed", ".png")


def test_a_finished_folder_is_returned_as_it_is_and_another_benchmark_refused(
    pacs: Benchmark, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(pacs, raw, tmp_path / "out")
    placed = spied(monkeypatch)
    assert prepare(pacs, raw, tmp_path / "out") == first and not placed
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/.preparing.jsonl").write_text('{"format": 1, "benchmark": "vlcs"}\n')
    with pytest.raises(DataError, match="an unfinished preparation of something else"):
        prepare(pacs, raw, tmp_path / "begun")


def test_two_processes_do_not_prepare_into_one_folder(pacs: Benchmark, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with preparation._locked(tmp_path / "out"), pytest.raises(DataError, match="another process is preparing"):
        prepare(pacs, raw, tmp_path / "out")
    prepare(pacs, raw, tmp_path / "out")


def test_a_full_disk_is_told_and_what_was_done_is_kept(
    pacs: Benchmark, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.write_bytes

    def write_bytes(self: Path, data: bytes) -> int:
        if self.name == ".pic_002.jpg.part" and "photo/horse" in str(self):
            raise OSError(28, "No space left on device", str(self))
        return original(self, data)

    monkeypatch.setattr(preparation, "_AT_ONCE", 8)
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space left"):
        prepare(pacs, raw, tmp_path / "out")
    monkeypatch.undo()
    placed = spied(monkeypatch)
    assert prepare(pacs, raw, tmp_path / "out").version == "fake" and 0 < len(placed) < 84


# --- the manifest, and the folder when it is loaded ---------------------------------------------------------------


def test_the_manifest_tells_checksums_sizes_and_sources(pacs: Benchmark, raw: Path, tmp_path: Path) -> None:
    import hashlib

    prepare(pacs, raw, tmp_path / "out")
    content = json.loads((tmp_path / "out/manifest.json").read_text())
    expected = hashlib.sha256((raw / "kfold/photo/dog/pic_001.jpg").read_bytes()).hexdigest()
    entry = dict(zip(content["fields"], content["images"]["photo/dog/pic_001.jpg"], strict=True))
    size = (raw / "kfold/photo/dog/pic_001.jpg").stat().st_size
    assert entry == {
        "sha256": expected,
        "bytes": size,
        "width": 8,
        "height": 6,
        "source": "kfold/photo/dog/pic_001.jpg",
    }


def test_a_folder_that_differs_from_its_manifest_is_refused(pacs: Benchmark, raw: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out", DataConfig(unseen="photo", verify=True)
    prepare(pacs, raw, out)
    (out / "photo/dog/pic_001.jpg").rename(out / "photo/dog/pic_000.jpg")
    (out / "photo/dog/pic_002.jpg").write_bytes(fakes.encoded("another"))
    with pytest.raises(DataError) as caught:
        load_split(out, config)
    for part in ("but missing: photo/dog/pic_001", "not in the manifest: photo/dog/pic_000", "002.jpg was changed"):
        assert part in str(caught.value)
    text = (out / "manifest.json").read_text()
    for changed, message in (
        (text[:-30], "is corrupt"),
        (text.replace('"format": 1', '"format": 2'), "has format 2, this version of secateur reads 1"),
        (text.replace("photo/dog/pic_001", "photo/dog/pic_000", 1), "was changed: its checksum"),
    ):
        (out / "manifest.json").write_text(changed)
        with pytest.raises(DataError, match=message):
            load_split(out, config)


# --- command line -------------------------------------------------------------------------------------------------


def command(*arguments: object) -> Data:
    return tyro.cli(Data, args=[str(argument) for argument in arguments])


def test_commands_prepare_split_and_list(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.pacs(raw)
    console = Console(width=200)
    prepare_it = command("prepare", "pacs", "--source", raw, "--out", tmp_path / "pacs")
    with pytest.raises(DataError, match=r"^1 problem\(s\) with PACS .*--skip-bad\)$"):
        prepare_it(console)
    assert "- wrong numbers of images" in capsys.readouterr().err
    command("prepare", "pacs", "--source", raw, "--out", tmp_path / "pacs", "--skip-bad")(console)
    shown = capsys.readouterr().out
    assert "84 images of 7 classes" in shown and "warning: wrong numbers" in shown and "no duplicates" in shown
    out = tmp_path / "split.json"
    command("split", tmp_path / "pacs", "--out", out, "--split", "domainbed", "--unseen", "photo", "--seed", 1)(console)
    assert "leave-one-domain-out, DomainBed's hold-outs" in capsys.readouterr().out
    split = load_split(tmp_path / "pacs", stored=out)
    assert (split.unseen, split.seed, split.data) == ("photo", 1, "pacs")
    with pytest.raises(InputError, match="exists; a stored split is not overwritten"):
        command("split", tmp_path / "pacs", "--out", out, "--unseen", "photo")(console)
    command("list")(console)
    listed = capsys.readouterr().out
    assert "office_home" in listed and "Real World 4,357" in listed and "tiny-imagenet-200.zip" in listed
    command("picture", "--out", tmp_path / "sheet.png")(console)
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
