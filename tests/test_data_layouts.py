"""Every benchmark is read from a fake in the exact layout of the original, unpacked and packed as it is distributed."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import raw_fakes as fakes
from secateur.data import BENCHMARKS, Benchmark, DataConfig, Manifest, load_split, prepare
from secateur.data.layouts import cifar_batch
from secateur.errors import DataError, InputError


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here survives a loss of power, and waiting for other programs' disk traffic takes seconds."""
    monkeypatch.setattr(os, "sync", lambda: None)


def state_of(path: Path) -> dict[str, tuple[bytes, int]]:
    """Returns content and time of change of every file at or below a path."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def converted(benchmark: Benchmark, source: Path, out: Path, expected: dict[str, bytes]) -> Manifest:
    """Prepares a fake, and checks that all expected images and nothing else came out, and the source is as it was."""
    before = state_of(source)
    manifest = prepare(benchmark, source, out)
    assert state_of(source) == before
    images = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.glob("*/*/*")}
    assert images.keys() == expected.keys()
    assert images == expected
    assert {p.name for p in out.iterdir() if p.is_file()} == {"manifest.json"}
    assert manifest == Manifest.read(out) and manifest.version == "fake"
    assert manifest.images.keys() == expected.keys() and not manifest.left_out and not manifest.warnings
    return manifest


Packing = Callable[[Path, Path], Path]


def unpacked(folder: Path, archive: Path) -> Path:
    return folder


def in_folder(folder: Path, archive: Path) -> Path:
    """A folder in which the archive lies, as somebody who downloads several would have it."""
    return fakes.zipped(folder, archive.parent / "downloads" / archive.name).parent


def tar_from_here(folder: Path, archive: Path) -> Path:
    """An archive whose paths begin with ./"""
    return fakes.tarred(folder, archive.with_suffix(".tar.gz"), start="./")


def tar(folder: Path, archive: Path) -> Path:
    return fakes.tarred(folder, archive.with_suffix(".tar.gz"))


@pytest.mark.parametrize("pack", [unpacked, fakes.zipped, in_folder])
@pytest.mark.parametrize("fake", [fakes.pacs, fakes.pacs_with_lists])
def test_pacs_in_both_distributions(fake: Callable[[Path], fakes.Expected], pack: Packing, tmp_path: Path) -> None:
    expected = fake(tmp_path / "raw")
    source = pack(tmp_path / "raw", tmp_path / "PACS.zip")
    manifest = converted(fakes.fitting("pacs", expected), source, tmp_path / "out", expected)
    assert manifest.classes == fakes.PACS_CLASSES and tuple(manifest.domains) == fakes.PACS_DOMAINS


@pytest.mark.parametrize("pack", [unpacked, fakes.zipped])
def test_office_home_keeps_the_space_in_real_world_and_passes_over_clutter(pack: Packing, tmp_path: Path) -> None:
    expected = fakes.office_home(tmp_path / "raw")
    source = pack(tmp_path / "raw", tmp_path / "OfficeHomeDataset_10072016.zip")
    manifest = converted(fakes.fitting("office_home", expected), source, tmp_path / "out", expected)
    assert list(manifest.domains) == ["Art", "Clipart", "Product", "Real World"] and len(manifest.classes) == 65


def test_office_home_is_found_under_other_spellings_and_a_doubled_folder(tmp_path: Path) -> None:
    expected = fakes.office_home(tmp_path / "raw", each=1)
    top = tmp_path / "raw" / "OfficeHomeDataset_10072016"
    (top / "Real World").rename(top / "RealWorld")
    (top / "Art").rename(top / "inner")
    (top / "Art").mkdir()
    (top / "inner").rename(top / "Art" / "Art")
    converted(fakes.fitting("office_home", expected), tmp_path / "raw", tmp_path / "out", expected)


@pytest.mark.parametrize("pack", [unpacked, tar, tar_from_here])
def test_vlcs_as_domainbed_distributes_it(pack: Packing, tmp_path: Path) -> None:
    expected = fakes.vlcs(tmp_path / "raw")
    source = pack(tmp_path / "raw", tmp_path / "VLCS.zip")
    converted(fakes.fitting("vlcs", expected), source, tmp_path / "out", expected)


@pytest.mark.parametrize("pack", [unpacked, fakes.zipped])
@pytest.mark.parametrize("only_full", [False, True])
def test_vlcs_with_parts_and_numbered_classes(only_full: bool, pack: Packing, tmp_path: Path) -> None:
    expected = fakes.vlcs_numbered(tmp_path / "raw", only_full=only_full)
    source = pack(tmp_path / "raw", tmp_path / "VLCS.zip")
    manifest = converted(fakes.fitting("vlcs", expected), source, tmp_path / "out", expected)
    assert manifest.domains == {"Caltech101": 15, "LabelMe": 15, "SUN09": 15, "VOC2007": 15}
    assert not manifest.duplicates.across_classes and not manifest.duplicates.within_class


@pytest.mark.parametrize("packed", [False, True])
def test_terra_incognita_from_its_annotation_files(packed: bool, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    expected = fakes.terra(raw, raw)
    assert len(expected) == 43
    if packed:
        expected = fakes.terra(tmp_path / "images", tmp_path / "notes")
        fakes.tarred(tmp_path / "images", tmp_path / "downloads" / "eccv_18_all_images_sm.tar.gz")
        fakes.tarred(tmp_path / "notes", tmp_path / "downloads" / "eccv_18_annotations.tar.gz")
        raw = tmp_path / "downloads"
    manifest = converted(fakes.fitting("terra_incognita", expected), raw, tmp_path / "out", expected)
    (twice,) = manifest.duplicates.across_classes
    assert [i.rsplit("/", 1)[0] for i in twice] == ["location_38/cat", "location_38/dog"]


def test_terra_incognita_that_is_laid_out_already(tmp_path: Path) -> None:
    places = ("location_100", "location_38", "location_43", "location_46")
    expected = fakes.domain_class(tmp_path / "raw/terra_incognita", places, fakes.TERRA_CLASSES, 1, "{}")
    converted(fakes.fitting("terra_incognita", expected), tmp_path / "raw", tmp_path / "out", expected)


def test_terra_incognita_prefers_the_annotations_of_the_benchmark_and_names_missing_images(tmp_path: Path) -> None:
    expected = fakes.terra(tmp_path / "raw", tmp_path / "raw")
    fakes.put(tmp_path / "raw/caltech_images_20210113.json", '{"images": [], "annotations": [], "categories": []}')
    benchmark = fakes.fitting("terra_incognita", expected)
    gone = "two-boxes-23d2-11e8-a6a3-ec086b02610b.jpg"
    (tmp_path / "raw/eccv_18_all_images_sm" / gone).unlink()
    with pytest.raises(DataError, match=f"{gone}: annotated in .*trans_test_annotations.json, but missing"):
        prepare(benchmark, tmp_path / "raw", tmp_path / "out")
    manifest = prepare(benchmark, tmp_path / "raw", tmp_path / "out", skip_bad=True)
    assert len(manifest.images) == 42 and len(manifest.left_out) == len(manifest.warnings) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_domainnet_leaves_out_its_listed_duplicates(packed: bool, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    expected = fakes.domainnet(raw, tmp_path / "downloads" if packed else raw)
    if packed:
        for domain in fakes.DOMAINNET_DOMAINS:
            with zipfile.ZipFile(tmp_path / "downloads" / f"{domain}.zip", "w") as file:
                for path in (raw / domain).rglob("*.jpg"):
                    file.write(path, path.relative_to(raw))
        raw = tmp_path / "downloads"
    manifest = converted(fakes.fitting("domainnet", expected), raw, tmp_path / "out", expected)
    assert manifest.removed == 2 and len(manifest.classes) == 345


def test_domainnet_asks_for_the_list_and_for_listed_images(tmp_path: Path) -> None:
    expected = fakes.domainnet(tmp_path / "raw", tmp_path / "raw")
    (tmp_path / "raw/domain_net_duplicates.txt").unlink()
    (tmp_path / "raw/sketch/class_044/sketch_045_000001.jpg").unlink()
    (tmp_path / "raw/sketch/class_045/sketch_046_000001.jpg").rename(tmp_path / "raw/sketch/class_044/another.jpg")
    fakes.put(tmp_path / "raw/sketch/class_045/another.jpg", fakes.encoded("another"))
    with pytest.raises(DataError) as caught:
        prepare(fakes.fitting("domainnet", expected), tmp_path / "raw", tmp_path / "out")
    message = str(caught.value)
    assert "domain_net_duplicates.txt: missing" in message and "9,431" in message
    assert "sketch/class_044/sketch_045_000001.jpg: listed in sketch_train.txt, but missing" in message


@pytest.mark.parametrize("pack", [unpacked, tar])
def test_cifar10_becomes_lossless_images(pack: Packing, tmp_path: Path) -> None:
    expected = fakes.cifar10(tmp_path / "raw")
    source = pack(tmp_path / "raw", tmp_path / "cifar-10-python.zip")
    manifest = prepare(fakes.fitting("cifar10", expected), source, tmp_path / "out")
    assert (
        manifest.official
        and manifest.domains == {"test": 10, "train": 50}
        and manifest.images.keys() == expected.keys()
    )
    for key, pixels in expected.items():
        with Image.open(tmp_path / "out" / key) as image:
            assert np.array_equal(np.asarray(image), pixels), key


def test_batches_of_python_2_and_3_are_read(tmp_path: Path) -> None:
    pixels = np.arange(2 * 3072, dtype=np.uint64).astype(np.uint8).reshape(2, 3072)
    for content in (fakes.python2_pickle(pixels, [3, 7], "x"), pickle.dumps({b"data": pixels, b"labels": [3, 7]})):
        images, labels = cifar_batch(content)
        assert labels == [3, 7] and images.shape == (2, 32, 32, 3)
        assert images[1, 2, 5].tolist() == pixels[1, [2 * 32 + 5, 1024 + 69, 2048 + 69]].tolist()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_pickles_that_would_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = fakes.cifar10(tmp_path / "raw")
    fakes.put(tmp_path / "raw/cifar-10-batches-py/data_batch_2", pickle.dumps({b"data": Bomb(), b"labels": []}))
    with pytest.raises(DataError, match=r"data_batch_2: not a batch of CIFAR-10 .*asks for posix.mkdir"):
        prepare(fakes.fitting("cifar10", expected), tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps([1]),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.float32), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}),
    ],
)
def test_batches_that_are_none_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        cifar_batch(content)


@pytest.mark.parametrize("pack", [unpacked, fakes.zipped])
def test_tiny_imagenet_takes_validation_labels_from_the_list(pack: Packing, tmp_path: Path) -> None:
    expected = fakes.tiny_imagenet(tmp_path / "raw")
    source = pack(tmp_path / "raw", tmp_path / "tiny-imagenet-200.zip")
    manifest = converted(fakes.fitting("tiny_imagenet", expected), source, tmp_path / "out", expected)
    assert manifest.official and len(manifest.classes) == 200


def test_tiny_imagenet_names_validation_images_that_are_missing_or_not_listed(tmp_path: Path) -> None:
    expected = fakes.tiny_imagenet(tmp_path / "raw")
    images = tmp_path / "raw/tiny-imagenet-200/val/images"
    (images / "val_3.JPEG").rename(images / "val_999.JPEG")
    with pytest.raises(DataError) as caught:
        prepare(fakes.fitting("tiny_imagenet", expected), tmp_path / "raw", tmp_path / "out", skip_bad=True)
    assert "val_3.JPEG: listed in" in str(caught.value) and "val_999.JPEG: not listed in" in str(caught.value)
    assert "domain 'val' lacks images of 1 classes: n00000003" in str(caught.value)


def test_official_parts_are_kept_apart_when_prepared_sets_are_loaded(tmp_path: Path) -> None:
    expected = fakes.cifar10(tmp_path / "cifar", each=20)
    prepare(fakes.fitting("cifar10", expected), tmp_path / "cifar", tmp_path / "cifar10")
    split = load_split(tmp_path / "cifar10", DataConfig(split="official", image_size=32))
    assert (len(split.train), len(split.val), len(split.test)) == (90, 10, 20)
    assert {i.split("/")[0] for i in (*split.train.ids, *split.val.ids)} == {"train"}
    assert {i.split("/")[0] for i in split.test.ids} == {"test"}
    expected = fakes.tiny_imagenet(tmp_path / "tiny")
    prepare(fakes.fitting("tiny_imagenet", expected), tmp_path / "tiny", tmp_path / "tiny_imagenet")
    split = load_split(tmp_path / "tiny_imagenet", DataConfig(split="within_train", image_size=32))
    assert (len(split.train), len(split.val), len(split.test)) == (160, 20, 20)
    assert {i.split("/")[0] for part in split.ids.values() for i in part} == {"train"}


def test_links_that_lead_back_are_not_followed_for_ever(tmp_path: Path) -> None:
    expected = fakes.pacs(tmp_path / "raw", each=1)
    (tmp_path / "raw/kfold/photo/again").symlink_to(tmp_path / "raw")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "raw/kfold/sketch").rename(tmp_path / "elsewhere/sketch")
    (tmp_path / "raw/kfold/sketch").symlink_to(tmp_path / "elsewhere/sketch")
    assert prepare(fakes.fitting("pacs", expected), tmp_path / "raw", tmp_path / "out").images.keys() == expected.keys()


# --- the table, and downloads that are not what they should be ----------------------------------------------------


def test_the_table_has_the_published_numbers() -> None:
    totals = {name: [sum(c.values()) for c in b.counts.values()] for name, b in BENCHMARKS.items()}
    assert totals == {
        "pacs": [9991],
        "office_home": [15588],
        "vlcs": [10729],
        "terra_incognita": [24330, 24788],
        "domainnet": [586575],
        "cifar10": [60000],
        "tiny_imagenet": [110000],
    }
    assert [b.num_classes for b in BENCHMARKS.values()] == [7, 65, 5, 10, 345, 10, 200]
    for benchmark in BENCHMARKS.values():
        assert all(counts.keys() == benchmark.domains.keys() for counts in benchmark.counts.values())
        assert benchmark.classes is None or len(benchmark.classes) == benchmark.num_classes


def test_names_are_forgiving_and_unknown_ones_answered(tmp_path: Path) -> None:
    fakes.pacs(tmp_path / "raw", each=1)
    for name in ("Office-Home", "Tiny ImageNet", "pacz"):
        with pytest.raises((DataError, InputError)) as caught:
            prepare(name, tmp_path / "raw", tmp_path / "out")
        assert "no images of" in str(caught.value) or "did you mean 'pacs'" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_archives_that_are_cut_short_or_lead_out_of_themselves_are_refused(tmp_path: Path) -> None:
    fakes.vlcs(tmp_path / "raw")
    tarball = fakes.tarred(tmp_path / "raw", tmp_path / "VLCS.tar.gz")
    archive = fakes.zipped(tmp_path / "raw", tmp_path / "VLCS.zip")
    for path in (tarball, archive):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=r"is corrupt or was not downloaded to its end .*; get it again"):
            prepare("vlcs", path, tmp_path / "out")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("VLCS/../../evil.jpg", fakes.encoded("evil"))
    with tarfile.open(tarball, "w:gz") as file:
        info = tarfile.TarInfo("/VLCS/evil.jpg")
        info.size = 3
        file.addfile(info, io.BytesIO(b"abc"))
    for path in (tarball, archive):
        with pytest.raises(DataError, match="a path that leads out of it"):
            prepare("vlcs", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_inside_a_sound_archive_is_a_bad_file(tmp_path: Path) -> None:
    expected = fakes.pacs(tmp_path / "raw")
    archive = fakes.zipped(tmp_path / "raw", tmp_path / "PACS.zip")
    with zipfile.ZipFile(archive) as file:
        info = file.getinfo("kfold/photo/dog/pic_002.jpg")
    content = bytearray(archive.read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    content[start + info.compress_size // 2] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"kfold/photo/dog/pic_002.jpg: cannot be read"):
        prepare(fakes.fitting("pacs", expected), archive, tmp_path / "out")


def test_sources_that_are_not_there_or_hold_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing at .*nowhere"):
        prepare("pacs", tmp_path / "nowhere", tmp_path / "out")
    fakes.put(tmp_path / "raw/notes.txt", "nothing here")
    with pytest.raises(DataError, match=r"no images of PACS .* Expected: PACS.zip"):
        prepare("pacs", tmp_path / "raw", tmp_path / "out")
    with pytest.raises(DataError, match="neither a folder nor an archive"):
        prepare("pacs", tmp_path / "raw/notes.txt", tmp_path / "out")
